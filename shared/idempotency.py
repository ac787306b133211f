"""Doing a thing once: records in S3 that are written once, and the claim of the one who works on a record.

Theory of operation. What a handler has to do ends with a record: a JSON object under a key that follows from the work.
`once` looks for the record, and where there is none it takes the claim, works, stores the record and gives the claim
back. The claim is a second object, only ever changed by compare-and-swap (`If-None-Match: *`, then `If-Match`). It
names its owner, an epoch that is one higher with each owner, and the time at which it ends unless it is renewed.

    state     in S3                                     who comes now
    --------  ----------------------------------------  ---------------------------------------------------------
    free      no record; no claim, or one given back    takes the claim, and works
    claimed   no record; a claim that has not ended     is turned away with `Claimed`, and comes again later
    stale     no record; a claim that ended, for its    takes it over: of several, the compare-and-swap lets one;
              owner died, was suspended or cut off      the former owner is cancelled as soon as it finds out
    done      a record, whatever the claim says         is given the record

What is guaranteed:
- One record. The first one stored stays (`If-None-Match: *`), and everybody is given that one, also a worker that made
  another one. No clock and no claim has a part in this.
- No two works have the same epoch. What work stores under names that carry its epoch is its own.
- An owner that dies holds up the others for `lease_s` at most.
- A message that is turned away is never dead-lettered for that, however long the work takes.

What is not: that work runs once, or on one machine at a time. An owner that is suspended past the end of its claim
cannot know; a write of its that was under way arrives later. Clocks that differ by a part of `lease_s` make the others
wait as much longer, or let them begin as much earlier. So the claim saves work, and correctness rests on the record:
everything else that work does must bear repetition.
"""

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TypeVar

from pydantic import AwareDatetime, BaseModel, ValidationError

from shared.delivery import receive_count
from shared.errors import Claimed, Continue, Unavailable, Unprocessable
from shared.objects import ObjectMissing, ObjectStore

RENEWALS = 3
"""Times that a claim is renewed, at least, before it would end: this many answers of S3, less one, may fail or hang."""
LONGEST_GIVE_BACK_S = 5.0
"""A worker that stops waits no longer than this for S3: the claim ends by itself."""
PATIENCE = 20
"""Receives after which a message that is turned away is sent anew: at its 50th, SQS would give it up."""

Record = TypeVar("Record", bound=BaseModel)
Other = TypeVar("Other")
Result = TypeVar("Result")
Clock = Callable[[], datetime]


async def stored(key: str, kind: type[Record], *, objects: ObjectStore) -> Record | None:
    """Return the record under `key`, or None where there is none yet.

    Raises:
        Unprocessable: `invalid_record`: something else wrote there.
    """
    try:
        return _parsed(await objects.get(key), key, kind)
    except ObjectMissing:
        return None


async def store_once(key: str, record: Record, *, objects: ObjectStore) -> Record:
    """Store the record unless there is one already, and return the one that is there."""
    if await objects.put_if_absent(key, record.model_dump_json(indent=1).encode()):
        return record
    return await stored(key, type(record), objects=objects) or record


async def once(
    key: str,
    kind: type[Record],
    work: Callable[[int], Awaitable[Record | Other]],
    *,
    objects: ObjectStore,
    claim: str,
    lease_s: float,
    clock: Clock,
) -> Record | Other:
    """Return the record under `key`; where there is none, have `work(epoch)` make it while holding the claim.

    What `work` returns that is no `kind`, None for example, is handed back, and no record is stored. `claim` is the key
    of the claim. It ends `lease_s` seconds after its last renewal; choose at most half of the queue's visibility
    timeout, and the claim of a worker that died ends before SQS gives its message to another one.

    Raises:
        Claimed: another worker works on it, or took it over from this one, whose work was cancelled.
        Continue: the same, where the message was turned away so often that SQS would soon give it up.
        Unprocessable: `invalid_record`: something else wrote under one of the keys.
        Unavailable: S3 does not answer.
    """
    done = await stored(key, kind, objects=objects)
    if done is not None:
        return done

    async def do(epoch: int) -> Record | Other:
        # The last owner may have stored it just before the claim was free.
        done = await stored(key, kind, objects=objects)
        if done is not None:
            return done
        made = await work(epoch)
        return await store_once(key, made, objects=objects) if isinstance(made, kind) else made

    return await _claimed(_Claim(objects, claim, lease_s, clock), do)


