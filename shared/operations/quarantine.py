"""What ingest refused, and giving it to ingest once more.

To release an object is to copy it to `incoming/<dataset>/released/<sha256>`, where ingest finds it like any upload:
with other limits or other rules it may take it now. If it refuses it again, the object is in quarantine again, under
the same hash with the new reason. Nothing is deleted: `released.json` says which refusal was answered. An object that
was too large to be moved into quarantine is found where it was uploaded.

IAM: s3:ListBucket on the bucket, s3:GetObject on `quarantine/*` and `incoming/*`, s3:PutObject on both.
"""

import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from shared import keys
from shared.documents.uploads import StoredRelease
from shared.keys import QUARANTINE, Quarantined
from shared.objects import ObjectMissing
from shared.operations.bucket import Bucket, read, store
from shared.operations.refused import Refused, WrongUsage

SHORT = 12
"""Digits of a hash that people are shown, and more than enough to name one."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """One object in quarantine."""

    sha256: str
    reason_code: str
    place: str
    dataset: str
    upload_key_sha256: str
    time: str
    bytes: int | None
    """The size of the object; None if it is still where it was uploaded."""
    released: str | None
    """The time at which a release answered this refusal; None if none did."""


async def chosen(
    hashes: Sequence[str], *, reason: str | None = None, dataset: str | None = None, released: bool, objects: Bucket
) -> list[Refusal]:
    """Return what is meant: hashes or their beginnings, or else all with the reason and of the dataset.

    Raises:
        WrongUsage: a hash has other characters than the digits of one.
        Refused: nothing, or more than one object, is in quarantine under a hash.
    """
    found = [refusal for prefix in hashes or [""] for refusal in await _under(prefix, objects=objects)]
    return [
        refusal
        for refusal in found
        if reason in {None, refusal.reason_code}
        and dataset in {None, refusal.dataset}
        and (released or refusal.released is None)
    ]


async def _under(prefix: str, *, objects: Bucket) -> list[Refusal]:
    if not re.fullmatch(r"[0-9a-f]{0,64}", prefix):
        raise WrongUsage("a hash is made of the digits 0 to 9 and a to f; `radqueue quarantine list` shows them")
    found = [refusal async for refusal in _refusals(prefix, objects=objects)]
    if prefix and len(found) != 1:
        raise Refused(f"{len(found) or 'no'} objects in quarantine begin with {prefix}")
    return found


async def _refusals(prefix: str, *, objects: Bucket) -> AsyncIterator[Refusal]:
    """Yield what is in quarantine, by hash, which begins with `prefix`."""
    sizes = {stored.key: stored.size async for stored in objects.list(f"{QUARANTINE}{prefix}")}
    for sha256 in dict.fromkeys(key.removeprefix(QUARANTINE).partition("/")[0] for key in sizes):
        place = Quarantined(sha256)
        reason = await read(place.reason, objects=objects) if place.reason.key in sizes else None
        if reason is None:
            continue
        answered = await read(place.released, objects=objects) if place.released.key in sizes else None
        yield Refusal(
            sha256=sha256,
            reason_code=reason.reason_code,
            place=reason.place,
            dataset=reason.dataset,
            upload_key_sha256=reason.upload_key_sha256,
            time=reason.time.isoformat(),
            bytes=sizes.get(place.object),
            released=answered.time.isoformat() if answered and answered.reason == reason else None,
        )


async def release(refusal: Refusal, *, dataset: str | None = None, objects: Bucket, now: datetime) -> str:
    """Give the object to ingest once more, in another dataset where that is given; returns the key that it has now.

    Raises:
        Refused: the object is gone.
    """
    place = Quarantined(refusal.sha256)
    source = place.object if refusal.bytes is not None else await _uploaded(refusal, objects=objects)
    to = keys.released(dataset or refusal.dataset, refusal.sha256)
    # Before the copy: a refusal that comes of it is younger, and no answer to it is there.
    if (reason := await read(place.reason, objects=objects)) is not None:
        await store(place.released, StoredRelease(time=now, reason=reason), objects=objects)
    try:
        await objects.copy(source, to)
    except ObjectMissing:
        raise Refused(f"the object {refusal.sha256[:SHORT]} is gone") from None
    return to


async def _uploaded(refusal: Refusal, *, objects: Bucket) -> str:
    """Find the object that stayed where it was: only the hash of its key is known."""
    async for stored in objects.list(keys.INCOMING):
        if hashlib.sha256(stored.key.encode()).hexdigest() == refusal.upload_key_sha256:
            return stored.key
    raise Refused(f"the object {refusal.sha256[:SHORT]} stayed where it was uploaded, and is gone from there")
