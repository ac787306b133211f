"""Virtual time: an event loop whose clock jumps to the next timer as soon as nothing is ready.

Server, client and the code under test run in one loop, and talk over sockets on loopback. Twelve hours of leases then
take about a second, and two runs see the same times. How it works: the loop asks its selector to wait until the next
timer is due; this selector looks for events without waiting, several times, and where there are none it sets the clock
forward instead of sleeping.

Limits:
- All parties of a conversation must be in this loop. A thread, a subprocess or another machine does not hold the clock
  still, except work given to the loop's own executor (`asyncio.to_thread`), for which the clock waits.
- Linux delivers a segment on loopback while the sender is still inside `send`, so that the receiver is readable before
  the sender's loop asks again. The selector looks three times and yields the processor between, for the case that the
  kernel put the delivery off.
- `loop.time()` is virtual, and with it the timeouts of asyncio and aiohttp and aiohttp's keep-alive. So are
  `time.time()` and `time.monotonic()` where code calls them by these names inside `virtual_clocks`;
  `datetime.now()` and `time.perf_counter()` are real.
- Computation takes no virtual time.
- Timers that start one another for ever are noticed late, after MOST_JUMPS: bound a wait with `asyncio.timeout`, which
  is virtual too.
"""

import asyncio
import functools
import os
import selectors
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, TypeVar, TypeVarTuple
from unittest.mock import patch

Arguments = TypeVarTuple("Arguments")
Returned = TypeVar("Returned")
LOOKS = 3
"""Looks at the sockets before each jump."""
DEADLOCK_S = 5.0
"""Real seconds without an event, a timer or work in the executor, after which nothing can ever happen."""
EXECUTOR_POLL_S = 0.05
MOST_JUMPS = 500_000
"""About a minute of real time; twelve hours of a worker take some ten thousand."""


class Deadlock(Exception):  # noqa: N818 - it states a fact about the test
    """Every task waits for something that no timer and no socket will bring."""


class Endless(Exception):  # noqa: N818 - it states a fact about the test
    """Timers start one another for ever."""


class _JumpingSelector(selectors.DefaultSelector):
    """Waits by setting the clock forward."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.in_executor = 0
        self.jumps = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        for _ in range(LOOKS):
            if events := super().select(0):
                return events
            if timeout is not None and timeout <= 0:
                return []
            os.sched_yield()
        if self.in_executor:
            return super().select(EXECUTOR_POLL_S)
        if timeout is None:
            if events := super().select(DEADLOCK_S):
                return events
            raise Deadlock
        self.now += timeout
        self.jumps += 1
        if self.jumps > MOST_JUMPS:
            raise Endless
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose `time` starts at 0 and jumps."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    @property
    def jumps(self) -> int:
        """How often the clock was set forward."""
        return self._jumping.jumps

    def time(self) -> float:
        """Return virtual seconds since the loop was made."""
        return self._jumping.now

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*Arguments], Returned], *args: *Arguments
    ) -> "asyncio.Future[Returned]":
        """Run `func` in a thread; the clock stands still until it is done."""
        future = super().run_in_executor(executor, func, *args)
        self._jumping.in_executor += 1
        future.add_done_callback(self._executed)
        return future

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - the base class has it
        """Wait for the threads in real time: a virtual timeout would be over at once."""
        executor = self._default_executor  # type: ignore[attr-defined]  # BaseEventLoop's own, in no stub
        if executor is not None:
            executor.shutdown(wait=True)

    def _executed(self, _: Any) -> None:
        self._jumping.in_executor -= 1


@contextmanager
def virtual_clocks(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Let `time.time` and `time.monotonic` follow the loop's clock."""
    began = time.time()
    with patch("time.time", lambda: began + loop.time()), patch("time.monotonic", loop.time):
        yield


def virtual_time(test: Callable[..., Any]) -> Callable[..., Any]:
    """Make an async test function one that runs in a virtual loop of its own; fixtures must not be async."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> Any:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner, virtual_clocks(runner.get_loop()):
            return runner.run(test(*args, **kwargs))

    return run