class _Held(BaseModel):
    """A claim as S3 holds it."""

    owner: str
    epoch: int
    ends: AwareDatetime


@dataclass(slots=True)
class _Claim:
    """A claim of this worker's."""

    objects: ObjectStore
    key: str
    lease_s: float
    clock: Clock
    owner: str = field(default_factory=lambda: uuid.uuid4().hex)
    epoch: int = 0
    etag: str = ""
    """Of the object as we wrote it last; empty while the claim is not ours."""
    ends: datetime = field(init=False, repr=False)

    async def take(self) -> None:
        """Take the claim. Raises `Claimed` or `Continue` where another owner has it."""
        held, etag = await self._seen()
        if held is not None and held.ends > self.clock():
            raise _turned_away("claimed by another worker")
        self.epoch = held.epoch + 1 if held is not None else 1
        self.ends = self._end()
        if held is None:
            await self.objects.put_if_absent(self.key, self._body())
        else:
            await self.objects.put_if_match(self.key, self._body(), etag)
        # The claim itself says who won: the answer to a write may have been lost, and botocore repeats it.
        held, etag = await self._seen()
        if held is None or held.owner != self.owner:
            raise _turned_away("claimed by another worker meanwhile")
        self.etag = etag

    async def keep(self) -> None:
        """Renew the claim until it is lost: taken over by another worker, or ended while S3 did not answer."""
        turn_s = self.lease_s / RENEWALS
        while (left_s := (self.ends - self.clock()).total_seconds()) > 0:
            with contextlib.suppress(Unavailable, TimeoutError):
                async with asyncio.timeout(min(turn_s, left_s)):
                    await asyncio.sleep(turn_s / 3)
                    if not await self._write(self._end()):
                        return

    async def give_back(self) -> None:
        """End the claim now, so that the next worker need not wait; one that was lost is left alone."""
        with contextlib.suppress(Unavailable, TimeoutError):  # it then ends by itself
            async with asyncio.timeout(min(LONGEST_GIVE_BACK_S, self.lease_s / RENEWALS)):
                await self._write(self.clock())

    async def _write(self, ends: datetime) -> bool:
        """Have the claim end at `ends`; tells whether it is still ours."""
        while self.etag:
            etag = await self.objects.put_if_match(self.key, self._body(ends), self.etag)
            if etag is not None:
                self.ends, self.etag = ends, etag
                return True
            # Another worker took it over, or S3 stored our last write and its answer got lost.
            held, seen = await self._seen()
            self.etag = seen if held is not None and held.owner == self.owner else ""
        return False

    async def _seen(self) -> tuple[_Held | None, str]:
        try:
            body, etag = await self.objects.get_with_etag(self.key)
        except ObjectMissing:
            return None, ""
        return _parsed(body, self.key, _Held), etag

    def _end(self) -> datetime:
        return self.clock() + timedelta(seconds=self.lease_s)

    def _body(self, ends: datetime | None = None) -> bytes:
        return _Held(owner=self.owner, epoch=self.epoch, ends=ends or self.ends).model_dump_json().encode()


async def _claimed(claim: _Claim, work: Callable[[int], Awaitable[Result]]) -> Result:
    """Run `work(epoch)` under the claim. It is cancelled where the claim is lost, and has ended when this returns."""
    await claim.take()
    working = asyncio.ensure_future(work(claim.epoch))
    keeping = asyncio.ensure_future(claim.keep())
    try:
        await asyncio.wait({working, keeping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        keeping.result()  # a bug there is no loss
        raise _turned_away("claim lost")
    finally:
        for task in (working, keeping):
            task.cancel()
        await asyncio.gather(working, keeping, return_exceptions=True)
        await claim.give_back()


def _turned_away(why: str) -> Exception:
    """Return what gives the message back, for as long as another worker is at it."""
    return Claimed(why) if receive_count() < PATIENCE else Continue(why)


def _parsed(body: bytes, key: str, kind: type[Record]) -> Record:
    try:
        return kind.model_validate_json(body)
    except ValidationError:
        raise Unprocessable("invalid_record", key) from None
