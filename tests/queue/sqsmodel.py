"""SQS's standard queues as a state machine without I/O: the truth that the fake serves and the tests judge from.

The clock is an argument. Every call and every change of state is appended to `log`; what expires by itself is logged
when it is next looked at, with the time at which it happened.

What AWS says, and what this does where it says "might":
- A receipt handle belongs to one receive. Deleting with the handle of an earlier receive succeeds without effect
  (https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_DeleteMessage.html), and so does deleting
  again what is deleted.
- Once the visibility timeout has passed, changing it or deleting "might result in an error"
  (…/APIReference/API_ChangeMessageVisibility.html). Here it always does, because a consumer must not rely on the other:
  deletion fails with InvalidParameterValue, "The receipt handle has expired", and a change with MessageNotInflight.
- Changing visibility by a handle of an earlier receive, or of a deleted message, fails with InvalidParameterValue,
  "Message does not exist or is not available for visibility timeout change". A handle that was never given out fails
  with ReceiptHandleIsInvalid.
- A lease ends 12 hours after the ReceiveMessage request that began it. An extension beyond is refused with
  InvalidParameterValue, "Total VisibilityTimeout for the message is beyond the limit", and not shortened
  (…/SQSDeveloperGuide/sqs-visibility-timeout.html). The page can also be read as 12 hours after the message's very
  first receive: `cap_from_first_receive`. What must hold under both readings is tested under both.
- A message that was received maxReceiveCount times moves to the dead-letter queue instead of being received again
  (…/SQSDeveloperGuide/sqs-dead-letter-queues.html). It keeps its id and the time it was sent.
- StartMessageMoveTask without a destination moves messages to the queue that they were moved from. A message that was
  sent to the dead-letter queue has no such queue: the task ends as FAILED with CouldNotDetermineMessageSource. A moved
  message is a new one, with a new id (…/APIReference/API_StartMessageMoveTask.html).
- At-least-once delivery: `duplicate` makes a second copy with the same id, that must be deleted by itself.

Left out: FIFO, retention, encryption, permissions, tags, the sampling of servers in short polls, the limit of 120,000
messages in flight. Messages come in the order in which they became visible.
"""

import base64
import hashlib
import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

LONGEST_LEASE_S = 43_200
MOST_PER_BATCH = 10
LONGEST_POLL_S = 20
LONGEST_DELAY_S = 900
LARGEST_MESSAGE = 1_048_576
MOVES_PER_S = 500
REGION, ACCOUNT = "eu-central-1", "123456789012"


class Refused(Exception):  # noqa: N818 - it is an answer
    """An error that SQS answers: its shape, and the code of the query protocol, which clients see."""

    def __init__(self, code: str, text: str, *, shape: str | None = None, status: int = 400) -> None:
        super().__init__(text)
        self.code = code
        self.shape = shape or f"com.amazonaws.sqs#{code.rsplit('.', 1)[-1]}"
        self.status = status


def _invalid_value(text: str) -> Refused:
    return Refused("InvalidParameterValue", text, shape="com.amazon.coral.service#InvalidParameterValueException")


@dataclass(frozen=True, slots=True)
class Record:
    """One line of the log. `what` is a call, a reply, a fault, or a change of state."""

    at: float
    what: str
    queue: str | None = None
    message_id: str | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Stored:
    """One copy of a message in a queue."""

    message_id: str
    body: str
    attributes: dict[str, Any]
    sent_at: float
    visible_at: float
    serial: int = 0
    """Tells copies apart; given when it is put into a queue."""
    receives: int = 0
    first_received_at: float | None = None
    received_at: float = 0.0
    """When the receive that its present handle belongs to was."""
    source_arn: str | None = None
    in_flight: bool = False
    """It was received and has not come back since; whether that is still so, the clock decides."""


@dataclass(slots=True)
class StoredQueue:
    """A queue, its settings and its messages in the order in which they came."""

    name: str
    settings: dict[str, str]
    messages: dict[int, Stored] = field(default_factory=dict)

    @property
    def arn(self) -> str:
        return f"arn:aws:sqs:{REGION}:{ACCOUNT}:{self.name}"

    @property
    def redrive(self) -> dict[str, Any] | None:
        return json.loads(self.settings["RedrivePolicy"]) if self.settings.get("RedrivePolicy") else None


@dataclass(slots=True)
class MoveTask:
    """A redrive, which moves messages as time passes."""

    handle: str
    source: StoredQueue
    destination_arn: str | None
    per_s: int
    started_at: float
    to_move: int
    moved: int = 0
    status: str = "RUNNING"
    failure: str | None = None


