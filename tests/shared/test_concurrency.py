"""Locks by key, many calls a few at a time, folders that go away."""

import asyncio

import pytest

from shared.concurrency import KeyedLocks, all_of, temporary_folder


async def test_one_key_is_held_by_one_at_a_time_and_others_do_not_wait():
    """Two holders of a key take turns, and the lock of a key nobody uses is forgotten."""
    locks = KeyedLocks()
    seen = []

    async def hold(key: str, name: str) -> None:
        async with locks(key):
            seen.append(name)
            await asyncio.sleep(0)
            seen.append(name)

    await asyncio.gather(hold("a", "1"), hold("a", "2"), hold("b", "3"))

    assert [name for name in seen if name != "3"] == ["1", "1", "2", "2"]
    assert seen.index("3") < seen.index("2")
    assert not locks._locks


async def test_calls_run_a_few_at_a_time_and_answer_in_order():
    """No more than `at_once` run together, and results come in the order of the calls."""
    running, most = 0, 0

    async def call(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return number

    answers = await all_of([lambda number=number: call(number) for number in range(10)], at_once=3)

    assert answers == list(range(10))
    assert most == 3


async def test_the_first_error_ends_the_others_and_comes_as_it_is():
    """When it is raised nothing runs any more."""
    ended = []

    async def wait() -> None:
        try:
            await asyncio.sleep(600)
        finally:
            ended.append("waiting")

    async def fail() -> None:
        await asyncio.sleep(0)
        raise KeyError("this")

    with pytest.raises(KeyError, match="this"):
        await all_of([wait, fail], at_once=2)

    assert ended == ["waiting"]


async def test_a_temporary_folder_is_gone_afterwards(tmp_path):
    """With everything in it, also after an error."""

    async def fail_inside() -> None:
        async with temporary_folder("x-", within=tmp_path) as folder:
            (folder / "file").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail_inside()

    assert list(tmp_path.iterdir()) == []
