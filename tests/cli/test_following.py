import hashlib
import json
import zipfile
from datetime import UTC, datetime

import pytest

from cli import show
from cli.client import Client
from cli.study.journey import Journey
from cli.study.uploads import collect, instances
from cli.training.following import Training
from cli.training.requests import training_request
from services.inference.reasons import REASONS
from services.inference.records import result_prefix
from shared.dicom import Revision, StoredInstance, digest_of, instance_key
from shared.messages import Geometry, InferenceTask
from shared.operations.refused import Refused
from shared.phantom import Patient, write_ct_series

EVALUATION = {
    "metric": "FD",
    "space": "s",
    "n": 8,
    "distance": 3.0,
    "floor": 2.0,
    "relative_fd": 1.5,
    "quality": {"coverage": 0.5, "kid": 0.1},
    "real_quality": {"coverage": 0.75, "kid": 0.0},
    "memorisation": {"flagged": True},
    "warnings": ["few_images"],
}
MAP = f"a_map@{'e' * 16}"


class Bucket:
    """Writes what the services would write; the keys are those of the contract."""

    def __init__(self, client, tmp_path):
        self.client, self.tmp_path = client, tmp_path

    def put(self, key, document):
        path = self.tmp_path / "object"
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        self.client.upload(path, key)

    def store(self, found):
        stored = []
        for one in found:
            key = instance_key(one.study_uid, one.series_uid, one.sop_instance_uid, one.sha)
            self.put(key, "any")
            stored.append(StoredInstance(sop_instance_uid=one.sop_instance_uid, sha=one.sha, key=key))
        return stored

    def settle(self, found):
        """Store a revision of these instances; returns the prefix of its results."""
        stored = tuple(sorted(self.store(found), key=lambda one: one.sop_instance_uid))
        revision = Revision(
            dataset="d",
            study_uid=found[0].study_uid,
            series_uid=found[0].series_uid,
            digest=digest_of(stored),
            created=datetime.now(UTC),
            instances=stored,
            geometry=Geometry(verdict="tilted", n_slices=len(stored), n_positions=len(stored)),
            warnings=("gantry_tilt",),
        )
        self.put(revision.key, revision.body().decode())
        return f"results/{revision.study_uid}/{revision.series_uid}/{revision.digest}/"

    def refuse(self, one, reason_code):
        told = {"dataset": "d", "upload_key_sha256": one, "time": "2026-01-01T00:00:00+00:00"}
        self.put(f"quarantine/{one}/reason.json", {"reason_code": reason_code, "place": "Rows", **told})


@pytest.fixture
def client(local_aws):
    return Client(local_aws.environ)


@pytest.fixture
def bucket(client, tmp_path):
    return Bucket(client, tmp_path)


@pytest.fixture
def uploaded(tmp_path):
    """Three slices of a series of this test alone, and what is in them."""
    folder = write_ct_series(tmp_path / "ct", slices=3, size=16, patient=Patient("PHANTOM^X", tmp_path.name))
    uploads = collect([folder], "d")
    return uploads, [found for upload in uploads for found in instances(upload)[0]]


def stage(journey):
    journey.look()
    (series,) = journey.series
    return series.stage


def test_a_series_is_followed_through_its_stages(client, bucket, uploaded):
    """Each stage is seen once what it leaves in the bucket is there, and the end holds the outputs."""
    uploads, found = uploaded
    journey = Journey(client, uploads)
    seen = [stage(journey)]
    bucket.store(found[:2])
    seen.append(stage(journey))
    bucket.store(found)
    seen.append(stage(journey))
    prefix = bucket.settle(found)
    seen.append(stage(journey))
    bucket.put(f"{prefix}routing.json", {"maps": [{"map": "a_map", "map_digest": "e" * 16}]})
    seen.append(stage(journey))
    bucket.put(f"{prefix}{MAP}/outputs.json", {})
    seen.append(stage(journey))
    bucket.put(f"{prefix}{MAP}/result.json", {"outcome": "completed", "outputs": [{"sop_instance_uid": "1.2"}]})
    seen.append(stage(journey))

    assert seen == ["uploaded", "uploaded", "stored", "settled", "settled", "inferred", "pushed"]
    assert journey.ended
    assert journey.series[0].outputs == [{"sop_instance_uid": "1.2"}]
    assert journey.summary()["series"][0]["geometry"] == "tilted"
    assert journey.summary()["series"][0]["warnings"] == ("gantry_tilt",)
    assert list(journey.series[0].seconds) == ["uploaded", "stored", "settled", "inferred", "pushed"]