class SqsModel:
    """All queues of one account."""

    def __init__(self, now: Callable[[], float], *, epoch: float = 0.0) -> None:
        """Take the clock, in seconds, and what to add to it where AWS answers a time of day."""
        self.now = now
        self.epoch = epoch
        self.cap_from_first_receive = False
        self.queues: dict[str, StoredQueue] = {}
        self.tasks: list[MoveTask] = []
        self.log: list[Record] = []
        self.listeners: list[Callable[[Record], None]] = []
        self._serial = 0

    def record(
        self,
        what: str,
        queue: str | None = None,
        message_id: str | None = None,
        *,
        at: float | None = None,
        **details: Any,
    ) -> None:
        """Append to the log."""
        entry = Record(self.now() if at is None else at, what, queue, message_id, details)
        self.log.append(entry)
        for listener in self.listeners:
            listener(entry)

    # Queues.

    def create_queue(self, name: str, settings: dict[str, str] | None = None) -> StoredQueue:
        """Create a queue, or return it where one with the same settings is there."""
        given = dict(settings or {})
        if name in self.queues:
            if any(self.queues[name].settings.get(key) != value for key, value in given.items()):
                raise Refused(
                    "QueueAlreadyExists",
                    "A queue already exists with different attributes",
                    shape="com.amazonaws.sqs#QueueNameExists",
                )
            return self.queues[name]
        self.queues[name] = StoredQueue(name, given)
        self.record("created", name)
        return self.queues[name]

    def queue(self, name: str) -> StoredQueue:
        """Return the queue of this name."""
        if name not in self.queues:
            raise Refused(
                "AWS.SimpleQueueService.NonExistentQueue",
                "The specified queue does not exist.",
                shape="com.amazonaws.sqs#QueueDoesNotExist",
            )
        self._let_time_pass()
        return self.queues[name]

    def attributes_of(self, queue: StoredQueue) -> dict[str, str]:
        """Return what GetQueueAttributes answers for `All`; the counts are exact here."""
        now = self.now()
        hidden = [message for message in queue.messages.values() if message.visible_at > now]
        delayed = sum(not message.in_flight for message in hidden)
        return (
            {"VisibilityTimeout": "30", "DelaySeconds": "0", "ReceiveMessageWaitTimeSeconds": "0"}
            | queue.settings
            | {
                "QueueArn": queue.arn,
                "ApproximateNumberOfMessages": str(len(queue.messages) - len(hidden)),
                "ApproximateNumberOfMessagesNotVisible": str(len(hidden) - delayed),
                "ApproximateNumberOfMessagesDelayed": str(delayed),
            }
        )

    # Messages.

    def send(
        self, queue: StoredQueue, body: str, attributes: dict[str, Any] | None = None, delay_s: int | None = None
    ) -> Stored:
        """Put a message into the queue."""
        if not body:
            raise Refused(
                "MissingParameter",
                "The request must contain the parameter MessageBody.",
                shape="com.amazonaws.sqs#MissingRequiredParameterException",
            )
        if len(body.encode()) > LARGEST_MESSAGE:
            raise _invalid_value(
                f"One or more parameters are invalid. Reason: Message must be shorter than {LARGEST_MESSAGE} bytes."
            )
        delay = int(queue.settings.get("DelaySeconds", 0)) if delay_s is None else delay_s
        if not 0 <= delay <= LONGEST_DELAY_S:
            raise _invalid_value(
                f"Value {delay} for parameter DelaySeconds is invalid. Reason: DelaySeconds must be >= 0 and <= 900."
            )
        if attributes and len(attributes) > MOST_PER_BATCH:
            raise _invalid_value("Number of message attributes must be at most 10.")
        message = self._add(queue, Stored(str(uuid.uuid4()), body, attributes or {}, self.now(), self.now() + delay))
        self.record("sent", queue.name, message.message_id, delay_s=delay, body=body, attributes=_texts(attributes))
        return message

    def receive(self, queue: StoredQueue, wanted: int = 1, visibility_s: int | None = None) -> list[tuple[Stored, str]]:
        """Take up to `wanted` visible messages, and return each with its handle."""
        if not 1 <= wanted <= MOST_PER_BATCH:
            raise _invalid_value(
                f"Value {wanted} for parameter MaxNumberOfMessages is invalid. Reason: Must be between 1 and 10."
            )
        timeout = int(queue.settings.get("VisibilityTimeout", 30)) if visibility_s is None else visibility_s
        _check_visibility(timeout)
        now = self.now()
        taken: list[tuple[Stored, str]] = []
        for message in sorted(queue.messages.values(), key=lambda one: (one.visible_at, one.serial)):
            if message.visible_at > now or len(taken) == wanted:
                break
            if self._dead_lettered(queue, message):
                continue
            message.receives += 1
            message.received_at = now
            message.first_received_at = now if message.first_received_at is None else message.first_received_at
            message.visible_at = now + timeout
            message.in_flight = timeout > 0
            handle = _handle(queue, message)
            self.record(
                "received",
                queue.name,
                message.message_id,
                receives=message.receives,
                visible_at=message.visible_at,
                serial=message.serial,
            )
            taken.append((message, handle))
        return taken

    def delete(self, queue: StoredQueue, handle: str) -> None:
        """Delete a message by the handle of its latest receive."""
        serial, receives = _parse_handle(queue, handle)
        message = queue.messages.get(serial)
        if message is None or message.receives != receives:
            message_id = message.message_id if message is not None else None
            self.record("delete_without_effect", queue.name, message_id, handle_receives=receives)
            return
        if message.visible_at <= self.now():
            raise _invalid_value(
                f"Value {handle} for parameter ReceiptHandle is invalid. Reason: The receipt handle has expired."
            )
        del queue.messages[serial]
        self.record("deleted", queue.name, message.message_id, receives=receives, serial=serial)

    def change_visibility(self, queue: StoredQueue, handle: str, timeout_s: int) -> None:
        """Let the message of `handle` become visible in `timeout_s` seconds from now."""
        serial, receives = _parse_handle(queue, handle)
        _check_visibility(timeout_s)
        message = queue.messages.get(serial)
        if message is None or message.receives != receives:
            raise _invalid_value(
                f"Value {handle} for parameter ReceiptHandle is invalid. Reason: Message does not exist or is not "
                "available for visibility timeout change."
            )
        now = self.now()
        if message.visible_at <= now:
            raise Refused(
                "AWS.SimpleQueueService.MessageNotInflight",
                "The specified message isn't in flight.",
                shape="com.amazonaws.sqs#MessageNotInflight",
            )
        began = message.first_received_at if self.cap_from_first_receive else message.received_at
        if now + timeout_s > (began or 0) + LONGEST_LEASE_S:
            raise _invalid_value(
                f"Value {timeout_s} for parameter VisibilityTimeout is invalid. Reason: Total VisibilityTimeout for "
                f"the message is beyond the limit [{LONGEST_LEASE_S} seconds]."
            )
        message.visible_at = now + timeout_s
        message.in_flight = timeout_s > 0
        self.record(
            "extended" if timeout_s else "released",
            queue.name,
            message.message_id,
            visible_at=message.visible_at,
            serial=serial,
        )

    # What no client asks for.

    def duplicate(self, queue: StoredQueue, message_id: str) -> None:
        """Make a second copy of a message, visible now: SQS delivers at least once."""
        original = next(one for one in queue.messages.values() if one.message_id == message_id)
        copy = self._add(
            queue, Stored(message_id, original.body, original.attributes, original.sent_at, visible_at=self.now())
        )
        self.record("duplicated", queue.name, message_id, serial=copy.serial)

    def take_away(self, queue: StoredQueue, message_id: str) -> None:
        """End the lease of a message now, as if its visibility timeout had passed."""
        for message in queue.messages.values():
            if message.message_id == message_id and message.in_flight:
                message.visible_at = self.now()
                self._let_time_pass()

    def next_change(self, queue: StoredQueue) -> float | None:
        """Return when a message becomes visible by itself next."""
        now = self.now()
        times = [message.visible_at for message in queue.messages.values() if message.visible_at > now]
        times += [now + 1 / task.per_s for task in self.tasks if task.status == "RUNNING"]
        return min(times, default=None)

    # Redrive.

    def start_move(self, source_arn: str, destination_arn: str | None, per_s: int | None) -> MoveTask:
        """Start to move the messages of a dead-letter queue."""
        source = self._by_arn(source_arn)
        if destination_arn is not None:
            self._by_arn(destination_arn)
        if not any((queue.redrive or {}).get("deadLetterTargetArn") == source_arn for queue in self.queues.values()):
            raise _invalid_value("Source queue must be configured as a Dead Letter Queue.")
        if any(task.source is source and task.status == "RUNNING" for task in self.tasks):
            raise _invalid_value(
                "There is already a task running. Only one active task is allowed for a source queue arn."
            )
        task = MoveTask(
            str(uuid.uuid4()), source, destination_arn, per_s or MOVES_PER_S, self.now(), len(source.messages)
        )
        self.tasks.append(task)
        self.record("move_started", source.name, task=task.handle)
        return task

    def tasks_of(self, source_arn: str) -> list[MoveTask]:
        """Return the tasks of a queue, the latest first."""
        source = self._by_arn(source_arn)
        self._let_time_pass()
        return [task for task in reversed(self.tasks) if task.source is source]

    # Inside.

    def _add(self, queue: StoredQueue, like: Stored) -> Stored:
        """Put a message into a queue, as a copy of its own."""
        self._serial += 1
        message = replace(like, serial=self._serial)
        queue.messages[message.serial] = message
        return message

    def _dead_lettered(self, queue: StoredQueue, message: Stored) -> bool:
        policy = queue.redrive
        if policy is None or message.receives < int(policy["maxReceiveCount"]):
            return False
        target = self._by_arn(policy["deadLetterTargetArn"])
        del queue.messages[message.serial]
        letter = Stored(message.message_id, message.body, message.attributes, message.sent_at, self.now())
        self._add(target, replace(letter, source_arn=queue.arn))
        self.record("dead_lettered", queue.name, message.message_id, receives=message.receives, to=target.name)
        return True

    def _let_time_pass(self) -> None:
        now = self.now()
        for queue in self.queues.values():
            for message in queue.messages.values():
                if message.in_flight and message.visible_at <= now:
                    message.in_flight = False
                    self.record("expired", queue.name, message.message_id, at=message.visible_at, serial=message.serial)
        for task in self.tasks:
            while task.status == "RUNNING" and task.moved < (now - task.started_at) * task.per_s:
                self._move_one(task)

    def _move_one(self, task: MoveTask) -> None:
        message = next((one for one in task.source.messages.values() if one.visible_at <= self.now()), None)
        if message is None or task.moved == task.to_move:
            task.status = "COMPLETED"
            return
        arn = task.destination_arn or message.source_arn
        if arn is None:
            task.status, task.failure = "FAILED", "CouldNotDetermineMessageSource"
            return
        del task.source.messages[message.serial]
        task.moved += 1
        target = self._by_arn(arn)
        moved = self._add(
            target, Stored(str(uuid.uuid4()), message.body, message.attributes, self.now(), visible_at=self.now())
        )
        self.record("redriven", task.source.name, message.message_id, to=target.name, as_id=moved.message_id)

    def _by_arn(self, arn: str) -> StoredQueue:
        for queue in self.queues.values():
            if queue.arn == arn:
                return queue
        raise Refused(
            "ResourceNotFoundException",
            "The resource that you specified for the SourceArn parameter doesn't exist.",
            status=404,
        )


