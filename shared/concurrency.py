"""Small parts of asyncio that more than one service needs."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

Result = TypeVar("Result")


class Stop(asyncio.Event):
    """An event that is set when the process is to end. Until it is heeded, the start of the process is cancelled."""

    heeded = False


def heed(stop: asyncio.Event) -> None:
    """Say that from now on the caller itself ends when `stop` is set."""
    if isinstance(stop, Stop):
        stop.heeded = True


class KeyedLocks:
    """A lock per key, inside one process: `async with locks(key): …`. A lock lives as long as it is used.

    It saves doing the same work twice at the same moment and protects nothing: two processes may still do the same
    thing, and their outcome must be one result.
    """

    def __init__(self) -> None:
        """Begin without locks."""
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def __call__(self, key: str) -> asyncio.Lock:
        """Return the lock of `key`."""
        lock = self._locks.get(key)
        if lock is None:
            lock = self._locks[key] = asyncio.Lock()
        return lock


async def all_of(calls: Iterable[Callable[[], Awaitable[Result]]], *, at_once: int) -> list[Result]:
    """Make all calls, at most `at_once` at the same time, and return what they return, in order.

    The first that raises ends the others, and its error is raised as it is, when none of them runs any more.
    """
    turns = asyncio.Semaphore(at_once)

    async def one(call: Callable[[], Awaitable[Result]]) -> Result:
        async with turns:
            return await call()

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(call)) for call in calls]
    except BaseExceptionGroup as failed:  # the queue decides on single errors
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


@asynccontextmanager
async def temporary_folder(prefix: str, *, within: Path | None = None) -> AsyncIterator[Path]:
    """Make a folder and remove it with all it holds, which may be many files, beside the event loop."""
    folder = await asyncio.to_thread(tempfile.TemporaryDirectory, prefix=prefix, dir=within, ignore_cleanup_errors=True)
    try:
        yield Path(folder.name)
    finally:
        await asyncio.to_thread(folder.cleanup)
