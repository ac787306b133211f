"""Where results go: HealthImaging, by STOW-RS or by an import job; another archive that speaks DICOMweb; S3 alone.

An archive that took instances has not necessarily kept them where anybody finds them: HealthImaging puts what
conflicts with the study into a non-primary image set, which DICOMweb does not show, and an import job says COMPLETED
whatever became of its files. So each instance that is pushed is looked for afterwards: it is shown, or the push failed.

IAM: medical-imaging:StoreDICOM, SearchImageSets and GetImageSetMetadata on the data store; for import jobs also
medical-imaging:StartDICOMImportJob and GetDICOMImportJob, iam:PassRole on the import role, and s3:PutObject,
s3:GetObject, s3:DeleteObject and s3:ListBucket on `imports/*`, which the import role reads and writes as well.
"""

import asyncio
import gzip
import hashlib
import json
import random
import re
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from pydicom.datadict import keyword_for_tag, tag_for_keyword

from services.inference.routing import Route, Target
from shared.aws_errors import AWS_ERRORS, Kind, answering, code_of, is_answer, kind_of, unavailable
from shared.concurrency import all_of
from shared.config import Misconfigured
from shared.dicomweb import MAX_STORE_BYTES, DicomWeb, DicomWebError, StoreRejected, StoreTooLarge
from shared.errors import Unavailable
from shared.log import get_logger
from shared.objects import ObjectMissing, ObjectStore

if TYPE_CHECKING:
    from types_aiobotocore_medical_imaging import HealthImagingClient

BATCH_BYTES = MAX_STORE_BYTES * 9 // 10
"""Instances in one STOW-RS request; the rest is for its multipart headers."""
OURS = {401, 403, 404, 408}
"""HTTP statuses that speak about our permission or our address, not about the instances."""
LOOKS = 5
LOOK_PAUSE_S = 0.2
"""What was stored may take a moment until it is found; the pause doubles with each look."""
QIDO_PAGE = 1000
TRANSFERS = 8
STUDY_TAGS = {
    "PatientID": "DICOMPatientId",
    "StudyDate": "DICOMStudyDate",
    "AccessionNumber": "DICOMAccessionNumber",
    "StudyID": "DICOMStudyId",
}
"""What all image sets of a study must agree on to be primary, and what SearchImageSets calls it."""

NEEDED: dict[Target, str] = {
    "healthimaging": "RADQUEUE_DATASTORE_ID",
    "healthimaging-import": "RADQUEUE_DATASTORE_ID and RADQUEUE_IMPORT_ROLE_ARN",
    "dicomweb": "RADQUEUE_DICOMWEB_URL",
}
"""The settings without which a target cannot be had."""

# Import jobs: https://docs.aws.amazon.com/healthimaging/latest/devguide/understanding-import-jobs.html
STARTS = 8
"""Starting a job is throttled to one per second or fewer; the pause doubles with each try."""
START_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
JOB_PAUSE_S = 1.0
JOB_DEADLINE_S = 3600.0
MANIFEST_LOOKS = 8
"""The manifest may come some time after the job ended."""
MANIFEST = "job-output-manifest.json"

log = get_logger()


class PushRejected(ValueError):  # noqa: N818 - it states a fact about the instances
    """The archive does not take the instances as they should be, and will not when asked again.

    `reason_code` is `push_rejected`, or `not_primary`: it took them, but DICOMweb does not show them. `where` names the
    attributes that conflict, by keyword, or the failure reasons of PS3.18 table I.2-2; never a value.
    """

    def __init__(self, reason_code: str = "push_rejected", where: Iterable[str] = ()) -> None:
        """State the reason and the attributes."""
        super().__init__(reason_code)
        self.reason_code = reason_code
        self.where = ",".join(sorted(set(where)))


class _NotStarted(Unavailable):
    """HealthImaging refused to start an import job: none reads what lies ready for it."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One instance to push."""

    path: Path
    study_uid: str
    series_uid: str
    sop_instance_uid: str


