"""Idempotency records in S3, and the lease of the worker of one: work may be repeated, its record is stored once.

Theory of operation. What a handler has to do ends with an idempotency record: a document whose key follows from the
work. `once` looks for the record, and if there is none it takes the lease, works, stores the record and gives the lease
back. The lease is a second document, the argument `lease`. It is only ever changed by compare-and-swap
(`If-None-Match: *`, then `If-Match`), and names its owner, an epoch that is one higher with each owner, and the time at
which it ends unless it is renewed.

    state     in S3                                     who comes now
    --------  ----------------------------------------  ---------------------------------------------------------
    free      no record; no lease, or one given back    takes the lease, and works
    leased    no record; a lease that has not ended     is turned away with `Leased`, and comes again later
    stale     no record; a lease that ended: its owner  takes it over: of several, the compare-and-swap lets one;
              died, was suspended or cut off            the former owner is cancelled as soon as it finds out
    done      a record, whatever the lease says         is given the record

What is guaranteed:
- Work at least once. Until a record is stored, every delivery of the message finds the record missing and works, or is
  turned away and comes again; being turned away never dead-letters it, however long the work takes.
- One record. The first one stored stays (`If-None-Match: *`), and every worker is given that one, even if it made
  another one. This does not depend on clocks or on the lease.
- An epoch of its own for each owner, as long as the lease's object is not deleted. What work stores under names that
  carry its epoch is its own.
- A worker that dies holds up the others for `lease_s` at most, and for as much longer as their clocks are behind.

What is not: that work runs once, or on one machine at a time. A lease can be lost: an owner that is suspended past its
end cannot know, and a write that was under way arrives later; clocks that differ let the others begin earlier.
So the lease saves work, and correctness rests on the record. What a handler must do:
- Store everything else under keys that bear repetition: the same bytes again, or a name that holds the epoch or the
  attempt.
- Go on with what `once` returns, which may be another worker's record, and announce it each time, from it alone.
- Let `Leased`, `Continue` and cancellation pass.
"""

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TypeVar

from shared.delivery import receive_count
from shared.documents.document import Document, Model, body_of
from shared.documents.leases import Lease
from shared.errors import Continue, Leased, Unavailable
from shared.objects import ObjectMissing, ObjectStore

RENEWALS = 3
"""Times that a lease is renewed, at least, before it would end: this many answers of S3, less one, may fail or hang."""
LONGEST_GIVE_BACK_S = 5.0
"""A worker that stops waits no longer than this for S3: the lease ends by itself."""
PATIENCE = 20
"""Receives after which a message that is turned away is sent anew: at its 50th, SQS would give it up."""

Other = TypeVar("Other")
Result = TypeVar("Result")
Clock = Callable[[], datetime]


async def stored(document: Document[Model], *, objects: ObjectStore) -> Model | None:
    """Return what a document holds, or None if it is not there yet.

    Raises:
        Unprocessable: `invalid_record`: something else wrote there.
    """
    try:
        return document.parse(await objects.get(document.key))
    except ObjectMissing:
        return None


async def store(document: Document[Model], content: Model, *, objects: ObjectStore) -> None:
    """Store a document, replacing what was there."""
    await objects.put(document.key, body_of(content))


async def store_once(document: Document[Model], record: Model, *, objects: ObjectStore) -> Model:
    """Store the record unless there is one already, and return the one that is there."""
    if await objects.put_if_absent(document.key, body_of(record)):
        return record
    return await stored(document, objects=objects) or record


async def once(
    document: Document[Model],
    work: Callable[[int], Awaitable[Model | Other]],
    *,
    objects: ObjectStore,
    lease: Document[Lease],
    lease_s: float,
    clock: Clock,
) -> Model | Other:
    """Return the record that `document` holds; if there is none, have `work(epoch)` make it while holding the lease.

    Raises as `make_once` does.
    """
    done = await stored(document, objects=objects)
    if done is not None:
        return done
    return await make_once(document, work, objects=objects, lease=lease, lease_s=lease_s, clock=clock)


async def make_once(
    document: Document[Model],
    work: Callable[[int], Awaitable[Model | Other]],
    *,
    objects: ObjectStore,
    lease: Document[Lease],
    lease_s: float,
    clock: Clock,
) -> Model | Other:
    """Do as `once` does, for a caller that has just looked for the record and found none.

    `work` may run more than once, also at the same time on two machines; the first record stored is returned to all.
    If it returns something else, such as None, that is handed back and no record is stored. The lease
    ends `lease_s` seconds after its last renewal; choose at most half of the queue's visibility timeout, and the lease
    of a worker that died ends before SQS gives its message to another one.

    Raises:
        Leased: another worker works on it, or took it over from this one, whose work was cancelled.
        Continue: the same, if the message was turned away so often that SQS would soon give it up.
        Unprocessable: `invalid_record`: something else wrote the record or the lease.
        Unavailable: S3 does not answer.
    """

    async def do(epoch: int) -> Model | Other:
        # The last owner may have stored it just before the lease was free.
        done = await stored(document, objects=objects)
        if done is not None:
            return done
        made = await work(epoch)
        return await store_once(document, made, objects=objects) if isinstance(made, document.model) else made

    return await _under_lease(_HeldLease(objects, lease, lease_s, clock), do)