def seen(message: Stored, epoch: float) -> dict[str, str]:
    """Return the system attributes that a consumer sees."""
    found = {
        "SenderId": "AIDAFAKE",
        "SentTimestamp": str(round((epoch + message.sent_at) * 1000)),
        "ApproximateReceiveCount": str(message.receives),
        "ApproximateFirstReceiveTimestamp": str(round((epoch + (message.first_received_at or 0)) * 1000)),
    }
    return found | ({"DeadLetterQueueSourceArn": message.source_arn} if message.source_arn else {})


def md5(text: str) -> str:
    """Return the checksum that SQS answers with."""
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def entries_of(what: str, log: list[Record], queue: str | None = None) -> Iterator[Record]:
    """Yield the records of one kind, of one queue where it is given."""
    return (entry for entry in log if entry.what == what and queue in (None, entry.queue))


def _check_visibility(timeout_s: int) -> None:
    if not 0 <= timeout_s <= LONGEST_LEASE_S:
        raise _invalid_value(
            f"Value {timeout_s} for parameter VisibilityTimeout is invalid. Reason: Must be 0 to {LONGEST_LEASE_S}."
        )


def _handle(queue: StoredQueue, message: Stored) -> str:
    return base64.urlsafe_b64encode(f"{queue.name}/{message.serial}/{message.receives}".encode()).decode()


def _parse_handle(queue: StoredQueue, handle: str) -> tuple[int, int]:
    try:
        name, serial, receives = base64.urlsafe_b64decode(handle.encode()).decode().split("/")
        if name == queue.name:
            return int(serial), int(receives)
    except ValueError:
        pass
    raise Refused("ReceiptHandleIsInvalid", f'The input receipt handle "{handle}" is not a valid receipt handle.')


def _texts(attributes: dict[str, Any] | None) -> dict[str, str]:
    return {name: value.get("StringValue", "") for name, value in (attributes or {}).items()}
