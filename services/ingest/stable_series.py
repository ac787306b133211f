"""When a series is quiet: what it consists of becomes a revision, its pictures an array, and the news goes out.

The first instance of a series in a bucket of time has somebody look at the series later: `shared/stability.py` says
how, and which of several messages goes on. A series is overdue when it has grown for `max_settle_s`.

What a series waits for is read from its listing alone: the instances that are newer than its newest revision.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

from services.ingest.datasets import DatasetRules
from services.ingest.deidentification import Option, keyed_hash, keyed_uid
from services.ingest.ports import Ports
from services.ingest.protocol import ArrayConfig, Assemble, Describe, Described, Measure
from services.ingest.windows import window_document, window_of
from shared import keys
from shared.child import ChildFailed
from shared.concurrency import all_of, temporary_folder
from shared.documents.arrays import StoredSidecar
from shared.documents.revisions import DIGEST_LENGTH, Revision, StoredInstance, digest_of
from shared.errors import Unavailable, Unprocessable
from shared.idempotency import once, store
from shared.log import get_logger
from shared.messages import ReadySeries, SeriesReady, SeriesSettling, SettlingSeries, sha256_of
from shared.objects import ObjectMissing, ObjectSummary
from shared.queue import receive_count
from shared.stability import LAST_MODIFIED_S, bucket_of, delay_s, is_responsible, send_once

BACKLOG_S = 2
"""A message that is handled later than this, and than the quiet period, after it was due waited behind others."""
DOWNLOADS = 8
log = get_logger()


@dataclass(frozen=True, slots=True)
class Series:
    """A series as its listing has it."""

    dataset: str
    study_uid: str
    series_uid: str
    instances: tuple[StoredInstance, ...]
    digest: str
    listed: datetime
    """The time of the listing."""


async def expect_settling(dataset: str, study_uid: str, series_uid: str, *, ports: Ports) -> None:
    """Have somebody look at a series that received an instance, once per dataset and bucket.

    The message is due after the bucket's end, so it sees every instance that found the bucket's marker. The marker
    comes after the message: a crash between them costs a second message.
    """
    now, quiet_s = ports.clock(), ports.settings.quiet_s
    bucket = bucket_of(now, quiet_s)
    told = SettlingSeries(dataset=dataset, study_uid=study_uid, series_uid=series_uid, bucket=bucket, first_seen=now)
    marker = keys.series_markers(dataset, study_uid, series_uid) + bucket
    async with ports.markers(marker):
        await send_once(
            marker, lambda: _look_later(told, now, delay_s(quiet_s, quiet_s), ports=ports), objects=ports.objects
        )


async def handle_settling(event: SeriesSettling, *, ports: Ports) -> None:
    """Look at a series that received instances, and settle it if it is quiet.

    A series is quiet when its newest instance is older than the quiet period and the time that uploads take now, and
    the queue has no backlog in which more of it may wait. One that never gets quiet is settled as it is every
    `max_settle_s`, by the first message of a bucket that began then. May run twice: a repeat decides anew.

    Raises:
        Unprocessable: a code of `reasons.DEAD_LETTERS`.
        Unavailable: S3 or SQS does not answer.
    """
    arrived = ports.clock()
    async with ports.settling(event.data.series_uid):
        await _look(event, arrived, ports=ports)


async def _look(event: SeriesSettling, arrived: datetime, *, ports: Ports) -> None:
    series, settings, now = event.data, ports.settings, ports.clock()

    # Fetch.
    listing = [item async for item in ports.objects.list(keys.series_prefix(series.study_uid, series.series_uid))]
    stored = [item.last_modified for item in listing if keys.stored_instance(item.key) is not None]
    if not stored:
        raise Unprocessable("series_gone")
    settled = max((item.last_modified for item in listing if keys.stored_revision(item.key)), default=None)
    since = min((time for time in stored if settled is None or time > settled), default=series.first_seen)
    overdue = since + timedelta(seconds=settings.max_settle_s)

    # Check.
    markers = keys.series_markers(series.dataset, series.study_uid, series.series_uid)
    if not await is_responsible(markers, series.bucket, overdue, objects=ports.objects):
        log.info("series.left_to_newer", series=series.series_uid, instances=len(stored))
        return
    age_s = (now - max(stored)).total_seconds() - LAST_MODIFIED_S
    late_s = (arrived - event.time).total_seconds()
    # An old event that came again tells of no lag; where uploads take longer than this, there is a backlog.
    quiet_s = settings.quiet_s + min(ports.lag.recent_s(now), settings.quiet_s)
    # One that comes back after its own failure is late for that reason.
    backlog = receive_count() == 1 and late_s > max(settings.quiet_s, BACKLOG_S)
    if now < overdue and (age_s < quiet_s or backlog):
        wait_s = settings.quiet_s if backlog else quiet_s - age_s
        await _look_later(series, now, delay_s(wait_s, settings.quiet_s), ports=ports)
        log.info("series.unsettled", series=series.series_uid, instances=len(stored), backlog=backlog)
        return

    # Compute, store and announce.
    await _settle(series.dataset, (series.study_uid, series.series_uid), (now, listing), ports=ports)


async def _look_later(series: SettlingSeries, now: datetime, delay_s: int, *, ports: Ports) -> None:
    due = now + timedelta(seconds=delay_s)
    await ports.publish(SeriesSettling.of(series.series_uid, series, time=due), delay_s=delay_s)


async def settle(dataset: str, study_uid: str, series_uid: str, *, ports: Ports) -> None:
    """Store the revision of a series as it stands, and announce it.

    Afterwards the revision and its array are stored, and `series.ready` was sent. A second run finds the revision and
    announces the same event. A revision that was overtaken by one with more instances is not stored.

    Raises:
        Leased, Continue: another worker settles the series.
    """
    async with ports.settling(series_uid):
        listed = ports.clock()
        listing = [item async for item in ports.objects.list(keys.series_prefix(study_uid, series_uid))]
        await _settle(dataset, (study_uid, series_uid), (listed, listing), ports=ports)


async def _settle(
    dataset: str, uids: tuple[str, str], seen: tuple[datetime, Sequence[ObjectSummary]], *, ports: Ports
) -> None:
    """Settle a series as a listing has it. Whoever lists later may be done earlier, and is newer nevertheless."""
    study_uid, series_uid = uids
    listed, listing = seen
    instances, warnings = _instances(listing)
    if not instances:
        raise Unprocessable("series_gone")
    digest = digest_of(instances)

    # Compute and store, one worker at a time: of two revisions the later one names the earlier one.
    series = Series(dataset, study_uid, series_uid, tuple(instances), digest, listed)
    revision = await once(
        keys.revision(study_uid, series_uid, digest),
        lambda _: _succeed(series, warnings, ports=ports),
        objects=ports.objects,
        lease=keys.series_lease(study_uid, series_uid),
        lease_s=ports.settings.visibility_s / 2,
        clock=ports.clock,
    )
    if revision is None:
        log.info("series.overtaken", series=series_uid, instances=len(instances))
        return
    if revision.dataset != dataset:
        await _array_of_another(revision, dataset, ports=ports)

    # Announce what is stored, which may be another worker's.
    await ports.publish(_ready(revision, ports.datasets.of(revision.dataset)))
    log.info("series.ready", series=series_uid, instances=len(revision.instances), warnings=revision.warnings)


async def _succeed(series: Series, warnings: Sequence[str], *, ports: Ports) -> Revision | None:
    """Make the revision that follows those that are stored; None where one of them has all of it and more."""
    made = await _revise(series, warnings, ports=ports)
    others = await _revisions(series.study_uid, series.series_uid, ports=ports)
    if any(set(made.instances) < set(other.instances) for other in others):
        return None
    newest = max(others, key=lambda other: other.created, default=None)
    return made.model_copy(update={"supersedes": newest.digest if newest else None})


async def _revisions(study_uid: str, series_uid: str, *, ports: Ports) -> list[Revision]:
    prefix = keys.revisions_prefix(study_uid, series_uid)
    listed = [keys.stored_revision(item.key) async for item in ports.objects.list(prefix)]
    return [document.parse(await ports.objects.get(document.key)) for document in listed if document is not None]


def _instances(listing: Sequence[ObjectSummary]) -> tuple[list[StoredInstance], list[str]]:
    """Return the instances of a series by UID, from its listing.

    Two data sets under one UID are there only where both were uploaded at the same moment: the older one counts.
    """
    chosen: dict[str, StoredInstance] = {}
    warnings = []
    for item in sorted(listing, key=lambda item: (item.last_modified, item.key)):
        instance = keys.stored_instance(item.key)
        if instance is None:
            continue
        if chosen.setdefault(instance.sop_instance_uid, instance) != instance:
            warnings = ["conflicting_instances"]
    return [chosen[uid] for uid in sorted(chosen)], warnings


async def _revise(series: Series, warnings: Sequence[str], *, ports: Ports) -> Revision:
    """Describe the series, and make and store its training array."""
    async with temporary_folder("radqueue-series-") as folder:
        paths = await _download(series.instances, folder, ports=ports)
        described = await _described(paths, ports=ports)
        array_key, more = await _array(series, paths, described, ports=ports)
    return Revision(
        dataset=series.dataset,
        study_uid=series.study_uid,
        series_uid=series.series_uid,
        digest=series.digest,
        created=series.listed,
        instances=series.instances,
        attributes=described.attributes,
        geometry=described.geometry,
        warnings=tuple(sorted({*warnings, *described.warnings, *more})),
        array_key=array_key,
        deidentified=_is_deidentified(ports.datasets.of(series.dataset), described),
    )


async def _described(paths: Sequence[str], *, ports: Ports) -> Described:
    try:
        return await ports.decoder.series_call(Describe(paths))
    except ChildFailed as failed:
        raise Unprocessable(f"series_{failed.reason_code}", failed.where) from None


def _is_deidentified(rules: DatasetRules, described: Described) -> bool:
    """Tell whether the instances were de-identified: some may have been stored before their dataset was to be."""
    return rules.deidentify is not None and rules.deidentify.studies and described.deidentified


async def _download(instances: Sequence[StoredInstance], folder: Path, *, ports: Ports) -> list[str]:
    paths = [folder / f"{number}.dcm" for number in range(len(instances))]
    pairs = zip(instances, paths, strict=True)
    try:
        await all_of(
            [partial(ports.objects.download, instance.key, path) for instance, path in pairs], at_once=DOWNLOADS
        )
    except ObjectMissing:  # deleted since it was listed: the next listing knows
        raise Unavailable("an instance of the listing is gone") from None
    return [str(path) for path in paths]


async def _array(
    series: Series, paths: Sequence[str], described: Described, *, ports: Ports
) -> tuple[str | None, Sequence[str]]:
    """Make and store the training array and its sidecar; return its key and warnings.

    A series whose array cannot be made is still routed: that is a warning, no failure.
    """
    if not described.n_grey:
        return None, ["colour_skipped"] if described.geometry else []
    rules = ports.datasets.of(series.dataset)
    modality, told = described.attributes.get("Modality"), _array_uids(series, described, ports=ports)
    config = _config(rules, modality)
    blank = rules.deidentify.blank if rules.deidentify else ()
    out = Path(paths[0]).with_name("array.npy")
    secret = ports.settings.patient_secret.get_secret_value()

    async def measured() -> tuple[float, float] | None:
        return (await ports.decoder.series_call(Measure(paths, config, blank))).window

    window_from = None
    try:
        if config.window is None:
            window_from = window_document(series.dataset, modality, config)
            window = await window_of(window_from, config, told, measured, objects=ports.objects)
            config = replace(config, window=window)
        made = await ports.decoder.series_call(Assemble(paths, str(out), config, blank, secret))
    except (ChildFailed, Unprocessable) as failed:
        where = failed.where if isinstance(failed, ChildFailed) else window_from and window_from.key
        log.warning("array.failed", series=series.series_uid, reason_code=failed.reason_code, where=where)
        return None, ["array_failed"]
    if not made.shape[0]:  # every slice was left out
        return None, made.warnings
    key = keys.array(series.dataset, told["series_uid"], told["digest"], config.hash())
    sidecar = StoredSidecar(
        study_uid=told["study_uid"],
        series_uid=told["series_uid"],
        digest=told["digest"],
        revision_key=told.get("revision_key"),
        patient_key=made.patient_key,
        modality=modality,
        n=made.shape[0],
        shape=tuple(made.shape),
        window=config.window,
        window_from=window_from and window_from.key,
        pixel_spacing_mm=made.pixel_spacing_mm and tuple(made.pixel_spacing_mm),
        rows_columns=made.rows_columns and tuple(made.rows_columns),
        left_out=dict(made.left_out),
        config=config.described(),
        config_hash=config.hash(),
        warnings=tuple(sorted({*described.warnings, *made.warnings})),
    )
    await store(keys.sidecar(key), sidecar, objects=ports.objects)
    await ports.objects.upload(out, key)
    return key, made.warnings


def _config(rules: DatasetRules, modality: object) -> ArrayConfig:
    array = rules.array
    return ArrayConfig(
        size=array.size,
        window=array.windows.get(str(modality)),
        percentiles=array.percentiles,
        leave_out=tuple(sorted(array.leave_out)),
        screened=sha256_of(str(rules.deidentify.blank))[:16] if rules.deidentify else "",
    )


def _array_uids(series: Series, described: Described, *, ports: Ports) -> dict[str, str]:
    """Return what an array is known by; in a de-identified dataset nothing that whoever has the originals could know.

    A plain digest would show them which series it is, as a UID would.
    """
    plain = {
        "study_uid": series.study_uid,
        "series_uid": series.series_uid,
        "digest": series.digest,
        "revision_key": keys.revision(series.study_uid, series.series_uid, series.digest).key,
    }
    rules = ports.datasets.of(series.dataset)
    profile = rules.deidentify
    if profile is None or Option.RETAIN_UIDS in profile.options or _is_deidentified(rules, described):
        return plain
    secret = ports.settings.patient_secret.get_secret_value()
    return {
        "study_uid": keyed_uid(series.study_uid, secret),
        "series_uid": keyed_uid(series.series_uid, secret),
        "digest": keyed_hash(series.digest, secret, DIGEST_LENGTH),
    }


async def _array_of_another(revision: Revision, dataset: str, *, ports: Ports) -> None:
    """Make the array of a series that was uploaded into a second dataset, by the rules of that one."""
    series = Series(
        dataset, revision.study_uid, revision.series_uid, revision.instances, revision.digest, revision.created
    )
    async with temporary_folder("radqueue-series-") as folder:
        paths = await _download(series.instances, folder, ports=ports)
        await _array(series, paths, await _described(paths, ports=ports), ports=ports)


def _ready(revision: Revision, rules: DatasetRules) -> SeriesReady:
    """Tell of a revision. Where its instances are the originals and its array is not, nothing tells of both."""
    linked = rules.deidentify is None or revision.deidentified
    modality = revision.attributes.get("Modality")
    told = ReadySeries(
        study_uid=revision.study_uid,
        series_uid=revision.series_uid,
        digest=revision.digest,
        revision_key=keys.document_of(revision).key,
        dataset=revision.dataset,
        n_instances=len(revision.instances),
        modality=modality if isinstance(modality, str) else None,
        warnings=revision.warnings,
        array_key=revision.array_key if linked else None,
        supersedes=revision.supersedes,
        geometry=revision.geometry,
        deidentified=revision.deidentified,
    )
    return SeriesReady.of(revision.series_uid, told, time=revision.created)
