"""The keys of the bucket: each as it has always been, each in the layout, and read back from listings."""

import ast
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import keys
from shared.documents.document import Document
from shared.documents.revisions import StoredInstance
from shared.keys import LAYOUT, ImportKeys, JobKeys, Quarantined, ResultKeys, TrainingKeys
from shared.messages import InferenceTask, SeriesRef

ROOT = Path(__file__).parent.parent.parent
KEY = re.compile(r"/?(?:datasets|events|imports|incoming|maps|models|quarantine|reports|results|settling|studies)/\S*$")
"""A text that is a key or its beginning, without the words of a docstring."""

uids = st.lists(st.integers(0, 10**9), min_size=1, max_size=6).map(lambda parts: ".".join(map(str, parts)))
shas = st.text("0123456789abcdef", min_size=16, max_size=16)

REF = SeriesRef(
    study_uid="1.2", series_uid="1.2.3", digest="ab" * 16, revision_key="studies/1.2/1.2.3/revisions/x.json"
)
OTHER = REF.model_copy(update={"series_uid": "1.2.30", "digest": "cd" * 16})
RESULT = ResultKeys.of(InferenceTask(map="lung", map_digest="ef" * 16, inputs=(REF,)))
OF_STUDY = ResultKeys.of(InferenceTask(map="lung", map_digest="ef" * 16, inputs=(OTHER, REF)))
TRAINING = TrainingKeys("chest-1")
ROUND = TRAINING.round(2)
JOB = JobKeys("models/chest-1", "2-0")
AB, EF = "ab" * 16, "ef" * 16
RESULT_OF = f"results/1.2/1.2.3/{AB}/lung@{EF}/"
STUDY_DIGEST = "da43bcaa1955d9dab098243880f225b3"

