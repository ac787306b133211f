"""HealthImaging's import jobs: from a prefix of S3 into a data store, with the output that AWS writes.

A job ends as COMPLETED whatever became of its files: the manifest and the SUCCESS and FAILURE folders tell. No warnings
are made here, so the WARNING folder stays empty. Jobs are in memory, as the S3 is that they read.
Source: AWS HealthImaging developer guide, "Understanding import jobs".
"""

import hashlib
import json
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config

from deploy.local.imagesets import ImageSetStore, discard
from deploy.local.restjson import ApiError
from shared.aws_errors import code_of, is_answer

STARTS_PER_S, BURST = 1.0, 5
"""How often a job may be started; AWS documents 0.25 to 1 per second, by region."""
IN_PROGRESS_S = 0.2
"""A job stays IN_PROGRESS for this long at least, so that nobody takes it for done at the first look."""
IDENTITY = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
MANIFEST = "job-output-manifest.json"


@dataclass(slots=True)
class Job:
    """One import job; times in seconds since the epoch."""

    id: str
    name: str
    datastore_id: str
    role_arn: str
    input_uri: str
    output_uri: str
    submitted_at: float
    status: str = "SUBMITTED"
    ended_at: float | None = None
    message: str | None = None

    def summary(self) -> dict[str, Any]:
        """Return what ListDICOMImportJobs tells of it."""
        told = {
            "jobId": self.id,
            "jobName": self.name,
            "jobStatus": self.status,
            "datastoreId": self.datastore_id,
            "dataAccessRoleArn": self.role_arn,
            "submittedAt": self.submitted_at,
            "endedAt": self.ended_at,
            "message": self.message,
        }
        return {name: value for name, value in told.items() if value is not None}

    def properties(self) -> dict[str, Any]:
        """Return what GetDICOMImportJob tells of it."""
        return {**self.summary(), "inputS3Uri": self.input_uri, "outputS3Uri": self.output_uri}


@dataclass(slots=True)
class _Outcome:
    """What became of a job's files."""

    success: list[dict[str, Any]] = field(default_factory=list)
    failure: list[dict[str, Any]] = field(default_factory=list)
    image_sets: list[dict[str, Any]] = field(default_factory=list)


