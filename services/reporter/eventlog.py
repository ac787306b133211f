"""The event log: every event as a JSON line in `events/date=<YYYY-MM-DD>/<uuid>.jsonl`, written by group commit.

Theory of operation. A handler calls `append` and waits. The first event of a batch starts a clock; when it runs out, or
the batch is full, the batch is closed and written, one object for each date in it, while the next batch fills. All who
wait for a batch return together once all its objects are stored, or fail together, and SQS delivers their messages
again. So an event may be in the log twice, but is never missing: readers discard repeats by id.

The date is the UTC date of the event's time, not of its arrival: an event that comes late still lands in its month.

IAM: s3:PutObject and s3:GetObject on `events/*`, s3:ListBucket.
"""

import asyncio
import contextvars
import uuid
from collections import defaultdict, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC

from shared import keys
from shared.errors import Unavailable
from shared.log import get_logger
from shared.messages import Event
from shared.objects import ObjectMissing, ObjectStore

BATCH_BYTES = 8 * 1024 * 1024
"""A batch is closed at this size, whatever its number of events: a message may hold 1 MiB."""
READS = 16
"""Objects that are read at the same time."""
log = get_logger()


@dataclass(eq=False, slots=True)
class _Batch:
    """What is written together. `failure` is done when it is: None, or why it failed."""

    timer: asyncio.TimerHandle
    failure: asyncio.Future[str | None]
    lines: dict[str, list[bytes]] = field(default_factory=lambda: defaultdict(list))
    """The lines of each date, which is written YYYY-MM-DD."""
    n_events: int = 0
    n_bytes: int = 0

    def add(self, event: Event) -> None:
        line = event.body().encode() + b"\n"  # JSON text escapes line ends, so a line is one event
        self.lines[event.time.astimezone(UTC).date().isoformat()].append(line)
        self.n_events += 1
        self.n_bytes += len(line)


class EventLog:
    """Appends events, many in one write, and reads a month of them."""

    def __init__(self, objects: ObjectStore, *, max_events: int, max_wait_s: float) -> None:
        """A batch is written when it holds `max_events`, or `max_wait_s` seconds after its first event."""
        self._objects = objects
        self._max_events = max_events
        self._max_wait_s = max_wait_s
        self._open: _Batch | None = None
        self._writing: dict[asyncio.Task[None], _Batch] = {}
        # A write belongs to no single message, so what it logs must not carry the keys of the first one's.
        self._context = contextvars.copy_context()

    async def append(self, event: Event) -> None:
        """Return when `event` is stored. Raises `Unavailable` when it may not be."""
        batch = self._open or self._begin()
        batch.add(event)
        if batch.n_events >= self._max_events or batch.n_bytes >= BATCH_BYTES:
            self._close()
        await _written(batch)

    async def flush(self) -> None:
        """Write what waits now, and return when every event appended so far is stored. Raises `Unavailable`."""
        self._close()
        for batch in list(self._writing.values()):
            await _written(batch)

    async def read(self, month: str) -> AsyncIterator[bytes]:
        """Yield the objects of `month` (YYYY-MM) in key order, each a run of JSON lines. Raises `Unavailable`."""
        reading: deque[asyncio.Task[bytes]] = deque()
        try:
            async for summary in self._objects.list(keys.events_of_month(month)):
                reading.append(asyncio.create_task(self._read_one(summary.key)))
                if len(reading) == READS:
                    yield await reading.popleft()
            while reading:
                yield await reading.popleft()
        finally:
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)

    async def _read_one(self, key: str) -> bytes:
        try:
            return await self._objects.get(key)
        except ObjectMissing:  # expired or removed since the listing
            log.warning("eventlog.object_gone", key=key)
            return b""

    def _begin(self) -> _Batch:
        loop = asyncio.get_running_loop()
        self._open = _Batch(loop.call_later(self._max_wait_s, self._close), loop.create_future())
        return self._open

    def _close(self) -> None:
        if self._open is None:
            return
        batch, self._open = self._open, None
        batch.timer.cancel()
        task = asyncio.create_task(self._write(batch), context=self._context.copy())
        self._writing[task] = batch
        task.add_done_callback(self._writing.pop)

    async def _write(self, batch: _Batch) -> None:
        failure: str | None = "event log: the write was cancelled"
        try:
            async with asyncio.TaskGroup() as puts:
                for date, lines in batch.lines.items():
                    puts.create_task(self._objects.put(keys.events(date, str(uuid.uuid4())), b"".join(lines)))
            failure = None
        except ExceptionGroup as errors:
            # Whatever it was (a refused write too), the events are good: their messages must outlast the trouble.
            failure = f"event log: {type(errors.exceptions[0]).__name__}"
            log.warning("eventlog.not_written", events=batch.n_events, exc_info=errors.exceptions[0])
        else:
            log.info("eventlog.written", events=batch.n_events, bytes=batch.n_bytes, objects=len(batch.lines))
        finally:
            batch.failure.set_result(failure)


async def _written(batch: _Batch) -> None:
    # Shielded: one handler that is cancelled must not take the others' batch along.
    failure = await asyncio.shield(batch.failure)
    if failure:
        raise Unavailable(failure)