class Archive(Protocol):
    """Takes instances in. Every method raises `Unavailable` where the archive does not answer, or does not know us."""

    target: Target

    async def shown(self, study_uid: str, series_uid: str) -> set[str] | None:
        """Return the SOPInstanceUIDs of a series that the archive shows; None where nothing is to be pushed."""

    async def push(self, instances: Sequence[Instance]) -> dict[str, str | None]:
        """Store the instances, see that each is shown, and return the image set of each series.

        Storing them again changes nothing.

        Raises:
            PushRejected: the archive refuses them, or does not show them.
        """


@dataclass(frozen=True, slots=True)
class Archives:
    """The archives that a worker can push to."""

    by_target: Mapping[Target, Archive]
    default: Target
    originals: bool = False
    """Whether the series that a MAP read is pushed before its results, where the MAP's route does not say."""

    def require(self, routes: Iterable[Route], file: str) -> None:
        """See that each route's archive is there; `file` is what messages call the table.

        Raises:
            Misconfigured: one is not.
        """
        for route in routes:
            if route.push is not None and route.push not in self.by_target:
                raise Misconfigured(f"{file}: {route.name}: push: {route.push} needs {NEEDED[route.push]}.")

    def of(self, route: Route | None) -> tuple[Archive, bool]:
        """Return the archive for a MAP's results, and whether its inputs go there as well."""
        target = route.push if route and route.push else self.default
        originals = self.originals if route is None or route.originals is None else route.originals
        return self.by_target[target], originals


class S3Only:
    """Results stay where they are stored."""

    target: Target = "s3"

    async def shown(self, study_uid: str, series_uid: str) -> set[str] | None:
        """Return None: there is no archive."""
        del study_uid, series_uid
        return None

    async def push(self, instances: Sequence[Instance]) -> dict[str, str | None]:
        """Push nothing."""
        return {one.series_uid: None for one in instances}


class DicomWebArchive:
    """Any archive that takes STOW-RS and answers QIDO-RS."""

    target: Target = "dicomweb"

    def __init__(self, web: DicomWeb) -> None:
        """Take a DICOMweb client."""
        self._web = web

    async def shown(self, study_uid: str, series_uid: str) -> set[str]:
        """Search for the instances of the series, page by page."""
        found: set[str] = set()
        try:
            while True:
                page = await self._web.search_instances(study_uid, series_uid, limit=QIDO_PAGE, offset=len(found))
                new = {uid for one in page for uid in one.get("00080018", {}).get("Value", [])} - found
                found |= new
                if len(page) < QIDO_PAGE or not new:  # an archive may not know `offset`
                    return found
        except DicomWebError as error:
            raise Unavailable(str(error)) from None

    async def push(self, instances: Sequence[Instance]) -> dict[str, str | None]:
        """Store the instances, and search for each of them."""
        await stow(self._web, instances)
        for (study_uid, series_uid), wanted in _by_series(instances).items():
            for pause_s in _pauses():
                await asyncio.sleep(pause_s)
                if wanted <= await self.shown(study_uid, series_uid):
                    break
            else:
                raise _not_shown(series_uid)
        return {one.series_uid: None for one in instances}


