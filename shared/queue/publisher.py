"""Sends events to the queues that their classes name."""

from functools import partial
from typing import TYPE_CHECKING, Protocol, Self

from shared.aws_errors import AWS_ERRORS, code_of
from shared.config import Misconfigured, ServiceSettings
from shared.errors import Unavailable, Unprocessable
from shared.log import get_logger
from shared.messages import Event, Queue
from shared.queue.sqs import LARGEST_BODY_BYTES, patiently
from shared.queue.trace import current_traceparent

if TYPE_CHECKING:
    from types_aiobotocore_sqs import SQSClient

log = get_logger()


class Publish(Protocol):
    """Sends an event to the queues that its class names."""

    async def __call__(self, event: Event, *, delay_s: int = 0) -> None:
        """Send `event`, visible after `delay_s` seconds (at most 900). Raises `Unavailable`."""


class Publisher:
    """`Publish` over SQS; the trace of the message being handled goes along."""

    @classmethod
    async def open(cls, sqs: "SQSClient", settings: ServiceSettings, *events: type[Event]) -> Self:
        """Return a publisher of these events.

        Raises:
            Misconfigured: a queue that they are sent to does not exist, may not be used, or SQS does not answer.
        """
        publisher = cls(sqs, settings)
        for queue in sorted({queue for event in events for queue in event.queues}):
            try:
                await patiently(partial(publisher._url, queue), settings.start_patience_s)
            except AWS_ERRORS as error:
                raise Misconfigured(f"RADQUEUE_{queue.upper()}_QUEUE: SQS answers {code_of(error)}.") from None
        return publisher

    def __init__(self, sqs: "SQSClient", settings: ServiceSettings) -> None:
        """Take an open client and the names of the queues."""
        self._sqs = sqs
        self._settings = settings
        self._urls: dict[Queue, str] = {}

    async def __call__(self, event: Event, *, delay_s: int = 0) -> None:
        """Send `event` to each of its queues. Raises `Unprocessable` where it is more than SQS takes."""
        body = event.model_copy(update={"traceparent": event.traceparent or current_traceparent()}).body()
        if len(body.encode()) > LARGEST_BODY_BYTES:
            raise Unprocessable("message_too_large", event.type)
        try:
            for queue in type(event).queues:
                url = await self._url(queue)
                await self._sqs.send_message(QueueUrl=url, MessageBody=body, DelaySeconds=delay_s)
        except AWS_ERRORS as error:
            raise Unavailable(f"SQS: {code_of(error)}") from None
        log.info("event.published", type=event.type, subject=event.subject, published_id=event.id, delay_s=delay_s)

    async def _url(self, queue: Queue) -> str:
        if queue not in self._urls:
            name: str = getattr(self._settings, f"{queue}_queue")
            self._urls[queue] = (await self._sqs.get_queue_url(QueueName=name))["QueueUrl"]
        return self._urls[queue]
