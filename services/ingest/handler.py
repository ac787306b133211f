"""The journey of an upload: fetch it, take it or refuse it, and have its series looked at when it is quiet."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from services.ingest.decoder import Rejected
from services.ingest.ports import Ports
from services.ingest.protocol import Instance, Member
from services.ingest.stable_series import expect_settling, settle
from shared import keys
from shared.concurrency import all_of, temporary_folder
from shared.documents.uploads import StoredRefusal
from shared.errors import Unprocessable
from shared.idempotency import store
from shared.keys import COMPLETE, INCOMING
from shared.log import get_logger
from shared.messages import CreatedObject, Name, ObjectsCreated, RejectedUpload, UploadRejected, sha256_of
from shared.objects import ObjectMissing
from shared.workfolder import sha256_of_file

DEFAULT_DATASET = "default"
MOST_NAMED = 20
"""Members of an archive that its refusal names."""
FILES_PER_DECODER = 4
"""Files that are taken at the same time: while one is decoded, others wait for S3. Each may hold 64 MiB in memory."""
Announce = Callable[..., Awaitable[None]]
"""`settle` or `expect_settling`."""
_NAME: TypeAdapter[str] = TypeAdapter(Name)
log = get_logger()


async def handle_uploads(event: ObjectsCreated, *, ports: Ports) -> None:
    """Take every object of a notification.

    Afterwards each instance is stored in `studies/` or in `quarantine/`, and a message is under way that looks at its
    series when it is quiet. A second delivery stores the same bytes under the same keys, so it may run any number of
    times.

    Raises:
        Unprocessable: a code of `reasons.DEAD_LETTERS`; the other objects of the notification are taken nevertheless.
        Unavailable: S3 or SQS does not answer.
    """
    await _one_by_one([partial(_take_upload, created, ports=ports) for created in event.objects])


async def _one_by_one(calls: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Make all calls; `Unprocessable` is about one of them, so the first is raised when all are done."""
    refused = []
    for call in calls:
        try:
            await call()
        except Unprocessable as error:
            refused.append(error)
    if refused:
        raise refused[0]


async def _take_upload(created: CreatedObject, *, ports: Ports) -> None:
    # Where it belongs.
    if created.bucket != ports.objects.bucket:
        raise Unprocessable("other_bucket")
    key_sha256 = sha256_of(created.key)
    if not created.key.startswith(INCOMING):
        log.info("upload.ignored", why="prefix", key_sha256=key_sha256)
        return
    folder, _, name = created.key.rpartition("/")
    if name == COMPLETE:
        await _take_folder(created, folder, ports=ports)
        return

    # Check and store.
    stored, is_closed = await _take_object(created, ports=ports)
    ports.lag.note(ports.clock(), created.time)

    # Announce. An archive is a closed set; anything else waits for what may still come.
    await _announce(stored, settle if is_closed else expect_settling, created.key.removeprefix(INCOMING), ports=ports)


async def _take_folder(marker: CreatedObject, folder: str, *, ports: Ports) -> None:
    """Take all that lies below a folder as one closed set, as if it were an archive: `_COMPLETE` says that it is.

    What was taken before is found stored, and what still waits in the queue is taken now: no part of a series is
    announced for the whole because of a notification that is late.
    """
    dataset, _, rest = folder.removeprefix(INCOMING).partition("/")
    if not rest:
        log.info("upload.ignored", why="complete_dataset", key_sha256=sha256_of(marker.key))
        return
    objects = [
        CreatedObject(bucket=marker.bucket, key=item.key, time=item.last_modified)
        async for item in ports.objects.list(f"{folder}/")
        if not item.key.endswith(f"/{COMPLETE}")
    ]

    async def take(created: CreatedObject) -> list[Instance | None]:
        try:
            return (await _take_object(created, ports=ports))[0]
        except Unprocessable:  # deleted since it was listed
            return []

    taken = await all_of(
        [partial(take, created) for created in objects], at_once=FILES_PER_DECODER * ports.settings.decoders
    )
    await _announce([instance for stored in taken for instance in stored], settle, f"{dataset}/", ports=ports)
    log.info("folder.complete", dataset=dataset, objects=len(objects))


async def _announce(stored: Sequence[Instance | None], announce: Announce, rest: str, *, ports: Ports) -> None:
    dataset = _dataset_of(rest) or DEFAULT_DATASET
    series = sorted({(item.study_uid, item.series_uid) for item in stored if item is not None})
    await _one_by_one([partial(announce, dataset, *uids, ports=ports) for uids in series])


