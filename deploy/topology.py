"""The topology that every deployment has, read from `topology.json`, and its creation through the AWS APIs.

Terraform reads the same JSON file, so the two cannot drift. Creation is idempotent: what exists is brought to the
description, never made twice.

IAM: s3:CreateBucket, s3:PutBucketNotification, s3:GetBucketNotification, sqs:CreateQueue, sqs:SetQueueAttributes,
sqs:GetQueueUrl, sqs:GetQueueAttributes, medical-imaging:CreateDatastore, medical-imaging:ListDatastores,
medical-imaging:GetDatastore, ecr:CreateRepository.
"""

import json
import time
from collections.abc import Callable
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, Self

import boto3
from botocore.config import Config
from pydantic import BaseModel, ConfigDict

from shared.aws_errors import AWS_ERRORS, code_of

DESCRIPTION = files("deploy") / "topology.json"
DATASTORE_TIMEOUT_S = 600
"""AWS takes up to a few minutes to make a data store ACTIVE."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Notification(_Frozen):
    """Which new objects the bucket tells which queue about; `queue` is a key of `Topology.queues`."""

    prefix: str
    events: tuple[str, ...]
    queue: str


class Bucket(_Frozen):
    """The one bucket."""

    name: str
    notifications: tuple[Notification, ...]


class Named(_Frozen):
    """Anything that is described by its name alone."""

    name: str


class QueueDefaults(_Frozen):
    """What all queues share; times in seconds."""

    visibility_timeout_s: int
    max_receive_count: int
    retention_s: int
    max_message_bytes: int
    dead_letter_suffix: str
    dead_letter_retention_s: int


class Topology(_Frozen):
    """Everything that a deployment consists of outside the services themselves."""

    region: str
    bucket: Bucket
    queues: dict[str, Named]
    queue_defaults: QueueDefaults
    datastore: Named
    repository: Named

    @classmethod
    def load(cls, path: Traversable = DESCRIPTION) -> Self:
        """Read the description."""
        return cls.model_validate_json(path.read_text("utf-8"))


def create(topology: Topology, *, endpoint_url: str | None = None) -> str:
    """Create what is missing, and return the data store's id.

    `endpoint_url` is an override of every service's endpoint; None means AWS itself, with the usual credentials.
    """
    # Only an overridden endpoint loses HealthImaging's host prefix: AWS itself requires it.
    config = Config(inject_host_prefix=False, s3={"addressing_style": "path"}) if endpoint_url else Config()
    # Any: the stubs, where they are installed, have one overload per service and none for a name in a variable.
    session: Any = boto3.Session(region_name=topology.region)

    def client(service: str) -> Any:
        return session.client(service, endpoint_url=endpoint_url, config=config)

    sqs = client("sqs")
    queue_arns = {
        key: _create_queue(sqs, queue.name, topology.queue_defaults) for key, queue in topology.queues.items()
    }
    _create_bucket(client("s3"), topology, queue_arns)
    _create_repository(client("ecr"), topology.repository.name)
    return _create_datastore(client("medical-imaging"), topology.datastore.name)


def _create_queue(sqs: Any, name: str, defaults: QueueDefaults) -> str:
    """Create a queue and its dead-letter queue; return the queue's ARN."""
    _, dead_letter_arn = _ensure_queue(
        sqs, name + defaults.dead_letter_suffix, {"MessageRetentionPeriod": str(defaults.dead_letter_retention_s)}
    )
    attributes = {
        "VisibilityTimeout": str(defaults.visibility_timeout_s),
        "MessageRetentionPeriod": str(defaults.retention_s),
        "MaximumMessageSize": str(defaults.max_message_bytes),
        "RedrivePolicy": json.dumps(
            {"deadLetterTargetArn": dead_letter_arn, "maxReceiveCount": str(defaults.max_receive_count)}
        ),
    }
    url, arn = _ensure_queue(sqs, name, attributes)
    sqs.set_queue_attributes(QueueUrl=url, Attributes={"Policy": json.dumps(_notification_policy(arn))})
    return arn


def _ensure_queue(sqs: Any, name: str, attributes: dict[str, str]) -> tuple[str, str]:
    # CreateQueue refuses to change the attributes of a queue that exists.
    try:
        url = sqs.get_queue_url(QueueName=name)["QueueUrl"]
        sqs.set_queue_attributes(QueueUrl=url, Attributes=attributes)
    except sqs.exceptions.QueueDoesNotExist:
        url = sqs.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"]
    arn: str = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    return url, arn


def _notification_policy(queue_arn: str) -> dict[str, Any]:
    """Allow S3 of the same account to send to the queue."""
    account = queue_arn.split(":")[4]
    return {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Principal": {"Service": "s3.amazonaws.com"},
                "Action": "sqs:SendMessage",
                "Resource": queue_arn,
                "Condition": {"StringEquals": {"aws:SourceAccount": account}},
            }
        ],
    }


def _create_bucket(s3: Any, topology: Topology, queue_arns: dict[str, str]) -> None:
    bucket = topology.bucket
    # us-east-1 is the one region that must not be named as a location constraint.
    location = (
        {} if topology.region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": topology.region}}
    )
    _unless_exists(lambda: s3.create_bucket(Bucket=bucket.name, **location), "BucketAlreadyOwnedByYou")
    configurations = [
        {
            "QueueArn": queue_arns[notification.queue],
            "Events": list(notification.events),
            "Filter": {"Key": {"FilterRules": [{"Name": "prefix", "Value": notification.prefix}]}},
        }
        for notification in bucket.notifications
    ]
    s3.put_bucket_notification_configuration(
        Bucket=bucket.name, NotificationConfiguration={"QueueConfigurations": configurations}
    )


def _create_repository(ecr: Any, name: str) -> None:
    _unless_exists(lambda: ecr.create_repository(repositoryName=name), "RepositoryAlreadyExistsException")


def _create_datastore(imaging: Any, name: str) -> str:
    pages = imaging.get_paginator("list_datastores").paginate(datastoreStatus="ACTIVE")
    for page in pages:
        for datastore in page["datastoreSummaries"]:
            if datastore["datastoreName"] == name:
                return str(datastore["datastoreId"])
    created: str = imaging.create_datastore(datastoreName=name)["datastoreId"]
    deadline = time.monotonic() + DATASTORE_TIMEOUT_S
    while (status := imaging.get_datastore(datastoreId=created)["datastoreProperties"]["datastoreStatus"]) != "ACTIVE":
        if status != "CREATING" or time.monotonic() > deadline:
            raise RuntimeError(f"data store {created} is {status}, not ACTIVE")
        time.sleep(5)
    return created


def _unless_exists(call: Callable[[], Any], exists_code: str) -> None:
    try:
        call()
    except AWS_ERRORS as error:
        if code_of(error) != exists_code:
            raise
