"""`python -m tests.chaos.mutants NAME MODULE`: a service with a mistake in it, which the sweep must find."""

import asyncio
import runpy
import sys
from collections.abc import Coroutine
from typing import Any

from shared.objects import ObjectMissing, ObjectStore
from shared.queue.sqs import SqsQueue

LATER_S = 1.0


LATER: set[asyncio.Task[None]] = set()


def do_later(doing: Coroutine[Any, Any, Any]) -> None:
    """Do something when its caller went on."""

    async def do() -> None:
        await asyncio.sleep(LATER_S)
        await doing

    LATER.add(asyncio.create_task(do()))


def delete_first() -> None:
    """Delete what was received before it is handled."""
    receive = SqsQueue.receive

    async def mutant(queue: SqsQueue, wanted: int, **how: Any) -> Any:
        messages = await receive(queue, wanted, **how)
        if messages:
            await queue.delete(messages)
        return messages

    SqsQueue.receive = mutant


def store_later() -> None:
    """Say that an object is stored, and store it a moment later: messages are deleted meanwhile."""
    put = ObjectStore._put

    async def mutant(objects: ObjectStore, *what: Any, **condition: Any) -> str:
        do_later(put(objects, *what, **condition))
        return "unknown"

    ObjectStore._put = mutant


def announce_first() -> None:
    """Announce a result, and store it a moment later."""
    put_if_absent = ObjectStore.put_if_absent

    async def mutant(objects: ObjectStore, key: str, body: bytes) -> bool:
        if not key.endswith("/result.json"):
            return await put_if_absent(objects, key, body)
        do_later(put_if_absent(objects, key, body))
        return True

    ObjectStore.put_if_absent = mutant


def forget_the_winner() -> None:
    """Compute again where an attempt is the result already, and push what the new one made."""
    get, put_if_absent = ObjectStore.get, ObjectStore.put_if_absent

    async def never_there(objects: ObjectStore, key: str) -> bytes:
        if key.endswith("/outputs.json"):
            raise ObjectMissing
        return await get(objects, key)

    async def last_one_wins(objects: ObjectStore, key: str, body: bytes) -> bool:
        if not key.endswith("/outputs.json"):
            return await put_if_absent(objects, key, body)
        return bool(await objects.put(key, body))

    ObjectStore.get, ObjectStore.put_if_absent = never_there, last_one_wins


MUTANTS = {one.__name__: one for one in (delete_first, store_later, announce_first, forget_the_winner)}


if __name__ == "__main__":
    MUTANTS[sys.argv[1]]()
    runpy.run_module(sys.argv[2], run_name="__main__")
