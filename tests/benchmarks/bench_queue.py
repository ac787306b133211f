"""What the queue runtime costs: processor time of a client per 1,000 messages, against receive and delete alone.

The server is a process of its own, and so is each client, which counts its own processor time only, user and system.
"""

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from aiobotocore.session import get_session

from shared import log
from shared.aws import Aws, connect
from shared.config import ServiceSettings
from shared.messages import ReportRequest, ReportRequested
from shared.metrics import Metrics
from shared.queue import consume
from shared.queue.leases import LeaseKeeper
from shared.queue.sqs import batches, open_queue
from shared.queue.trace import new_traceparent

if TYPE_CHECKING:
    from types_aiobotocore_sqs import SQSClient

ROOT = Path(__file__).parent.parent.parent
QUEUE = "radqueue-bench"
MESSAGES, ROUNDS = 1_000, 11
"""Of each client; the first round warms up, and is not counted."""
HELD = 200
"""Messages whose lease is extended in a round."""
HELD_S = 10
MEMORY_MESSAGES, MEMORY_S = 100_000, 110.0
"""As many, or as many as the server lets through in this time."""
SAMPLES = 50
BACKLOG = 2_000
"""Messages that wait in the queue at most: the server gets slower with more."""
NOW = datetime(2026, 11, 2, tzinfo=UTC)
SETTINGS = ServiceSettings(poll_s=1)


