"""What becomes of a message, by how its handler ended: one table."""

import asyncio
import random
from enum import Enum

from shared.errors import Continue, Unavailable, Unprocessable, place_of

MOST_BUGS = 3
"""A message whose handler raised so many bugs goes to the dead-letter queue."""
MOST_DEATHS = 5
"""A message that was in work when so many workers were killed goes there, too: it may be what kills them."""
LONGEST_RETRY_S = 300.0


class Fate(Enum):
    """What becomes of a message."""

    DELETE = "delete"
    DEAD_LETTER = "dead_letter"
    """Sent to the dead-letter queue with the reason, then deleted."""
    RETRY = "retry"
    """Made visible again after a delay."""
    RELEASE = "release"
    """Made visible at once."""
    CONTINUE = "continue"
    """Sent again as a new message, whose 12 hours begin anew, then deleted."""


FATES: tuple[tuple[type, Fate], ...] = (
    (type(None), Fate.DELETE),
    (Continue, Fate.CONTINUE),
    (Unprocessable, Fate.DEAD_LETTER),
    (Unavailable, Fate.RETRY),
    (asyncio.CancelledError, Fate.RELEASE),
)
"""Anything else is a bug: retried, and dead-lettered when it is the third."""
NO_BUGS = tuple(kind for kind, _ in FATES)


def fate_of(error: BaseException | None, bugs: int) -> Fate:
    """Decide a message's fate from how its handler ended, and how often that was a bug, this time included."""
    for kind, fate in FATES:
        if isinstance(error, kind):
            return fate
    return Fate.DEAD_LETTER if bugs >= MOST_BUGS else Fate.RETRY


def is_bug(error: BaseException | None) -> bool:
    """Tell whether the table does not know it."""
    return not isinstance(error, NO_BUGS)


def retry_delay_s(receive_count: int, base_s: float) -> int:
    """Return a random delay below an exponential ceiling.

    Full jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    exponent = min(receive_count - 1, 30)  # 2.0 ** 1024 is no float
    return round(random.uniform(0, min(LONGEST_RETRY_S, base_s * 2.0**exponent)))  # noqa: S311 - jitter


def reason_of(error: BaseException | None) -> str | None:
    """Return the short reason of an ending that was no success: a reason code, or the type of the exception."""
    if isinstance(error, Unprocessable):
        return error.reason_code
    return type(error).__name__ if error is not None else None


def why_of(error: BaseException | None) -> str | None:
    """Return what `Unavailable` says; no other text is logged, it may hold values of a message or a file."""
    return str(error) or None if isinstance(error, Unavailable) else None


def dead_letter_attributes(error: BaseException | None, receive_count: int) -> dict[str, str]:
    """Return what the dead-letter queue is told beside the body: reason and place, never a text."""
    attributes = {"reason_code": "bug", "receive_count": str(receive_count)}
    if isinstance(error, Unprocessable):
        attributes["reason_code"] = error.reason_code
        attributes |= {"detail": error.detail} if error.detail else {}
    elif error is not None:
        attributes |= {"error_type": type(error).__name__, "where": place_of(error)}
    return attributes
