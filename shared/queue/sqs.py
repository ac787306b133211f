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
from shared.errors import Unprocessable
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
NOT_THERE_YET = {"NonExistentQueue", "QueueDoesNotExist"}
"""A queue that somebody may be creating now."""
FEW_RECEIVES = 20
"""A redrive policy that allows fewer takes good work away: outages and kills are receives, too."""
START_PAUSE_S = 1.0
COUNTS = ("attempt", "receives", "bugs", "deaths")
"""The message attributes that go along when a message is sent again, as `Received` explains them."""
POLL_MARGIN_S = 5.0
"""A poll that has not answered this many seconds after its wait is given up."""
NO_BODY = "{}"
"""What a message without a body is dead-lettered with: SQS takes no empty one."""
MOST_DIGITS = 18
"""Longer numbers are nothing that SQS writes."""

Item = TypeVar("Item")
Result = TypeVar("Result")
log = get_logger()


@dataclass(eq=False, slots=True)
class Received:
    """A message that this process holds. Times are of the event loop's clock, in seconds."""

    message_id: str
    body: str
    receipt_handle: str
    deliveries: int
    """How often SQS handed out this very message."""
    attempt: int
    """How often the work was continued in a new message: what follows counts from there."""
    receive_count: int
    """How often the work was received, in this message and in those that it was sent again from."""
    bugs: int
    """How often its handler raised an error that the table of fates does not know."""
    deaths: int
    """How often nothing more was heard of who received it: it was killed. One too many while this very message, once
    given back in good order, has not been sent again."""
    waited_s: float
    """Seconds from being sent to the first receive."""
    lease_until: float
    """When SQS gives the message to another worker, unless it is extended."""
    ends_at: float
    """The time at which SQS does so whatever is asked for."""
    handler: "asyncio.Task[None] | None" = None
    """Who is told when the lease is lost, while the handler runs."""
    lost: str | None = None
    """Why the lease ended, once it has."""
    fault: Unprocessable | None = None
    """Why no message could be made of what SQS delivered; such a one is dead-lettered, never handled."""


class SqsQueue:
    """The calls that the runtime makes; each raises one of AWS_ERRORS where SQS does not do as asked."""

    def __init__(self, sqs: "SQSClient", name: str, url: str, dead_letter_url: str) -> None:
        """Take an open client; `open_queue` finds the URLs."""
        self._sqs = sqs
        self.name = name
        self._url = url
        self._dead_letter_url = dead_letter_url

    async def receive(self, wanted: int, *, wait_s: int, visibility_s: int) -> list[Received]:
        """Poll for up to `wanted` messages: one call, which is given up POLL_MARGIN_S after its wait."""
        before = asyncio.get_running_loop().time()
        async with asyncio.timeout(wait_s + POLL_MARGIN_S):
            response: Mapping[str, Any] = await self._sqs.receive_message(
                QueueUrl=self._url,
                MaxNumberOfMessages=wanted,
                WaitTimeSeconds=wait_s,
                VisibilityTimeout=visibility_s,
                MessageSystemAttributeNames=[
                    "ApproximateFirstReceiveTimestamp",
                    "ApproximateReceiveCount",
                    "SentTimestamp",
                ],
                MessageAttributeNames=list(COUNTS),
            )
        delivered = response.get("Messages")
        made = [_received(one, before, visibility_s) for one in delivered] if isinstance(delivered, list) else []
        return [message for message in made if message is not None]

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

    async def send_again(self, message: Received, counts: Mapping[str, int], *, delay_s: int = 0) -> None:
        """Send the body as a new message of this queue, visible after `delay_s`, with its counts beside it."""
        attributes = {name: str(counts[name]) for name in COUNTS if counts.get(name)}
        await self._send(self._url, message.body, attributes, delay_s)

    async def _send(self, url: str, body: str, attributes: Mapping[str, str], delay_s: int = 0) -> None:
        told: Any = {name: {"DataType": "String", "StringValue": value} for name, value in attributes.items()}
        await self._sqs.send_message(QueueUrl=url, MessageBody=body, MessageAttributes=told, DelaySeconds=delay_s)


async def open_queue(sqs: "SQSClient", name: str, *, patience_s: float) -> SqsQueue:
    """Find a queue and its dead-letter queue, for `patience_s` seconds where they do not answer or exist.

    Raises:
        Misconfigured: one of them cannot be used, or is not there when the patience ends.
    """
    if name.endswith(".fifo"):
        raise Misconfigured(f"The queue {name} is a FIFO queue: it holds up all work behind one message that fails.")
    try:
        return await patiently(partial(_open, sqs, name), patience_s)
    except AWS_ERRORS as error:
        raise Misconfigured(f"The queue {name} or its dead-letter queue cannot be used: {code_of(error)}.") from None


