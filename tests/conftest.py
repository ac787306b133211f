"""Fixtures that more than one test folder uses."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

from deploy.topology import Topology
from shared.aws import Aws, connect
from shared.config import ServiceSettings
from tests.examples import register_profiles

ROOT = Path(__file__).parent.parent
STOP_TIMEOUT_S = 30

LONGEST_FIRST = (
    "test_journey.py",
    "chaos/test_services.py",
    "cli/test_map_commands.py",
    "trainer/test_training.py",
    "trainer/test_journey.py",
    "shared/test_once.py",
    "inference/test_runner.py",
    "inference/test_runner_processes.py",
    "cli/test_up.py",
    "trainer/test_distributed.py",
    "trainer/test_resume.py",
    "cli/test_map_build.py",
    "inference/test_container.py",
)
"""Files that take the longest. A file stays with one worker: begun late, it would be waited for by all the others."""

register_profiles()


@pytest.hookimpl(tryfirst=True)  # what is slow is left out by pytest's own hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and call slow whatever runs containers."""
    ranks = {ROOT / "tests" / name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))
    for item in items:
        if "engine" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@dataclass(frozen=True)
class LocalAws:
    """A running AWS on one machine, as its clients see it."""

    process: subprocess.Popen[str]
    directory: Path
    endpoint_url: str
    environ: dict[str, str]
    """What `local.env` says: all that a client needs in its environment."""

    @property
    def bucket(self) -> str:
        return self.environ["RADQUEUE_BUCKET"]

    @property
    def datastore_id(self) -> str:
        return self.environ["RADQUEUE_DATASTORE_ID"]

    @property
    def region(self) -> str:
        return self.environ["AWS_REGION"]

    @property
    def process_environ(self) -> dict[str, str]:
        """The whole environment of a subprocess that is to use this AWS and nothing of the user's."""
        return clean_environ() | self.environ

    def stop(self) -> int:
        """Stop it as an operator would, and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=STOP_TIMEOUT_S)
        sys.stderr.write(errors)
        return self.process.returncode


def clean_environ() -> dict[str, str]:
    """This process's environment without any AWS setting or proxy of the user's."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AWS_", "RADQUEUE_")) and not name.lower().endswith("_proxy")
    }


@pytest.fixture
def start_aws() -> Iterator[Callable[..., LocalAws]]:
    """Start an AWS of the test's own in a folder; whatever still runs at the end of the test is stopped."""
    started: list[LocalAws] = []

    def start(directory: Path, port: int = 0) -> LocalAws:
        started.append(start_local_aws(directory, port))
        return started[-1]

    yield start
    for aws in started:
        if aws.process.poll() is None:
            aws.stop()


def start_local_aws(directory: Path, port: int = 0) -> LocalAws:
    """Start AWS on this machine as a process of its own, and wait until it says that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy.local", "--port", str(port), "--dir", str(directory)],
        cwd=ROOT,
        env=clean_environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    # The line comes when the whole topology answers; the end of the stream comes when the process died first.
    word, _, endpoint_url = process.stdout.readline().strip().partition(" ")
    if word != "ready":
        process.kill()
        _, errors = process.communicate()
        pytest.fail(f"the local AWS did not start: {errors}")
    lines = (directory / "local.env").read_text().splitlines()
    return LocalAws(process, directory, endpoint_url, dict(line.split("=", 1) for line in lines))


@pytest.fixture(scope="session")
def local_aws(tmp_path_factory) -> Iterator[LocalAws]:
    """One AWS on this machine for the whole session; tests that could meet use keys, queues and stores of their own."""
    aws = start_local_aws(tmp_path_factory.mktemp("local_aws"))
    yield aws
    code = aws.stop()

    assert code == 0


@pytest.fixture
async def aws(local_aws, monkeypatch) -> AsyncIterator[Aws]:
    """Open clients of the local AWS; the environment of the test says what `local.env` says."""
    for name, value in local_aws.environ.items():
        monkeypatch.setenv(name, value)
    async with connect(os.environ) as clients:
        yield clients


@pytest.fixture
def own_queues(local_aws) -> ServiceSettings:
    """Settings that name four new queues, with dead-letter queues, so that tests do not meet in the shared ones."""
    prefix = f"test-{uuid.uuid4().hex[:8]}"
    names = {f"{role}_queue": f"{prefix}-{role}" for role in Topology.load().queues}
    with contextlib.closing(open_client(local_aws, "sqs")) as sqs:
        for name in names.values():
            dlq = sqs.create_queue(QueueName=f"{name}-dlq")["QueueUrl"]
            arn = sqs.get_queue_attributes(QueueUrl=dlq, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
            policy = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": 50})
            sqs.create_queue(QueueName=name, Attributes={"RedrivePolicy": policy, "VisibilityTimeout": "30"})
    short = {"poll_s": 1, "visibility_s": 10, "grace_s": 5, "retry_base_s": 0.5, "start_patience_s": 1}
    return ServiceSettings(bucket=local_aws.bucket, **short, **names)


@pytest.fixture
def aws_client(local_aws) -> Iterator[Callable[..., Any]]:
    """Open a boto3 client of the local AWS by its service's name; all are closed at the end of the test."""
    with contextlib.ExitStack() as stack:

        def client(service: str, aws: LocalAws = local_aws) -> Any:
            return stack.enter_context(contextlib.closing(open_client(aws, service)))

        yield client


def open_client(aws: LocalAws, service: str) -> Any:
    """Open a boto3 client; the caller closes it."""
    config = Config(
        inject_host_prefix=False,
        s3={"addressing_style": "path"},
        retries={"max_attempts": 0},
        max_pool_connections=64,
    )
    return boto3.client(
        service,
        endpoint_url=aws.endpoint_url,
        region_name=aws.region,
        aws_access_key_id=aws.environ["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=aws.environ["AWS_SECRET_ACCESS_KEY"],
        config=config,
    )


@pytest.fixture
def dicom_bytes() -> Callable[..., bytes]:
    """Make a small Part 10 CT instance; keyword arguments set attributes by their DICOM keywords."""

    def make(**attributes: Any) -> bytes:
        from pydicom.dataset import Dataset, FileMetaDataset  # noqa: PLC0415 - not every session has it
        from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid  # noqa: PLC0415

        dataset = Dataset()
        dataset.SOPClassUID = CTImageStorage
        for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
            setattr(dataset, keyword, generate_uid())
        dataset.Modality, dataset.PatientName, dataset.PatientID = "CT", "Made^Up", "P-1"
        dataset.StudyDate, dataset.StudyTime, dataset.StudyID = "20260102", "120000", "S-1"
        dataset.AccessionNumber, dataset.SeriesNumber, dataset.InstanceNumber = "A-1", 1, 1
        dataset.Rows = dataset.Columns = 8
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated = dataset.BitsStored = 16
        dataset.HighBit, dataset.PixelRepresentation = 15, 0
        dataset.PixelData = bytes(range(128))
        for keyword, value in attributes.items():
            setattr(dataset, keyword, value)
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        buffer = io.BytesIO()
        dataset.save_as(buffer, enforce_file_format=True)
        return buffer.getvalue()

    return make