class HealthImaging:
    """AWS HealthImaging, by STOW-RS."""

    target: Target = "healthimaging"

    def __init__(self, web: DicomWeb, client: "HealthImagingClient", datastore_id: str) -> None:
        """Take the data store's DICOMweb side and its API."""
        self._web = web
        self._client = client
        self._datastore_id = datastore_id

    async def shown(self, study_uid: str, series_uid: str) -> set[str]:
        """Read the metadata of the primary image sets of the series."""
        primary, _ = await self._image_sets(study_uid, series_uid)
        return {uid for image_set in primary for uid in await self._instances(image_set)}

    async def push(self, instances: Sequence[Instance]) -> dict[str, str | None]:
        """Store the instances, and find each of them in a primary image set."""
        if not instances:
            return {}
        await self._store(instances)
        found: dict[str, str | None] = {}
        for (study_uid, series_uid), wanted in _by_series(instances).items():
            found[series_uid] = await self._primary(study_uid, series_uid, wanted)
        return found

    async def _store(self, instances: Sequence[Instance]) -> None:
        await stow(self._web, instances)

    async def _primary(self, study_uid: str, series_uid: str, wanted: set[str]) -> str:
        """Return the newest primary image set of a series, all of whose `wanted` instances are primary."""
        others: list[Any] = []
        missing = wanted
        for pause_s in _pauses():
            await asyncio.sleep(pause_s)
            primary, others = await self._image_sets(study_uid, series_uid)
            missing = wanted - {uid for image_set in primary for uid in await self._instances(image_set)}
            if not missing:
                newest: str = max(primary, key=lambda one: one["updatedAt"])["imageSetId"]
                return newest
        # An older push may have left its non-primary image set behind: only after the last look it says something.
        for image_set in others:
            if missing & await self._instances(image_set):
                keywords = await self._conflicts(study_uid, image_set)
                log.warning("push.not_primary", series=series_uid, conflicts=keywords)
                raise PushRejected("not_primary", keywords)
        raise _not_shown(series_uid)

    async def _image_sets(self, study_uid: str, series_uid: str) -> tuple[list[Any], list[Any]]:
        """Return the primary image sets of a series, and those that are not, or are of another study."""
        found = await self._search({"DICOMSeriesInstanceUID": series_uid})
        primary = [one for one in found if _is_primary(one) and _tag(one, "DICOMStudyInstanceUID") == study_uid]
        return primary, [one for one in found if one not in primary]

    async def _conflicts(self, study_uid: str, image_set: Any) -> list[str]:
        """Return the keywords in which an image set differs from what is primary of its study, or of its series."""
        series_uid = _tag(image_set, "DICOMSeriesInstanceUID")
        for one in await self._search({"DICOMSeriesInstanceUID": series_uid}):
            if _is_primary(one) and _tag(one, "DICOMStudyInstanceUID") != study_uid:
                return ["SeriesInstanceUID"]
        primary = [one for one in await self._search({"DICOMStudyInstanceUID": study_uid}) if _is_primary(one)]
        return [
            keyword
            for keyword, name in STUDY_TAGS.items()
            if any(_tag(one, name) != _tag(image_set, name) for one in primary)
        ]

    async def _search(self, value: dict[str, str]) -> list[Any]:
        criteria: Any = {"filters": [{"operator": "EQUAL", "values": [value]}]}
        found: list[Any] = []
        with answering("HealthImaging"):
            pages = self._client.get_paginator("search_image_sets").paginate(
                datastoreId=self._datastore_id, searchCriteria=criteria
            )
            async for page in pages:
                found += page["imageSetsMetadataSummaries"]
        return found

    async def _instances(self, image_set: Any) -> set[str]:
        """Return the SOPInstanceUIDs in an image set's metadata."""
        with answering("HealthImaging"):
            answer = await self._client.get_image_set_metadata(
                datastoreId=self._datastore_id, imageSetId=image_set["imageSetId"]
            )
            content = await answer["imageSetMetadataBlob"].read()
        return await asyncio.to_thread(_instances_of, content)