@pytest.mark.parametrize(
    ("maps", "record", "expected"),
    [
        ([], None, "skipped"),
        ([{"map": "a_map"}], ("result.json", {"outcome": "no_matching_series"}), "no_match"),
        ([{"map": "a_map"}], ("failure.json", {"reason_code": "deadline"}), "failed"),
    ],
)
def test_every_way_to_end_is_told_apart(client, bucket, uploaded, *, maps, record, expected):
    """No route, no matching series and a failed MAP all end the waiting, each under its own name."""
    uploads, found = uploaded
    prefix = bucket.settle(found)
    bucket.put(f"{prefix}routing.json", {"maps": maps})
    if record:
        bucket.put(f"{prefix}{MAP}/{record[0]}", record[1])
    journey = Journey(client, uploads)

    assert stage(journey) == expected
    assert journey.ended


def test_a_map_that_failed_tells_why_where_and_what_to_do(client, bucket, uploaded, capsys):
    """Code, place, remedy and the log's place are told to people and to scripts; a failed push names its attempt."""
    uploads, found = uploaded
    prefix = bucket.settle(found)
    bucket.put(f"{prefix}routing.json", {"maps": [{"map": "a_map"}, {"map": "b_map"}]})
    other = f"b_map@{'e' * 16}"
    failure = {"reason_code": "application_error", "error_type": "KeyError", "where": "app.py:12", "attempt": "one"}
    bucket.put(f"{prefix}{MAP}/failure.json", failure | {"map": "a_map"})
    bucket.put(f"{prefix}{MAP}/attempts/one/log.txt", "what it printed")
    bucket.put(f"{prefix}{other}/failure.json", {"map": "b_map", "reason_code": "push_rejected", "attempt": "two"})
    bucket.put(f"{prefix}{other}/outputs.json", {"attempt": "one"})
    bucket.put(f"{prefix}{other}/attempts/one/log.txt", "what it printed")
    journey = Journey(client, uploads)

    assert stage(journey) == "failed"
    first, second = journey.summary()["series"][0]["results"]
    assert (first["outcome"], first["reason_code"]) == ("failed", "application_error")
    assert (first["error_type"], first["where"]) == ("KeyError", "app.py:12")
    assert (first["why"], first["remedy"]) == REASONS["application_error"]
    assert first["log"] == client.url(f"{prefix}{MAP}/attempts/one/log.txt")
    assert second["log"] == client.url(f"{prefix}{other}/attempts/one/log.txt")
    show.journey(journey)
    printed = capsys.readouterr().out
    assert "failed: a_map: application_error (KeyError app.py:12): the application raised an exception" in printed
    assert REASONS["application_error"][1] in printed
    assert first["log"] in printed


def test_an_older_revision_without_all_that_was_uploaded_is_not_the_end(client, bucket, uploaded):
    """A result on a part of the series is not taken for the result of the upload."""
    uploads, found = uploaded
    prefix = bucket.settle(found[:2])
    bucket.put(f"{prefix}routing.json", {"maps": []})
    journey = Journey(client, uploads)

    assert stage(journey) == "uploaded"
    bucket.put(f"{bucket.settle(found)}routing.json", {"maps": []})
    assert stage(journey) == "skipped"


def test_refused_instances_are_left_out_of_the_series(client, bucket, uploaded):
    """The rest of a series is followed without them; a series of which nothing is left is rejected."""
    uploads, found = uploaded
    journey = Journey(client, uploads)
    bucket.refuse(found[0].object_sha256, "truncated")
    bucket.put(f"{bucket.settle(found[1:])}routing.json", {"maps": []})

    assert stage(journey) == "skipped"
    assert [rejection.reason_code for rejection in journey.all_rejections] == ["truncated"]
    alone = Journey(client, [upload for upload in uploads if upload.sha256 == found[0].object_sha256])
    assert stage(alone) == "rejected"


