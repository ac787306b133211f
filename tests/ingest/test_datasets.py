"""`datasets.yaml`: what is inherited, and that every mistake is told by its place."""

import asyncio

import pytest

from services.ingest.__main__ import serve
from services.ingest.datasets import Datasets, read
from services.ingest.deidentification import Option
from services.ingest.settings import IngestSettings
from shared.config import Misconfigured

SECRET = "sixteen letters!"
TEXT = """
default: {array: {size: 32, windows: {MR: [0, 500]}}, deidentify: {options: [clean_descriptors]}}
datasets:
  plain: {deidentify: false}
  large: {array: {size: 128}}
  all: {array: {leave_out: []}, deidentify: {studies: true, blank: [{when: {Modality: [US, ES], Rows: 600},
    regions: [[0, 0, 800, 60]]}]}}
  bare: {deidentify: true}
"""


def test_nothing_said_is_the_default():
    """An empty file says what no file says: arrays of 64 pixels, CT by its window, nothing de-identified."""
    rules = read("", "short").of("any")

    assert rules == Datasets().default
    assert (rules.array.size, rules.array.windows, rules.deidentify) == (64, {"CT": (-1000, 1000)}, None)
    assert rules.array.leave_out == ("blank", "localizer")


def test_a_dataset_inherits_what_it_does_not_say():
    """Array rules are inherited one by one, the profile as a whole, and each can be turned off."""
    datasets = read(TEXT, SECRET)
    other, plain, large = (datasets.of(name) for name in ("other", "plain", "large"))

    assert other.deidentify.options == (Option.CLEAN_DESCRIPTORS,)
    assert plain.deidentify is None
    assert (plain.array.size, large.array.size, large.array.windows) == (32, 128, {"MR": (0, 500)})
    assert large.deidentify == other.deidentify
    assert datasets.of("all").deidentify.options == datasets.of("bare").deidentify.options == ()
    assert datasets.of("all").array.leave_out == ()
    assert datasets.of("all").deidentify.studies


def test_a_region_rule_applies_where_all_its_values_are(maker):
    """One of several values is enough for a keyword, each keyword must fit, numbers are compared as such."""
    (rule,) = read(TEXT, SECRET).of("all").deidentify.blank
    fits = maker.ct(Modality="ES", Rows=600)

    assert rule.applies(fits)
    assert not rule.applies(maker.ct(Modality="CT", Rows=600))
    assert not rule.applies(maker.ct(Modality="US", Rows=601))
    assert not rule.applies(maker.ct(Modality="US", Rows=None))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("default: {array: {sise: 3}}", "default.array.sise"),
        ("default: {array: {size: 4}}", "default.array.size"),
        ("default: {array: {windows: {CT: [5, 5]}}}", "default.array.windows.CT"),
        ("default: {array: {windows: {CT: [-.inf, 5]}}}", "default.array.windows.CT.0"),
        ("default: {array: {windows: {ct: [0, 5]}}}", "default.array.windows.ct"),
        ("default: {array: {percentiles: [-1, 5]}}", "default.array.percentiles.0"),
        ("datasets: {a b: {}}", "datasets.a b"),
        ("datasets: {a: {deidentify: {options: [keep_all]}}}", "datasets.a.deidentify.options.0"),
        ("datasets: {a: {deidentify: {blank: [{when: {}, regions: []}]}}}", "datasets.a.deidentify.blank.0.regions"),
        (
            "datasets: {a: {deidentify: {blank: [{when: {Modalitie: CT}, regions: [[0, 0, 1, 1]]}]}}}",
            "datasets.a.deidentify.blank.0.when.Modalitie",
        ),
        ("datasets: {a: {deidentify: basic}}", "datasets.a.deidentify"),
        ("a: [", "line 1, column 5"),
        ("datasets:\n  a: {deidentify: true}\n  b: {}\n  a: {}", "line 4, column 3"),
    ],
)
def test_a_mistake_is_told_by_its_place(text, place):
    """Each thing that is wrong has a line that says where."""
    with pytest.raises(Misconfigured) as raised:
        read(text, SECRET)

    assert f"datasets.yaml: {place}: " in str(raised.value)


def test_a_key_that_nothing_reads_is_told_in_words():
    """A misspelt key is the commonest mistake."""
    with pytest.raises(Misconfigured, match=r"default\.array\.sise: there is no such key\."):
        read("default: {array: {sise: 3}}", SECRET)


def test_nesting_without_end_is_no_yaml():
    """A document that is deeper than any reader goes is told like any other mistake."""
    with pytest.raises(Misconfigured):
        read("[" * 5000, SECRET)


def test_a_profile_needs_a_secret():
    """Pseudonyms under a secret that everybody knows are none, so nothing starts."""
    with pytest.raises(Misconfigured) as raised:
        read("datasets: {a: {deidentify: true}}", IngestSettings().patient_secret.get_secret_value())

    assert "RADQUEUE_PATIENT_SECRET" in str(raised.value)


@pytest.mark.parametrize("text", [None, "default: 3"])
async def test_the_service_does_not_start_without_its_rules(tmp_path, text):
    """A file that is not there or says nonsense ends the service before it takes a message."""
    path = tmp_path / "datasets.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(Misconfigured):
        await serve(IngestSettings(datasets_file=str(path)), None, None, asyncio.Event())
