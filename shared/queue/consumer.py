"""Consumes one queue: slots, polls, handlers and the drain at the end."""

import asyncio
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog

from shared import delivery
from shared import metrics as declared
from shared.aws_errors import AWS_ERRORS, code_of
from shared.concurrency import heed
from shared.config import ServiceSettings
from shared.errors import Leased, Unprocessable
from shared.log import get_logger
from shared.messages import Event, Message, decode
from shared.metrics import Metrics
from shared.queue.circuit import Circuit
from shared.queue.deletes import Deleter
from shared.queue.fates import (
    MOST_DEATHS,
    Fate,
    dead_letter_attributes,
    fate_of,
    is_bug,
    reason_of,
    retry_delay_s,
    why_of,
)
from shared.queue.leases import LeaseKeeper
from shared.queue.sqs import BATCH, POLL_MARGIN_S, Received, SqsQueue, open_queue
from shared.queue.trace import handling

if TYPE_CHECKING:
    from types_aiobotocore_sqs import SQSClient

LONGEST_BACKOFF_S = 30.0
SETTLE_GRACE_S = 5.0
"""Seconds that sending on, dead-lettering or releasing a message may take at a stop."""
LEVELS = {
    Fate.DELETE: logging.INFO,
    Fate.CONTINUE: logging.INFO,
    Fate.RELEASE: logging.INFO,
    Fate.RETRY: logging.WARNING,
    Fate.DEAD_LETTER: logging.ERROR,
}

Handler = Callable[[Any], Awaitable[None]]
log = get_logger()


async def consume(
    handlers: Mapping[type[Message], Handler],
    sqs: "SQSClient",
    queue: str,
    *,
    settings: ServiceSettings,
    stop: asyncio.Event,
    metrics: Metrics | None = None,
) -> None:
    """Handle the messages of `queue` until `stop` is set, then drain and return.

    `handlers` maps a message's class to the async function that handles it; a class that is not there is dead-lettered.

    Raises:
        Misconfigured: the queue or its dead-letter queue does not exist, or cannot be used.
    """
    opened = await open_queue(sqs, queue, patience_s=settings.start_patience_s)
    heed(stop)
    consumer = _Consumer(handlers, opened, settings, stop, metrics)
    log.info("queue.consuming", queue=queue)
    await consumer.run()