async def _open(sqs: "SQSClient", name: str) -> SqsQueue:
    url = (await sqs.get_queue_url(QueueName=name))["QueueUrl"]
    answer = await sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["RedrivePolicy"])
    policy = answer.get("Attributes", {}).get("RedrivePolicy")
    if policy is None:
        raise Misconfigured(f"The queue {name} has no redrive policy: give it a dead-letter queue.")
    redrive = json.loads(policy)
    if int(redrive["maxReceiveCount"]) < FEW_RECEIVES:
        log.warning("queue.few_receives", queue=name, max_receive_count=redrive["maxReceiveCount"], least=FEW_RECEIVES)
    dead_letter_queue = redrive["deadLetterTargetArn"].rsplit(":", 1)[1]
    dead_letter_url = (await sqs.get_queue_url(QueueName=dead_letter_queue))["QueueUrl"]
    await _check_sendable(sqs, dead_letter_queue, dead_letter_url)
    return SqsQueue(sqs, name, url, dead_letter_url)


async def _check_sendable(sqs: "SQSClient", name: str, url: str) -> None:
    """Send a batch of nothing, which SQS refuses to everybody, but with another error to those who may not send."""
    try:
        await sqs.send_message_batch(QueueUrl=url, Entries=[])
    except AWS_ERRORS as error:
        if kind_of(error) is Kind.DENIED:
            raise Misconfigured(f"The dead-letter queue {name} cannot be sent to: {code_of(error)}.") from None
        if kind_of(error) is Kind.UNAVAILABLE:
            raise


async def patiently(call: Callable[[], Awaitable[Result]], patience_s: float) -> Result:
    """Make a call again while SQS does not answer it, or lacks the queue; after `patience_s`, or if refused, raise."""
    loop = asyncio.get_running_loop()
    until = loop.time() + patience_s
    while True:
        try:
            return await call()
        except AWS_ERRORS as error:
            if (kind_of(error) is not Kind.UNAVAILABLE and code_of(error) not in NOT_THERE_YET) or loop.time() >= until:
                raise
            log.warning("queue.waiting", error=code_of(error))
        await asyncio.sleep(START_PAUSE_S)


def batches(items: Iterable[Item], size: int = BATCH) -> Iterator[list[Item]]:
    """Cut `items` into lists of at most `size`."""
    every = list(items)
    return (every[start : start + size] for start in range(0, len(every), size))


def _received(delivered: Any, before: float, visibility_s: int) -> Received | None:
    """Make a message of what SQS delivered. Nothing of that is trusted: the first field that is wrong is its `fault`.

    None: it has no receipt handle, so that nothing can be done with it; the queue's own maxReceiveCount ends it.
    """
    found = delivered if isinstance(delivered, dict) else {}
    handle = found.get("ReceiptHandle")
    if not isinstance(handle, str):
        log.error("queue.delivery_without_handle")
        return None
    message = Received(
        message_id="",
        body=NO_BODY,
        receipt_handle=handle,
        deliveries=1,
        attempt=0,
        receive_count=1,
        bugs=0,
        deaths=0,
        waited_s=0.0,
        lease_until=before + visibility_s,
        ends_at=before + LONGEST_LEASE_S,
    )
    try:
        message.body = _text(found, "Body")
        message.message_id = _text(found, "MessageId")
        attributes = found.get("Attributes")
        message.deliveries = _number(attributes, "ApproximateReceiveCount", least=1)
        first, sent = (_number(attributes, n) for n in ("ApproximateFirstReceiveTimestamp", "SentTimestamp"))
        message.waited_s = (first - sent) / 1000
        message.attempt, receives, message.bugs, deaths = _counts(found.get("MessageAttributes", {}))
        message.receive_count = receives + message.deliveries
        message.deaths = deaths + message.deliveries - 1
    except Unprocessable as fault:
        message.fault = fault
    return message


def _counts(attributes: Any) -> list[int]:
    if not isinstance(attributes, dict):
        raise Unprocessable("invalid_delivery", "MessageAttributes")
    return [_number(attributes[name], "StringValue") if name in attributes else 0 for name in COUNTS]


def _text(found: Any, name: str) -> str:
    value = found.get(name)
    if isinstance(value, str) and value:
        return value
    raise Unprocessable("invalid_delivery", name)


def _number(found: Any, name: str, *, least: int = 0) -> int:
    """Return a number that SQS writes as text."""
    value = found.get(name) if isinstance(found, dict) else None
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= MOST_DIGITS:
        number = int(value)
        if number >= least:
            return number
    raise Unprocessable("invalid_delivery", name)