PINNED = {
    "incoming/chest/a/b.dcm": keys.upload("chest", "a/b.dcm"),
    "incoming/chest/released/0123": keys.released("chest", "0123"),
    "incoming/chest/a/_COMPLETE": keys.upload("chest", f"a/{keys.COMPLETE}"),
    "studies/1.2/1.2.3/1.2.3.4.0123456789abcdef.dcm": keys.instance("1.2", "1.2.3", "1.2.3.4", "0123456789abcdef"),
    f"studies/1.2/1.2.3/revisions/{AB}.json": keys.revision("1.2", "1.2.3", AB),
    "settling/chest/1.2/1.2.3/1772000000": keys.series_markers("chest", "1.2", "1.2.3") + "1772000000",
    "settling/_studies/1.2/1772000000": keys.study_markers("1.2") + "1772000000",
    "settling/_claims/1.2/1.2.3.json": keys.series_lease("1.2", "1.2.3"),
    f"datasets/chest/1.2.3.{AB}.{'0' * 16}.npy": keys.array("chest", "1.2.3", AB, "0" * 16),
    f"datasets/chest/1.2.3.{AB}.{'0' * 16}.json": keys.sidecar(keys.array("chest", "1.2.3", AB, "0" * 16)),
    f"datasets/chest/window.CT.{'0' * 16}.json": keys.window("chest", "CT", "0" * 16),
    f"results/1.2/1.2.3/{AB}/routing.json": keys.routing(REF),
    f"results/1.2/study/{AB}/routing.json": keys.study_routing("1.2", AB),
    "results/1.2/study/5a1259787a099771d511d19f01de048a/routing.json": keys.study_routing(
        "1.2", keys.digest_of_series((REF, OTHER))
    ),
    f"{RESULT_OF}claim.json": RESULT.lease,
    f"{RESULT_OF}attempts/a1/9.9.dcm": RESULT.made_instance("a1", "9.9"),
    f"{RESULT_OF}attempts/a1/files/0/table.csv": RESULT.made_file("a1", 0, "table.csv"),
    f"{RESULT_OF}attempts/a1/log.txt": RESULT.log("a1"),
    f"{RESULT_OF}outputs.json": RESULT.outputs,
    f"{RESULT_OF}result.json": RESULT.result,
    f"{RESULT_OF}failure.json": RESULT.failure,
    f"results/1.2/study/{STUDY_DIGEST}/lung@{EF}/result.json": OF_STUDY.result,
    "imports/0123/token": ImportKeys("0123").token,
    "imports/0123/input/": ImportKeys("0123").input,
    "imports/0123/output/": ImportKeys("0123").output,
    "maps/lung/serving.json": keys.serving("lung"),
    f"maps/lung/rejected/{EF}.json": keys.rejection("lung", EF),
    "models/chest-1/options.json": TRAINING.options,
    "models/chest-1/lease.json": TRAINING.lease,
    "models/chest-1/manifest.json": TRAINING.manifest,
    "models/chest-1/config.js": TRAINING.config,
    "models/chest-1/first_config.js": TRAINING.first_config,
    "models/chest-1/rounds/2/plan.1.json": ROUND.plan(1),
    "models/chest-1/rounds/2/partial.1.json": ROUND.partial(1),
    "models/chest-1/rounds/2/partial.1.3.400.pt": ROUND.partial_checkpoint(1, 3, 400),
    "models/chest-1/rounds/2/trained.1.json": ROUND.trained(1),
    "models/chest-1/rounds/2/checkpoint.3.pt": ROUND.checkpoint(3),
    "models/chest-1/rounds/2/evaluation.json": ROUND.evaluation,
    "models/chest-1/rounds/2/images.3.png": ROUND.images(3),
    "models/chest-1/rounds/2/config.3.js": ROUND.config(3),
    "models/chest-1/state.json": TRAINING.state,
    "models/chest-1/progress.json": TRAINING.progress,
    "models/chest-1/step.json": TRAINING.step,
    "models/chest-1/sagemaker/data/a.npy": f"{JOB.data}a.npy",
    "models/chest-1/sagemaker/2-0/checkpoints/partial.9.pt": f"{JOB.checkpoints}/partial.9.pt",
    "models/chest-1/sagemaker/2-0/output/job-0/output/model.tar.gz": JOB.returned("job-0"),
    "models/chest-1/sagemaker/2-0/job-0/config.js": f"{JOB.input('job-0')}config.js",
    "models/chest-1/generator.pt": TRAINING.generator,
    "models/chest-1/generator.json": TRAINING.description,
    "models/chest-1/images.npy": TRAINING.images_array,
    "models/chest-1/images.png": TRAINING.images,
    "models/chest-1/completed.json": TRAINING.completed,
    "models/chest-1/failure.json": TRAINING.failure,
    "models/chest-1/tensorboard/events.0": TRAINING.product("tensorboard/events.0"),
    "events/date=2026-11-02/u1.jsonl": keys.events("2026-11-02", "u1"),
    "reports/2026-11.json": keys.report("2026-11"),
    "reports/2026-11.html": keys.report_page("2026-11"),
    "quarantine/0123/object": Quarantined("0123").object,
    "quarantine/0123/reason.json": Quarantined("0123").reason,
    "quarantine/0123/released.json": Quarantined("0123").released,
}
"""By what is in the bucket of every user: none of these may ever change."""


@pytest.mark.parametrize("expected", PINNED)
def test_each_key_is_as_it_has_always_been(expected):
    """A key that changed would lose what was stored, and do again what was done."""
    made = PINNED[expected]

    assert (made.key if isinstance(made, Document) else made) == expected


def test_each_key_is_in_the_layout_with_its_model():
    """LAYOUT has a pattern for each key, with the model that the key's document has; and no pattern is left over."""
    found = {key: place_of(key) for key in PINNED}
    models = {key: made.model if isinstance(made, Document) else None for key, made in PINNED.items()}

    assert {key: place.model for key, place in found.items()} == models
    assert set(found.values()) == set(LAYOUT)


@pytest.mark.parametrize("folder", ["cli", "radqueue", "services", "shared"])
def test_no_other_module_spells_a_key(folder):
    """Whoever wants a key asks `shared/keys.py` for it; the paths of DICOMweb are alike, and are none."""
    spelled = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.name not in {"keys.py", "dicomweb.py"}
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and KEY.match(node.value)
    ]

    assert spelled == []


