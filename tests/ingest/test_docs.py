"""docs/ingest.md says what the code says."""

import re
from pathlib import Path
from typing import get_args

import pytest

from services.ingest import assembly, datasets
from services.ingest.datasets import Datasets, read
from services.ingest.decoder import CALLS_OF_A_CHILD
from services.ingest.deidentification import Option
from services.ingest.frames import CODECS
from services.ingest.reading import NATIVE
from services.ingest.reasons import DEAD_LETTERS, REASONS, WARNINGS
from services.ingest.settings import IngestSettings
from shared.messages import Verdict

PAGE = (Path(__file__).parents[2] / "docs" / "ingest.md").read_text()


def rows(title: str) -> dict[str, list[str]]:
    """The rows of a section's table, by what stands first."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    cells = (
        [cell.strip() for cell in line.split(" | ")] for line in re.findall(r"^\| (`.*) \|$", section, re.MULTILINE)
    )
    return {first.strip("`"): rest for first, *rest in cells}


@pytest.mark.parametrize(("title", "table"), [("Reasons", REASONS), ("Dead letters", DEAD_LETTERS)])
def test_every_code_is_told_with_what_to_do(title, table):
    """The page has each code once, with the meaning and the advice of the table, and no code else."""
    told = {code: ". ".join(cells) for code, cells in rows(title).items()}

    assert told == table
    assert all(len(cells) == 2 for cells in rows(title).values())


def test_every_warning_is_told():
    """The page has each warning with its meaning, and no other."""
    assert {code: f"{meaning}." for code, (meaning,) in rows("Warnings").items()} == WARNINGS


def test_every_verdict_rule_and_option_is_told():
    """The page has the verdicts on a geometry, the rules that leave slices out and the options of the profile."""
    assert set(rows("Geometry")) == set(get_args(Verdict)) - {"irregular"}
    assert set(rows("Training arrays")) == set(assembly.WARNING_OF)
    assert set(Option) <= set(rows("De-identification"))


def test_the_example_of_datasets_is_one():
    """What the page shows as datasets.yaml can be used as it is."""
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    rules = read(example, "sixteen letters!")

    assert rules.default == Datasets().default
    assert rules.of("chest-research").array.size == 128
    assert example in (datasets.__doc__ or "")


def test_every_transfer_syntax_is_told_with_its_decoder():
    """The page lists what can be read, and what reads it."""
    told = rows("Transfer syntaxes")

    assert set(told) == NATIVE | set(CODECS)
    assert {uid: told[uid] for uid in CODECS} == {uid: [codec.name, codec.decoder] for uid, codec in CODECS.items()}


def test_every_limit_is_told():
    """The page has the limits of reading under their variables, and the number of files that a child reads."""
    told = {name.removeprefix("RADQUEUE_").lower() for name in rows("Limits")}

    assert told <= set(IngestSettings.model_fields)
    assert {name for name in IngestSettings.model_fields if name.startswith(("decode", "max_"))} - told == {
        "max_settle_s"
    }
    assert f"{CALLS_OF_A_CHILD:,} files" in PAGE