@dataclass(slots=True)
class _Consumer:
    handlers: Mapping[type[Message], Handler]
    queue: SqsQueue
    settings: ServiceSettings
    stop: asyncio.Event
    metrics: Metrics | None
    logger: Any = field(default_factory=log.bind)
    """The logger of what is logged with every message: the module's own would be bound anew for each line."""
    circuit: Circuit = field(default_factory=Circuit)
    running: "dict[Received, asyncio.Task[None]]" = field(default_factory=dict)
    """What takes a slot: messages whose handler runs, or whose fate is being brought about."""
    finished: "set[asyncio.Task[None]]" = field(default_factory=set)
    """Messages that are done with, and that SQS has not deleted yet."""
    slot_freed: asyncio.Event = field(default_factory=asyncio.Event)
    poll: "asyncio.Task[list[Received]] | None" = None
    poll_ends: float = 0.0
    stopping: "asyncio.Task[bool]" = field(init=False)
    """Done once `stop` is set."""
    keeper: LeaseKeeper = field(init=False)
    deleter: Deleter = field(init=False)

    def __post_init__(self) -> None:
        self.keeper = LeaseKeeper(
            self.queue,
            self.settings.visibility_s,
            extended=lambda count: self._count(declared.LEASE_EXTENSIONS, count),
            lost=lambda: self._count(declared.LEASE_LOSSES),
        )
        self.deleter = Deleter(self.queue, self.keeper)

    async def run(self) -> None:
        self.stopping = asyncio.create_task(self.stop.wait())
        background = [asyncio.create_task(one.run()) for one in (self.keeper, self.deleter)]
        receiving = asyncio.create_task(self._receive())
        try:
            # The background tasks never end by themselves: one that does has a bug, and nothing may go on without it.
            await asyncio.wait([receiving, *background], return_when=asyncio.FIRST_COMPLETED)
            for task in (*background, receiving):
                if task.done():
                    task.result()
            await self._drain()
        finally:
            polling = [] if self.poll is None else [self.poll]
            await _cancel(self.stopping, receiving, *polling, *self.running.values(), *self.finished, *background)

    # Receive.

    async def _receive(self) -> None:
        failures = 0
        while not self.stop.is_set():
            wanted = await self._slots()
            if wanted == 0:
                continue
            # A lease is reckoned from before the poll; one that comes late in a long poll must have time left.
            wait_s = min(self.settings.poll_s, self.settings.visibility_s // 2)
            self.poll_ends = asyncio.get_running_loop().time() + wait_s
            self.poll = asyncio.create_task(
                self.queue.receive(wanted, wait_s=wait_s, visibility_s=self.settings.visibility_s)
            )
            await self._unless_stopped(self.poll)
            if self.stop.is_set():
                return
            try:
                messages = self.poll.result()
                self.poll = None
            except Exception as error:  # noqa: BLE001 - an answer that botocore cannot read ends no worker
                self.poll = None
                failures += 1
                delay_s = random.uniform(0, min(LONGEST_BACKOFF_S, 2.0 ** min(failures, 10)))  # noqa: S311 - jitter
                log.warning("queue.poll_failed", error=code_of(error), failures=failures, delay_s=round(delay_s, 1))
                await self._unless_stopped(asyncio.sleep(delay_s))
                continue
            failures = 0
            self._begin(messages)

    async def _slots(self) -> int:
        """Wait for a free slot; return how many messages to poll for, which is none if the wait ended otherwise."""
        free = self.settings.slots - len(self.running)
        # What is finished and not deleted runs again if this process is killed: it is bounded while deletes fail.
        free = min(free, free + BATCH - len(self.finished))
        # While the circuit is open, one message at a time shows whether it works again.
        if free <= 0 or (self.circuit.is_open and self.running):
            self.slot_freed.clear()
            await self._unless_stopped(self.slot_freed.wait())
            return 0
        if self.circuit.is_open:
            await self._unless_stopped(asyncio.sleep(self.circuit.pause_s))
            return 0 if self.stop.is_set() else 1
        return min(free, BATCH)

    async def _unless_stopped(self, awaited: "Coroutine[Any, Any, Any] | asyncio.Task[Any]") -> None:
        """Wait until it is done or `stop` is set; what was not a task of its own is then cancelled."""
        task = asyncio.ensure_future(awaited)
        try:
            await asyncio.wait([task, self.stopping], return_when=asyncio.FIRST_COMPLETED)
        finally:
            if task is not awaited:
                task.cancel()

    # Handle.

    def _begin(self, messages: list[Received]) -> None:
        for message in messages:
            if message.receive_count == 1:
                self._measure(declared.MESSAGE_AGE, max(0.0, message.waited_s))
            self.keeper.hold(message)
            message.handler = self.running[message] = asyncio.create_task(self._handle(message))
        if messages:
            self._measure(declared.MESSAGES_RECEIVED, len(messages))
            self._measure(declared.IN_FLIGHT, len(self.running))

    async def _handle(self, message: Received) -> None:
        structlog.contextvars.bind_contextvars(message_id=message.message_id, receive_count=message.receive_count)
        delivery.current.set(delivery.Delivery(message.receive_count, message.ends_at))
        started = time.monotonic()
        error: BaseException | None = None
        try:
            await self._dispatch(message)
        except BaseException as caught:  # noqa: BLE001 - the table decides, on cancellation too
            error = caught
        message.handler = None  # a lease that is lost from here on has nobody to tell
        seconds = time.monotonic() - started
        message.bugs += is_bug(error)
        fate = fate_of(error, message.bugs)
        self._note(fate, error)
        try:
            deleted = await self._settle(message, fate, error)
        except Exception as failed:
            # The message is left alone and comes again after its visibility timeout: nothing is lost. Of a bug, too:
            # a message that stayed held would come again after 12 hours.
            self.keeper.drop(message)
            bug = None if isinstance(failed, AWS_ERRORS) else failed
            log.warning("message.not_settled", error=code_of(failed), exc_info=bug)
            return
        finally:
            self._free(message)
        if deleted is not None:
            await deleted
        self._tell(message, fate, error, seconds)

    def _free(self, message: Received) -> None:
        """Give the slot back; the rest of the task is kept count of until it ends."""
        task = self.running.pop(message)
        self.finished.add(task)
        task.add_done_callback(self._gone)
        self.slot_freed.set()

    def _gone(self, task: "asyncio.Task[None]") -> None:
        self.finished.discard(task)
        self.slot_freed.set()

    def _note(self, fate: Fate, error: BaseException | None) -> None:
        """Tell the circuit how the handler ended, if that says whether work can be done: bad messages say nothing."""
        if fate is Fate.RELEASE or isinstance(error, Leased | Unprocessable):
            return
        if self.circuit.note(None if fate is Fate.CONTINUE else reason_of(error)):
            self._count(declared.CIRCUIT_OPENED)
            log.error("circuit.opened", reason=reason_of(error), pause_s=self.circuit.pause_s)

    def _tell(self, message: Received, fate: Fate, error: BaseException | None, seconds: float) -> None:
        """Log and count a fate that has come about."""
        became = "lost" if message.lost else fate.value
        self._measure(declared.HANDLER_SECONDS, round(seconds, 3))
        self._count(declared.MESSAGE_FATES, Fate=became)
        self.logger.log(
            LEVELS[fate],
            "message.handled",
            fate=became,
            seconds=round(seconds, 3),
            reason=message.lost or reason_of(error),
            why=why_of(error),
            exc_info=error if is_bug(error) else None,
        )

    async def _dispatch(self, message: Received) -> None:
        if message.fault is not None:
            raise message.fault
        if message.deaths >= MOST_DEATHS:
            raise Unprocessable("worker_died")
        decoded = decode(message.body)
        with handling(f"{self.queue.name} process", decoded.traceparent):
            if isinstance(decoded, Event):
                structlog.contextvars.bind_contextvars(event_id=decoded.id, event_type=decoded.type)
            handler = self.handlers.get(type(decoded))
            if handler is None:
                raise Unprocessable("wrong_queue")
            await handler(decoded)

    async def _settle(
        self, message: Received, fate: Fate, error: BaseException | None
    ) -> "asyncio.Future[None] | None":
        """Bring the fate about; what is returned is done once SQS has deleted the message."""
        if message.lost is not None:
            return None
        if fate in (Fate.RETRY, Fate.RELEASE):
            return await self._give_back(message, fate, bug=is_bug(error))
        if fate is Fate.DEAD_LETTER:
            attributes = dead_letter_attributes(error, message.receive_count)
            await self.queue.dead_letter(message, attributes)
            self._count(declared.DEAD_LETTERS, Reason=attributes["reason_code"])
        elif fate is Fate.CONTINUE:
            await self.queue.send_again(message, {"attempt": message.attempt + 1})
        return self.deleter.delete(message)

    async def _give_back(self, message: Received, fate: Fate, *, bug: bool) -> "asyncio.Future[None] | None":
        """Have the message come again: by its visibility, or as a new one where counts must go along.

        SQS counts receives and nothing else. So that what is given back in good order is told from what a killed worker
        leaves, only the first time is by visibility; whether it was that or a kill is not known, and not counted.
        """
        if fate is Fate.RELEASE:
            delay_s = self._release_delay_s()
            self._count(declared.RELEASED_AT_DRAIN)
        else:
            delay_s = retry_delay_s(message.receive_count, self.settings.retry_base_s)
        if message.receive_count == 1 and not bug:
            await self.keeper.release([message], delay_s)
            return None
        deaths = message.deaths if message.receive_count > message.deliveries else max(0, message.deaths - 1)
        counts = {"receives": message.receive_count, "deaths": deaths, "bugs": message.bugs}
        await self.queue.send_again(message, counts | {"attempt": message.attempt}, delay_s=delay_s)
        return self.deleter.delete(message)

    # Drain.

    async def _drain(self) -> None:
        """End in order: the last poll and the handlers together, then the deletes."""
        log.info("queue.draining", in_flight=len(self.running), grace_s=self.settings.grace_s)
        await asyncio.gather(self._return_last_poll(), self._end_handlers())
        if self.finished:
            _, waiting = await asyncio.wait(self.finished, timeout=max(1.0, self.settings.grace_s))
            if waiting:
                log.warning("queue.deletes_given_up", messages=len(waiting))

    async def _return_last_poll(self) -> None:
        if self.poll is None:
            return
        left_s = self.poll_ends - asyncio.get_running_loop().time() + POLL_MARGIN_S
        try:
            messages = await asyncio.wait_for(self.poll, max(0.0, left_s))
            await self.keeper.release(messages, 0)
        except AWS_ERRORS as error:
            log.warning("queue.last_poll_failed", error=code_of(error))
            return
        self._count(declared.RELEASED_AT_DRAIN, len(messages))

    async def _end_handlers(self) -> None:
        if self.running:
            await asyncio.wait(self.running.values(), timeout=self.settings.grace_s)
            late = [message.handler for message in self.running if message.handler is not None]
            await _cancel(*late)
        if self.running:  # their handlers have ended, and what follows from that is under way
            await asyncio.wait(self.running.values(), timeout=SETTLE_GRACE_S)

    def _release_delay_s(self) -> int:
        """A cancelled message is visible at once, unless a poll that may not be heard any more could take it."""
        left_s = 0.0 if self.poll is None else self.poll_ends - asyncio.get_running_loop().time()
        return math.ceil(left_s) + 1 if left_s > 0 else 0

    # Count.

    def _count(self, metric: declared.Metric, count: int = 1, **dimensions: str) -> None:
        if count:
            self._measure(metric, count, **dimensions)

    def _measure(self, metric: declared.Metric, value: float, **dimensions: str) -> None:
        if self.metrics is not None:
            dimensions["Queue"] = self.queue.name
            self.metrics.put(metric, value, at=None, **dimensions)


async def _cancel(*tasks: "asyncio.Task[Any]") -> None:
    """Cancel and wait; what they raise is theirs."""
    for task in tasks:
        task.cancel("drain")
    await asyncio.gather(*tasks, return_exceptions=True)
