"""Digests and revisions, as ingest writes and inference reads them."""

import random
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import keys
from shared.documents.document import body_of
from shared.documents.revisions import Revision, StoredInstance, digest_of, sha_of
from shared.errors import Unprocessable
from shared.messages import Geometry

uids = st.lists(st.integers(0, 10**9), min_size=1, max_size=6).map(lambda parts: ".".join(map(str, parts)))
shas = st.text("0123456789abcdef", min_size=16, max_size=16)


@given(st.lists(st.tuples(uids, shas), min_size=1, max_size=9, unique_by=lambda pair: pair[0]), st.randoms())
def test_a_digest_depends_on_the_set(pairs, rng: random.Random):
    """Neither the order nor the key's prefix changes a digest; another instance does."""
    made = [StoredInstance(sop_instance_uid=uid, sha=sha, key="a") for uid, sha in pairs]
    shuffled = [instance.model_copy(update={"key": "b"}) for instance in made]
    rng.shuffle(shuffled)
    more = [*made, StoredInstance(sop_instance_uid="9.9.9.9.9.9.9", sha="0" * 16, key="a")]

    assert digest_of(made) == digest_of(shuffled)
    assert digest_of(made) != digest_of(more)
    assert len(digest_of(made)) == 32


def revision():
    instance = StoredInstance(sop_instance_uid="1.2.3", sha="0" * 16, key="studies/1/2/1.2.3.0000000000000000.dcm")
    return Revision(
        dataset="lung",
        study_uid="1",
        series_uid="2",
        digest=digest_of([instance]),
        created=datetime(2026, 5, 1, 12, 30, 0, 123456, tzinfo=UTC),
        instances=(instance,),
        attributes={"Modality": "CT", "PixelSpacing": [0.7, 0.7], "ImageType": ["ORIGINAL", "PRIMARY"], "Rows": 512},
        geometry=Geometry(verdict="volume", n_slices=1, n_positions=1, normal=(0, 0, 1), tilt_deg=-18.5),
        warnings=("gantry_tilt",),
    )


def test_a_revision_survives_storage():
    """A stored revision is read back as it was, and knows its key."""
    made = revision()
    document = keys.document_of(made)

    assert document.parse(body_of(made)) == made
    assert document == keys.revision("1", "2", made.digest)


def test_a_damaged_revision_is_unprocessable_and_unquoted():
    """The error names the field, never the value."""
    body = body_of(revision()).replace(b'"lung"', b'"Jane Secretperson"')
    with pytest.raises(Unprocessable) as raised:
        keys.document_of(revision()).parse(body)

    assert raised.value.reason_code == "invalid_revision"
    assert raised.value.detail == "dataset"


def test_a_sha_is_sixteen_digits():
    """The sha in a key is the beginning of the sha256."""
    assert sha_of(b"") == "e3b0c44298fc1c14"
