"""The queue runtime, against SQS over HTTP: what becomes of a message, however its handler ends."""

import asyncio
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest

from shared.config import Misconfigured
from shared.errors import Continue, Unavailable, Unprocessable
from shared.messages import ReportRequest, ReportRequested, TrainingRequest, TrainingRequested
from shared.queue import Fate, Publisher, consume, fate_of, remaining_s
from shared.queue import circuit as circuit_module
from shared.queue.circuit import FAILURES, FIRST_PAUSE_S, LONGEST_PAUSE_S, Circuit
from shared.queue.sqs import SqsQueue

NOW = datetime(2026, 11, 2, tzinfo=UTC)


def report(month: str = "2026-11") -> ReportRequested:
    return ReportRequested.of(f"reports/{month}", ReportRequest(month=month), time=NOW)


@dataclass
class Running:
    """A consumer in the background, and what its handler saw."""

    seen: list = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task | None = None

    async def saw(self, count: int) -> list:
        async with asyncio.timeout(30), self.changed:
            await self.changed.wait_for(lambda: len(self.seen) >= count)
        return self.seen

    async def note(self, event) -> None:
        async with self.changed:
            self.seen.append(event)
            self.changed.notify_all()

    async def drained(self) -> None:
        self.stop.set()
        async with asyncio.timeout(30):
            await self.task


@pytest.fixture
async def start(aws, own_queues):
    """Start a consumer of the reporting queue; `handler` runs after the event is noted."""
    started = []

    def begin(handler=None, **settings) -> Running:
        running = Running()

        async def handle(event) -> None:
            await running.note(event)
            if handler is not None:
                await handler(event)

        chosen = own_queues.model_copy(update=settings)
        running.task = asyncio.create_task(
            consume({ReportRequested: handle}, aws.sqs, chosen.reporting_queue, settings=chosen, stop=running.stop)
        )
        started.append(running)
        return running

    yield begin
    for running in started:
        await running.drained()


