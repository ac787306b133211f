"""The worker as a process, with the MAP that ships, over SQS, S3 and HealthImaging."""

import asyncio
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from services.inference.__main__ import serve
from services.inference.records import Outputs, Routing, routing_prefix
from services.inference.settings import InferenceSettings
from shared.config import ServiceSettings, load
from shared.messages import InferenceCompleted, MapRejected, MapUpdated, decode
from shared.metrics import Metrics
from shared.phantom import write_ct_series

TIMEOUT_S = 120
CLOSED_URL = "http://127.0.0.1:9/datastore/none"
"""Nothing listens on the discard port."""

pytestmark = pytest.mark.asyncio(loop_scope="session")


@dataclass
class Queues:
    """The worker's own queues, as its neighbours see them."""

    sqs: Any
    settings: ServiceSettings

    def url(self, role):
        return self.sqs.get_queue_url(QueueName=getattr(self.settings, f"{role}_queue"))["QueueUrl"]

    def send(self, event):
        self.sqs.send_message(QueueUrl=self.url("inference"), MessageBody=event.body())

    async def receive(self, role):
        """Return the next message of a queue, decoded."""
        return await asyncio.to_thread(self._receive, self.url(role))

    def _receive(self, url):
        until = time.monotonic() + TIMEOUT_S
        while time.monotonic() < until:
            for message in self.sqs.receive_message(QueueUrl=url, WaitTimeSeconds=2).get("Messages", []):
                self.sqs.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
                return decode(message["Body"])
        return pytest.fail(f"nothing came within {TIMEOUT_S} s")


@pytest.fixture
def queues(aws_client, own_queues) -> Queues:
    return Queues(aws_client("sqs"), own_queues)


@contextlib.contextmanager
def running(environ) -> Iterator[subprocess.Popen[str]]:
    """Run a worker, which is killed where the test did not end it."""
    with subprocess.Popen(
        [sys.executable, "-m", "services.inference"], env=environ, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def environ(local_aws, own_queues, tmp_path) -> dict[str, str]:
    """The environment of a worker with queues and a folder of its own."""
    settings = own_queues.model_dump(exclude={"slots"}) | {"work_dir": tmp_path / "work"}
    return local_aws.process_environ | {f"RADQUEUE_{name.upper()}": str(value) for name, value in settings.items()}


@pytest.fixture
def ct_files(tmp_path) -> list[bytes]:
    """A series that the MAP that ships takes."""
    return [path.read_bytes() for path in sorted(write_ct_series(tmp_path / "ct", slices=6, size=64).iterdir())]


async def test_a_settled_series_becomes_a_segmentation_in_healthimaging(worker, environ, queues, ct_files, tmp_path):
    """One message leads to a SEG at the target and an event; the worker stops in order, and names no patient."""
    revision = await worker.store_series(files=ct_files)
    queues.send(worker.ready(revision))
    with running(environ) as process:
        event = await queues.receive("reporting")
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=TIMEOUT_S)
    lines = [json.loads(line) for line in said.splitlines()]
    prefix = routing_prefix(worker.ready(revision).data)
    routing = Routing.model_validate_json(await worker.objects.get(f"{prefix}routing.json"))
    instances = await worker.web.search_instances(revision.study_uid)

    assert isinstance(event, InferenceCompleted)
    assert [one.map for one in routing.maps] == ["ct_tissues"]
    assert [one.sop_class_uid for one in event.data.outputs] == ["1.2.840.10008.5.1.4.1.1.66.4"]
    assert event.data.outputs[0].image_set_id
    assert [one["00080018"]["Value"][0] for one in instances] == [event.data.outputs[0].sop_instance_uid]
    assert process.returncode == 0
    assert [line["event"] for line in lines][-1] == "service.stopped"
    assert "PHANTOM" not in said
    assert list((tmp_path / "work").iterdir()) == []


async def test_a_worker_that_is_killed_between_outputs_and_push_leaves_its_instances_to_the_next(
    worker, environ, queues, ct_files
):
    """The first worker's target does not answer, and SIGKILL ends it; the second pushes what the first one made."""
    revision = await worker.store_series(files=ct_files)
    queues.send(worker.ready(revision))
    prefix = routing_prefix(worker.ready(revision).data)
    with running(environ | {"RADQUEUE_DICOMWEB_URL": CLOSED_URL}) as process:
        async with asyncio.timeout(TIMEOUT_S):
            while not (made := [key for key in await worker.keys(prefix) if key.endswith("/outputs.json")]):
                await asyncio.sleep(0.1)
        process.kill()
    outputs = Outputs.model_validate_json(await worker.objects.get(prefix + made[0]))
    with running(environ):
        event = await queues.receive("reporting")
    at_target = await worker.web.search_instances(revision.study_uid)
    attempts = {key.split("/")[2] for key in await worker.keys(prefix) if "/attempts/" in key}

    assert process.returncode == -signal.SIGKILL
    assert [one.sop_instance_uid for one in event.data.outputs] == [one.sop_instance_uid for one in outputs.outputs]
    assert [one["00080018"]["Value"][0] for one in at_target] == [one.sop_instance_uid for one in outputs.outputs]
    assert len(attempts) == 1


async def test_a_folder_serves_as_it_was_until_a_good_version_is_in_it(worker, clients, environ, queues, tmp_path):
    """Also where each study has a process of its own: a version that was rejected has no part in any result."""
    found = worker.maps["capture"]
    shutil.copytree(found.map.place, tmp_path / "capture", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "maps.yaml").write_text(yaml.safe_dump({"maps": [found.route.model_dump(mode="json")]}))
    environ |= {"RADQUEUE_MAPS_FILE": str(tmp_path / "maps.yaml"), "RADQUEUE_RECYCLE_AFTER": "1"}
    environ |= {"RADQUEUE_MAP_VERSIONS_LOOK_S": "1", "RADQUEUE_MAPS_LOOK_S": "1"}
    series = [await worker.store_series() for _ in range(3)]
    app = tmp_path / "capture" / "app.py"
    texts = [app.read_text(), app.read_text() + "raise RuntimeError\n", app.read_text() + "# mended\n"]
    metrics, stop = Metrics(clients.cloudwatch), asyncio.Event()
    serving = asyncio.create_task(serve(load(InferenceSettings, environ), clients, metrics, stop))
    seen = []
    for text, revision in zip(texts, series, strict=True):
        if text != app.read_text():
            app.write_text(text)
            seen.append(await queues.receive("reporting"))
        queues.send(worker.request(revision))
        seen.append(await queues.receive("reporting"))
    stop.set()
    await asyncio.wait_for(serving, TIMEOUT_S)
    first, rejected, second, updated, third = seen

    assert [type(event) for event in (rejected, updated)] == [MapRejected, MapUpdated]
    assert {type(event) for event in (first, second, third)} == {InferenceCompleted}
    assert first.data.map_digest == second.data.map_digest == rejected.data.serving_digest
    assert second.data.map_digest != third.data.map_digest == updated.data.map_digest
    assert [event.data.inputs[0].series_uid for event in (first, second, third)] == [one.series_uid for one in series]
