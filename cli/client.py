"""What the command line knows of AWS: a synchronous client of the bucket, the queues and HealthImaging, like any other.

IAM: s3:ListBucket, s3:GetObject and s3:PutObject (on `incoming/*`) on the bucket; sqs:GetQueueUrl and
sqs:GetQueueAttributes on the queues and their dead-letter queues, sqs:SendMessage on the inference, training and
reporting queues; medical-imaging:GetImageSet on the data store.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import NoCredentialsError

from shared.aws_errors import AWS_ERRORS, Kind, code_of, is_answer, kind_of
from shared.config import Misconfigured, ServiceSettings, load
from shared.documents.document import Document, Model
from shared.errors import Unprocessable
from shared.messages import Event
from shared.objects import ObjectSummary
from shared.operations.refused import Refused

QUEUES = ("ingest", "inference", "training", "reporting")
CONNECTIONS = 16
HOW_TO = (
    "Start radqueue on this machine with `radqueue up`, then in another terminal "
    "`set -a; . .radqueue/local.env; set +a`, or give `--env FILE`."
)


class ClientSettings(ServiceSettings):
    """What the command line needs: the names of the bucket and the queues, and the data store."""

    datastore_id: str = ""
    """The HealthImaging data store that results are in."""


class Client:
    """The bucket, the queues and HealthImaging. Every method raises `Refused` where AWS does not do as asked."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Read the standard variables. Raises `Misconfigured` if the region or the credentials are missing."""
        self.settings = load(ClientSettings, environ)
        self.bucket = self.settings.bucket
        self.region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or ""
        self.endpoint_url = environ.get("AWS_ENDPOINT_URL")
        if not self.region:
            raise Misconfigured(f"There is no radqueue environment: AWS_REGION is not set. {HOW_TO}")
        # Variables may come from a file rather than from this process's environment, so they are handed over.
        self._session = boto3.Session(
            aws_access_key_id=environ.get("AWS_ACCESS_KEY_ID"),
            aws_secret_access_key=environ.get("AWS_SECRET_ACCESS_KEY"),
            aws_session_token=environ.get("AWS_SESSION_TOKEN"),
            region_name=self.region,
        )
        if self._session.get_credentials() is None:
            raise Misconfigured(f"AWS_ACCESS_KEY_ID is not set, and there are no other credentials. {HOW_TO}")

    # The bucket.

    def get(self, key: str) -> bytes | None:
        """Return the object, or None if there is none."""
        with self._explained():
            try:
                body: bytes = self._s3.get_object(Bucket=self.bucket, Key=key)["Body"].read()
            except AWS_ERRORS as error:
                if kind_of(error) is Kind.MISSING:
                    return None
                raise
        return body

    def read(self, document: Document[Model]) -> Model | None:
        """Return what a document holds, or None if there is none."""
        body = self.get(document.key)
        try:
            return None if body is None else document.parse(body)
        except Unprocessable:
            raise Refused(f"{self.url(document.key)} is damaged, or of a newer version of radqueue") from None

    def exists(self, key: str) -> bool:
        """Tell whether there is an object under `key`."""
        return self.modified(key) is not None

    def modified(self, key: str) -> datetime | None:
        """Return when the object was written, or None if there is none."""
        with self._explained():
            try:
                when: datetime = self._s3.head_object(Bucket=self.bucket, Key=key)["LastModified"]
            except AWS_ERRORS as error:
                if kind_of(error) is Kind.MISSING:
                    return None
                raise
        return when

    def stored(self, prefix: str, *, at_most: int | None = None) -> list[ObjectSummary]:
        """Return what is stored under `prefix`, in key order."""
        return list(islice(self.listing(prefix), at_most))

    def listing(self, prefix: str) -> Iterator[ObjectSummary]:
        """Yield what is stored under `prefix`, in key order, page by page."""
        with self._explained():
            for page in self._s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix):
                for item in page.get("Contents", []):
                    yield ObjectSummary(item["Key"], item["Size"], item["LastModified"], item["ETag"])

    def url(self, key: str) -> str:
        """Name the object for people and for other clients."""
        return f"s3://{self.bucket}/{key}"

    def upload(self, path: Path, key: str, told: Callable[[int], None] = lambda _: None) -> None:
        """Upload a file; `told` is called with the number of bytes that went since the last time."""
        with path.open("rb") as file, self._explained():
            # Without threads: the files are small and many, and the progress is told in order.
            self._s3.upload_fileobj(file, self.bucket, key, Callback=told, Config=TransferConfig(use_threads=False))

    def put(self, key: str, body: bytes) -> str:
        """Store an object; returns its ETag."""
        with self._explained():
            etag: str = self._s3.put_object(Bucket=self.bucket, Key=key, Body=body)["ETag"]
        return etag

    def copy(self, key: str, to: str) -> None:
        """Copy an object inside S3, whatever its size."""
        with self._explained():
            self._s3.copy(
                {"Bucket": self.bucket, "Key": key}, self.bucket, to, Config=TransferConfig(use_threads=False)
            )

    def download(self, key: str, path: Path) -> None:
        """Write the object into a file, whose folder is made if it is not there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._explained():
            self._s3.download_file(self.bucket, key, str(path), Config=TransferConfig(use_threads=False))

    # The queues.

    def send(self, event: Event, *, delay_s: int = 0) -> None:
        """Send an event to the queues of its class, visible after `delay_s` seconds."""
        for queue in type(event).queues:
            with self._explained():
                url = self._queue_url(self.queue_names[queue])
                self._sqs.send_message(QueueUrl=url, MessageBody=event.body(), DelaySeconds=delay_s)

    @contextmanager
    def sqs(self) -> Iterator[Any]:
        """Give the block the client of SQS, and explain what it raises."""
        with self._explained():
            yield self._sqs

    def queue_counts(self) -> dict[str, dict[str, int]]:
        """Return, per queue, how many messages are visible, in flight, delayed and in its dead-letter queue.

        SQS says that these numbers are approximate.
        """
        return {queue: self._counts(name) for queue, name in self.queue_names.items()}

    @property
    def queue_names(self) -> dict[str, str]:
        """The queues' names in AWS by their names in the contract."""
        return {queue: getattr(self.settings, f"{queue}_queue") for queue in QUEUES}

    def _counts(self, name: str) -> dict[str, int]:
        with self._explained():
            asked = ["All"]
            attributes = self._sqs.get_queue_attributes(QueueUrl=self._queue_url(name), AttributeNames=asked)
            told = attributes["Attributes"]
            counts = {
                "visible": int(told["ApproximateNumberOfMessages"]),
                "in_flight": int(told["ApproximateNumberOfMessagesNotVisible"]),
                "delayed": int(told["ApproximateNumberOfMessagesDelayed"]),
                "dead": 0,
            }
            if "RedrivePolicy" in told:
                dead = json.loads(told["RedrivePolicy"])["deadLetterTargetArn"].rsplit(":", 1)[1]
                answer = self._sqs.get_queue_attributes(QueueUrl=self._queue_url(dead), AttributeNames=asked)
                counts["dead"] = int(answer["Attributes"]["ApproximateNumberOfMessages"])
        return counts

    def _queue_url(self, name: str) -> str:
        if name not in self._queue_urls:
            self._queue_urls[name] = self._sqs.get_queue_url(QueueName=name)["QueueUrl"]
        return self._queue_urls[name]

    # HealthImaging.

    def image_set(self, image_set_id: str) -> dict[str, Any] | None:
        """Return what GetImageSet says, or None if there is no such image set."""
        with self._explained():
            try:
                found: dict[str, Any] = self._imaging.get_image_set(
                    datastoreId=self.settings.datastore_id, imageSetId=image_set_id
                )
            except AWS_ERRORS as error:
                if kind_of(error) is Kind.MISSING:
                    return None
                raise
        return found

    # The clients, each made when it is first used.

    @cached_property
    def _s3(self) -> Any:
        return self._client("s3")

    @cached_property
    def _sqs(self) -> Any:
        return self._client("sqs")

    @cached_property
    def _imaging(self) -> Any:
        return self._client("medical-imaging")

    @cached_property
    def _queue_urls(self) -> dict[str, str]:
        return {}

    def _client(self, service: str) -> Any:
        config = Config(
            connect_timeout=5,
            retries={"mode": "standard", "max_attempts": 3},
            max_pool_connections=CONNECTIONS,
            # AWS's own endpoints require the host prefix of HealthImaging, any other does not have it.
            inject_host_prefix=self.endpoint_url is None,
            s3={"addressing_style": "path"} if self.endpoint_url else None,
        )
        create: Any = self._session.client  # its overloads list every service by name
        return create(service, endpoint_url=self.endpoint_url, config=config)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        where = self.endpoint_url or f"AWS in {self.region}"
        try:
            yield
        except NoCredentialsError:
            raise Misconfigured(f"There are no credentials for {where}. {HOW_TO}") from None
        except AWS_ERRORS as error:
            code = code_of(error)
            if not is_answer(error):
                raise Refused(f"{where} does not answer ({code}). Is `radqueue up` running?") from None
            explanation = EXPLANATIONS.get(code, f"{where} answers {code}.")
            raise Refused(explanation.format(where=where, bucket=self.bucket)) from None


EXPLANATIONS = {
    "NoSuchBucket": "{where} has no bucket {bucket}: set RADQUEUE_BUCKET to the one that the services use.",
    "QueueDoesNotExist": "{where} lacks one of the queues: set RADQUEUE_INGEST_QUEUE and so on to their names.",
    "NonExistentQueue": "{where} lacks one of the queues: set RADQUEUE_INGEST_QUEUE and so on to their names.",
    "InvalidAccessKeyId": "{where} does not know these credentials.",
    "AccessDenied": "{where} does not allow this with these credentials.",
}


def now() -> datetime:
    """Return the time in UTC."""
    return datetime.now(UTC)