class ImportJobs(HealthImaging):
    """AWS HealthImaging, by import jobs: for what STOW-RS would take too long."""

    target: Target = "healthimaging-import"

    def __init__(
        self, web: DicomWeb, client: "HealthImagingClient", datastore_id: str, *, objects: ObjectStore, role_arn: str
    ) -> None:
        """`role_arn` is the role that HealthImaging takes on to read and write `imports/*` of the bucket."""
        super().__init__(web, client, datastore_id)
        self._objects = objects
        self._role_arn = role_arn

    async def _store(self, instances: Sequence[Instance]) -> None:
        """Import the instances from a prefix of their own, which is removed unless a job may still read it.

        The prefix follows from the instances, and the client's token lies in it: who comes after one that was killed,
        or did not wait long enough, meets the same job. With the prefix the token goes, so that the next job is new.
        """
        prefix = _import_prefix(instances)
        token, is_read = await self._token(f"{prefix}token")
        keys = {f"{prefix}input/{one.sop_instance_uid}.dcm": one.path for one in instances}
        try:
            await all_of((partial(self._objects.upload, path, key) for key, path in keys.items()), at_once=TRANSFERS)
            was_read, is_read = is_read, True
            try:
                job_id = await self._start(prefix, token)
            except _NotStarted:
                is_read = was_read
                raise
            job = await self._ended(job_id)
            is_read = False
            await self._check(job, set(keys))
        finally:
            if not is_read:
                leftovers = [item.key async for item in self._objects.list(prefix)]
                await all_of((partial(self._objects.delete, key) for key in leftovers), at_once=TRANSFERS)

    async def _token(self, key: str) -> tuple[str, bool]:
        """Return the token of the import, and whether somebody may have started its job already."""
        token = uuid.uuid4().hex
        if await self._objects.put_if_absent(key, token.encode()):
            return token, False
        try:
            return (await self._objects.get(key)).decode(), True
        except ObjectMissing:
            raise Unavailable("an import of the same instances has just ended") from None

    async def _start(self, prefix: str, token: str) -> str:
        uri = f"s3://{self._objects.bucket}/{prefix}"
        for attempt in range(STARTS):
            try:
                job = await self._client.start_dicom_import_job(
                    jobName=f"radqueue-{token}",
                    dataAccessRoleArn=self._role_arn,
                    clientToken=token,
                    datastoreId=self._datastore_id,
                    inputS3Uri=f"{uri}input/",
                    outputS3Uri=f"{uri}output/",
                )
            except AWS_ERRORS as error:
                if not is_answer(error):
                    raise unavailable("HealthImaging", error) from None
                if kind_of(error) is not Kind.UNAVAILABLE:
                    raise _NotStarted(f"HealthImaging: {code_of(error)}") from None
                # With jitter, so that workers that were refused together do not come back together.
                pause_s = min(LONGEST_PAUSE_S, START_PAUSE_S * 2**attempt) * random.uniform(0.5, 1)  # noqa: S311
                log.info("import.throttled", attempt=attempt)
                await asyncio.sleep(pause_s)
            else:
                log.info("import.started", job=job["jobId"])
                return job["jobId"]
        raise _NotStarted("HealthImaging: too many import jobs")

    async def _ended(self, job_id: str) -> Any:
        """Return the properties of a job that ended, in any way."""
        pause_s = JOB_PAUSE_S
        try:
            async with asyncio.timeout(JOB_DEADLINE_S):
                while True:
                    with answering("HealthImaging"):
                        answer = await self._client.get_dicom_import_job(datastoreId=self._datastore_id, jobId=job_id)
                    job = answer["jobProperties"]
                    if job["jobStatus"] in {"COMPLETED", "FAILED"}:
                        log.info("import.ended", job=job_id, status=job["jobStatus"])
                        return job
                    await asyncio.sleep(pause_s)
                    pause_s = min(LONGEST_PAUSE_S, pause_s * 1.5)
        except TimeoutError:
            raise Unavailable("HealthImaging: an import job does not end") from None

    async def _check(self, job: Any, keys: set[str]) -> None:
        """See in the job's output that each file was imported.

        Raises:
            PushRejected: a file was not, for what it holds.
            Unavailable: for another reason, or the job did not begin.
        """
        output = _key_of(job["outputS3Uri"])
        summary = await self._summary(output, failed=job["jobStatus"] == "FAILED")
        failed = await self._lines(summary.get("failureOutputS3Uri"))
        refused = [
            line["exception"] for line in failed if line["exception"].get("exceptionType") == "ValidationException"
        ]
        if refused:
            keywords = [word for exception in refused for word in _keywords(exception.get("message", ""))]
            log.warning("push.rejected", failures=len(failed), job=job["jobId"], keywords=sorted(set(keywords)))
            raise PushRejected(where=keywords)
        warned = await self._lines(summary.get("warningsOutputS3Uri"))
        imported = [*await self._lines(summary.get("successOutputS3Uri")), *warned]
        if warned:
            log.warning("import.warnings", job=job["jobId"], files=len(warned))
        if keys - {line["inputFile"] for line in imported}:
            raise Unavailable("HealthImaging: an import job left files out")

    async def _summary(self, output: str, *, failed: bool) -> dict[str, Any]:
        for pause_s in _pauses(MANIFEST_LOOKS):
            await asyncio.sleep(pause_s)
            try:
                summary: dict[str, Any] = json.loads(await self._objects.get(f"{output}{MANIFEST}"))["jobSummary"]
            except (ObjectMissing, ValueError, KeyError):
                if failed:
                    break
                continue
            return summary
        raise Unavailable("HealthImaging: an import job failed" if failed else "HealthImaging: no import manifest")

    async def _lines(self, folder: str | None) -> list[dict[str, Any]]:
        """Return the lines of all files in a folder of the job's output; it may not be there."""
        if folder is None:
            return []
        found = [item.key async for item in self._objects.list(_key_of(folder)) if item.key.endswith(".ndjson")]
        return [json.loads(line) for key in found for line in (await self._objects.get(key)).splitlines() if line]