def test_what_is_no_dicom_is_followed_into_quarantine(client, bucket, tmp_path):
    """A broken file has no series; its rejection ends the waiting, and until then the time-out names it."""
    broken = tmp_path / "broken.dcm"
    broken.write_text(f"broken {tmp_path}")
    journey = Journey(client, uploads := collect([broken], "d"))

    with pytest.raises(Refused, match=f"the work goes on.*{broken} was neither taken nor refused"):
        journey.wait(0)
    bucket.refuse(uploads[0].sha256, "not_dicom")
    journey.wait(0)
    told = {"path": str(broken), "object_sha256": uploads[0].sha256, "reason_code": "not_dicom", "place": "Rows"}
    assert journey.summary()["rejections"] == [told]


def test_a_refusal_before_the_upload_is_not_its_own(client, bucket, tmp_path, monkeypatch):
    """What was refused once may be taken now, so only a reason that was written after the upload counts."""
    broken = tmp_path / "broken.dcm"
    broken.write_text(f"refused before {tmp_path}")
    (upload,) = collect([broken], "d")
    bucket.refuse(upload.sha256, "too_large")
    client.upload(broken, upload.key)
    at = {upload.key: datetime(2026, 1, 1, 0, 0, 1, tzinfo=UTC)}
    monkeypatch.setattr(client, "modified", lambda key: at.get(key, datetime(2026, 1, 1, tzinfo=UTC)))
    journey = Journey(client, [upload])
    journey.look()

    assert not journey.all_rejections
    at.clear()
    journey.look()
    assert [rejection.reason_code for rejection in journey.all_rejections] == ["too_large"]


def test_a_training_is_followed_to_its_end(client, bucket, tmp_path):
    """Rounds appear in order, and completed.json, or failure.json, ends the waiting."""
    name = tmp_path.name.replace("_", "-")
    training = Training(client, training_request("d", request_id=name))
    training.look()

    assert (training.state, training.ended) == ("requested", False)
    evaluation = EVALUATION | {"relative_fd": 1.5}
    told = {"round": 1, "steps": 10, "approved": True, "duration_s": 1.0, "evaluation": evaluation}
    bucket.put(f"models/{name}/rounds/1/evaluation.json", {"told": told | {"rule": "first"}})
    training.look()
    assert (training.state, len(training.rounds)) == ("training", 1)
    keys = {"generator_key": "g", "images_key": "i", "images_array_key": "a"}
    bucket.put(f"models/{name}/completed.json", {"told": {"approved": True, **keys}})
    training.wait(0)
    assert (training.state, training.approved, training.keys) == ("approved", True, ["g", "i", "a"])
    assert training.summary()["rounds"][0]["relative_fd"] == 1.5


def test_an_id_that_another_request_had_first_ends_the_waiting(client, bucket, tmp_path):
    """Two requests of one id may wait in the queue together: the model of the first is not handed to the second."""
    name = tmp_path.name.replace("_", "-")
    first, second = (training_request("d", request_id=name, max_rounds=rounds) for rounds in (1, 2))
    training = Training(client, second)
    training.look()
    bucket.put(f"models/{name}/options.json", {"request": first.model_dump(mode="json")})

    with pytest.raises(Refused, match="was made before, with another max_rounds"):
        training.wait(0)