def test_prefixes_are_those_of_the_keys():
    """What is listed begins as what is stored."""
    instance = keys.instance("1.2", "1.2.3", "1.2.3.4", "0" * 16)

    assert keys.dataset_of(keys.upload("chest", "a/b.dcm")) == "chest"
    assert instance.startswith(keys.series_prefix("1.2", "1.2.3"))
    assert keys.series_prefix("1.2", "1.2.3").startswith(keys.study_prefix("1.2"))
    assert keys.revision("1.2", "1.2.3", AB).key.startswith(keys.revisions_prefix("1.2", "1.2.3"))
    assert RESULT.prefix.startswith(keys.map_results_prefix(keys.revision_results_prefix(REF), "lung"))
    assert RESULT.prefix.startswith(RESULT.of_any_version)
    assert OF_STUDY.prefix.startswith(keys.study_results_prefix("1.2"))
    assert keys.study_results_prefix("1.2").startswith(keys.results_prefix("1.2"))
    assert keys.array("chest", "1", AB, "0").startswith(keys.dataset_prefix("chest"))
    assert keys.events("2026-11-02", "u").startswith(keys.events_of_day("2026-11-02"))
    assert keys.events("2026-11-02", "u").startswith(keys.events_of_month("2026-11"))
    assert ROUND.partial(1).key.startswith(ROUND.partials_prefix)


@given(study=uids, series=uids, sop=uids, sha=shas)
def test_an_instance_key_is_read_back(study, series, sop, sha):
    """What is written into a key, UID and sha, is found in a listing, also where a sha is all digits."""
    key = keys.instance(study, series, sop, sha)

    assert key.startswith(keys.series_prefix(study, series))
    assert keys.stored_instance(key) == StoredInstance(sop_instance_uid=sop, sha=sha, key=key)
    assert keys.stored_revision(key) is None


@pytest.mark.parametrize(
    "key", ["studies/1/2/revisions/abc.json", "studies/1/2/3.dcm", "settling/1/2/3", "studies/1/2/"]
)
def test_other_keys_are_no_instances(key):
    """Revisions and whatever else lies under a series are passed over in its listing."""
    assert keys.stored_instance(key) is None


def test_documents_are_found_in_listings():
    """Revisions, decisions about studies and results are read from their keys."""
    assert keys.stored_revision(keys.revision("1.2", "1.2.3", AB).key) == keys.revision("1.2", "1.2.3", AB)
    assert keys.revision_of(REF).key == REF.revision_key
    assert keys.stored_study_routing(keys.study_routing("1.2", AB).key) == keys.study_routing("1.2", AB)
    assert keys.stored_study_routing(OF_STUDY.result.key) is None
    for document in (RESULT.outputs, RESULT.result, RESULT.failure):
        assert keys.stored_result(document.key) == ("1.2.3", RESULT)
    assert keys.stored_result(OF_STUDY.failure.key) == ("study", OF_STUDY)
    assert keys.stored_result(RESULT.lease.key) is None
    assert keys.stored_result(f"{RESULT.made_file('a', 0, 'result.json')}") is None


@given(st.randoms())
def test_a_result_does_not_depend_on_the_order_of_its_inputs(rng: random.Random):
    """A MAP that reads several series has one result of them, in whatever order a request lists them."""
    inputs = [REF.model_copy(update={"series_uid": f"1.2.{number}"}) for number in range(5)]
    shuffled = list(inputs)
    rng.shuffle(shuffled)
    made = [ResultKeys.of(InferenceTask(map="m", map_digest=EF, inputs=tuple(each))) for each in (inputs, shuffled)]

    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.2.840", True),
        ("1", True),
        ("", False),
        ("1..2", False),
        ("1.2/3", False),
        ("1.2\n", False),
        ("1" * 65, False),
    ],
)
def test_a_uid_is_digits_and_dots(text, expected):
    """Only a UID may become a part of a key."""
    assert keys.is_uid(text) is expected


def place_of(key):
    """Return the first place of the layout whose pattern a key meets."""
    return next(place for place in LAYOUT if re.fullmatch(regex_of(place.pattern), key))


def regex_of(pattern):
    parts = re.split(r"<([^>]*)>", pattern)
    named = [".+" if name == "…" else "[0-9.]+" if name.endswith("UID") else "[^/]+" for name in parts[1::2]]
    return "".join(re.escape(text) + name for text, name in zip(parts[::2], [*named, ""], strict=True))
