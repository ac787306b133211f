"""The delivery of the message that the running task handles: the queue runtime sets it, and any code may ask."""

import asyncio
import math
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Delivery:
    """One time that SQS handed a message out."""

    receive_count: int
    ends_at: float
    """The time at which SQS takes the message back in any case, in seconds of the event loop's clock."""


current: ContextVar[Delivery | None] = ContextVar("delivery", default=None)


def receive_count() -> int:
    """Return how often the message being handled was received, this time included; 1 outside of a handler."""
    delivery = current.get()
    return 1 if delivery is None else delivery.receive_count


def remaining_s() -> float:
    """Return how long the message being handled can still be held: SQS ends that 12 hours after it was received.

    A handler that needs longer saves its state and raises `Continue`.
    """
    delivery = current.get()
    return math.inf if delivery is None else delivery.ends_at - asyncio.get_running_loop().time()