async def depth(aws, name: str) -> tuple[int, int]:
    """Messages in a queue: (visible, in flight or delayed)."""
    url = (await aws.sqs.get_queue_url(QueueName=name))["QueueUrl"]
    found = (await aws.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"]))["Attributes"]
    hidden = int(found["ApproximateNumberOfMessagesNotVisible"]) + int(found["ApproximateNumberOfMessagesDelayed"])
    return int(found["ApproximateNumberOfMessages"]), hidden


async def becomes(aws, name: str, expected: tuple[int, int]) -> None:
    """Return when the queue holds `expected`; fail after 30 s."""
    async with asyncio.timeout(30):
        while await depth(aws, name) != expected:
            await asyncio.sleep(0.02)


async def dead_letter(aws, name: str) -> dict:
    """Receive the one message of the dead-letter queue of `name`."""
    url = (await aws.sqs.get_queue_url(QueueName=f"{name}-dlq"))["QueueUrl"]
    response = await aws.sqs.receive_message(QueueUrl=url, MessageAttributeNames=["All"], WaitTimeSeconds=20)
    (message,) = response["Messages"]
    return {"body": message["Body"]} | {k: v["StringValue"] for k, v in message["MessageAttributes"].items()}


async def send(aws, name: str, body: str) -> None:
    url = (await aws.sqs.get_queue_url(QueueName=name))["QueueUrl"]
    await aws.sqs.send_message(QueueUrl=url, MessageBody=body)


@pytest.mark.parametrize(
    ("error", "receive_count", "fate"),
    [
        (None, 1, Fate.DELETE),
        (Unprocessable("x"), 1, Fate.DEAD_LETTER),
        (Unavailable("x"), 49, Fate.RETRY),
        (asyncio.CancelledError(), 1, Fate.RELEASE),
        (Continue(), 1, Fate.CONTINUE),
        (KeyError("x"), 1, Fate.RETRY),
        (KeyError("x"), 2, Fate.RETRY),
        (KeyError("x"), 3, Fate.DEAD_LETTER),
    ],
)
def test_the_fate_follows_from_how_the_handler_ended(error, receive_count, fate):
    """The table of the contract."""
    assert fate_of(error, receive_count) is fate


async def test_a_handled_message_is_deleted_and_carries_its_trace(aws, own_queues, start):
    """A published event arrives equal, with a trace, and is gone from the queue."""
    running = start()
    await Publisher(aws.sqs, own_queues)(report())
    (seen,) = await running.saw(1)

    assert seen.model_copy(update={"traceparent": None}) == report()
    assert seen.traceparent.count("-") == 3
    await becomes(aws, own_queues.reporting_queue, (0, 0))


async def test_what_a_handler_publishes_carries_on_its_trace(aws, own_queues, start):
    """The trace goes from the message that is handled into the message that is sent."""
    publish = Publisher(aws.sqs, own_queues)

    async def handler(event) -> None:
        if event.data.month == "2026-11":
            await publish(report("2026-12"))

    running = start(handler)
    await publish(report())
    first, second = await running.saw(2)

    assert second.traceparent == first.traceparent


@pytest.mark.parametrize(
    ("body", "reason_code"),
    [
        ("not json DOE^JANE", "not_json"),
        ('{"specversion": "1.0", "type": "x"}', "unknown_type"),
        (
            TrainingRequested.of("m", TrainingRequest(request_id="r", dataset="d"), time=NOW).body(),
            "wrong_queue",
        ),
    ],
)
async def test_a_poison_message_is_dead_lettered_with_its_reason(aws, own_queues, start, body, reason_code):
    """The body is kept as it came, the reason stands beside it, and the log does not hold it."""
    start()
    await send(aws, own_queues.reporting_queue, body)
    dead = await dead_letter(aws, own_queues.reporting_queue)

    assert dead["body"] == body
    assert dead["reason_code"] == reason_code
    await becomes(aws, own_queues.reporting_queue, (0, 0))


async def test_an_unavailable_dependency_is_tried_again(aws, own_queues, start):
    """`Unavailable` makes the message come again until it works, and nothing is dead-lettered."""
    attempts = []

    async def handler(_) -> None:
        attempts.append(1)
        if len(attempts) < 4:
            raise Unavailable("not yet")

    running = start(handler)
    await Publisher(aws.sqs, own_queues)(report())
    await running.saw(4)

    await becomes(aws, own_queues.reporting_queue, (0, 0))
    assert await depth(aws, f"{own_queues.reporting_queue}-dlq") == (0, 0)


async def test_continued_work_comes_as_a_new_message_with_the_same_event(aws, own_queues, start):
    """A handler that asks to continue gets the same event again, in the same trace, in a message never received."""
    attempts = []

    async def handler(_) -> None:
        attempts.append(remaining_s())
        if len(attempts) < 3:
            raise Continue

    running = start(handler)
    await Publisher(aws.sqs, own_queues)(report())
    seen = await running.saw(3)

    assert len({event.model_dump_json() for event in seen}) == 1
    assert all(12 * 3600 - 60 < left <= 12 * 3600 for left in attempts)
    await becomes(aws, own_queues.reporting_queue, (0, 0))
    assert await depth(aws, f"{own_queues.reporting_queue}-dlq") == (0, 0)


def test_a_circuit_opens_when_everything_fails_alike_and_closes_with_one_success():
    """Ten endings in a row for one reason open it, its pauses grow, and anything good or different closes it."""
    circuit = Circuit()
    opened = [circuit.note("S3") for _ in range(FAILURES + 2)]

    assert opened.index(True) == FAILURES - 1
    assert opened.count(True) == 1
    assert circuit.pause_s == 4 * FIRST_PAUSE_S
    for _ in range(2000):
        circuit.note("S3")
    assert circuit.pause_s == LONGEST_PAUSE_S
    circuit.note(None)
    assert not circuit.is_open
    for _ in range(FAILURES):
        circuit.note("S3")
        circuit.note("not_json")
    assert not circuit.is_open


async def test_an_open_circuit_lets_one_message_through_and_closes_when_it_works(aws, own_queues, start, monkeypatch):
    """While all handlers fail alike messages stay in the queue; when one succeeds the rest flows."""
    monkeypatch.setattr(circuit_module, "FIRST_PAUSE_S", 0.2)
    broken = True

    async def handler(_) -> None:
        if broken:
            raise Unavailable("the archive is down")

    running = start(handler, retry_base_s=0.01)
    publish = Publisher(aws.sqs, own_queues)
    for month in range(1, 13):
        await publish(report(f"2026-{month:02}"))
    await running.saw(FAILURES + 2)
    broken = False

    await becomes(aws, own_queues.reporting_queue, (0, 0))
    assert await depth(aws, f"{own_queues.reporting_queue}-dlq") == (0, 0)


async def test_a_bug_is_dead_lettered_at_its_third_receive_without_its_text(aws, own_queues, start):
    """The dead letter names type and place of the exception, not its words."""

    async def handler(_) -> None:
        raise KeyError("DOE^JANE")

    running = start(handler)
    await Publisher(aws.sqs, own_queues)(report())
    dead = await dead_letter(aws, own_queues.reporting_queue)

    assert len(running.seen) == 3
    assert (dead["reason_code"], dead["error_type"], dead["receive_count"]) == ("bug", "KeyError", "3")
    assert dead["where"].startswith("test_queue.py:")
    assert "DOE" not in json.dumps(dead)


async def test_a_long_job_is_not_given_to_another_worker(aws, own_queues, start):
    """A handler that runs longer than the visibility timeout keeps its message while another worker polls."""
    done = asyncio.Event()

    async def handler(_) -> None:
        await asyncio.wait_for(done.wait(), 25)

    first = start(handler, visibility_s=2)
    second = start(handler, visibility_s=2)
    await Publisher(aws.sqs, own_queues)(report())
    started = asyncio.get_running_loop().time()
    while asyncio.get_running_loop().time() < started + 7:
        assert len(first.seen) + len(second.seen) <= 1
        await asyncio.sleep(0.1)
    done.set()

    await becomes(aws, own_queues.reporting_queue, (0, 0))
    assert len(first.seen) + len(second.seen) == 1


async def test_no_more_messages_are_fetched_than_slots_are_free(aws, own_queues, start):
    """With two slots taken the rest stays visible in the queue, for other workers."""
    done = asyncio.Event()

    async def handler(_) -> None:
        await done.wait()

    running = start(handler, slots=2)
    publish = Publisher(aws.sqs, own_queues)
    for month in range(1, 6):
        await publish(report(f"2026-{month:02}"))
    await running.saw(2)

    assert await depth(aws, own_queues.reporting_queue) == (3, 2)
    done.set()
    await running.saw(5)
    await becomes(aws, own_queues.reporting_queue, (0, 0))


async def test_a_drain_lets_handlers_finish_within_the_grace_period(aws, own_queues, start):
    """A handler that ends in time is deleted; nothing new is fetched."""
    done = asyncio.Event()

    async def handler(_) -> None:
        await done.wait()

    running = start(handler)
    await Publisher(aws.sqs, own_queues)(report())
    await running.saw(1)
    running.stop.set()
    done.set()
    await running.drained()

    assert await depth(aws, own_queues.reporting_queue) == (0, 0)


async def test_a_stop_with_full_slots_gives_nothing_back_that_is_running(aws, own_queues, start):
    """While the last handler ends within the grace period its message stays hidden from other workers."""
    done = asyncio.Event()

    async def handler(_) -> None:
        await done.wait()

    running = start(handler, slots=1)
    await Publisher(aws.sqs, own_queues)(report())
    await running.saw(1)
    running.stop.set()
    for _ in range(20):
        assert await depth(aws, own_queues.reporting_queue) == (0, 1)
        await asyncio.sleep(0.05)
    done.set()
    await running.drained()

    assert await depth(aws, own_queues.reporting_queue) == (0, 0)


async def test_a_drain_cancels_what_takes_too_long_and_makes_it_visible(aws, own_queues, start):
    """After the grace period the handler is cancelled, and the message is there as soon as no poll of ours runs."""
    running = start(lambda _: asyncio.sleep(600), grace_s=0.2)
    await Publisher(aws.sqs, own_queues)(report())
    await running.saw(1)
    await running.drained()

    await becomes(aws, own_queues.reporting_queue, (1, 0))


async def test_a_lost_lease_cancels_the_handler_and_deletes_nothing(aws, own_queues, start, monkeypatch):
    """Where SQS says that the handle is not valid any more, the handler is told and its message is left alone."""
    told = asyncio.Event()

    async def handler(_) -> None:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            told.set()
            raise

    async def refuse(self, messages, timeout_s) -> list:
        return messages

    monkeypatch.setattr(SqsQueue, "change_visibility", refuse)
    running = start(handler, visibility_s=3)
    await Publisher(aws.sqs, own_queues)(report())
    await running.saw(1)
    async with asyncio.timeout(20):
        await told.wait()
    running.stop.set()
    await running.drained()

    assert sum(await depth(aws, own_queues.reporting_queue)) == 1


async def test_an_outage_does_not_end_the_consumer(aws, own_queues, start, monkeypatch):
    """Polls that fail are tried again for as long as they fail, and then messages flow."""
    failures = []
    receive = aws.sqs.receive_message

    async def flaky(**arguments):
        if len(failures) < 3:
            failures.append(1)
            raise ConnectionResetError
        return await receive(**arguments)

    monkeypatch.setattr(aws.sqs, "receive_message", flaky)
    running = start()
    await Publisher(aws.sqs, own_queues)(report())
    await running.saw(1)

    assert len(failures) == 3
    await becomes(aws, own_queues.reporting_queue, (0, 0))


async def test_an_event_that_sqs_would_not_take_is_unprocessable(aws, own_queues):
    """Sending it again would be refused again, so its message is dead-lettered with the reason."""
    request = TrainingRequest(request_id="r", dataset="d", overrides={"x" * 2**20: 1})

    with pytest.raises(Unprocessable, match="message_too_large"):
        await Publisher(aws.sqs, own_queues)(TrainingRequested.of("m", request, time=NOW))


async def test_a_queue_that_cannot_be_published_to_is_a_misconfiguration(aws, own_queues):
    """A wrong queue name is told at the start, not after the work."""
    wrong = own_queues.model_copy(update={"reporting_queue": "no-such-queue"})
    with pytest.raises(Misconfigured, match="RADQUEUE_REPORTING_QUEUE"):
        await Publisher.open(aws.sqs, wrong, ReportRequested)

    await Publisher.open(aws.sqs, own_queues, ReportRequested, TrainingRequested)


async def test_a_queue_without_a_dead_letter_queue_is_a_misconfiguration(aws, own_queues):
    """Nothing is consumed where a bad message could only be lost."""
    with pytest.raises(Misconfigured, match="redrive policy"):
        await consume({}, aws.sqs, f"{own_queues.reporting_queue}-dlq", settings=own_queues, stop=asyncio.Event())
