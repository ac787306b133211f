"""One SQS queue and its dead-letter queue, with the quotas of SQS.

Quotas: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/quotas-messages.html
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from shared.aws_errors import AWS_ERRORS, Kind, code_of, kind_of
from shared.config import Misconfigured
from shared.log import get_logger

if TYPE_CHECKING:
    from types_aiobotocore_sqs import SQSClient

BATCH = 10
"""Entries that one batch call takes."""
LARGEST_BODY_BYTES = 1024 * 1024
"""Body and attributes of one message; the attributes of an event are none."""
LONGEST_LEASE_S = 12 * 3600
"""A message's visibility ends this long after the receive, whatever is asked for:
https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-visibility-timeout.html"""
BEYOND_LIMIT = "beyond the limit"
"""Words by which SQS refuses an extension past that; its code is the one of an invalid handle, too."""
START_PATIENCE_S = 30.0
"""Seconds that SQS may take to answer at a start: a service may be started before what it needs."""
START_PAUSE_S = 1.0
ATTEMPT = "attempt"
"""Message attribute: how often the work was continued in a new message."""

Item = TypeVar("Item")
Result = TypeVar("Result")
log = get_logger()


@dataclass(eq=False, slots=True)
class Received:
    """A message that this process holds. Times are of the event loop's clock, in seconds."""

    message_id: str
    body: str
    receipt_handle: str
    receive_count: int
    attempt: int
    waited_s: float
    """From being sent to the first receive."""
    lease_until: float
    """When SQS gives the message to another worker, unless it is extended."""
    ends_at: float
    """When it does whatever is asked for."""
    handler: "asyncio.Task[None] | None" = None
    """Who is told when the lease is lost, while the handler runs."""
    lost: str | None = None
    """Why the lease ended, once it has."""


class SqsQueue:
    """The calls that the runtime makes; each raises one of AWS_ERRORS where SQS does not do as asked."""

    def __init__(self, sqs: "SQSClient", name: str, url: str, dead_letter_url: str) -> None:
        """Take an open client; `open_queue` finds the URLs."""
        self._sqs = sqs
        self.name = name
        self._url = url
        self._dead_letter_url = dead_letter_url

    async def receive(self, wanted: int, *, wait_s: int, visibility_s: int) -> list[Received]:
        """Poll for up to `wanted` messages."""
        before = asyncio.get_running_loop().time()
        response = await self._sqs.receive_message(
            QueueUrl=self._url,
            MaxNumberOfMessages=wanted,
            WaitTimeSeconds=wait_s,
            VisibilityTimeout=visibility_s,
            MessageSystemAttributeNames=[
                "ApproximateFirstReceiveTimestamp",
                "ApproximateReceiveCount",
                "SentTimestamp",
            ],
            MessageAttributeNames=[ATTEMPT],
        )
        return [_received(message, before, visibility_s) for message in response.get("Messages", [])]

    async def delete(self, messages: Sequence[Received]) -> list[Received]:
        """Delete up to 10; returns those that SQS did not delete and that may be tried again."""
        entries: Any = [{"Id": str(i), "ReceiptHandle": one.receipt_handle} for i, one in enumerate(messages)]
        response = await self._sqs.delete_message_batch(QueueUrl=self._url, Entries=entries)
        return [messages[int(entry["Id"])] for entry in response.get("Failed", []) if not entry["SenderFault"]]

    async def change_visibility(self, messages: Sequence[Received], timeout_s: int) -> list[Received]:
        """Make up to 10 visible in `timeout_s`; returns those whose handle SQS does not accept any more."""
        entries: Any = [
            {"Id": str(i), "ReceiptHandle": one.receipt_handle, "VisibilityTimeout": timeout_s}
            for i, one in enumerate(messages)
        ]
        before = asyncio.get_running_loop().time()
        response = await self._sqs.change_message_visibility_batch(QueueUrl=self._url, Entries=entries)
        failed = {int(entry["Id"]): entry for entry in response.get("Failed", [])}
        for index, message in enumerate(messages):
            if index not in failed:
                message.lease_until = before + timeout_s
        # A time beyond the 12 hours is refused as well, but takes nothing away: the lease lasts as long as it did.
        return [
            messages[index]
            for index, entry in failed.items()
            if entry["SenderFault"] and BEYOND_LIMIT not in entry.get("Message", "")
        ]

    async def dead_letter(self, message: Received, attributes: Mapping[str, str]) -> None:
        """Send the body to the dead-letter queue, with the reason beside it."""
        await self._send(self._dead_letter_url, message.body, attributes)

    async def send_again(self, message: Received) -> None:
        """Send the body as a new message of this queue, with its attempt counted."""
        await self._send(self._url, message.body, {ATTEMPT: str(message.attempt + 1)})

    async def _send(self, url: str, body: str, attributes: Mapping[str, str]) -> None:
        told: Any = {name: {"DataType": "String", "StringValue": value} for name, value in attributes.items()}
        await self._sqs.send_message(QueueUrl=url, MessageBody=body, MessageAttributes=told)


async def open_queue(sqs: "SQSClient", name: str) -> SqsQueue:
    """Find a queue and its dead-letter queue.

    Raises:
        Misconfigured: one of them does not exist, or SQS does not answer.
    """
    try:
        return await patiently(partial(_open, sqs, name))
    except AWS_ERRORS as error:
        raise Misconfigured(f"The queue {name} or its dead-letter queue cannot be used: {code_of(error)}.") from None


async def _open(sqs: "SQSClient", name: str) -> SqsQueue:
    url = (await sqs.get_queue_url(QueueName=name))["QueueUrl"]
    answer = await sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["RedrivePolicy"])
    policy = answer.get("Attributes", {}).get("RedrivePolicy")
    if policy is None:
        raise Misconfigured(f"The queue {name} has no redrive policy: give it a dead-letter queue.")
    dead_letter_queue = json.loads(policy)["deadLetterTargetArn"].rsplit(":", 1)[1]
    return SqsQueue(sqs, name, url, (await sqs.get_queue_url(QueueName=dead_letter_queue))["QueueUrl"])


async def patiently(call: Callable[[], Awaitable[Result]]) -> Result:
    """Make a call again while SQS does not answer it; one that is refused, or START_PATIENCE_S later, raises."""
    loop = asyncio.get_running_loop()
    until = loop.time() + START_PATIENCE_S
    while True:
        try:
            return await call()
        except AWS_ERRORS as error:
            if kind_of(error) is not Kind.UNAVAILABLE or loop.time() > until:
                raise
            log.warning("queue.waiting", error=code_of(error))
        await asyncio.sleep(START_PAUSE_S)


def batches(items: Iterable[Item], size: int = BATCH) -> Iterator[list[Item]]:
    """Cut `items` into lists of at most `size`."""
    every = list(items)
    return (every[start : start + size] for start in range(0, len(every), size))


def _received(message: Any, before: float, visibility_s: int) -> Received:
    attributes = message["Attributes"]
    return Received(
        message_id=message["MessageId"],
        body=message["Body"],
        receipt_handle=message["ReceiptHandle"],
        receive_count=int(attributes["ApproximateReceiveCount"]),
        attempt=int(message.get("MessageAttributes", {}).get(ATTEMPT, {}).get("StringValue", "0")),
        waited_s=(int(attributes["ApproximateFirstReceiveTimestamp"]) - int(attributes["SentTimestamp"])) / 1000,
        lease_until=before + visibility_s,
        ends_at=before + LONGEST_LEASE_S,
    )
