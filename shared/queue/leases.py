"""Keeps the messages that this process holds: extends their visibility, and tells handlers whose lease is lost."""

import asyncio
import math
from collections.abc import Callable, Sequence

from shared.aws_errors import AWS_ERRORS, code_of
from shared.log import get_logger
from shared.queue.sqs import Received, SqsQueue, batches

LOOKS = 6
"""Looks per visibility timeout; a lease is extended once a third of it is gone, so that three extensions may fail."""
CALL_SHARE = 4
"""An extension that SQS does not answer within this part of the visibility timeout is given up, and repeated."""
EARLY_SHARE = 30
"""A lease counts as lost this part of the visibility timeout before it ends: the handler must hear of it in time."""
END_MARGIN_S = 30.0
"""Seconds before the end of the 12 hours at which a handler is cancelled, so that it can clean up."""
log = get_logger()


class LeaseKeeper:
    """One task for all messages that are held."""

    def __init__(
        self, queue: SqsQueue, visibility_s: int, *, extended: Callable[[int], None], lost: Callable[[], None]
    ) -> None:
        """`extended` and `lost` count for the metrics."""
        self._queue = queue
        self._visibility_s = visibility_s
        self._extended = extended
        self._lost = lost
        self._held: set[Received] = set()
        self._changing = asyncio.Lock()

    # What the consumer says of a message.

    def hold(self, message: Received) -> None:
        """Extend the message's visibility from now on."""
        self._held.add(message)

    def drop(self, message: Received) -> None:
        """Leave the message alone from now on."""
        self._held.discard(message)

    async def release(self, messages: Sequence[Received], delay_s: int) -> None:
        """Give messages back: visible to others in `delay_s` seconds. Waits for an extension that is under way."""
        for message in messages:
            self.drop(message)
        async with self._changing:
            for some in batches(messages):
                await self._queue.change_visibility(some, delay_s)

    # What goes on meanwhile.

    async def run(self) -> None:
        """Extend what is due, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            # Wait until something is due: a look, or the end of the lease that ends first.
            await asyncio.sleep(max(0.01, min(self._visibility_s / LOOKS, self._first_end() - loop.time())))
            # Lose what ended before it was extended.
            self._find_ended(loop.time())
            # Extend what has used up a third of its lease.
            soon = loop.time() + self._visibility_s * 2 / 3
            for some in batches([message for message in self._held if message.lease_until <= soon]):
                await self._extend(some)

    def _first_end(self) -> float:
        ends = (message.lease_until - self._visibility_s / EARLY_SHARE for message in self._held)
        return min(ends, default=math.inf)

    def _find_ended(self, now: float) -> None:
        for message in list(self._held):
            if now >= message.ends_at - END_MARGIN_S:
                self._lose(message, "twelve_hours")
            elif now >= message.lease_until - self._visibility_s / EARLY_SHARE:
                self._lose(message, "deadline_passed")

    async def _extend(self, messages: Sequence[Received]) -> None:
        now = asyncio.get_running_loop().time()
        async with self._changing:
            # Some may have been dropped since: those are given back, or done.
            held = [message for message in messages if message in self._held]
            if not held:
                return
            # None may be asked for more than SQS allows the oldest; they differ only in a lease's last minutes.
            timeout_s = int(min([self._visibility_s, *(message.ends_at - now for message in held)]))
            try:
                async with asyncio.timeout_at(min(self._first_end(), now + self._visibility_s / CALL_SHARE)):
                    refused = await self._queue.change_visibility(held, timeout_s)
            except AWS_ERRORS as error:
                log.warning("lease.not_extended", error=code_of(error), messages=len(held))
                return
        # What SQS refuses to extend is another worker's by now.
        self._extended(len(held) - len(refused))
        for message in refused:
            if message in self._held:
                self._lose(message, "handle_invalid")

    def _lose(self, message: Received, why: str) -> None:
        """The message belongs to another worker, or to nobody: its handler stops, and nothing is deleted."""
        self.drop(message)
        self._lost()
        message.lost = why
        log.warning("lease.lost", message_id=message.message_id, why=why)
        if message.handler is not None:
            message.handler.cancel(f"lease lost: {why}")
