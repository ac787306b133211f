"""When a study has settled: its series become the inputs of the MAPs that read a study as a whole.

A series that such a MAP takes has the worker look at the study later: `shared/stability.py` says how, and which of
several messages goes on. A study is overdue when it has grown for `max_settle_s`.

What is decided is a record of the study as it stood: the newest revision of each series, and which of them each MAP is
given. A late series, or a late instance of one, makes another record, whose requests supersede those of the older one.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from services.inference.serving.versions import InstalledMap
from shared import keys
from shared.documents.document import Document
from shared.documents.inference import StudyRouting
from shared.documents.revisions import Revision
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
    """Seconds after which a study is complete if nothing was added to it."""
    max_settle_s: float
    """Seconds after which a study is complete in any case."""


async def expect_settling(
    study_uid: str, *, objects: ObjectStore, publish: Publish, clock: Clock, quiet: Quiet
) -> None:
    """Have a worker look later at a study of which a series has settled, once per bucket."""
    now = clock()
    settling = SettlingStudy(study_uid=study_uid, bucket=bucket_of(now, quiet.quiet_s), first_seen=now)
    delay = delay_s(quiet.quiet_s, quiet.quiet_s)
    marker = keys.study_markers(study_uid) + settling.bucket
    await send_once(marker, lambda: _look_later(settling, now, delay, publish=publish), objects=objects)


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

    Afterwards the record of what was decided is stored, and each MAP was sent one request. It may run
    twice: the same study gives the same outcome.

    Raises:
        Unprocessable: `study_gone`, `invalid_revision`, `invalid_record`.
        Unavailable: S3 or SQS does not answer.
    """
    study, now = event.data, clock()

    # Fetch.
    listing = _Listing.of([item async for item in objects.list(keys.study_prefix(study.study_uid))])
    if not listing.revisions:
        raise Unprocessable("study_gone")
    decided = await _decided(study.study_uid, objects=objects)

    # Check.
    since = min((time for time in listing.settled if decided is None or time > decided), default=study.first_seen)
    overdue = since + timedelta(seconds=quiet.max_settle_s)
    if not await is_responsible(keys.study_markers(study.study_uid), study.bucket, overdue, objects=objects):
        log.info("study.left_to_newer", study=study.study_uid)
        return
    wait_s = quiet.quiet_s + LAST_MODIFIED_S - (now - max(listing.changed)).total_seconds()
    if now < overdue and (wait_s > 0 or listing.unsettled):
        await _look_later(study, now, delay_s(wait_s, quiet.quiet_s), publish=publish)
        log.info("study.unsettled", study=study.study_uid, series=len(listing.revisions))
        return

    # Choose.
    revisions = [await _newest(found, objects=objects) for found in listing.revisions.values()]
    routing = await store_once(*_routed(study.study_uid, revisions, maps), objects=objects)

    # Ask.
    for task in routing.tasks:
        await publish(InferenceRequested.of(keys.ResultKeys.of(task).prefix, task, time=routing.time))
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
    """The state of a study, as read from the listing of its objects."""

    revisions: dict[str, list[Document[Revision]]]
    """The revisions of each series, by its UID."""
    settled: tuple[datetime, ...]
    """The time at which the newest revision of each series was stored."""
    changed: tuple[datetime, ...]
    """The times at which each series last received an instance and a revision."""
    unsettled: bool
    """True if a series has instances that are newer than its newest revision."""

    @classmethod
    def of(cls, listing: Sequence[ObjectSummary]) -> "_Listing":
        revisions: dict[str, list[Document[Revision]]] = defaultdict(list)
        stored_at: dict[str, datetime] = {}
        settled_at: dict[str, datetime] = {}
        for item in listing:
            series_uid = item.key.split("/")[2]
            if (revision := keys.stored_revision(item.key)) is not None:
                revisions[series_uid].append(revision)
                settled_at[series_uid] = max(item.last_modified, settled_at.get(series_uid, item.last_modified))
            elif keys.stored_instance(item.key) is not None:
                stored_at[series_uid] = max(item.last_modified, stored_at.get(series_uid, item.last_modified))
        unsettled = any(uid not in settled_at or time > settled_at[uid] for uid, time in stored_at.items())
        return cls(dict(revisions), tuple(settled_at.values()), (*stored_at.values(), *settled_at.values()), unsettled)


def _routed(
    study_uid: str, revisions: Iterable[Revision], maps: Mapping[str, InstalledMap]
) -> tuple[Document[StudyRouting], StudyRouting]:
    """Return what the MAPs are given of the revisions, and the document that holds it."""
    by_series = {revision.series_uid: revision for revision in sorted(revisions, key=lambda one: one.series_uid)}
    refs = {uid: ref_of(revision) for uid, revision in by_series.items()}
    tasks = []
    for found in maps.values():
        inputs = tuple(refs[uid] for uid, revision in by_series.items() if found.route.takes(revision))
        if found.route.level == "study" and inputs:
            tasks.append(InferenceTask(map=found.map.name, map_digest=found.map.digest, inputs=inputs))
    time = max(revision.created for revision in by_series.values())
    routing = StudyRouting(series=tuple(refs.values()), tasks=tuple(tasks), time=time)
    return keys.study_routing(study_uid, keys.digest_of_series(routing.series)), routing


def ref_of(revision: Revision) -> SeriesRef:
    """Return how messages name the revision."""
    return SeriesRef(
        study_uid=revision.study_uid,
        series_uid=revision.series_uid,
        digest=revision.digest,
        revision_key=keys.document_of(revision).key,
    )


async def _newest(found: Iterable[Document[Revision]], *, objects: ObjectStore) -> Revision:
    revisions = [document.parse(await objects.get(document.key)) for document in found]
    return max(revisions, key=lambda revision: (revision.created, revision.digest))


async def _routings(study_uid: str, *, objects: ObjectStore) -> list[StudyRouting]:
    listed = [keys.stored_study_routing(item.key) async for item in objects.list(keys.study_results_prefix(study_uid))]
    found = [await stored(document, objects=objects) for document in listed if document is not None]
    return [routing for routing in found if routing is not None]


async def _decided(study_uid: str, *, objects: ObjectStore) -> datetime | None:
    """Return when the newest record was stored."""
    listing = [item async for item in objects.list(keys.study_results_prefix(study_uid))]
    return max((item.last_modified for item in listing if keys.stored_study_routing(item.key)), default=None)


async def _look_later(study: SettlingStudy, now: datetime, delay_s: int, *, publish: Publish) -> None:
    due = now + timedelta(seconds=delay_s)
    await publish(StudySettling.of(study.study_uid, study, time=due), delay_s=delay_s)
