"""`radqueue map route`: which MAPs would take which series, of a study in S3 and of a folder."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from cli.client import Client
from cli.map import route
from shared.dicom import Geometry, Revision, StoredInstance
from shared.phantom import write_ct_series

TABLE = """
maps:
  - {name: chest, source: a, when: {Modality: CT, BodyPartExamined: CHEST, geometry.verdict: regular}}
  - {name: whole, source: b, when: {Modality: CT}, level: study}
  - {name: mr, source: c, when: {Modality: MR, n_instances: {min: 4}}}
"""


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(TABLE)
    return path


def answers(found, number=0):
    return {one["map"]: (one["takes"], sorted(one["unmet"])) for one in found["series"][number]["maps"]}


def test_a_folder_is_routed_without_aws(radqueue, table, tmp_path):
    """Every MAP answers for every series, and those that do not take it name the conditions that failed."""
    write_ct_series(tmp_path / "study", slices=3, size=16)
    (tmp_path / "study" / "readme.txt").write_text("no DICOM")
    done = radqueue("map", "route", tmp_path / "study", "--maps", table, "--json")
    found = json.loads(done.stdout)

    assert done.returncode == 0, done.stderr
    assert answers(found)["whole"] == (True, [])
    assert "geometry.verdict" not in answers(found)["chest"][1], "a folder is looked at as ingest looks at a series"
    assert answers(found)["mr"] == (False, ["Modality", "n_instances"])
    unmet = {one["map"]: one["unmet"] for one in found["series"][0]["maps"]}
    assert unmet["mr"]["Modality"] == {"wanted": "MR", "has": "CT"}
    assert unmet["mr"]["n_instances"] == {"wanted": {"min": 4.0}, "has": 3}
    assert found["studies"] == {"whole": [found["series"][0]["series_uid"]]}


def test_a_stored_study_is_routed_by_its_newest_revisions(radqueue, local_aws, table, tmp_path):
    """What a worker would see is what is told: an older revision of a series does not count."""
    client = Client(local_aws.environ)
    study_uid, created = f"1.2.{tmp_path.stat().st_ino}", datetime(2026, 1, 1, tzinfo=UTC)

    def store(series_uid, digest, minutes, geometry=None, **attributes):
        instance = StoredInstance(sop_instance_uid="1.2.3", sha="0" * 16, key="k")
        revision = Revision(
            dataset="d",
            study_uid=study_uid,
            series_uid=series_uid,
            digest=digest * 32,
            created=created + timedelta(minutes=minutes),
            instances=(instance,),
            attributes=attributes,
            geometry=geometry,
        )
        (tmp_path / "revision.json").write_bytes(revision.body())
        client.upload(tmp_path / "revision.json", revision.key)

    lies = Geometry(verdict="regular", n_slices=1, n_positions=1)
    store("1.1", "b", 1, Modality="CT", BodyPartExamined="HEAD")
    store("1.1", "a", 2, geometry=lies, Modality="CT", BodyPartExamined="CHEST")
    store("1.2", "c", 1, Modality="MR")
    client.upload(table, "tables/maps.yaml")
    place = f"s3://{client.bucket}/tables/maps.yaml"
    done = radqueue("map", "route", study_uid, "--maps", place, "--json", env=local_aws.environ)
    found = json.loads(done.stdout)
    told = radqueue("map", "route", study_uid, "--maps", place, env=local_aws.environ).stdout

    assert answers(found, 0) == {"chest": (True, []), "whole": (True, []), "mr": (False, ["Modality", "n_instances"])}
    assert answers(found, 1)["chest"] == (False, ["BodyPartExamined", "Modality", "geometry.verdict"])
    assert "BodyPartExamined: wants CHEST, missing" in told
    assert "n_instances: wants at least 4, has 1" in told
    assert "whole: 1 series in one run" in told


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("CT", "CT"),
        (["CHEST", "THORAX"], "CHEST or THORAX"),
        ({"regex": "(?i)lung"}, "a match of (?i)lung"),
        ({"min": 1.0, "max": 2.5}, "at least 1 and at most 2.5"),
        ({"missing": True}, "none"),
        ({"missing": False}, "any value"),
    ],
)
def test_a_condition_is_told_in_words(condition, words):
    """Nobody has to read how this program writes down a condition."""
    assert route._wish(condition) == words
    assert [route._fact(one) for one in (None, "", ["A", "B"], 3)] == ["missing", "missing", "has A, B", "has 3"]


@pytest.mark.parametrize(
    ("study", "text", "code", "why"),
    [
        ("1.2.3.4.5.6", TABLE, 1, "no series of this study has settled here"),
        ("no-uid", TABLE, 2, "neither a folder nor a StudyInstanceUID"),
        (".", TABLE, 1, "there is no DICOM file"),
        (".", "maps: [", 2, "mine.yaml: line 1, column 8: not YAML."),
        (".", None, 2, "--maps: cannot read"),
    ],
)
def test_what_cannot_be_routed_is_told_with_its_exit_code(radqueue, local_aws, table, *, study, text, code, why):
    """A study that is not there can come later; what is wrong with the table or the words is the user's to mend."""
    table.unlink() if text is None else table.write_text(text)
    done = radqueue("map", "route", study, "--maps", table, env=local_aws.environ)

    assert done.returncode == code
    assert why in done.stderr