@dataclass(slots=True)
class _HeldLease:
    """A lease that this worker holds or tries to take."""

    objects: ObjectStore
    document: Document[Lease]
    lease_s: float
    clock: Clock
    owner: str = field(default_factory=lambda: uuid.uuid4().hex)
    epoch: int = 0
    etag: str = ""
    """The ETag of the lease as we wrote it last; empty while the lease is not ours."""
    ends: datetime = field(init=False, repr=False)

    async def take(self) -> None:
        """Take the lease. Raises `Leased` or `Continue` if another owner has it."""
        # Is it free, or has it ended?
        held, etag = await self._seen()
        if held is not None and held.ends > self.clock():
            raise _turned_away("leased by another worker")
        # Write our name, unless another worker is faster.
        self.epoch = held.epoch + 1 if held is not None else 1
        self.ends = self._end()
        if held is None:
            await self.objects.put_if_absent(self.document.key, self._body())
        else:
            await self.objects.put_if_match(self.document.key, self._body(), etag)
        # The lease itself says who won: the answer to a write may have been lost, and botocore repeats it.
        held, etag = await self._seen()
        if held is None or held.owner != self.owner:
            raise _turned_away("leased by another worker meanwhile")
        self.etag = etag

    async def keep(self) -> None:
        """Renew the lease until it is lost: taken over by another worker, or ended while S3 did not answer."""
        turn_s = self.lease_s / RENEWALS
        while (left_s := (self.ends - self.clock()).total_seconds()) > 0:
            with contextlib.suppress(Unavailable, TimeoutError):
                async with asyncio.timeout(min(turn_s, left_s)):
                    await asyncio.sleep(turn_s / 3)
                    if not await self._write(self._end()):
                        return

    async def give_back(self) -> None:
        """End the lease now, so that the next worker need not wait; one that was lost is left alone."""
        with contextlib.suppress(Unavailable, TimeoutError):  # it then ends by itself
            async with asyncio.timeout(min(LONGEST_GIVE_BACK_S, self.lease_s / RENEWALS)):
                await self._write(self.clock())

    async def _write(self, ends: datetime) -> bool:
        """Have the lease end at `ends`; tells whether it is still ours."""
        while self.etag:
            etag = await self.objects.put_if_match(self.document.key, self._body(ends), self.etag)
            if etag is not None:
                self.ends, self.etag = ends, etag
                return True
            # Another worker took it over, or S3 stored our last write and its answer got lost.
            held, seen = await self._seen()
            self.etag = seen if held is not None and held.owner == self.owner else ""
        return False

    async def _seen(self) -> tuple[Lease | None, str]:
        try:
            body, etag = await self.objects.get_with_etag(self.document.key)
        except ObjectMissing:
            return None, ""
        return self.document.parse(body), etag

    def _end(self) -> datetime:
        return self.clock() + timedelta(seconds=self.lease_s)

    def _body(self, ends: datetime | None = None) -> bytes:
        return body_of(Lease(owner=self.owner, epoch=self.epoch, ends=ends or self.ends))


async def _under_lease(lease: _HeldLease, work: Callable[[int], Awaitable[Result]]) -> Result:
    """Run `work(epoch)` under the lease. It is cancelled if the lease is lost, and has ended when this returns."""
    # Take the lease, and renew it while the work goes on.
    await lease.take()
    working = asyncio.ensure_future(work(lease.epoch))
    keeping = asyncio.ensure_future(lease.keep())
    try:
        # Whichever ends first decides: the work was done, or the lease was lost.
        await asyncio.wait({working, keeping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        keeping.result()  # a bug there is no loss
        raise _turned_away("claim lost")
    finally:
        # Nothing of it goes on when this returns, and the lease is free.
        for task in (working, keeping):
            task.cancel()
        await asyncio.gather(working, keeping, return_exceptions=True)
        await lease.give_back()


def _turned_away(why: str) -> Exception:
    """Return what gives the message back, for as long as another worker is at it."""
    return Leased(why) if receive_count() < PATIENCE else Continue(why)
