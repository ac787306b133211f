"""Stored documents: a body that was ever written is read for ever, and what is written says its version."""

import json
from pathlib import Path

import pytest

from shared.documents.arrays import Sidecar
from shared.documents.document import Document, body_of
from shared.errors import Unprocessable
from shared.keys import LAYOUT

RECORDED = Path(__file__).parent.parent / "contracts" / "documents"
MODELS = {place.model.__name__: place.model for place in LAYOUT if place.model is not None}
FIRST = sorted(RECORDED.glob("unversioned/*.json"))
"""Written before the document had a `schema_version`."""


def parsed(path):
    """Read a recorded body; its file has the name of its model."""
    return Document(f"any/{path.name}", MODELS[path.stem]).parse(path.read_bytes())


@pytest.mark.parametrize("path", sorted(RECORDED.rglob("*.json")), ids=lambda path: str(path.relative_to(RECORDED)))
def test_every_recorded_body_parses_for_ever(path):
    """A body of any version ever released is accepted, and survives a round trip."""
    made = parsed(path)

    assert Document("any", type(made)).parse(body_of(made)) == made


@pytest.mark.parametrize("path", FIRST, ids=lambda path: path.stem)
def test_a_body_without_a_version_is_the_same_document(path):
    """Whether it was written before there was a version or after it: whoever compares the two sees no difference."""
    assert "schema_version" not in json.loads(path.read_bytes())
    assert parsed(path) == parsed(RECORDED / path.name)


def test_every_document_of_the_layout_has_a_recorded_body():
    """No document is released without a record of how it looks."""
    assert {path.stem for path in RECORDED.glob("*.json")} == MODELS.keys()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_what_is_written_is_what_was_recorded(name):
    """The body says its version, and all that it said: a field that is renamed or dropped breaks who reads it."""
    path = RECORDED / f"{name}.json"
    given, kept = json.loads(path.read_bytes()), json.loads(body_of(parsed(path)))
    more = given.keys() - kept.keys()

    assert kept["schema_version"] == 1
    assert kept == {field: value for field, value in given.items() if field not in more}
    assert not more or name == "StoredDescription"  # which is for people, too: we read a part of it again


def test_the_sidecar_that_ingest_writes_is_one_that_trainings_read():
    """What both know of it is the same; the class is other people's alone."""
    path = RECORDED / "StoredSidecar.json"
    written, read = parsed(path), Sidecar.model_validate_json(path.read_bytes())

    assert read.model_dump(exclude={"class_name"}) == written.model_dump(include=Sidecar.model_fields.keys())


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_document_of_a_later_version_is_refused_by_its_key(name):
    """What this version cannot know is not guessed at, and no value is told."""
    later = json.loads((RECORDED / f"{name}.json").read_bytes()) | {"schema_version": 2}
    with pytest.raises(Unprocessable) as raised:
        Document("any/key", MODELS[name]).parse(json.dumps(later).encode())

    assert str(raised.value) in {"invalid_record: any/key", "invalid_revision: schema_version"}
