"""The queue runtime: receives messages, runs handlers, and decides what becomes of each message.

Theory of operation. `consume` polls one queue for as many messages as it has free slots. Each message runs in a task of
its own. One keeper task extends the visibility of all messages in flight, so a long job is never given to another
worker while this process lives, and is given to one within the visibility timeout after it died. How the handler ends
decides the message's fate, by the one table `FATES`. When `stop` is set no new poll begins, the poll in flight is let
finish and its messages are returned at once (an abandoned poll could take a message along into nowhere), handlers get
the grace period, are then cancelled, and their messages made visible.

SQS delivers at least once and out of order: a handler may run twice, also at the same time on two machines.

IAM: sqs:ReceiveMessage, sqs:DeleteMessage, sqs:ChangeMessageVisibility, sqs:GetQueueUrl, sqs:GetQueueAttributes on the
queue; sqs:SendMessage on its dead-letter queue and on the queues that handlers publish to. The queue needs a redrive
policy with a high maxReceiveCount (50): it is only the backstop.
"""

import asyncio
import contextlib
import json
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Protocol

import structlog
from botocore.exceptions import BotoCoreError, ClientError

from shared.config import Misconfigured, ServiceSettings
from shared.errors import Unavailable, Unprocessable, place_of
from shared.log import get_logger
from shared.messages import Event, Message, Queue, decode

if TYPE_CHECKING:
    from types_aiobotocore_sqs import SQSClient

BATCH = 10
"""Entries that one SQS batch call takes."""
DELETE_WINDOW_S = 0.1
BUG_RECEIVES = 3
"""A message whose handler raises a bug goes to the dead-letter queue at this receive."""
LONGEST_RETRY_S = 300.0
LONGEST_BACKOFF_S = 30.0
LONGEST_DELAY_S = 900
"""The longest DelaySeconds that SQS takes."""
AWS_ERRORS = (BotoCoreError, ClientError, OSError, TimeoutError)

Handler = Callable[[Any], Awaitable[None]]
traceparent: ContextVar[str | None] = ContextVar("traceparent", default=None)
log = get_logger()


class Fate(Enum):
    """What becomes of a message."""

    DELETE = auto()
    DEAD_LETTER = auto()
    RETRY = auto()
    RELEASE = auto()


def fate_of(error: BaseException | None, receive_count: int) -> Fate:
    """Decide a message's fate from how its handler ended and how often the message was received."""
    for kind, fate in FATES:
        if isinstance(error, kind):
            return fate
    return Fate.DEAD_LETTER if receive_count >= BUG_RECEIVES else Fate.RETRY


FATES: tuple[tuple[type, Fate], ...] = (
    (type(None), Fate.DELETE),
    (Unprocessable, Fate.DEAD_LETTER),
    (Unavailable, Fate.RETRY),
    (asyncio.CancelledError, Fate.RELEASE),
)
"""Anything else is a bug: retried, and dead-lettered at its third receive."""


class Publish(Protocol):
    """Sends an event to the queues that its class names."""

    async def __call__(self, event: Event, *, delay_s: int = 0) -> None:
        """Send `event`, visible after `delay_s` seconds (at most 900). Raises `Unavailable`."""


class Publisher:
    """`Publish` over SQS; the trace of the message being handled goes along."""

    def __init__(self, sqs: "SQSClient", settings: ServiceSettings) -> None:
        """Take an open client and the names of the queues."""
        self._sqs = sqs
        self._settings = settings
        self._urls: dict[Queue, str] = {}

    async def __call__(self, event: Event, *, delay_s: int = 0) -> None:
        """Send `event` to each of its queues."""
        traced = event.model_copy(update={"traceparent": event.traceparent or traceparent.get() or new_traceparent()})
        try:
            for queue in type(event).queues:
                url = await self._url(queue)
                await self._sqs.send_message(QueueUrl=url, MessageBody=traced.body(), DelaySeconds=delay_s)
        except AWS_ERRORS as error:
            raise Unavailable(f"SQS: {_code(error)}") from None
        log.info("event.published", type=event.type, subject=event.subject, event_id=event.id, delay_s=delay_s)

    async def _url(self, queue: Queue) -> str:
        if queue not in self._urls:
            name: str = getattr(self._settings, f"{queue}_queue")
            response = await self._sqs.get_queue_url(QueueName=name)
            self._urls[queue] = response["QueueUrl"]
        return self._urls[queue]


