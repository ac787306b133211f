"""Both journeys through real processes, while things go wrong: repeats, disorder, broken input, SIGKILL."""

import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import pydicom
import pytest
from botocore.config import Config

from deploy.local.stack import Stack
from shared.messages import ReportRequest, ReportRequested, TrainingRequest, TrainingRequested
from shared.phantom import Patient, write_cohort, write_ct_series
from tests.conftest import clean_environ

TIMEOUT_S = 180
PATIENT = Patient(name="Quixote^Alonso", patient_id="LAMANCHA-1605", birth_date="15470929")
TRAINING = {"steps": 60, "batchSize": 16, "width": 16}
"""Parameters of a training that takes seconds and is not good enough, so that it goes on to its last round."""
SEG = "1.2.840.10008.5.1.4.1.1.66.4"
OTHERS = ("PHANTOM^THORAX", "PHANTOM-0-", "19700101")
"""How the patients of the cohort are called."""
SEED_OF = {"journey": 101, "late": 102, "killed": 103}


def now() -> datetime:
    return datetime.now(UTC)


class World:
    """The running stack, seen as any client of AWS sees it."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.bucket = stack.env["RADQUEUE_BUCKET"]
        self.datastore_id = stack.env["RADQUEUE_DATASTORE_ID"]
        session = boto3.Session(
            aws_access_key_id=stack.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=stack.env["AWS_SECRET_ACCESS_KEY"],
            region_name=stack.env["AWS_REGION"],
        )
        config = Config(inject_host_prefix=False)
        self.s3, self.sqs, self.imaging = (
            session.client(name, endpoint_url=stack.endpoint_url, config=config)
            for name in ("s3", "sqs", "medical-imaging")
        )

    def put(self, name: str, body: bytes) -> None:
        self.s3.put_object(Bucket=self.bucket, Key=f"incoming/{name}", Body=body)

    def keys(self, prefix: str) -> list[str]:
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def document(self, key: str) -> dict[str, Any]:
        return json.loads(self.s3.get_object(Bucket=self.bucket, Key=key)["Body"].read())

    def written(self, key: str) -> Any:
        return self.s3.head_object(Bucket=self.bucket, Key=key)["LastModified"]

    def send(self, role: str, body: str) -> None:
        self.sqs.send_message(
            QueueUrl=self.queue_url(self.stack.env[f"RADQUEUE_{role.upper()}_QUEUE"]), MessageBody=body
        )

    def queue_url(self, name: str) -> str:
        return self.sqs.get_queue_url(QueueName=name)["QueueUrl"]

    def dead(self, role: str) -> list[dict[str, Any]]:
        """Take every message out of a dead-letter queue."""
        url = self.queue_url(self.stack.env[f"RADQUEUE_{role.upper()}_QUEUE"] + "-dlq")
        taken = []
        while found := self.sqs.receive_message(QueueUrl=url, MessageAttributeNames=["All"]).get("Messages"):
            for message in found:
                taken.append(message)
                self.sqs.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
        return taken

    def busy(self, role: str) -> int:
        """Messages that are visible, in flight or delayed."""
        url = self.queue_url(self.stack.env[f"RADQUEUE_{role.upper()}_QUEUE"])
        told = self.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
        names = ("", "NotVisible", "Delayed")
        return sum(int(told[f"ApproximateNumberOfMessages{name}"]) for name in names)

    def log_events(self, service: str) -> list[dict[str, Any]]:
        lines = (self.stack.logs / f"{service}.log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def until(self, what: str, condition: Callable[[], Any]) -> Any:
        """Return what the condition returns once it is true; fail after TIMEOUT_S, or when the stack has ended."""
        deadline = time.monotonic() + TIMEOUT_S
        while not (found := condition()):
            self.stack.check()
            if time.monotonic() > deadline:
                pytest.fail(f"waited {TIMEOUT_S} s for {what}")
            time.sleep(0.1)
        return found

    def kill(self, service: str) -> None:
        """Send SIGKILL to a service, and return when its successor consumes."""
        pid = self.stack.pids[service]
        os.kill(pid, signal.SIGKILL)
        started = len([event for event in self.log_events(service) if event["event"] == "queue.consuming"])
        self.until(
            f"a new {service}",
            lambda: (
                len([e for e in self.log_events(service) if e["event"] == "queue.consuming"]) > started
                and self.stack.pids.get(service) not in (None, pid)
            ),
        )

    # What the journeys leave.

    def results(self, series: "Series") -> list[dict[str, Any]]:
        keys = self.keys(f"results/{series.study_uid}/{series.series_uid}/")
        return [self.document(key) for key in keys if key.endswith("/result.json")]

    def result_of(self, series: "Series", *, revisions: int = 1) -> list[dict[str, Any]]:
        return self.until(f"{revisions} results", lambda: len(found := self.results(series)) >= revisions and found)

    def image_sets(self, series: "Series") -> list[dict[str, Any]]:
        """Image sets of the study, by HealthImaging's own search."""
        uid = [{"values": [{"DICOMStudyInstanceUID": series.study_uid}], "operator": "EQUAL"}]
        pages = self.imaging.get_paginator("search_image_sets").paginate(
            datastoreId=self.datastore_id, searchCriteria={"filters": uid}
        )
        return [found for page in pages for found in page["imageSetsMetadataSummaries"]]


