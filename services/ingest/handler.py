"""The journey of an upload: fetch it, take it or refuse it, and have its series looked at when it is quiet."""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from services.ingest.answers import Instance, Member
from services.ingest.decoder import Rejected
from services.ingest.ports import Ports
from services.ingest.settling import expect_settling, settle
from shared.concurrency import all_of, temporary_folder
from shared.dicom import instance_key, series_prefix, stored_instance
from shared.errors import Unprocessable
from shared.log import get_logger
from shared.messages import CreatedObject, Name, ObjectsCreated, RejectedUpload, UploadRejected, sha256_of
from shared.objects import ObjectMissing

INCOMING = "incoming"
DEFAULT_DATASET = "default"
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
    await _one_by_one([partial(_take_upload, created, ports) for created in event.objects])


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


async def _take_upload(created: CreatedObject, ports: Ports) -> None:
    # Where it belongs.
    if created.bucket != ports.objects.bucket:
        raise Unprocessable("other_bucket")
    key_sha256 = sha256_of(created.key)
    prefix, _, rest = created.key.partition("/")
    if prefix != INCOMING:
        log.info("upload.ignored", why="prefix", key_sha256=key_sha256)
        return
    with _object_gone():
        size = await ports.objects.size(created.key)
    if created.key.endswith("/") and size == 0:
        log.info("upload.ignored", why="directory_marker", key_sha256=key_sha256)
        return
    dataset = _dataset_of(rest)

    if size > ports.settings.max_upload_bytes:
        await _reject(created, dataset or DEFAULT_DATASET, Rejected("too_large"), None, ports)
        return

    async with temporary_folder("radqueue-ingest-") as folder:
        # Fetch.
        upload = folder / "upload"
        with _object_gone():
            await ports.objects.download(created.key, upload)

        # Check and store.
        if dataset is None:
            await _reject(created, DEFAULT_DATASET, Rejected("bad_dataset_name"), upload, ports)
            return
        (folder / "members").mkdir()
        try:
            members = await ports.decoder.unpack(upload, folder / "members")
        except Rejected as rejected:
            await _reject(created, dataset, rejected, upload, ports)
            return
        if members is None:
            stored = [await _take_file(created, dataset, upload, ports)]
        else:
            stored = await _take_members(created, dataset, upload, members, ports)

    ports.lag.note(ports.clock(), created.time)

    # Announce. A zip is a closed set; anything else waits for what may still come.
    announce = expect_settling if members is None else settle
    series = sorted({(item.study_uid, item.series_uid) for item in stored if item is not None})
    await _one_by_one([partial(announce, dataset, *uids, ports=ports) for uids in series])


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
    created: CreatedObject, dataset: str, upload: Path, members: Sequence[Member], ports: Ports
) -> list[Instance | None]:
    """Take the files of a zip, as many at a time as there are decoders."""
    unpacked = [Path(member.path) for member in members if member.path is not None]
    withheld = [member for member in members if member.reason_code is not None]
    if withheld:  # there are no bytes of theirs to keep: the zip itself goes into quarantine
        place = " ".join(f"{member.number}:{member.reason_code}" for member in withheld[:20])
        await _reject(created, dataset, Rejected(withheld[0].reason_code or "", place), upload, ports)
    elif not unpacked:
        await _reject(created, dataset, Rejected("not_dicom"), upload, ports)
    calls = [partial(_take_file, created, dataset, path, ports) for path in unpacked]
    return await all_of(calls, at_once=ports.settings.decoders)


async def _take_file(created: CreatedObject, dataset: str, path: Path, ports: Ports) -> Instance | None:
    """Store one DICOM file, or put it into quarantine and return None."""
    normalised = path.with_name(path.name + ".dcm")
    try:
        instance = await ports.decoder.normalise(path, normalised)
        await _store(instance, normalised, ports)
    except Rejected as rejected:
        await _reject(created, dataset, rejected, path, ports)
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


async def _store(instance: Instance, path: Path, ports: Ports) -> None:
    uid = instance.sop_instance_uid
    key = instance_key(instance.study_uid, instance.series_uid, uid, instance.sha)
    prefix = f"{series_prefix(instance.study_uid, instance.series_uid)}{uid}."
    found = [stored_instance(item.key) async for item in ports.objects.list(prefix)]
    namesakes = {item.key for item in found if item is not None and item.sop_instance_uid == uid}
    if key in namesakes:
        return
    if namesakes:
        raise Rejected("conflicting_duplicate", uid)
    await ports.objects.upload(path, key)


async def _reject(created: CreatedObject, dataset: str, rejected: Rejected, path: Path | None, ports: Ports) -> None:
    """Put a refused file into quarantine and tell it; without `path` it is too large to move and stays where it is."""
    key_sha256 = sha256_of(created.key)
    if path is None:
        object_sha256 = await ports.objects.sha256(created.key)
    else:
        object_sha256 = await asyncio.to_thread(_sha256_of_file, path)
    folder = f"quarantine/{object_sha256}"
    reason = {
        "reason_code": rejected.reason_code,
        "place": rejected.place,
        "upload_key_sha256": key_sha256,
        "dataset": dataset,
        "time": created.time.isoformat(),
    }
    if path is not None:
        await ports.objects.upload(path, f"{folder}/object")
    reason_key = f"{folder}/reason.json"
    await ports.objects.put(reason_key, json.dumps(reason, indent=1).encode())
    told = RejectedUpload(
        dataset=dataset,
        upload_key_sha256=key_sha256,
        object_sha256=object_sha256,
        reason_code=rejected.reason_code,
        quarantine_key=reason_key,
    )
    await ports.publish(UploadRejected.of(object_sha256, told, time=created.time))
    log.info("upload.rejected", dataset=dataset, reason_code=rejected.reason_code, key_sha256=key_sha256)


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
