"""What every service does beside its work, through real processes."""

import asyncio
import contextlib
import json
import signal
import sys
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
import structlog
from aiohttp import web

from shared import spot
from shared.messages import ReportRequest, ReportRequested
from shared.queue import Publisher

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 60
NOTICE = {"action": "terminate", "time": "2026-11-02T08:22:00Z"}
WORKER = """
import asyncio
from shared.config import ServiceSettings
from shared.messages import ReportRequested
from shared.queue import consume
from shared.service import run

async def handle(request):
    print(request.data.month, flush=True)
    if request.data.month == "2026-12":
        await asyncio.sleep(3600)

async def serve(settings, aws, metrics, stop):
    handlers = {ReportRequested: handle}
    await consume(handlers, aws.sqs, settings.reporting_queue, settings=settings, stop=stop, metrics=metrics)

run("worker", ServiceSettings, serve)
"""


@dataclass
class Imds:
    """An instance metadata service, version 2: without a token of its own it answers nothing."""

    url: str = ""
    notice: dict | None = None
    misbehaviours: list[web.Response] = field(default_factory=list)
    """What it answers to the next looks instead."""
    tokens: set[str] = field(default_factory=set)
    looks: asyncio.Queue[int] = field(default_factory=asyncio.Queue)
    """The status of each answer about the notice."""

    async def token(self, request: web.Request) -> web.Response:
        if not 1 <= int(request.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "0")) <= 21_600:
            return web.Response(status=400)
        self.tokens.add(token := f"token-{len(self.tokens)}")
        return web.Response(text=token)

    async def instance_action(self, request: web.Request) -> web.Response:
        if self.misbehaviours:
            answer = self.misbehaviours.pop(0)
        elif request.headers.get("X-aws-ec2-metadata-token") not in self.tokens:
            answer = web.Response(status=401)
        elif self.notice is None:
            answer = web.Response(status=404)
        else:
            answer = web.json_response(self.notice)
        self.looks.put_nowait(answer.status)
        return answer


@pytest.fixture
async def imds() -> AsyncIterator[Imds]:
    """Serve on loopback until the end of the test."""
    served = Imds()
    app = web.Application()
    app.router.add_put("/latest/api/token", served.token)
    app.router.add_get("/latest/meta-data/spot/instance-action", served.instance_action)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    served.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield served
    await runner.cleanup()


@pytest.fixture
async def start(local_aws, own_queues, tmp_path):
    """Start a service whose handler never ends for December; what still runs at the end of the test is killed."""
    (tmp_path / "worker.py").write_text(WORKER)
    settings = {f"RADQUEUE_{name.upper()}": str(value) for name, value in own_queues}
    async with contextlib.AsyncExitStack() as stack:

        async def begin(**environ: str) -> asyncio.subprocess.Process:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                tmp_path / "worker.py",
                env=local_aws.process_environ | settings | {"PYTHONPATH": str(ROOT)} | environ,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            stack.push_async_callback(_end, process)
            return process

        yield begin


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
        await process.communicate()


def requested(month: str) -> ReportRequested:
    return ReportRequested.of("reports", ReportRequest(month=month), time=datetime(2026, 12, 2, tzinfo=UTC))


async def events(process: asyncio.subprocess.Process) -> list[str]:
    """Wait for the end; return the names of what was logged."""
    async with asyncio.timeout(TIMEOUT_S):
        _, errors = await process.communicate()
    return [json.loads(line)["event"] for line in errors.decode().splitlines()]


async def test_a_spot_interruption_notice_drains_the_service(aws, own_queues, start, imds):
    """No notice changes nothing; with one, the handler is cancelled, its message visible again, the exit code 0."""
    await Publisher(aws.sqs, own_queues)(requested("2026-12"))
    process = await start(
        RADQUEUE_SPOT_NOTICE="true", RADQUEUE_GRACE_S="0.2", AWS_EC2_METADATA_SERVICE_ENDPOINT=f"{imds.url}/"
    )
    async with asyncio.timeout(TIMEOUT_S):
        assert await process.stdout.readline() == b"2026-12\n"
        assert await imds.looks.get() == 404
    running = process.returncode is None
    imds.notice = NOTICE
    told = await events(process)
    url = (await aws.sqs.get_queue_url(QueueName=own_queues.reporting_queue))["QueueUrl"]
    answer = {}
    async with asyncio.timeout(TIMEOUT_S):  # it stays hidden until the poll that was under way must have ended
        while "Messages" not in answer:
            answer = await aws.sqs.receive_message(QueueUrl=url, WaitTimeSeconds=1)

    assert running
    assert process.returncode == 0
    assert [one for one in told if one.startswith(("spot.", "queue.", "service."))] == [
        "service.started",
        "queue.consuming",
        "spot.interrupted",
        "queue.draining",
        "service.stopped",
    ]
    assert imds.looks.get_nowait() == 200


