"""AWS HealthImaging by import jobs, which read what is to be imported from S3: for what STOW-RS would take too long.

IAM: those of `healthimaging`, and medical-imaging:StartDICOMImportJob and GetDICOMImportJob, iam:PassRole on the import
role, and s3:PutObject, s3:GetObject, s3:DeleteObject and s3:ListBucket on `imports/*`, which the import role reads and
writes as well.
"""

import asyncio
import hashlib
import json
import random
import re
import uuid
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydicom.datadict import tag_for_keyword

from services.inference.routing import TargetName
from services.inference.targets.healthimaging import HealthImaging
from services.inference.targets.target import LONGEST_PAUSE_S, Instance, PushRejected, pauses
from services.inference.transfers import TRANSFERS
from shared.aws_errors import AWS_ERRORS, Kind, answering, code_of, is_answer, kind_of, unavailable
from shared.concurrency import all_of
from shared.dicomweb import DicomWeb
from shared.errors import Unavailable
from shared.keys import ImportKeys
from shared.log import get_logger
from shared.objects import ObjectMissing, ObjectStore

if TYPE_CHECKING:
    from types_aiobotocore_medical_imaging import HealthImagingClient

# Import jobs: https://docs.aws.amazon.com/healthimaging/latest/devguide/understanding-import-jobs.html
STARTS = 8
"""How often starting a job is tried: it is throttled to one per second or fewer. The pause doubles with each try."""
START_PAUSE_S = 1.0
JOB_PAUSE_S = 1.0
JOB_DEADLINE_S = 3600.0
MANIFEST_LOOKS = 8
"""How often the manifest is looked for: it may come some time after the job ended."""
MANIFEST = "job-output-manifest.json"

log = get_logger()


class _NotStarted(Unavailable):
    """HealthImaging refused to start an import job, so no job reads the uploaded files."""


class ImportJobs(HealthImaging):
    """AWS HealthImaging, by import jobs: for what STOW-RS would take too long."""

    name: TargetName = "healthimaging-import"

    def __init__(
        self, web: DicomWeb, client: "HealthImagingClient", datastore_id: str, *, objects: ObjectStore, role_arn: str
    ) -> None:
        """`role_arn` is the role that HealthImaging takes on to read and write `imports/*` of the bucket."""
        super().__init__(web, client, datastore_id)
        self._objects = objects
        self._role_arn = role_arn

    async def _store(self, instances: Sequence[Instance]) -> None:
        """Import the instances from a prefix of their own, which is removed unless a job may still read it.

        The prefix follows from the instances, and the client's token lies in it: a worker that comes after one that was
        killed, or did not wait long enough, meets the same job. The token goes with the prefix, so the next job is new.
        """
        places = _import_keys(instances)
        token, is_read = await self._token(places.token)
        keys = {f"{places.input}{one.sop_instance_uid}.dcm": one.path for one in instances}
        try:
            # Upload.
            await all_of((partial(self._objects.upload, path, key) for key, path in keys.items()), at_once=TRANSFERS)
            # Import, and see what became of each file.
            was_read, is_read = is_read, True
            try:
                job_id = await self._start(places, token)
            except _NotStarted:
                is_read = was_read
                raise
            job = await self._ended(job_id)
            is_read = False
            await self._check(job, set(keys))
        finally:
            # Clean up.
            if not is_read:
                leftovers = [item.key async for item in self._objects.list(places.prefix)]
                await all_of((partial(self._objects.delete, key) for key in leftovers), at_once=TRANSFERS)

    async def _token(self, key: str) -> tuple[str, bool]:
        """Return the token of the import, and whether its job may have been started already."""
        token = uuid.uuid4().hex
        if await self._objects.put_if_absent(key, token.encode()):
            return token, False
        try:
            return (await self._objects.get(key)).decode(), True
        except ObjectMissing:
            raise Unavailable("an import of the same instances has just ended") from None

    async def _start(self, places: ImportKeys, token: str) -> str:
        bucket = f"s3://{self._objects.bucket}"
        for attempt in range(STARTS):
            try:
                job = await self._client.start_dicom_import_job(
                    jobName=f"radqueue-{token}",
                    dataAccessRoleArn=self._role_arn,
                    clientToken=token,
                    datastoreId=self._datastore_id,
                    inputS3Uri=f"{bucket}/{places.input}",
                    outputS3Uri=f"{bucket}/{places.output}",
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
        for pause_s in pauses(MANIFEST_LOOKS):
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


def _import_keys(instances: Iterable[Instance]) -> ImportKeys:
    uids = sorted(f"{one.study_uid}/{one.series_uid}/{one.sop_instance_uid}" for one in instances)
    return ImportKeys(hashlib.sha256(chr(10).join(uids).encode()).hexdigest()[:32])


def _key_of(uri: str) -> str:
    return urlsplit(uri).path.lstrip("/")


def _keywords(message: str) -> list[str]:
    """Return the DICOM keywords in a message, and nothing else of it."""
    return [word for word in re.findall(r"[A-Z][A-Za-z0-9]+", message) if tag_for_keyword(word) is not None]