def new_traceparent() -> str:
    """Return a W3C trace context with a new trace id (https://www.w3.org/TR/trace-context/)."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"


async def consume(
    handlers: Mapping[type[Message], Handler],
    sqs: "SQSClient",
    queue: str,
    *,
    settings: ServiceSettings,
    stop: asyncio.Event,
) -> None:
    """Handle the messages of `queue` until `stop` is set, then drain and return.

    `handlers` maps a message's class to the async function that handles it; a class that is not there is dead-lettered.

    Raises:
        Misconfigured: the queue or its dead-letter queue does not exist.
    """
    url, dlq_url = await _queue_urls(sqs, queue)
    consumer = _Consumer(handlers, sqs, url, dlq_url, settings, stop)
    log.info("queue.consuming", queue=queue)
    await consumer.run()


@dataclass(eq=False, slots=True)
class _InFlight:
    """One received message."""

    message_id: str
    body: str
    receipt_handle: str
    receive_count: int
    visible_at: float
    """Monotonic seconds at which SQS would give it to another worker."""
    task: asyncio.Task[None] | None = None
    lease_lost: bool = False


@dataclass(slots=True)
class _Consumer:
    handlers: Mapping[type[Message], Handler]
    sqs: "SQSClient"
    url: str
    dlq_url: str
    settings: ServiceSettings
    stop: asyncio.Event
    in_flight: set[_InFlight] = field(default_factory=set)
    to_delete: "asyncio.Queue[_InFlight]" = field(default_factory=asyncio.Queue)
    slot_freed: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        keeper = asyncio.create_task(self._keep_leases())
        deleter = asyncio.create_task(self._delete_finished())
        try:
            await self._receive()
            await self._drain()
        finally:
            keeper.cancel()
            await self.to_delete.join()
            deleter.cancel()
            await asyncio.gather(keeper, deleter, return_exceptions=True)

    # Receive.

    async def _receive(self) -> None:
        failures = 0
        while not self.stop.is_set():
            free = self.settings.slots - len(self.in_flight)
            if free <= 0:
                self.slot_freed.clear()
                await _first(self.slot_freed.wait(), self.stop.wait())
                continue
            try:
                messages = await self._poll(min(free, BATCH))
                failures = 0
            except AWS_ERRORS as error:
                failures += 1
                delay = random.uniform(0, min(LONGEST_BACKOFF_S, 2.0**failures))  # noqa: S311 - jitter
                log.warning("queue.poll_failed", error=_code(error), failures=failures, delay_s=round(delay, 1))
                await _first(asyncio.sleep(delay), self.stop.wait())
                continue
            if self.stop.is_set():
                await self._make_visible(messages, 0)
                return
            for message in messages:
                self.in_flight.add(message)
                message.task = asyncio.create_task(self._handle(message))

    async def _poll(self, wanted: int) -> list[_InFlight]:
        before = time.monotonic()
        response = await self.sqs.receive_message(
            QueueUrl=self.url,
            MaxNumberOfMessages=wanted,
            WaitTimeSeconds=self.settings.poll_s,
            VisibilityTimeout=self.settings.visibility_s,
            MessageSystemAttributeNames=["ApproximateReceiveCount"],
        )
        return [
            _InFlight(
                message_id=message["MessageId"],
                body=message["Body"],
                receipt_handle=message["ReceiptHandle"],
                receive_count=int(message["Attributes"]["ApproximateReceiveCount"]),
                visible_at=before + self.settings.visibility_s,
            )
            for message in response.get("Messages", [])
        ]

    # Handle.

    async def _handle(self, message: _InFlight) -> None:
        structlog.contextvars.bind_contextvars(message_id=message.message_id, receive_count=message.receive_count)
        started = time.monotonic()
        error: BaseException | None = None
        try:
            decoded = decode(message.body)
            _bind(decoded)
            handler = self.handlers.get(type(decoded))
            if handler is None:
                raise Unprocessable("wrong_queue")  # noqa: TRY301 - the table below decides on it like on any other
            await handler(decoded)
        except BaseException as caught:  # noqa: BLE001 - the table decides, on cancellation too
            error = caught
        fate = fate_of(error, message.receive_count)
        log.log(
            _LEVELS[fate],
            "message.handled",
            fate=fate.name.lower(),
            seconds=round(time.monotonic() - started, 3),
            reason=_reason(error),
            exc_info=error if _is_bug(error) else None,
        )
        try:
            await self._settle(message, fate, error)
        except AWS_ERRORS as failed:
            # The message stays as it is and comes again after its visibility timeout; nothing is lost.
            log.warning("message.not_settled", error=_code(failed))
        finally:
            self.in_flight.discard(message)
            self.slot_freed.set()

    async def _settle(self, message: _InFlight, fate: Fate, error: BaseException | None) -> None:
        if message.lease_lost:
            return
        if fate is Fate.DEAD_LETTER:
            await self.sqs.send_message(
                QueueUrl=self.dlq_url,
                MessageBody=message.body,
                MessageAttributes={
                    name: {"DataType": "String", "StringValue": value}
                    for name, value in _dead_letter_attributes(error, message.receive_count).items()
                },
            )
        if fate in (Fate.DELETE, Fate.DEAD_LETTER):
            self.to_delete.put_nowait(message)
        elif fate is Fate.RETRY:
            ceiling = min(LONGEST_RETRY_S, self.settings.retry_base_s * 2.0 ** (message.receive_count - 1))
            await self._make_visible([message], round(random.uniform(0, ceiling)))  # noqa: S311 - full jitter
        else:
            await self._make_visible([message], 0)

    # Leases.

    async def _keep_leases(self) -> None:
        while True:
            await asyncio.sleep(self.settings.visibility_s / 6)
            soon = time.monotonic() + self.settings.visibility_s / 2
            due = [message for message in self.in_flight if message.visible_at < soon]
            for some in _batches(BATCH, due):
                await self._extend(some)

    async def _extend(self, messages: Sequence[_InFlight]) -> None:
        before = time.monotonic()
        try:
            failed = await self._change_visibility(messages, self.settings.visibility_s)
        except AWS_ERRORS as error:
            log.warning("lease.not_extended", error=_code(error), messages=len(messages))
            return
        for index, message in enumerate(messages):
            if str(index) not in failed:
                message.visible_at = before + self.settings.visibility_s
            elif message in self.in_flight and message.task is not None:
                log.warning("lease.lost", message_id=message.message_id)
                message.lease_lost = True
                message.task.cancel("lease_lost")

    async def _make_visible(self, messages: Sequence[_InFlight], delay_s: int) -> None:
        for some in _batches(BATCH, messages):
            await self._change_visibility(some, delay_s)

    async def _change_visibility(self, messages: Sequence[_InFlight], timeout_s: int) -> set[str]:
        response = await self.sqs.change_message_visibility_batch(
            QueueUrl=self.url,
            Entries=[
                {"Id": str(index), "ReceiptHandle": message.receipt_handle, "VisibilityTimeout": timeout_s}
                for index, message in enumerate(messages)
            ],
        )
        return {entry["Id"] for entry in response.get("Failed", []) if entry["SenderFault"]}

    # Delete.

    async def _delete_finished(self) -> None:
        """Delete in batches of 10, or of what came within 100 ms."""
        while True:
            batch = [await self.to_delete.get()]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DELETE_WINDOW_S):
                    while len(batch) < BATCH:
                        batch.append(await self.to_delete.get())
            await self._delete(batch)
            for _ in batch:
                self.to_delete.task_done()

    async def _delete(self, batch: list[_InFlight]) -> None:
        pause = DELETE_WINDOW_S
        while batch and pause < self.settings.visibility_s / 4:
            entries: Any = [{"Id": str(i), "ReceiptHandle": message.receipt_handle} for i, message in enumerate(batch)]
            try:
                response = await self.sqs.delete_message_batch(QueueUrl=self.url, Entries=entries)
                batch = [batch[int(entry["Id"])] for entry in response.get("Failed", [])]
            except AWS_ERRORS as error:
                log.warning("message.not_deleted", error=_code(error), messages=len(batch))
            if batch:
                await asyncio.sleep(pause)
                pause *= 2
        if batch:
            log.warning("message.delete_given_up", messages=len(batch))

    # Drain.

    async def _drain(self) -> None:
        tasks = [message.task for message in self.in_flight if message.task is not None]
        if not tasks:
            return
        log.info("queue.draining", in_flight=len(tasks), grace_s=self.settings.grace_s)
        _, running = await asyncio.wait(tasks, timeout=self.settings.grace_s)
        for task in running:
            task.cancel("drain")
        await asyncio.gather(*running, return_exceptions=True)


async def _queue_urls(sqs: "SQSClient", queue: str) -> tuple[str, str]:
    try:
        url = (await sqs.get_queue_url(QueueName=queue))["QueueUrl"]
        answer = await sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["RedrivePolicy"])
        policy = answer.get("Attributes", {}).get("RedrivePolicy")
        if policy is None:
            raise Misconfigured(f"The queue {queue} has no redrive policy: give it a dead-letter queue.")
        dlq = json.loads(policy)["deadLetterTargetArn"].rsplit(":", 1)[1]
        return url, (await sqs.get_queue_url(QueueName=dlq))["QueueUrl"]
    except ClientError as error:
        raise Misconfigured(f"The queue {queue} or its dead-letter queue cannot be used: {_code(error)}.") from None


def _bind(message: Message) -> None:
    traceparent.set(message.traceparent or new_traceparent())
    structlog.contextvars.bind_contextvars(trace_id=(traceparent.get() or "").split("-")[1])
    if isinstance(message, Event):
        structlog.contextvars.bind_contextvars(event_id=message.id, event_type=message.type)


_LEVELS = {Fate.DELETE: 20, Fate.RELEASE: 20, Fate.RETRY: 30, Fate.DEAD_LETTER: 40}


def _is_bug(error: BaseException | None) -> bool:
    return error is not None and not isinstance(error, tuple(kind for kind, _ in FATES))


def _reason(error: BaseException | None) -> str | None:
    if isinstance(error, Unprocessable):
        return error.reason_code
    return type(error).__name__ if error is not None else None


def _dead_letter_attributes(error: BaseException | None, receive_count: int) -> dict[str, str]:
    attributes = {"reason_code": "bug", "receive_count": str(receive_count)}
    if isinstance(error, Unprocessable):
        attributes["reason_code"] = error.reason_code
        attributes |= {"detail": error.detail} if error.detail else {}
    elif error is not None:
        attributes |= {"error_type": type(error).__name__, "where": place_of(error)}
    return attributes


def _code(error: BaseException) -> str:
    """Name a botocore error without its text."""
    return error.response["Error"]["Code"] if isinstance(error, ClientError) else type(error).__name__


async def _first(*awaitables: Awaitable[Any]) -> None:
    """Wait until one of them is done, and cancel the rest."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _batches(size: int, items: Iterable[_InFlight]) -> list[list[_InFlight]]:
    """Cut `items` into lists of at most `size`."""
    every = list(items)
    return [every[start : start + size] for start in range(0, len(every), size)]