async def stow(web: DicomWeb, instances: Sequence[Instance]) -> None:
    """Store the instances by STOW-RS.

    Raises:
        PushRejected: the archive refuses them.
        Unavailable: it does not answer, or does not know us.
    """
    for batch in _batches([one.path for one in instances]):
        try:
            await web.store(batch)
        except StoreRejected as rejected:
            log.warning("push.rejected", failures=len(rejected.result.failures), reasons=str(rejected))
            reasons = [f"0x{one.reason:04X}" for one in rejected.result.failures if one.reason is not None]
            tags = [tag for one in rejected.result.failures for tag in one.tags]
            raise PushRejected(where=[*map(keyword_for_tag, tags), *reasons]) from None
        except StoreTooLarge:
            raise PushRejected from None
        except DicomWebError as error:
            if error.status in OURS:
                raise Unavailable(str(error)) from None
            raise PushRejected from None


def _import_prefix(instances: Iterable[Instance]) -> str:
    uids = sorted(f"{one.study_uid}/{one.series_uid}/{one.sop_instance_uid}" for one in instances)
    return f"imports/{hashlib.sha256(chr(10).join(uids).encode()).hexdigest()[:32]}/"


def _pauses(n: int = LOOKS) -> list[float]:
    """Return the seconds to wait before each of `n` looks: none before the first, then twice as many each time."""
    return [0.0, *(min(LONGEST_PAUSE_S, LOOK_PAUSE_S * 2**look) for look in range(n - 1))]


def _not_shown(series_uid: str) -> Unavailable:
    log.warning("push.not_shown", series=series_uid)
    return Unavailable("the archive does not show a series that was pushed")


def _by_series(instances: Iterable[Instance]) -> dict[tuple[str, str], set[str]]:
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for one in instances:
        found[one.study_uid, one.series_uid].add(one.sop_instance_uid)
    return found


def _is_primary(image_set: Any) -> bool:
    return bool(image_set.get("isPrimary", True))


def _tag(image_set: Any, name: str) -> str:
    return str(image_set["DICOMTags"].get(name) or "")


def _instances_of(metadata: bytes) -> set[str]:
    document = json.loads(gzip.decompress(metadata))
    return {uid for series in document["Study"]["Series"].values() for uid in series["Instances"]}


def _key_of(uri: str) -> str:
    return urlsplit(uri).path.lstrip("/")


def _keywords(message: str) -> list[str]:
    """Return the DICOM keywords in a message, and nothing else of it."""
    return [word for word in re.findall(r"[A-Z][A-Za-z0-9]+", message) if tag_for_keyword(word) is not None]


def _batches(instances: Iterable[Path]) -> Iterator[list[Path]]:
    batch: list[Path] = []
    size = 0
    for path in instances:
        if batch and size + path.stat().st_size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(path)
        size += path.stat().st_size
    if batch:
        yield batch