class Series:
    """A made CT series on disk."""

    def __init__(self, folder: Path, seed: int, *, slices: int = 6) -> None:
        write_ct_series(folder, seed=seed, slices=slices, size=128, patient=PATIENT)
        self.files = sorted(folder.rglob("*.dcm"))
        header = pydicom.dcmread(self.files[0], stop_before_pixels=True)
        self.study_uid, self.series_uid = str(header.StudyInstanceUID), str(header.SeriesInstanceUID)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    settings = {"QUIET_S": "4", "VISIBILITY_S": "10", "POLL_S": "1", "LEASE_S": "3", "THREADS": "1", "MIN_IMAGES": "16"}
    environ = clean_environ() | {f"RADQUEUE_{name}": value for name, value in settings.items()}
    with Stack(tmp_path_factory.mktemp("stack"), environ=environ) as stack:
        yield World(stack)


@pytest.fixture
def series(request, tmp_path) -> Series:
    """One of its own for each test; many slices where the MAP is to be met while it runs."""
    return Series(tmp_path / "series", request.param, slices=24 if request.param == SEED_OF["killed"] else 6)


@pytest.mark.parametrize("series", [SEED_OF["journey"]], indirect=True)
def test_an_upload_in_disorder_with_repeats_becomes_one_result_in_healthimaging(world, series):
    """A plain put_object of each file, last first, each S3 event sent once more, ends in one result and one SEG."""
    for number, path in reversed(list(enumerate(series.files))):
        key = f"chest/Quixote Alonso/{number}+1.dcm"
        world.put(key, path.read_bytes())
        record = {
            "eventName": "ObjectCreated:Put",
            "eventTime": "2026-11-02T03:04:05.000Z",
            "s3": {
                "bucket": {"name": world.bucket},
                "object": {"key": f"incoming/chest/Quixote+Alonso/{number}%2B1.dcm"},
            },
        }
        world.send("ingest", json.dumps({"Records": [record]}))
    (result,) = world.result_of(series)
    world.until("ingest to be idle", lambda: world.busy("ingest") == 0 and world.busy("inference") == 0)

    assert len(world.keys(f"studies/{series.study_uid}/{series.series_uid}/revisions/")) == 1
    assert len(world.results(series)) == 1
    assert result["outcome"] == "completed"
    (output,) = result["outputs"]
    assert output["sop_class_uid"] == SEG
    (image_set,) = world.image_sets(series)
    assert image_set["imageSetId"] == output["image_set_id"]
    stored = world.imaging.get_image_set(datastoreId=world.datastore_id, imageSetId=output["image_set_id"])
    assert stored["imageSetState"] == "ACTIVE"
    assert image_set["isPrimary"]


@pytest.mark.parametrize("series", [SEED_OF["late"]], indirect=True)
def test_a_late_instance_makes_a_new_revision_and_a_second_result(world, series):
    """What arrives after the series settled supersedes the revision; both results stay, the second sees all slices."""
    *first, late = series.files
    for path in first:
        world.put(f"chest/{uuid.uuid4()}.dcm", path.read_bytes())
    world.result_of(series)
    world.put(f"chest/{uuid.uuid4()}.dcm", late.read_bytes())
    results = world.result_of(series, revisions=2)

    keys = world.keys(f"studies/{series.study_uid}/{series.series_uid}/revisions/")
    early, late_revision = sorted(map(world.document, keys), key=lambda revision: len(revision["instances"]))
    assert early["supersedes"] is None
    assert late_revision["supersedes"] == early["digest"]
    assert len(late_revision["instances"]) == len(series.files)
    assert len({output["sop_instance_uid"] for result in results for output in result["outputs"]}) == 2


