"""A lease in S3: of several workers that were given one request, one trains.

Theory of operation. The lease is an object that is only ever changed by compare-and-swap (`If-None-Match: *`, then
`If-Match`), so of two workers that take it, one wins. It carries an epoch, one higher with each owner, and the time
at which it ends unless renewed. A worker that was suspended past that time can still believe that it owns the lease:
nothing but the compare-and-swap of what it stores can stop it, so the lease saves work, and correctness rests on the
first-writer-wins objects of `handler.py`. Clocks of the workers must agree to within a fraction of the lease.
"""

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeVar

from pydantic import AwareDatetime, BaseModel

from shared.errors import Unavailable
from shared.objects import ObjectMissing, ObjectStore

RENEWALS = 3
"""Times that a lease is renewed, at least, before it would end: this many answers of S3, less one, may fail or hang."""

Result = TypeVar("Result")


class _Held(BaseModel):
    """A lease as S3 holds it."""

    owner: str
    epoch: int
    ends: AwareDatetime


@dataclass(slots=True)
class _Lease:
    objects: ObjectStore
    key: str
    lease_s: float
    clock: Callable[[], datetime]
    held: _Held
    etag: str | None = None

    async def take(self) -> None:
        """Take the lease. Raises `Unavailable` where another owner holds it."""
        try:
            body, etag = await self.objects.get_with_etag(self.key)
            other = _Held.model_validate_json(body)
            if other.ends > self.clock():
                raise Unavailable("lease held by another worker")
            self.held = self._renewed(epoch=other.epoch + 1)
            self.etag = await self.objects.put_if_match(self.key, _body(self.held), etag)
        except ObjectMissing:
            self.held = self._renewed(epoch=1)
            if await self.objects.put_if_absent(self.key, _body(self.held)):
                _, self.etag = await self.objects.get_with_etag(self.key)
        if self.etag is None:
            raise Unavailable("lease taken by another worker")

    async def keep(self) -> None:
        """Renew the lease until it is lost: taken by another owner, or ended while S3 did not answer."""
        turn_s = self.lease_s / RENEWALS
        while (left_s := (self.held.ends - self.clock()).total_seconds()) > 0:
            with contextlib.suppress(Unavailable, TimeoutError):
                async with asyncio.timeout(min(turn_s, left_s)):
                    await asyncio.sleep(turn_s / 3)
                    if not await self._renew():
                        return

    async def give_back(self) -> None:
        """End the lease now, so that the next worker need not wait; a lease that was lost is left alone."""
        if self.etag is not None:
            ended = self.held.model_copy(update={"ends": self.clock()})
            async with asyncio.timeout(self.lease_s / RENEWALS):
                await self.objects.put_if_match(self.key, _body(ended), self.etag)

    async def _renew(self) -> bool:
        """Renew the lease once; tells whether it is still ours."""
        held = self._renewed()
        etag = await self.objects.put_if_match(self.key, _body(held), self.etag or "")
        if etag is None:  # which may be our own doing: S3 stored the last renewal, and its answer got lost
            try:
                body, etag = await self.objects.get_with_etag(self.key)
            except ObjectMissing:
                return False
            held = _Held.model_validate_json(body)
        if held.owner != self.held.owner:
            self.etag = None
            return False
        self.held, self.etag = held, etag
        return True

    def _renewed(self, **changes: int) -> _Held:
        return self.held.model_copy(update={"ends": self.clock() + timedelta(seconds=self.lease_s), **changes})


def _body(held: _Held) -> bytes:
    return held.model_dump_json().encode()


async def under_lease(
    objects: ObjectStore,
    key: str,
    work: Callable[[int], Awaitable[Result]],
    *,
    lease_s: float,
    clock: Callable[[], datetime],
) -> Result:
    """Take the lease at `key`, run `work(epoch)` and give the lease back.

    Work whose lease is lost is cancelled.

    Raises:
        Unavailable: another worker holds the lease, or took it meanwhile.
    """
    lease = _Lease(objects, key, lease_s, clock, _Held(owner=uuid.uuid4().hex, epoch=0, ends=clock()))
    await lease.take()
    working = asyncio.ensure_future(work(lease.held.epoch))
    keeping = asyncio.ensure_future(lease.keep())
    try:
        await asyncio.wait({working, keeping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        keeping.result()  # a bug there is no loss
        raise Unavailable("lease lost")
    finally:
        for task in (working, keeping):
            task.cancel()
        await asyncio.gather(working, keeping, return_exceptions=True)
        with contextlib.suppress(Unavailable, TimeoutError):  # it then ends by itself
            await lease.give_back()
