"""HealthImaging's import jobs on this machine, through boto3, from S3 to S3."""

import json
import time
import uuid

import pytest
from botocore.exceptions import ClientError, ParamValidationError

ROLE = "arn:aws:iam::123456789012:role/import"
TIMEOUT_S = 60


class Importing:
    """A data store and a prefix of the test's own."""

    def __init__(self, aws, imaging, s3):
        self.imaging, self.s3, self.bucket = imaging, s3, aws.bucket
        self.datastore_id = imaging.create_datastore(datastoreName="imports")["datastoreId"]
        self.prefix = f"test-imports/{uuid.uuid4().hex}/"

    def put(self, **files):
        for name, content in files.items():
            self.s3.put_object(Bucket=self.bucket, Key=f"{self.prefix}input/{name}", Body=content)

    def start(self, **other):
        uri = f"s3://{self.bucket}/{self.prefix}"
        asked = {"dataAccessRoleArn": ROLE, "inputS3Uri": f"{uri}input/", "outputS3Uri": f"{uri}output/"}
        until = time.monotonic() + TIMEOUT_S
        while True:
            try:
                return self.imaging.start_dicom_import_job(datastoreId=self.datastore_id, **asked | other)
            except ClientError as error:
                # Other tests of this session start jobs as well, and share the limit.
                if error.response["Error"]["Code"] != "ThrottlingException" or time.monotonic() > until:
                    raise
                time.sleep(0.2)

    def job(self, job_id):
        return self.imaging.get_dicom_import_job(datastoreId=self.datastore_id, jobId=job_id)["jobProperties"]

    def ended(self, job_id):
        until = time.monotonic() + TIMEOUT_S
        while (job := self.job(job_id))["jobStatus"] in {"SUBMITTED", "IN_PROGRESS"}:
            assert time.monotonic() < until, "the job does not end"
            time.sleep(0.05)
        return job

    def output(self, job):
        """Return what the job wrote, by the end of its key."""
        prefix = job["outputS3Uri"].removeprefix(f"s3://{self.bucket}/")
        found = self.s3.list_objects_v2(Bucket=self.bucket, Prefix=prefix).get("Contents", [])
        read = {item["Key"]: self.s3.get_object(Bucket=self.bucket, Key=item["Key"])["Body"].read() for item in found}
        return {key.removeprefix(prefix): body.decode() for key, body in read.items()}


@pytest.fixture
def importing(local_aws, aws_client):
    return Importing(local_aws, aws_client("medical-imaging"), aws_client("s3"))


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_job_imports_what_is_dicom_and_tells_what_is_not(importing, dicom_bytes):
    """COMPLETED says that the job ran: the manifest and its folders say what became of each file."""
    importing.put(good=dicom_bytes(), other=dicom_bytes(), text=b"no DICOM", bad=dicom_bytes(StudyInstanceUID=""))
    started = importing.start()
    seen = importing.job(started["jobId"])["jobStatus"]
    job = importing.ended(started["jobId"])
    output = importing.output(job)
    summary = json.loads(output["job-output-manifest.json"])["jobSummary"]
    success, failure = lines(output["SUCCESS/success.ndjson"]), lines(output["FAILURE/failure.ndjson"])
    image_sets = importing.imaging.search_image_sets(datastoreId=importing.datastore_id)["imageSetsMetadataSummaries"]

    assert started["jobStatus"] == "SUBMITTED"
    assert seen in {"SUBMITTED", "IN_PROGRESS"}
    assert job["jobStatus"] == "COMPLETED"
    assert job["outputS3Uri"].endswith(f"/{importing.datastore_id}-DicomImport-{job['jobId']}/")
    assert (summary["numberOfScannedFiles"], summary["numberOfImportedFiles"]) == (4, 2)
    assert summary["successOutputS3Uri"] == f"{job['outputS3Uri']}SUCCESS/"
    assert {line["inputFile"] for line in success} == {f"{importing.prefix}input/{name}" for name in ("good", "other")}
    assert {line["importResponse"]["imageSetId"] for line in success} == {one["imageSetId"] for one in image_sets}
    assert all(line["importResponse"]["isPrimary"] for line in success)
    assert {line["inputFile"].rpartition("/")[2]: line["exception"]["message"] for line in failure} == {
        "text": "The file is not a DICOM P10 file",
        "bad": "DICOM attribute StudyInstanceUID does not exist",
    }


def test_what_conflicts_with_its_study_is_imported_as_not_primary(importing, dicom_bytes):
    """The line of a file says whether DICOMweb will show it."""
    study_uid = "1.2.3.4"
    importing.put(first=dicom_bytes(StudyInstanceUID=study_uid))
    importing.ended(importing.start()["jobId"])
    importing.put(first=dicom_bytes(StudyInstanceUID=study_uid, PatientID="another"))
    job = importing.ended(importing.start()["jobId"])
    (line,) = lines(importing.output(job)["SUCCESS/success.ndjson"])

    assert line["importResponse"]["isPrimary"] is False


def test_the_same_client_token_is_the_same_job(importing, dicom_bytes):
    """A request that is sent twice starts one job, which the list has once, by its status."""
    importing.put(one=dicom_bytes())
    ids = {importing.start(clientToken="the-same")["jobId"] for _ in range(2)}
    other = importing.start()["jobId"]
    for job_id in (*ids, other):
        importing.ended(job_id)
    listed = importing.imaging.list_dicom_import_jobs(datastoreId=importing.datastore_id, jobStatus="COMPLETED")
    failed = importing.imaging.list_dicom_import_jobs(datastoreId=importing.datastore_id, jobStatus="FAILED")

    assert len(ids) == 1
    assert [one["jobId"] for one in listed["jobSummaries"]] == [other, *ids]
    assert failed["jobSummaries"] == []


def test_a_job_that_cannot_read_its_input_fails(importing):
    """A bucket that is not there is told as the job's end, not at its start."""
    job = importing.ended(importing.start(inputS3Uri="s3://there-is-none/input/")["jobId"])

    assert job["jobStatus"] == "FAILED"
    assert "NoSuchBucket" in job["message"]


def test_a_job_needs_a_role_and_a_data_store(importing):
    """Neither is made up where it is missing, and a job of another data store is not shown."""
    uris = {"inputS3Uri": "s3://bucket/in/", "outputS3Uri": "s3://bucket/out/"}
    with pytest.raises(ParamValidationError, match="dataAccessRoleArn"):
        importing.imaging.start_dicom_import_job(datastoreId=importing.datastore_id, **uris)
    with pytest.raises(ClientError, match="ValidationException"):
        importing.start(dataAccessRoleArn="not-the-arn-of-a-role")
    with pytest.raises(ClientError, match="ResourceNotFoundException"):
        importing.imaging.start_dicom_import_job(datastoreId="0" * 32, dataAccessRoleArn=ROLE, **uris)
    with pytest.raises(ClientError, match="ResourceNotFoundException"):
        importing.job("0" * 32)


def test_too_many_jobs_at_once_are_throttled(importing):
    """Starting is limited as on AWS: a client that does not wait is told 429."""
    uri = f"s3://{importing.bucket}/{importing.prefix}"
    asked = {"dataAccessRoleArn": ROLE, "inputS3Uri": f"{uri}none/", "outputS3Uri": f"{uri}output/"}

    def start_many():
        for _ in range(50):
            importing.imaging.start_dicom_import_job(datastoreId=importing.datastore_id, **asked)

    with pytest.raises(ClientError) as caught:
        start_many()

    assert caught.value.response["Error"]["Code"] == "ThrottlingException"
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 429
