"""What the tests of the queue run in: the fake SQS, a client like the services' own, and consumers."""

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession, get_session

from shared.config import ServiceSettings
from shared.messages import ReportRequest, ReportRequested
from shared.queue import consume
from tests.queue.fakesqs import FakeSqs
from tests.queue.sqsmodel import Record

QUEUE = "radqueue-reporting"
NOW = datetime(2026, 11, 2, tzinfo=UTC)

CLIENT = AioConfig(
    connect_timeout=5,
    read_timeout=60,
    max_pool_connections=50,
    retries={"mode": "standard", "max_attempts": 3},
    user_agent="radqueue",
    parameter_validation=False,
)
"""As in `shared.aws.connect`, which would open clients that nothing here needs. Its calls are tried four times."""
ONE_TRY = AioConfig(retries={"total_max_attempts": 1})


@functools.cache
def _session() -> AioSession:
    """Keep the session: it caches the service's description, which takes long to read."""
    return get_session()


@asynccontextmanager
async def client_of(url: str, config: AioConfig = CLIENT) -> AsyncIterator[Any]:
    """Open an SQS client of the fake."""
    create: Any = _session().create_client
    arguments = {"aws_access_key_id": "fake", "aws_secret_access_key": "fake"}
    async with create("sqs", region_name="eu-central-1", endpoint_url=url, config=config, **arguments) as sqs:
        yield sqs


def report(month: str = "2026-11") -> ReportRequested:
    """Return a message that the consumers here handle."""
    return ReportRequested.of(f"reports/{month}", ReportRequest(month=month), time=NOW)


def months(count: int) -> list[str]:
    """Return that many months, each the content of another message."""
    return [f"{2001 + index // 12}-{index % 12 + 1:02}" for index in range(count)]


@dataclass
class Worker:
    """A consumer in the background; its handler notes when each run starts and how it ends."""

    task: asyncio.Task[None]
    stop: asyncio.Event
    started: list[tuple[float, str]] = field(default_factory=list)
    """Time and month of each run."""
    finished: list[tuple[float, str]] = field(default_factory=list)
    cancelled: list[tuple[float, str, BaseException]] = field(default_factory=list)
    ended: int = 0
    """Runs that ended, however."""

    async def drained(self) -> None:
        """Stop as SIGTERM does, and wait until it has ended."""
        self.stop.set()
        async with asyncio.timeout(600):
            await self.task

    @property
    def runs(self) -> list[str]:
        """The months in the order in which runs began."""
        return [month for _, month in self.started]


Handle = Callable[[ReportRequested], Awaitable[None]]


@dataclass
class World:
    """One queue and what consumes it."""

    fake: FakeSqs
    sqs: Any
    workers: list[Worker] = field(default_factory=list)
    happened: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        """Hear of everything that the fake does."""
        self.fake.model.listeners.append(lambda _: self.happened.set())

    def now(self) -> float:
        """Return the time of the fake."""
        return self.fake.model.now()

    async def send(self, body: str | None = None, *, month: str = "2026-11", delay_s: int = 0) -> str:
        """Send one message without a call over HTTP, and return its id."""
        queue = self.fake.model.queue(QUEUE)
        return self.fake.model.send(queue, body or report(month).body(), delay_s=delay_s).message_id

    def consumer(self, handle: Handle | None = None, *, sqs: Any = None, **settings: Any) -> Worker:
        """Start a consumer; `settings` may go below what validation allows, so that tests are short."""
        stop = asyncio.Event()

        async def noted(event: ReportRequested) -> None:
            month = event.data.month or ""
            worker.started.append((self.now(), month))
            self.happened.set()
            try:
                if handle is not None:
                    await handle(event)
                worker.finished.append((self.now(), month))
            except asyncio.CancelledError as error:
                worker.cancelled.append((self.now(), month, error))
                raise
            finally:
                worker.ended += 1
                self.happened.set()

        chosen = ServiceSettings(reporting_queue=QUEUE).model_copy(update=settings)
        running = consume({ReportRequested: noted}, sqs or self.sqs, QUEUE, settings=chosen, stop=stop)
        worker = Worker(asyncio.create_task(running), stop)
        worker.task.add_done_callback(lambda _: self.happened.set())
        self.workers.append(worker)
        return worker

    async def until(self, condition: Callable[[], bool], within_s: float = 300) -> None:
        """Wait until something is true, looking whenever the fake or a handler did something."""
        async with asyncio.timeout(within_s):
            while not condition():
                for worker in self.workers:
                    if worker.task.done():
                        worker.task.result()
                await self.happened.wait()
                self.happened.clear()
                await asyncio.sleep(0)

    async def emptied(self, within_s: float = 300) -> None:
        """Wait until the queue holds nothing."""
        await self.until(lambda: self.fake.counts(QUEUE) == (0, 0), within_s)

    def log(self, what: str, queue: str | None = QUEUE) -> list[Record]:
        """Return the records of one kind."""
        return [entry for entry in self.fake.model.log if entry.what == what and queue in (None, entry.queue)]

    def calls(self, operation: str) -> list[Record]:
        """Return the calls of one operation on the queue."""
        return [entry for entry in self.log("call") if entry.details["operation"] == operation]

    def dead_letters(self) -> list[dict[str, str]]:
        """Return body and attributes of what was sent to the dead-letter queue."""
        return [{"body": e.details["body"]} | e.details["attributes"] for e in self.log("sent", f"{QUEUE}-dlq")]


@asynccontextmanager
async def world(*, max_receives: int = 50) -> AsyncIterator[World]:
    """Serve a queue; consumers that still run at the end are drained."""
    async with FakeSqs.serving() as fake, client_of(fake.url) as sqs:
        fake.create(QUEUE, max_receives=max_receives)
        here = World(fake, sqs)
        try:
            yield here
        finally:
            for worker in here.workers:
                worker.stop.set()
            await asyncio.gather(*(worker.task for worker in here.workers), return_exceptions=True)
