"""Deletes finished messages in batches, and repeats what SQS did not do for as long as the lease lasts."""

import asyncio
import contextlib

from shared.aws_errors import AWS_ERRORS, code_of
from shared.log import get_logger
from shared.queue.leases import LeaseKeeper
from shared.queue.sqs import BATCH, Received, SqsQueue

WINDOW_S = 0.1
"""A batch is sent when it is full, or this long after its first message."""
LONGEST_PAUSE_S = 5.0
Waiting = tuple[Received, "asyncio.Future[None]"]
log = get_logger()


class Deleter:
    """One task for all messages that are done with. They stay held until SQS has taken the delete."""

    def __init__(self, queue: SqsQueue, keeper: LeaseKeeper) -> None:
        """Take the queue, and who holds its messages."""
        self._queue = queue
        self._keeper = keeper
        self._waiting: asyncio.Queue[Waiting] = asyncio.Queue()
        self._pause_s = WINDOW_S

    def delete(self, message: Received) -> "asyncio.Future[None]":
        """Have the message deleted soon; what is returned is done once it is, or once its lease is lost."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((message, done))
        return done

    async def run(self) -> None:
        """Delete, for ever."""
        while True:
            batch = [await self._waiting.get()]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WINDOW_S):
                    while len(batch) < BATCH:
                        batch.append(await self._waiting.get())
            left = await self._delete([message for message, _ in batch if message.lost is None])
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S) if left else WINDOW_S
            for message, done in batch:
                if message in left:  # later, so that it does not hold up the others
                    asyncio.get_running_loop().call_later(self._pause_s, self._waiting.put_nowait, (message, done))
                    continue
                self._keeper.drop(message)
                if not done.done():
                    done.set_result(None)

    async def _delete(self, batch: list[Received]) -> list[Received]:
        """Return those that are to be tried again."""
        if not batch:
            return []
        try:
            return await self._queue.delete(batch)
        except AWS_ERRORS as error:
            log.warning("message.not_deleted", error=code_of(error), messages=len(batch))
            return batch
