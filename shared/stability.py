"""When to look at something that grows: one delayed message per bucket of time, guarded by a marker object.

Theory of operation. The first addition in a bucket of time (as long as the quiet period) sends a message that looks
later, and then a marker is stored, which keeps the others of that bucket from sending one. So a thing that grows for an
hour has a message in each bucket, and one of them is enough: a message that finds the marker of a newer bucket ends,
because the message of that bucket was sent and looks later. The newest always goes on, until the thing is quiet or
overdue. A crash at any place costs a second message, but every thing is looked at. Clocks of two machines may differ by
a quiet period.
"""

import math
from collections.abc import Awaitable, Callable
from datetime import datetime

from shared.objects import ObjectStore

LAST_MODIFIED_S = 1
"""S3 tells the time of an object in whole seconds, rounded down."""


def bucket_of(now: datetime, quiet_s: float) -> str:
    """Return the bucket's first second; buckets sort by time."""
    bucket_s = math.ceil(quiet_s)
    return str(int(now.timestamp()) // bucket_s * bucket_s)


def delay_s(wait_s: float, quiet_s: float) -> int:
    """Return the delay of a message that looks after `wait_s`, or after the quiet period if that is shorter."""
    return min(math.ceil(max(wait_s, 0)), math.ceil(quiet_s)) + 1


async def send_once(marker: str, send: Callable[[], Awaitable[None]], *, objects: ObjectStore) -> None:
    """Send the message of a bucket unless its marker is there. The marker comes after the message."""
    if await objects.exists(marker):
        return
    await send()
    await objects.put_if_absent(marker, b"")


async def is_responsible(markers: str, bucket: str, overdue: datetime, *, objects: ObjectStore) -> bool:
    """Tell whether a bucket's message is the newest, or the first whose bucket began when the thing was overdue.

    `markers` is the prefix of the thing's markers; what follows in their keys is the bucket.
    """
    own, late = markers + bucket, f"{markers}{math.ceil(overdue.timestamp())}"
    known = {own, *[item.key async for item in objects.list(markers)]}
    return own in {max(known), min((key for key in known if key >= late), default="")}
