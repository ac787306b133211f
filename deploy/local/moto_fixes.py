"""Where moto 5.2 is far from AWS, or far too slow, and radqueue would notice.

Each fix replaces one function of moto's and says what was wrong. What stays different: a completed multipart upload
notifies twice (consumers must take duplicates anyway), notifications carry no sequencer, alarms are never evaluated.
"""

import time
from datetime import datetime
from typing import Any

from botocore.utils import parse_to_aware_datetime
from moto.core import serialize
from moto.sqs import models

# moto is typed, and its types say that its functions are not to be replaced.
sqs: Any = models
timestamps: Any = serialize.TimestampSerializer


def apply() -> None:
    """Put the fixes in place; a second call changes nothing."""
    sqs.Queue.delete_message = delete_message
    sqs.SQSBackend.is_message_valid_based_on_retention_period = is_within_retention
    sqs.unix_time = time.time
    sqs.unix_time_millis = unix_time_millis
    timestamps._convert_timestamp_to_str = convert_timestamp_to_str  # noqa: SLF001


def delete_message(queue: Any, receipt_handle: str) -> None:
    """Delete a message by the handle of its latest receive alone.

    moto takes every handle that a message ever had, so that a worker whose time had run out would delete what another
    one is working on. AWS answers such a request with success and keeps the message.
    """
    if receipt_handle in queue.deleted_messages:
        return
    for message in queue._messages:  # noqa: SLF001
        if message.receipt_handle == receipt_handle:
            queue.pending_messages.discard(message)
            queue.deleted_messages.update(message.all_receipt_handles)
            queue._messages = [other for other in queue._messages if other is not message]  # noqa: SLF001
            return
        if message.had_receipt_handle(receipt_handle):
            return
    raise sqs.ReceiptHandleIsInvalid


def is_within_retention(backend: Any, queue_name: str, message: Any) -> bool:
    """Tell whether a message is young enough to be delivered.

    moto computes all attributes of the queue for it, which walks through the whole queue three times per message.
    """
    retention_s = int(backend.get_queue(queue_name).message_retention_period)
    return bool(message.sent_timestamp / 1000 + retention_s > time.time())


def unix_time_millis() -> float:
    """Return milliseconds since the epoch; moto's own goes through four `datetime` objects, per message and look."""
    return time.time() * 1000


def convert_timestamp_to_str(serializer: Any, value: Any, timestamp_format: str) -> Any:
    """Format a timestamp for an answer.

    S3's listings hand over texts in ISO 8601, which botocore's general parser reads 40 times slower than the standard
    library: a third of the time of a listing.
    """
    convert = getattr(serializer, f"_timestamp_{timestamp_format.lower()}")
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        moment = parse_to_aware_datetime(value)
    return convert(moment if moment.tzinfo else parse_to_aware_datetime(value))
