"""Keys, digests and revisions, as ingest writes and inference reads them."""

import random
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.dicom import (
    Geometry,
    Revision,
    StoredInstance,
    digest_of,
    instance_key,
    is_uid,
    revision_key,
    series_prefix,
    sha_of,
    stored_instance,
)
from shared.errors import Unprocessable

uids = st.lists(st.integers(0, 10**9), min_size=1, max_size=6).map(lambda parts: ".".join(map(str, parts)))
shas = st.text("0123456789abcdef", min_size=16, max_size=16)


@given(study=uids, series=uids, sop=uids, sha=shas)
def test_an_instance_key_is_read_back(study, series, sop, sha):
    """What is written into a key, UID and sha, is found in a listing, also where a sha is all digits."""
    key = instance_key(study, series, sop, sha)

    assert key.startswith(series_prefix(study, series))
    assert stored_instance(key) == StoredInstance(sop_instance_uid=sop, sha=sha, key=key)


@pytest.mark.parametrize(
    "key", ["studies/1/2/revisions/abc.json", "studies/1/2/3.dcm", "settling/1/2/3", "studies/1/2/"]
)
def test_other_keys_are_no_instances(key):
    """Revisions and whatever else lies under a series are passed over in its listing."""
    assert stored_instance(key) is None


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
    assert is_uid(text) is expected


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

    assert Revision.parse(made.body()) == made
    assert made.key == revision_key("1", "2", made.digest)


def test_a_damaged_revision_is_unprocessable_and_unquoted():
    """The error names the field, never the value."""
    body = revision().body().replace(b'"lung"', b'"Jane Secretperson"')
    with pytest.raises(Unprocessable) as raised:
        Revision.parse(body)

    assert raised.value.reason_code == "invalid_revision"
    assert raised.value.detail == "dataset"


def test_a_sha_is_sixteen_digits():
    """The sha in a key is the beginning of the sha256."""
    assert sha_of(b"") == "e3b0c44298fc1c14"