def rows() -> list[dict[str, Any]]:
    """Run the clients in turn, a round each, then the long run, then the keepers; ratios are of medians."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        url = stack.enter_context(_server("tests.queue.fakesqs"))
        local = stack.enter_context(_server("deploy.local", "--port", "0", "--dir", folder))
        server = _Server(stack, url, local)
        ran = _in_turn(server, ("runtime", "bare", "same_client"), MESSAGES)
        rate = statistics.median(one["per_s"] for one in ran["runtime"])
        memory = server.long_run(min(MEMORY_MESSAGES, int(rate * MEMORY_S)))
        renewing = _in_turn(server, ("keeper", "bare_keeper"), HELD)

    cpu = {which: statistics.median(one["cpu_s"] for one in found) for which, found in ran.items()}
    renewal = {which: statistics.median(one["cpu_ms"] for one in found) for which, found in renewing.items()}
    what, n = "CPU of a client per 1,000 messages", MESSAGES * (ROUNDS - 1)
    return [
        _row(f"{what}, consume: typed, traced, metered, logged", cpu["runtime"], "s", n),
        _row(f"{what}, aiobotocore's receive and delete_message_batch", cpu["bare"], "s", n),
        _row(f"{what}, ratio", cpu["runtime"] / cpu["bare"], "x", n),
        _row(f"{what}, the same with the runtime's own client", cpu["same_client"], "s", n),
        _row(f"{what}, ratio to that", cpu["runtime"] / cpu["same_client"], "x", n),
        _row("messages per second, consume, one server process", rate, "1/s", n),
        _row("lease renewal per message, CPU", renewal["keeper"], "ms", HELD * (ROUNDS - 1)),
        _row("aiobotocore's change_message_visibility_batch, CPU", renewal["bare_keeper"], "ms", HELD * (ROUNDS - 1)),
        _row("lease renewal, ratio to that", renewal["keeper"] / renewal["bare_keeper"], "x", HELD * (ROUNDS - 1)),
        _row("resident memory per message, slope", memory["slope_bytes"], "B", int(memory["n"])),
        _row("resident memory at the end of that", memory["end_mib"], "MiB", int(memory["n"])),
    ]


def _in_turn(server: "_Server", clients: tuple[str, ...], n: int) -> dict[str, list[dict[str, float]]]:
    """Let the clients take rounds, so that what else the machine does meets them alike."""
    with contextlib.ExitStack() as stack:
        run = {which: stack.enter_context(server.client(which)) for which in clients}
        ran: dict[str, list[dict[str, float]]] = {which: [] for which in clients}
        for _ in range(ROUNDS):
            for which in clients:
                server.fill(n)
                ran[which].append(run[which](n))
    return {which: found[1:] for which, found in ran.items()}


def _row(what: str, value: float, unit: str, n: int) -> dict[str, Any]:
    return {"bench": "queue", "what": what, "value": value, "unit": unit, "n": n}


@contextlib.contextmanager
def _server(module: str, *arguments: str) -> Iterator[str]:
    """Run a server that says `ready URL`, and give its URL."""
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            word, _, url = process.stdout.readline().strip().partition(" ")
            if word != "ready":
                raise RuntimeError(f"{module} did not start")
            yield url
        finally:
            process.terminate()


class _Server:
    """The queue as whoever fills it sees it."""

    def __init__(self, stack: contextlib.ExitStack, url: str, cloudwatch_url: str) -> None:
        self._url = url
        self._environ = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ENDPOINT_URL_CLOUDWATCH": cloudwatch_url,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
        }
        self._sqs = stack.enter_context(
            contextlib.closing(
                boto3.client(
                    "sqs",
                    endpoint_url=url,
                    region_name="us-east-1",
                    aws_access_key_id="local",
                    aws_secret_access_key="local",
                )
            )
        )
        dead = self._sqs.create_queue(QueueName=f"{QUEUE}-dlq")["QueueUrl"]
        arn = self._sqs.get_queue_attributes(QueueUrl=dead, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
        policy = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": 50})
        self._queue_url = self._sqs.create_queue(QueueName=QUEUE, Attributes={"RedrivePolicy": policy})["QueueUrl"]

    def fill(self, n: int) -> None:
        """Send `n` different events."""
        bodies = (
            ReportRequested.of(f"bench/{index}", ReportRequest(), time=NOW)
            .model_copy(update={"traceparent": new_traceparent()})
            .body()
            for index in range(n)
        )
        for some in batches(bodies):
            entries = [{"Id": str(index), "MessageBody": body} for index, body in enumerate(some)]
            self._sqs.send_message_batch(QueueUrl=self._queue_url, Entries=entries)

    @contextlib.contextmanager
    def client(self, which: str) -> "Iterator[Callable[[int], dict[str, float]]]":
        """Start a client; give the function that has it consume n messages, and returns what it measured."""
        with self._start(which) as process:
            assert process.stdin
            answers = process.stdout
            assert answers

            def run(n: int) -> dict[str, float]:
                _ask(process, n)
                measured: dict[str, float] = json.loads(answers.readline())
                return measured

            yield run
            process.stdin.close()

    def long_run(self, n: int) -> dict[str, float]:
        """Run the runtime over `n` messages, which come while it runs."""
        sent = 0
        with self._start("memory") as process:
            _ask(process, n)
            while sent < n and process.poll() is None:
                room = min(BACKLOG - self._backlog(), n - sent)
                if room >= min(BACKLOG // 2, n - sent):
                    self.fill(room)
                    sent += room
                else:
                    time.sleep(0.1)
            told, _ = process.communicate()
        measured: dict[str, float] = json.loads(told)
        return measured

    def _backlog(self) -> int:
        asked: Any = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        answer = self._sqs.get_queue_attributes(QueueUrl=self._queue_url, AttributeNames=asked)
        return sum(map(int, answer["Attributes"].values()))

    def _start(self, which: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "tests.benchmarks.bench_queue", which]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | self._environ
        return subprocess.Popen(
            command, cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )


def _ask(process: "subprocess.Popen[str]", n: int) -> None:
    assert process.stdin
    process.stdin.write(f"{n}\n")
    process.stdin.flush()


# The clients.


async def _client(which: str) -> None:
    """Answer each number of messages on standard input with what consuming them took."""
    with Path(os.devnull).open("w") as nowhere:
        log.setup("bench", stream=nowhere)
        async with connect(os.environ) as aws:
            for line in sys.stdin:
                print(json.dumps(await CLIENTS[which](aws, int(line))), flush=True)  # noqa: T201 - told to the parent


class _Stopwatch:
    """Measures from the first message to the last, so that neither start nor drain counts."""

    def __init__(self) -> None:
        self._times: list[tuple[float, float]] = []

    def look(self) -> None:
        self._times.append((time.process_time(), time.perf_counter()))

    def per_thousand(self, n: int) -> dict[str, float]:
        (cpu, wall), (cpu_end, wall_end) = self._times[0], self._times[-1]
        return {"cpu_s": (cpu_end - cpu) * 1_000 / n, "per_s": n / (wall_end - wall)}


async def _runtime(aws: Aws, n: int) -> dict[str, float]:
    metrics, watch = Metrics(aws.cloudwatch), _Stopwatch()
    await _consume(aws, n, metrics, lambda n_handled: watch.look() if n_handled in (1, n) else None)
    found, before = watch.per_thousand(n), time.process_time()
    await metrics.flush()
    return found | {"cpu_s": found["cpu_s"] + (time.process_time() - before) * 1_000 / n}


async def _consume(aws: Aws, n: int, metrics: Metrics, each: Callable[[int], None]) -> None:
    """Consume `n` messages, telling `each` how many were handled."""
    stop = asyncio.Event()
    n_handled = 0

    async def handle(_: ReportRequested) -> None:
        nonlocal n_handled
        n_handled += 1
        each(n_handled)
        if n_handled == n:
            stop.set()

    await consume({ReportRequested: handle}, aws.sqs, QUEUE, settings=SETTINGS, stop=stop, metrics=metrics)


async def _bare(aws: Aws, n: int) -> dict[str, float]:
    """Receive and delete with a client as aiobotocore makes it."""
    create: Any = get_session().create_client
    async with create("sqs", region_name=aws.region) as sqs:
        return await _receive_and_delete(sqs, n)


async def _same_client(aws: Aws, n: int) -> dict[str, float]:
    """Receive and delete with the client that the runtime uses."""
    return await _receive_and_delete(aws.sqs, n)


async def _receive_and_delete(sqs: "SQSClient", n: int) -> dict[str, float]:
    url = (await sqs.get_queue_url(QueueName=QUEUE))["QueueUrl"]
    watch, n_received = _Stopwatch(), 0
    while n_received < n:
        received = await sqs.receive_message(
            QueueUrl=url,
            MaxNumberOfMessages=SETTINGS.slots,
            WaitTimeSeconds=SETTINGS.poll_s,
            VisibilityTimeout=SETTINGS.visibility_s,
        )
        watch.look()
        messages = received.get("Messages", [])
        if messages:
            entries: Any = [{"Id": str(i), "ReceiptHandle": one["ReceiptHandle"]} for i, one in enumerate(messages)]
            await sqs.delete_message_batch(QueueUrl=url, Entries=entries)
        n_received += len(messages)
    return watch.per_thousand(n)


async def _keeper(aws: Aws, n: int) -> dict[str, float]:
    """Extend `n` held messages once."""
    queue = await open_queue(aws.sqs, QUEUE, patience_s=0)
    extended, all_extended = 0, asyncio.Event()
    looks: list[float] = []

    def count(more: int) -> None:
        nonlocal extended
        extended += more
        looks.append(time.process_time())
        if extended >= n:
            all_extended.set()

    # With this lease and a keeper of twice the length, all are due at its first look.
    keeper = LeaseKeeper(queue, 2 * HELD_S, extended=count, lost=lambda: None)
    n_held = 0
    while n_held < n:
        for message in await queue.receive(10, wait_s=1, visibility_s=HELD_S):
            keeper.hold(message)
            n_held += 1
    running = asyncio.create_task(keeper.run())
    await all_extended.wait()
    running.cancel()
    return {"cpu_ms": (looks[-1] - looks[0]) * 1_000 / (n - 10)}  # from the first batch's end to the last one's


async def _bare_keeper(aws: Aws, n: int) -> dict[str, float]:
    """Extend `n` messages with a client as aiobotocore makes it."""
    create: Any = get_session().create_client
    async with create("sqs", region_name=aws.region) as sqs:
        url = (await sqs.get_queue_url(QueueName=QUEUE))["QueueUrl"]
        handles: list[str] = []
        while len(handles) < n:
            received = await sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10, VisibilityTimeout=HELD_S)
            handles += [message["ReceiptHandle"] for message in received.get("Messages", [])]
        looks: list[float] = []
        for some in batches(handles):
            entries = [
                {"Id": str(i), "ReceiptHandle": handle, "VisibilityTimeout": 2 * HELD_S}
                for i, handle in enumerate(some)
            ]
            await sqs.change_message_visibility_batch(QueueUrl=url, Entries=entries)
            looks.append(time.process_time())
    return {"cpu_ms": (looks[-1] - looks[0]) * 1_000 / (n - 10)}


async def _memory(aws: Aws, n: int) -> dict[str, float]:
    """Consume `n`, sending metrics as a service does; the slope is of the last four fifths."""
    metrics = Metrics(aws.cloudwatch)
    flushing = asyncio.create_task(metrics.keep_flushing(SETTINGS.metrics_flush_s, asyncio.Event()))
    points: list[tuple[int, float]] = []

    def sample(n_handled: int) -> None:
        if n_handled % (n // SAMPLES) == 0:
            points.append((n_handled, _resident_bytes()))

    await _consume(aws, n, metrics, sample)
    flushing.cancel()
    late = [point for point in points if point[0] > n / 5]
    slope = statistics.linear_regression(*zip(*late, strict=True)).slope
    return {"n": n, "slope_bytes": slope, "end_mib": _resident_bytes() / 2**20}


CLIENTS: Mapping[str, Any] = {
    "runtime": _runtime,
    "bare": _bare,
    "same_client": _same_client,
    "keeper": _keeper,
    "bare_keeper": _bare_keeper,
    "memory": _memory,
}


def _resident_bytes() -> float:
    """Return the resident set (proc_pid_statm(5), field 2)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asyncio.run(_client(sys.argv[1]))
    else:
        for row in rows():
            print(f"{row['what']:75} {row['value']:8.3f} {row['unit']:3} n={row['n']}")  # noqa: T201
