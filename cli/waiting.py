"""Looking again and again until something is there."""

import time
from collections.abc import Callable
from typing import TypeVar

from shared.operations.refused import Refused

POLL_S = 1.0
Found = TypeVar("Found")


def until(look: Callable[[], Found | None], timeout_s: float, why: Callable[[], str]) -> Found:
    """Look until there is something, and return it. Raises `Refused` with what `why` says when time is up."""
    end = time.monotonic() + timeout_s
    while (found := look()) is None:
        if time.monotonic() > end:
            raise Refused(f"after {timeout_s:.0f} s, {why()}")
        time.sleep(POLL_S)
    return found