def test_what_an_archive_holds_beside_a_series_and_is_refused_is_told(client, bucket, tmp_path):
    """A member that is no DICOM, and an archive with members that were withheld: known when the series has ended."""
    folder = write_ct_series(tmp_path / "ct", slices=2, size=16, patient=Patient("PHANTOM^X", tmp_path.name))
    with zipfile.ZipFile(tmp_path / "study.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
        archive.writestr("broken", b"\x08\x00 no DICOM")
        archive.writestr("zeros", bytes(1_000_000))
    (upload,) = collect([tmp_path / "study.zip"], "d")
    found, others = instances(upload)
    journey = Journey(client, [upload])
    journey.look()
    for one in others - {hashlib.sha256(bytes(1_000_000)).hexdigest()}:
        bucket.refuse(one, "not_dicom")
    bucket.put(f"{bucket.settle(found)}routing.json", {"maps": []})
    journey.look()

    assert journey.ended
    assert len(others) == 3
    assert {one.object_sha256 for one in journey.all_rejections} == {
        upload.sha256,
        hashlib.sha256(b"\x08\x00 no DICOM").hexdigest(),
    }


def test_of_two_files_under_one_uid_the_one_that_is_taken_is_followed(client, bucket, tmp_path):
    """Which one ingest takes is not known before, whatever their order; the other one is told as refused."""
    folder = write_ct_series(tmp_path / "ct", slices=2, size=16, patient=Patient("PHANTOM^X", tmp_path.name))
    first, *_ = sorted(folder.iterdir())
    for name in ("a", "z"):
        (folder / name).write_bytes(first.read_bytes()[:-9])
    uploads = collect([folder], "d")
    cut = next(upload for upload in uploads if upload.path.name == "a")
    found = [one for upload in uploads for one in instances(upload)[0] if one.upload_sha256 != cut.sha256]
    journey = Journey(client, uploads)
    bucket.refuse(cut.sha256, "truncated")
    bucket.put(f"{bucket.settle(found)}routing.json", {"maps": []})
    journey.look()
    journey.look()

    assert [(series.stage, series.n_instances) for series in journey.series] == [("skipped", 2)]
    assert [one.path for one in journey.all_rejections] == [cut.path]


def test_a_withheld_member_ends_only_what_it_was(client, bucket, tmp_path):
    """Ingest refuses an archive for it before the others are stored; those are on their way nevertheless."""
    folder = write_ct_series(tmp_path / "ct", slices=3, size=16, patient=Patient("PHANTOM^X", tmp_path.name))
    with zipfile.ZipFile(tmp_path / "study.zip", "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
    (upload,) = collect([tmp_path / "study.zip"], "d")
    found, _ = instances(upload)
    journey = Journey(client, [upload])
    told = {"dataset": "d", "upload_key_sha256": "0", "time": "2026-01-01T00:00:00+00:00"}
    reason = {"reason_code": "zip_unsupported", "place": "#1:zip_unsupported", **told}
    bucket.put(f"quarantine/{upload.sha256}/reason.json", reason)
    early = stage(journey)
    bucket.put(f"{bucket.settle([found[0], found[2]])}routing.json", {"maps": []})
    stage(journey)

    assert early == "uploaded"
    assert [(series.stage, series.n_instances) for series in journey.series] == [("skipped", 2)]


def test_a_series_that_waits_for_long_tells_where_to_look(client, uploaded, monkeypatch):
    """A dataset that is de-identified as it is stored cannot be followed, which is said long before time is up."""
    journey = Journey(client, uploaded[0])
    journey.look()
    soon = journey.hints()
    monkeypatch.setattr("cli.study.journey.HINT_AFTER_S", -1)

    assert soon == []
    assert "de-identified" in journey.hints()[0]


def test_a_timeout_tells_how_far_it_came(client, bucket, tmp_path):
    """What is said when time is up is what was seen last."""
    name = tmp_path.name.replace("_", "-")
    training = Training(client, training_request("d", request_id=name))
    told = {"round": 1, "steps": 10, "approved": False, "duration_s": 1.0, "evaluation": EVALUATION, "rule": "first"}
    bucket.put(f"models/{name}/rounds/1/evaluation.json", {"told": told})

    with pytest.raises(Refused, match="is training, 1 rounds done"):
        training.wait(0)


def test_the_round_that_runs_is_told_by_tenths_and_each_round_with_its_rule(client, bucket, tmp_path, capsys):
    """Progress is shown while its round runs; each round is told with its rule, its numbers and why it was refused."""
    name = tmp_path.name.replace("_", "-")
    training = Training(client, training_request("d", request_id=name, threshold=1.0, min_coverage=0.9))
    progress = {"of_steps": 100, "images_seen": 320, "generator_loss": 0.7, "discriminator_loss": 0.6, "time": ""}
    for step in (21, 25, 30):
        bucket.put(f"models/{name}/progress.json", progress | {"round": 1, "step": step})
        training.look()
    shown = "round 1: step {} of 100, 320 images seen, losses 0.70 (generator), 0.60 (discriminator)"

    assert show.training_lines(training)[:-1] == [shown.format(21), shown.format(30)]
    assert training.summary()["progress"]["step"] == 30
    show.out.print(show.training_table(training))
    assert shown.format(30) in capsys.readouterr().out

    told = {"round": 1, "steps": 100, "approved": False, "duration_s": 1.0, "evaluation": EVALUATION}
    why = "its relative distance 1.5 is above 1"
    bucket.put(f"models/{name}/rounds/1/evaluation.json", {"told": told | {"rule": "first", "why_not": why}})
    training.look()

    assert training.progress is None
    assert show.training_lines(training)[-2] == (
        "round 1 (first): FD 3.00, relative 1.50, coverage 0.50 of 0.75, copies found, 1.0 s, warnings: few_images"
    )
    assert training.summary()["rounds"][0]["why_not"] == why
    keys = {"generator_key": "g", "images_key": "i", "images_array_key": "a"}
    bucket.put(f"models/{name}/completed.json", {"told": {"approved": False, "why_not": why, **keys}})
    training.wait(0)
    show.training(training)
    printed = capsys.readouterr().out
    assert "│ first" in printed
    assert "0.50 of 0.75" in printed
    assert why in printed


def test_a_failed_training_is_told_by_its_numbers_and_an_earlier_failure_is_none(client, bucket, tmp_path):
    """Asking again for a training that failed waits for the new answer, which says how many images are missing."""
    request = training_request("d", request_id=tmp_path.name.replace("_", "-"))
    numbers = {"n_patients": 1, "n_training": 24, "n_held_out": 0, "min_images": 32}
    key, told = f"models/{request.request_id}/failure.json", {"reason_code": "too_little_data", "numbers": numbers}
    bucket.put(key, {"told": told, "time": "2026-01-01T00:00:00Z"})
    training = Training(client, request)
    training.look()

    assert not training.ended
    bucket.put(key, {"told": told, "time": "2026-01-01T00:00:09Z"})
    training.wait(0)
    assert (training.state, training.approved) == ("failed: too_little_data", False)
    assert "Found 1 patients: 24 images to train on, and 0 of other ones to judge by; 32 of each" in training.why


def test_a_study_level_map_is_waited_for_and_its_result_is_the_series_result(client, bucket, uploaded):
    """A series whose study is given to a MAP as a whole goes on until the newest decision that has it has ended."""
    uploads, found = uploaded
    prefix = bucket.settle(found)
    study_uid, series_uid, digest = prefix.split("/")[1:4]
    ref = {"study_uid": study_uid, "series_uid": series_uid, "digest": digest, "revision_key": "k"}
    late = ref | {"series_uid": "1.2.3"}
    place = f"results/{study_uid}/study/"

    def decide(name, minute, *refs):
        task = {"map": "a_map", "map_digest": "e" * 16, "inputs": refs}
        told = {"series": refs, "tasks": [task], "time": f"2026-01-01T00:{minute:02}:00Z"}
        bucket.put(f"{place}{name}/routing.json", told)
        return result_prefix(InferenceTask.model_validate(task))

    journey = Journey(client, uploads)
    bucket.put(f"{prefix}routing.json", {"maps": [], "study_maps": ["a_map"]})
    seen = [stage(journey)]
    decide("one", 1, ref)
    seen.append(stage(journey))
    both = decide("two", 2, ref, late)
    bucket.put(f"{both}outputs.json", {})
    seen.append(stage(journey))
    bucket.put(f"{both}result.json", {"outcome": "completed", "outputs": [{"sop_instance_uid": "1.2"}]})
    seen.append(stage(journey))

    assert both.startswith(place)
    assert seen == ["settled", "settled", "inferred", "pushed"]
    assert journey.series[0].outputs == [{"sop_instance_uid": "1.2"}]