async def test_without_the_setting_nobody_asks_for_a_notice(aws, own_queues, start, imds):
    """It is off by default: a service that handles messages never speaks to the metadata service."""
    imds.notice = NOTICE
    await Publisher(aws.sqs, own_queues)(requested("2026-11"))
    process = await start(AWS_EC2_METADATA_SERVICE_ENDPOINT=imds.url)
    async with asyncio.timeout(TIMEOUT_S):
        await process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    told = await events(process)

    assert process.returncode == 0
    assert not [one for one in told if one.startswith("spot.")]
    assert not imds.tokens


async def test_a_service_works_where_no_metadata_service_answers(aws, own_queues, start):
    """A connection that is refused is told once; messages are handled, and SIGTERM ends the service as ever."""
    process = await start(RADQUEUE_SPOT_NOTICE="true", AWS_EC2_METADATA_SERVICE_ENDPOINT="http://127.0.0.1:1")
    await Publisher(aws.sqs, own_queues)(requested("2026-11"))
    async with asyncio.timeout(TIMEOUT_S):
        said = await process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    told = await events(process)

    assert (said, process.returncode) == (b"2026-11\n", 0)
    assert [one for one in told if one.startswith("spot.")] == ["spot.metadata_unusable"]


async def test_a_metadata_service_that_misbehaves_is_told_once_and_asked_again(imds, monkeypatch):
    """Errors and answers that are none neither end the watch nor set the stop; the notice after them does."""
    monkeypatch.setattr(spot, "LOOK_S", 0.001)
    odd = [{"status": 500}, {"text": "<html>"}, {"text": "{}"}, {"status": 401}, {"text": '{"action": "stop"}'}]
    imds.misbehaviours = [web.Response(**answer) for answer in odd]
    imds.notice = NOTICE
    stop = asyncio.Event()
    with structlog.testing.capture_logs() as lines:
        async with asyncio.timeout(TIMEOUT_S):
            await spot.watch({spot.ENDPOINT: imds.url}, stop)

    assert stop.is_set()
    assert [line["event"] for line in lines] == ["spot.metadata_unusable", "spot.interrupted"]
    assert [imds.looks.get_nowait() for _ in range(imds.looks.qsize())] == [500, 200, 200, 401, 200, 200]


async def test_a_grace_period_that_outlasts_the_notice_is_misconfigured(start):
    """The two minutes of the notice hold the grace period, or the service does not start."""
    process = await start(RADQUEUE_SPOT_NOTICE="true", RADQUEUE_GRACE_S="101")
    async with asyncio.timeout(TIMEOUT_S):
        _, errors = await process.communicate()

    assert process.returncode == 2
    assert errors.decode() == "radqueue worker: RADQUEUE_GRACE_S: a spot instance leaves at most 100 s.\n"


async def logged(process: asyncio.subprocess.Process, event: str) -> None:
    """Wait until the service logs `event`."""
    async with asyncio.timeout(TIMEOUT_S):
        while json.loads(await process.stderr.readline())["event"] != event:
            pass


async def test_a_stop_is_heard_while_the_queue_is_waited_for(start):
    """A service that waits for what is not there ends at once, and cleanly."""
    process = await start(RADQUEUE_REPORTING_QUEUE="nobody-creates-this", RADQUEUE_START_PATIENCE_S="3600")
    await logged(process, "queue.waiting")
    process.send_signal(signal.SIGTERM)

    assert await events(process) == ["service.stopped"]
    assert process.returncode == 0


async def test_a_stop_is_heard_while_the_bucket_is_waited_for(start):
    """Also before anything answers at all."""
    process = await start(AWS_ENDPOINT_URL="http://127.0.0.1:9", RADQUEUE_START_PATIENCE_S="3600")
    await logged(process, "service.waiting")
    process.send_signal(signal.SIGTERM)

    assert (await events(process))[-1] == "service.stopped"
    assert process.returncode == 0


async def test_a_service_waits_for_a_bucket_that_is_being_created(start, aws_client):
    """An AWS on one machine creates it while services start already."""
    bucket = f"late-{uuid.uuid4().hex}"
    process = await start(RADQUEUE_BUCKET=bucket, RADQUEUE_START_PATIENCE_S="60")
    await logged(process, "service.waiting")
    aws_client("s3").create_bucket(Bucket=bucket)
    await logged(process, "queue.consuming")
    process.send_signal(signal.SIGTERM)
    await events(process)

    assert process.returncode == 0


async def test_a_bucket_that_never_comes_is_a_misconfiguration(start):
    """The patience has an end, and the text names the setting."""
    process = await start(RADQUEUE_BUCKET="nobody-creates-this", RADQUEUE_START_PATIENCE_S="0")
    async with asyncio.timeout(TIMEOUT_S):
        _, errors = await process.communicate()

    assert process.returncode == 2
    assert "radqueue worker: RADQUEUE_BUCKET: " in errors.decode()