def test_a_broken_file_is_quarantined_and_leaves_the_dead_letter_queue_empty(world):
    """A refused upload is an outcome: it is kept with its reason, and no message fails."""
    body = b"\0" * 128 + b"DICM" + b"Quixote^Alonso is no data set" * 10
    before = set(world.keys("quarantine/"))
    world.put("chest/Quixote Alonso.dcm", body)
    keys = world.until("the quarantine", lambda: set(world.keys("quarantine/")) - before)
    world.until("ingest to be idle", lambda: world.busy("ingest") == 0)
    (reason_key,) = [key for key in keys | set(world.keys("quarantine/")) - before if key.endswith("reason.json")]

    assert world.document(reason_key)["reason_code"]
    assert "Quixote" not in json.dumps(world.document(reason_key))
    kept = world.s3.get_object(Bucket=world.bucket, Key=reason_key.replace("reason.json", "object"))["Body"].read()
    assert kept == body
    assert world.dead("ingest") == []


def test_a_poison_message_is_dead_lettered_with_its_reason(world):
    """A body that nobody can decode ends in the dead-letter queue of the queue that it came to, with a reason code."""
    world.send("inference", "Quixote^Alonso")
    (message,) = world.until("the dead letter", lambda: world.dead("inference"))

    assert message["Body"] == "Quixote^Alonso"
    assert message["MessageAttributes"]["reason_code"]["StringValue"] == "not_json"


@pytest.mark.parametrize("series", [SEED_OF["killed"]], indirect=True)
def test_an_inference_worker_killed_in_the_middle_leaves_one_result(world, series):
    """SIGKILL while the MAP runs: another worker gets the message, and there is one result with one SEG."""
    events = len(world.log_events("inference"))
    for path in series.files:
        world.put(f"chest/{uuid.uuid4()}.dcm", path.read_bytes())

    def runs() -> int:
        return sum(event["event"] == "map.running" for event in world.log_events("inference")[events:])

    world.until("the MAP to run", runs)
    world.kill("inference")
    (result,) = world.result_of(series)
    world.until("inference to be idle", lambda: world.busy("inference") == 0)

    assert runs() == 2
    assert len(world.results(series)) == 1
    (output,) = result["outputs"]
    assert [found["imageSetId"] for found in world.image_sets(series)] == [output["image_set_id"]]
    assert world.dead("inference") == []


@pytest.mark.slow
def test_a_trainer_killed_in_the_middle_resumes_and_the_month_is_reported(world, tmp_path):
    """After SIGKILL no completed round is repeated; the report tells each round once, and shows the images."""
    world.put("gan/broken.dcm", b"\0" * 128 + b"DICM" + uuid.uuid4().bytes)  # for the report to tell of
    for path in sorted(write_cohort(tmp_path / "cohort", patients=6, slices=24, size=64)):
        for file in sorted(path.rglob("*.dcm")):
            world.put(f"gan/{uuid.uuid4()}.dcm", file.read_bytes())
    world.until("the arrays", lambda: len([k for k in world.keys("datasets/gan/") if k.endswith(".npy")]) == 6)
    request = TrainingRequest(
        request_id="killed", dataset="gan", overrides=TRAINING, threshold=0.01, max_rounds=3, n_images=9
    )
    world.send("training", TrainingRequested.of("models/killed", request, time=now()).body())
    first = world.until(
        "round 1", lambda: [k for k in world.keys("models/killed/rounds/1/") if k.endswith("evaluation.json")]
    )
    before = world.written(first[0])
    world.kill("trainer")
    completed = world.until("the training", lambda: "models/killed/completed.json" in world.keys("models/killed/"))
    world.until("the events", lambda: world.busy("training") == 0 and world.busy("reporting") == 0)
    month = f"{now():%Y-%m}"
    world.send("reporting", ReportRequested.of(f"reports/{month}", ReportRequest(month=month), time=now()).body())
    world.until("the report", lambda: f"reports/{month}.html" in world.keys("reports/"))
    report = world.document(f"reports/{month}.json")

    assert completed
    assert world.written(first[0]) == before
    (training,) = [t for t in report["training"] if t["request_id"] == "killed"]
    assert [round_["round"] for round_ in training["rounds"]] == [1, 2, 3]
    assert training["config"]["width"] == TRAINING["width"]
    assert report["rejections_by_reason"]
    html = world.s3.get_object(Bucket=world.bucket, Key=f"reports/{month}.html")["Body"].read().decode()
    assert "data:image/png;base64," in html
    assert world.dead("training") == world.dead("reporting") == []
    assert_no_log_line_names_a_patient(world)


def test_no_log_line_names_a_patient(world):
    """No name, id or birth date of any uploaded file is in anything that any process printed."""
    assert_no_log_line_names_a_patient(world)


def assert_no_log_line_names_a_patient(world):
    printed = {path.name: path.read_text() for path in world.stack.logs.iterdir()}
    traces = [PATIENT.patient_id, PATIENT.birth_date, *PATIENT.name.split("^"), *OTHERS]

    assert {"aws.log", "ingest.log", "inference.log", "trainer.log", "reporter.log"} <= set(printed)
    assert [(name, trace) for name, text in printed.items() for trace in traces if trace in text] == []