class ImportJobs:
    """All import jobs of this process, each in a thread of its own."""

    def __init__(self, store: ImageSetStore, *, endpoint_url: str, region: str) -> None:
        """`endpoint_url` is where S3 is: this process's own."""
        self._store = store
        self._endpoint_url = endpoint_url
        self._region = region
        self._jobs: dict[str, Job] = {}
        self._by_token: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._starts = float(BURST)
        self._refilled = time.monotonic()

    def start(
        self, token: str, name: str | None, datastore_id: str, role_arn: str, uris: tuple[str, str]
    ) -> dict[str, Any]:
        """Start a job, and tell of it; the same client token again tells of the job that it made.

        Raises `NotFound` and `ApiError`.
        """
        self._store.require_active(datastore_id)
        with self._lock:
            if token in self._by_token:
                return self._by_token[token].summary()
            self._throttle()
            job_id = uuid.uuid4().hex
            output_uri = f"{uris[1].rstrip('/')}/{datastore_id}-DicomImport-{job_id}/"
            job = Job(job_id, name or job_id, datastore_id, role_arn, uris[0], output_uri, time.time())
            self._jobs[job.id] = self._by_token[token] = job
        told = job.summary()
        threading.Thread(target=self._run, args=(job,), daemon=True).start()
        return told

    def get(self, datastore_id: str, job_id: str) -> Job:
        """Return a job of a data store. Raises `ApiError`."""
        job = self._jobs.get(job_id)
        if job is None or job.datastore_id != datastore_id:
            raise ApiError("ResourceNotFoundException", "no such import job")
        return job

    def of(self, datastore_id: str, status: str | None) -> list[Job]:
        """Return the jobs of a data store, of one status or all, newest first. Raises `NotFound`."""
        self._store.require_active(datastore_id)
        found = [job for job in list(self._jobs.values()) if job.datastore_id == datastore_id]
        return [job for job in reversed(found) if status in {None, job.status}]

    def _throttle(self) -> None:
        now = time.monotonic()
        self._starts = min(BURST, self._starts + (now - self._refilled) * STARTS_PER_S)
        self._refilled = now
        if self._starts < 1:
            raise ApiError("ThrottlingException", "Rate exceeded")
        self._starts -= 1

    @cached_property
    def _s3(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self._endpoint_url,
            region_name=self._region,
            config=Config(s3={"addressing_style": "path"}),
        )

    def _run(self, job: Job) -> None:
        job.status = "IN_PROGRESS"
        until = time.monotonic() + IN_PROGRESS_S
        try:
            outcome = self._import(job)
            self._write_output(job, outcome)
            ended = "COMPLETED"
        except Exception as error:  # noqa: BLE001 - a thread's border: the job must not stay in progress for ever
            job.message = f"S3 answers {code_of(error)}" if is_answer(error) else f"internal error: {code_of(error)}"
            ended = "FAILED"
        time.sleep(max(0.0, until - time.monotonic()))
        job.ended_at = time.time()
        job.status = ended

    def _import(self, job: Job) -> _Outcome:
        # pydicom is loaded at the first job: it would be a fifth of the start-up time.
        from deploy.local.dicomweb import examine  # noqa: PLC0415
        from deploy.local.imagesets import Arrival  # noqa: PLC0415

        outcome, arrivals, keys, paths = _Outcome(), [], [], []
        bucket, prefix = _place(job.input_uri)
        pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        try:
            for key in [item["Key"] for page in pages for item in page.get("Contents", [])]:
                path = self._store.incoming / uuid.uuid4().hex
                paths.append(path)
                self._s3.download_file(bucket, key, str(path))
                examined = examine(path, hashlib.sha256(path.read_bytes()).hexdigest())
                if isinstance(examined, Arrival):
                    arrivals.append(examined)
                    keys.append(key)
                else:
                    error = {"exceptionType": "ValidationException", "message": _why(path)}
                    outcome.failure.append({"inputFile": key, "exception": error})
            image_sets = self._store.store(job.datastore_id, arrivals)
        finally:
            discard(paths)
        matched = Counter(image_set.id for image_set in image_sets)
        for key, image_set in zip(keys, image_sets, strict=True):
            told = {
                "imageSetId": image_set.id,
                "imageSetVersion": image_set.version,
                "isPrimary": image_set.is_primary,
            }
            outcome.success.append({"inputFile": key, "importResponse": told})
            summary = {**told, "numberOfMatchedSOPInstances": matched[image_set.id]}
            if summary not in outcome.image_sets:
                outcome.image_sets.append(summary)
        return outcome

    def _write_output(self, job: Job, outcome: _Outcome) -> None:
        bucket, prefix = _place(job.output_uri)
        for folder, name, lines in (
            ("SUCCESS", "success", outcome.success),
            ("FAILURE", "failure", outcome.failure),
        ):
            if lines:
                body = "".join(json.dumps(line) + "\n" for line in lines)
                self._s3.put_object(Bucket=bucket, Key=f"{prefix}{folder}/{name}.ndjson", Body=body.encode())
        summary = {
            "jobId": job.id,
            "datastoreId": job.datastore_id,
            "inputS3Uri": job.input_uri,
            "outputS3Uri": job.output_uri,
            "successOutputS3Uri": f"{job.output_uri}SUCCESS/",
            "failureOutputS3Uri": f"{job.output_uri}FAILURE/",
            "warningsOutputS3Uri": f"{job.output_uri}WARNING/",
            "numberOfScannedFiles": len(outcome.success) + len(outcome.failure),
            "numberOfImportedFiles": len(outcome.success),
            "numberOfFilesWithCustomerError": len(outcome.failure),
            "numberOfFilesWithServerError": 0,
            "numberOfGeneratedImageSets": len(outcome.image_sets),
            "imageSetsSummary": outcome.image_sets,
        }
        manifest = json.dumps({"jobSummary": summary}, indent=1)
        self._s3.put_object(Bucket=bucket, Key=f"{prefix}{MANIFEST}", Body=manifest.encode())


def _place(uri: str) -> tuple[str, str]:
    parts = urlsplit(uri)
    return parts.netloc, parts.path.lstrip("/")


def _why(path: Any) -> str:
    """Say why a file is refused, by the keyword of an attribute at most."""
    import pydicom  # noqa: PLC0415

    try:
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
    except Exception:  # noqa: BLE001 - whatever pydicom stumbles over, the file is none
        return "The file is not a DICOM P10 file"
    missing = [keyword for keyword in IDENTITY if not dataset.get(keyword)]
    missing += [] if dataset.file_meta.get("TransferSyntaxUID") else ["TransferSyntaxUID"]
    return f"DICOM attribute {missing[0]} does not exist" if missing else "A DICOM attribute is not valid"
