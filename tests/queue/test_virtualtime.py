"""The virtual loop: time jumps, but never over something that is ready."""

import asyncio
import time

import pytest

from tests.queue.virtualtime import Deadlock, Endless, VirtualLoop, virtual_time


@virtual_time
async def test_a_day_of_sleep_takes_no_time():
    """A sleep sets the clock forward by its length, and the time of day too, and returns at once."""
    real, began = time.perf_counter(), time.time()
    await asyncio.sleep(86_400)

    assert asyncio.get_running_loop().time() == pytest.approx(86_400)
    assert time.time() - began == pytest.approx(86_400)
    assert time.perf_counter() - real < 1


@virtual_time
async def test_timers_fire_in_order():
    """Jumps go to the earliest timer, whatever the order of their creation."""
    fired = []

    async def after(seconds: float) -> None:
        await asyncio.sleep(seconds)
        fired.append((seconds, asyncio.get_running_loop().time()))

    await asyncio.gather(*(after(seconds) for seconds in (30, 0.5, 3600, 7)))

    assert [seconds for seconds, _ in fired] == [0.5, 7, 30, 3600]
    assert [at for _, at in fired] == pytest.approx([0.5, 7, 30, 3600])


@virtual_time
async def test_bytes_on_the_way_are_read_before_the_clock_jumps():
    """Thousands of exchanges over loopback finish without one of their timeouts firing."""
    ended = asyncio.Event()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()
        await writer.wait_closed()
        ended.set()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    for _ in range(3000):
        writer.write(b"x")
        async with asyncio.timeout(0.001):
            await reader.readexactly(1)
    writer.close()
    await ended.wait()
    server.close()

    assert asyncio.get_running_loop().time() < 0.001


@virtual_time
async def test_the_clock_waits_for_threads():
    """Work in the executor takes no virtual time, however long it takes."""
    async with asyncio.timeout(1):
        await asyncio.to_thread(time.sleep, 0.2)

    assert asyncio.get_running_loop().time() < 1


def test_a_deadlock_is_told(monkeypatch):
    """A loop in which nothing can ever happen ends with an error, instead of hanging."""
    monkeypatch.setattr("tests.queue.virtualtime.DEADLOCK_S", 0.05)
    loop = VirtualLoop()
    waiting = loop.create_future()
    with pytest.raises(Deadlock):
        loop.run_until_complete(waiting)
    loop.close()


def test_an_endless_scenario_is_told(monkeypatch):
    """So is one in which timers follow one another and nothing comes of it."""
    monkeypatch.setattr("tests.queue.virtualtime.MOST_JUMPS", 100)

    async def forever() -> None:
        while True:
            await asyncio.sleep(20)

    loop = VirtualLoop()
    task = loop.create_task(forever())
    with pytest.raises(Endless):
        loop.run_until_complete(task)
    task.cancel()
    monkeypatch.undo()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(task)
    loop.close()