async def _take_object(created: CreatedObject, *, ports: Ports) -> tuple[list[Instance | None], bool]:
    """Store the instances of one object; return them, and whether the object is a closed set.

    Raises:
        Unprocessable: `object_gone`.
    """
    with _object_gone():
        size = await ports.objects.size(created.key)
    if created.key.endswith("/") and size == 0:
        log.info("upload.ignored", why="directory_marker", key_sha256=sha256_of(created.key))
        return [], False
    dataset = _dataset_of(created.key.removeprefix(INCOMING))

    if size > ports.settings.max_upload_bytes:
        await _reject(created, dataset or DEFAULT_DATASET, Rejected("too_large"), None, ports=ports)
        return [], False

    async with temporary_folder("radqueue-ingest-") as folder:
        # Fetch.
        upload = folder / "upload"
        with _object_gone():
            await ports.objects.download(created.key, upload)

        # Check and store.
        if dataset is None:
            await _reject(created, DEFAULT_DATASET, Rejected("bad_dataset_name"), upload, ports=ports)
            return [], False
        (folder / "members").mkdir()
        try:
            members = await ports.decoder.unpack(upload, folder / "members")
        except Rejected as rejected:
            await _reject(created, dataset, rejected, upload, ports=ports)
            return [], False
        if members is None:
            return [await _take_file(created, dataset, upload, ports=ports)], False
        return await _take_members(created, dataset, upload, members, ports=ports), True


@contextmanager
def _object_gone() -> Iterator[None]:
    try:
        yield
    except ObjectMissing:
        raise Unprocessable("object_gone") from None


def _dataset_of(rest: str) -> str | None:
    """Return the dataset named in `<dataset>/<anything>`; None where that is no name."""
    named, slash, _ = rest.partition("/")
    if not slash:
        return DEFAULT_DATASET
    try:
        return _NAME.validate_python(named)
    except ValidationError:
        return None


async def _take_members(
    created: CreatedObject, dataset: str, upload: Path, members: Sequence[Member], *, ports: Ports
) -> list[Instance | None]:
    """Take the files of an archive, several at a time."""
    unpacked = [Path(member.path) for member in members if member.path is not None]
    withheld = [member for member in members if member.reason_code is not None]
    if withheld:  # there are no bytes of theirs to keep: the archive itself goes into quarantine
        named = [f"#{member.number}:{member.reason_code}" for member in withheld]
        place = " ".join(named[:MOST_NAMED] + ["…"] * (len(named) > MOST_NAMED))
        await _reject(created, dataset, Rejected(withheld[0].reason_code or "", place), upload, ports=ports)
    elif not unpacked:
        await _reject(created, dataset, Rejected("not_dicom"), upload, ports=ports)
    calls = [partial(_take_file, created, dataset, path, ports=ports, member=f"#{path.name}") for path in unpacked]
    return await all_of(calls, at_once=FILES_PER_DECODER * ports.settings.decoders)


async def _take_file(
    created: CreatedObject, dataset: str, path: Path, *, ports: Ports, member: str = ""
) -> Instance | None:
    """Store one DICOM file, or put it into quarantine and return None; of an archive it is that `member`."""
    normalised = path.with_name(path.name + ".dcm")
    try:
        rules = ports.datasets.of(dataset).deidentify
        instance = await ports.decoder.normalise(path, normalised, rules if rules and rules.studies else None)
        await _store(instance, normalised, ports=ports)
    except Rejected as rejected:
        place = " ".join(filter(None, (member, rejected.place)))
        await _reject(created, dataset, Rejected(rejected.reason_code, place), path, ports=ports)
        return None
    finally:
        normalised.unlink(missing_ok=True)
    log.info(
        "instance.stored",
        dataset=dataset,
        series=instance.series_uid,
        sop_instance=instance.sop_instance_uid,
        warnings=instance.warnings,
    )
    return instance


async def _store(instance: Instance, path: Path, *, ports: Ports) -> None:
    uid = instance.sop_instance_uid
    key = keys.instance(instance.study_uid, instance.series_uid, uid, instance.sha)
    prefix = f"{keys.series_prefix(instance.study_uid, instance.series_uid)}{uid}."
    async with ports.storing(prefix):
        found = [keys.stored_instance(item.key) async for item in ports.objects.list(prefix)]
        namesakes = {item.key for item in found if item is not None and item.sop_instance_uid == uid}
        if key in namesakes:
            return
        if namesakes:
            raise Rejected("conflicting_duplicate", uid)
        await ports.objects.upload(path, key)


async def _reject(created: CreatedObject, dataset: str, rejected: Rejected, path: Path | None, *, ports: Ports) -> None:
    """Put a refused file into quarantine and tell it; without `path` it is too large to move and stays where it is."""
    key_sha256 = sha256_of(created.key)
    if path is None:
        object_sha256 = await ports.objects.sha256(created.key)
    else:
        object_sha256 = await asyncio.to_thread(sha256_of_file, path)
    place = keys.Quarantined(object_sha256)
    reason = StoredRefusal(
        reason_code=rejected.reason_code,
        place=rejected.place,
        upload_key_sha256=key_sha256,
        dataset=dataset,
        time=created.time,
    )
    if path is not None:
        await ports.objects.upload(path, place.object)
    await store(place.reason, reason, objects=ports.objects)
    told = RejectedUpload(
        dataset=dataset,
        upload_key_sha256=key_sha256,
        object_sha256=object_sha256,
        reason_code=rejected.reason_code,
        quarantine_key=place.reason.key,
    )
    await ports.publish(UploadRejected.of(object_sha256, told, time=created.time))
    log.info("upload.rejected", dataset=dataset, reason_code=rejected.reason_code, key_sha256=key_sha256)
