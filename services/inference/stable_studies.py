"""When a study has settled: its series become the inputs of the MAPs that read a study as a whole.

A series that such a MAP takes has the worker look at the study later: `shared/stability.py` says how, and which of
several messages goes on. A study is overdue when it has grown for `max_settle_s`.

What is decided is a record of the study as it stood: the newest revision of each series, and which of them each MAP is
given. A late series, or a late instance of one, makes another record, whose requests supersede those of the older one.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from services.inference.records import DIGEST_LENGTH, StudyRouting, result_prefix, study_prefix
from services.inference.serving.versions import InstalledMap
from shared.dicom import Revision, stored_instance
from shared.errors import Unprocessable
from shared.idempotency import store_once, stored
from shared.log import get_logger
from shared.messages import InferenceRequested, InferenceTask, SeriesRef, SettlingStudy, StudySettling
from shared.objects import ObjectStore, ObjectSummary
from shared.queue import Publish
from shared.stability import LAST_MODIFIED_S, bucket_of, delay_s, is_responsible, send_once

Clock = Callable[[], datetime]
log = get_logger()


@dataclass(frozen=True, slots=True)
class Quiet:
    """When a study counts as complete."""

    quiet_s: float
    """After so many seconds in which nothing was added to it."""
    max_settle_s: float
    """After so many seconds in any case."""


async def expect_settling(
    study_uid: str, *, objects: ObjectStore, publish: Publish, clock: Clock, quiet: Quiet
) -> None:
    """Have somebody look at a study that a series was settled of, once per bucket."""
    now = clock()
    told = SettlingStudy(study_uid=study_uid, bucket=bucket_of(now, quiet.quiet_s), first_seen=now)
    delay = delay_s(quiet.quiet_s, quiet.quiet_s)
    await send_once(
        _markers(study_uid) + told.bucket, lambda: _look_later(told, now, delay, publish=publish), objects=objects
    )


async def settle(
    event: StudySettling,
    *,
    objects: ObjectStore,
    publish: Publish,
    maps: Mapping[str, InstalledMap],
    clock: Clock,
    quiet: Quiet,
) -> None:
    """Look at a study, and if it is quiet give it to the MAPs that read a study as a whole.

    Afterwards the record of what was decided is stored, and each MAP was sent one request. May run twice: of the same
    study the same follows.

    Raises:
        Unprocessable: `study_gone`, `invalid_revision`, `invalid_record`.
        Unavailable: S3 or SQS does not answer.
    """
    study, now = event.data, clock()

    # Fetch.
    listing = _Listing.of([item async for item in objects.list(f"studies/{study.study_uid}/")])
    if not listing.revisions:
        raise Unprocessable("study_gone")
    decided = await _decided(study.study_uid, objects=objects)

    # Check.
    since = min((time for time in listing.settled if decided is None or time > decided), default=study.first_seen)
    overdue = since + timedelta(seconds=quiet.max_settle_s)
    if not await is_responsible(_markers(study.study_uid), study.bucket, overdue, objects=objects):
        log.info("study.left_to_newer", study=study.study_uid)
        return
    wait_s = quiet.quiet_s + LAST_MODIFIED_S - (now - max(listing.changed)).total_seconds()
    if now < overdue and (wait_s > 0 or listing.unsettled):
        await _look_later(study, now, delay_s(wait_s, quiet.quiet_s), publish=publish)
        log.info("study.unsettled", study=study.study_uid, series=len(listing.revisions))
        return

    # Choose.
    revisions = [await _newest(keys, objects=objects) for keys in listing.revisions.values()]
    routing = await store_once(*_routed(study.study_uid, revisions, maps), objects=objects)

    # Ask.
    for task in routing.tasks:
        await publish(InferenceRequested.of(result_prefix(task), task, time=routing.time))
    log.info("study.settled", study=study.study_uid, series=len(routing.series), maps=len(routing.tasks))


async def is_superseded(task: InferenceTask, *, objects: ObjectStore) -> bool:
    """Tell whether the MAP was given a newer state of the study since; its own request makes this one needless."""
    found = [
        (routing.time, asked.inputs)
        for routing in await _routings(task.inputs[0].study_uid, objects=objects)
        for asked in routing.tasks
        if asked.map == task.map
    ]
    own = max((time for time, inputs in found if inputs == task.inputs), default=None)
    return own is not None and any(time > own for time, _ in found)


@dataclass(frozen=True, slots=True)
class _Listing:
    """A study as its listing has it."""

    revisions: dict[str, list[str]]
    """Keys by series UID."""
    settled: tuple[datetime, ...]
    """When the newest of each series was stored."""
    changed: tuple[datetime, ...]
    """When each series received something last: an instance, or a revision."""
    unsettled: bool
    """Whether a series has instances that are newer than its newest revision."""

    @classmethod
    def of(cls, listing: Sequence[ObjectSummary]) -> "_Listing":
        revisions: dict[str, list[str]] = defaultdict(list)
        stored_at: dict[str, datetime] = {}
        settled_at: dict[str, datetime] = {}
        for item in listing:
            series_uid = item.key.split("/")[2]
            if "/revisions/" in item.key:
                revisions[series_uid].append(item.key)
                settled_at[series_uid] = max(item.last_modified, settled_at.get(series_uid, item.last_modified))
            elif stored_instance(item.key) is not None:
                stored_at[series_uid] = max(item.last_modified, stored_at.get(series_uid, item.last_modified))
        unsettled = any(uid not in settled_at or time > settled_at[uid] for uid, time in stored_at.items())
        return cls(dict(revisions), tuple(settled_at.values()), (*stored_at.values(), *settled_at.values()), unsettled)


def _routed(
    study_uid: str, revisions: Iterable[Revision], maps: Mapping[str, InstalledMap]
) -> tuple[str, StudyRouting]:
    """Return what the MAPs are given of the revisions, and the key of that record."""
    by_series = {revision.series_uid: revision for revision in sorted(revisions, key=lambda one: one.series_uid)}
    refs = {uid: ref_of(revision) for uid, revision in by_series.items()}
    tasks = []
    for found in maps.values():
        inputs = tuple(refs[uid] for uid, revision in by_series.items() if found.route.takes(revision))
        if found.route.level == "study" and inputs:
            tasks.append(InferenceTask(map=found.map.name, map_digest=found.map.digest, inputs=inputs))
    lines = "\n".join(f"{ref.series_uid}:{ref.digest}" for ref in refs.values())
    digest = hashlib.sha256(lines.encode()).hexdigest()[:DIGEST_LENGTH]
    time = max(revision.created for revision in by_series.values())
    routing = StudyRouting(series=tuple(refs.values()), tasks=tuple(tasks), time=time)
    return f"{study_prefix(study_uid)}{digest}/routing.json", routing


def ref_of(revision: Revision) -> SeriesRef:
    """Return how messages name the revision."""
    return SeriesRef(
        study_uid=revision.study_uid,
        series_uid=revision.series_uid,
        digest=revision.digest,
        revision_key=revision.key,
    )


async def _newest(keys: Iterable[str], *, objects: ObjectStore) -> Revision:
    revisions = [Revision.parse(await objects.get(key)) for key in keys]
    return max(revisions, key=lambda revision: (revision.created, revision.digest))


async def _routings(study_uid: str, *, objects: ObjectStore) -> list[StudyRouting]:
    keys = [item.key async for item in objects.list(study_prefix(study_uid)) if item.key.endswith("/routing.json")]
    found = [await stored(key, StudyRouting, objects=objects) for key in keys]
    return [routing for routing in found if routing is not None]


async def _decided(study_uid: str, *, objects: ObjectStore) -> datetime | None:
    """Return when the newest record was stored."""
    listing = [item async for item in objects.list(study_prefix(study_uid))]
    return max((item.last_modified for item in listing if item.key.endswith("/routing.json")), default=None)


async def _look_later(study: SettlingStudy, now: datetime, delay_s: int, *, publish: Publish) -> None:
    due = now + timedelta(seconds=delay_s)
    await publish(StudySettling.of(study.study_uid, study, time=due), delay_s=delay_s)


def _markers(study_uid: str) -> str:
    """Return the prefix of a study's markers, which no dataset's can be: the name of one begins with a letter."""
    return f"settling/_studies/{study_uid}/"
