"""The dead-letter queues: what is in them and why, and sending it back to work.

SQS has no way to read a queue without taking from it, so to look is to receive: a message that was looked at is hidden
for `HOLD_S` at most, and made visible as soon as the looking ends. Its receive count grows, which nothing reads. Bodies
are never shown: whatever is here could not be handled, and may hold anything.

To move a message is to send it to its queue, and only then to delete it here. Who is killed between the two leaves it
in both: it is worked on, and moved again by the next redrive, which consumers have to bear with from SQS anyway.

IAM: sqs:GetQueueUrl and sqs:GetQueueAttributes on the queues and their dead-letter queues; sqs:ReceiveMessage,
sqs:ChangeMessageVisibility, sqs:DeleteMessage, sqs:StartMessageMoveTask and sqs:ListMessageMoveTasks on the dead-letter
queues; sqs:SendMessage on the queues.
"""

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from shared.aws_errors import AWS_ERRORS, code_of
from shared.messages import EVENT_TYPES
from shared.operations.refused import Refused

if TYPE_CHECKING:
    from types_aiobotocore_sqs import SQSClient

HOLD_S = 30
"""Seconds for which a message that is looked at is hidden from others."""
MOST_LOOKED_AT = 1_000
"""Messages that are held at once: so many can be given back before `HOLD_S` is over."""
REPEATS = 5
"""Receives in a row that bring only what was seen before: the queue has been gone through."""
BATCH = 10
BATCH_BYTES = 1_048_576
"""The largest size of a batch, all its messages together:
https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/quotas-messages.html"""
BATCH_MARGIN_BYTES = 65_536
"""Left for attributes, which count too."""
TOLD = {"reason_code", "detail", "receive_count", "error_type", "where"}
"""Message attributes that the runtime puts beside a dead letter; they do not go back with it."""
MAX_RECEIVES, UNKNOWN = "max_receives", "unknown"
"""Reasons of messages without a code: SQS moved it by the redrive policy; nobody knows."""
CODE = re.compile(r"[a-z][a-z0-9_]{0,63}")
MISSING = {
    "404",
    "405",
    "500",
    "501",
    "InvalidAction",
    "NotImplemented",
    "UnknownOperationException",
    "UnknownOperation",
}
"""Answers of endpoints that do not have message move tasks. SQS's own errors are words, a bare status is not of it."""
EVENT_NAMES = {event.model_fields["type"].default for event in EVENT_TYPES}
PLACES = 3
PROGRESS_S = 1.0
CLOCK_STEP = timedelta(seconds=1)
"""The resolution of the date in an HTTP answer."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message of a dead-letter queue. Its body is for sending it again, not for people."""

    message_id: str
    receipt_handle: str
    body: str
    attributes: dict[str, Any]
    """The attributes that go back to the queue with the message."""
    reason: str
    place: str
    """The place where it was raised, or the field that is wrong; may be empty."""
    sent: datetime

    @property
    def event_type(self) -> str:
        """The type of the event, if it is one of the contract's; otherwise a word for what the body is."""
        try:
            document = json.loads(self.body)
        except ValueError:
            return "not json"
        if isinstance(document, dict) and ("Records" in document or "detail-type" in document):
            return "s3"
        name = document.get("type") if isinstance(document, dict) else None
        return name if isinstance(name, str) and name in EVENT_NAMES else UNKNOWN

    def sample(self) -> dict[str, str]:
        """Tell it apart from others, without anything of a patient."""
        return {"message_id": self.message_id, "event_type": self.event_type, "sent": self.sent.isoformat()}


@dataclass(frozen=True, slots=True)
class Place:
    """A queue and its dead-letter queue in AWS."""

    role: str
    url: str
    arn: str
    dead_url: str
    dead_arn: str
    dead: int
    """Number of messages in the dead-letter queue, which SQS says is approximate."""
    as_of: datetime
    """The time at which SQS said so, by its own clock and rounded up to seconds."""


async def listed(place: Place, *, sqs: "SQSClient") -> dict[str, Any]:
    """Tell what is in a dead-letter queue, by reason, and leave it there."""
    by_reason: dict[str, list[DeadLetter]] = {}
    n_seen = 0
    async with Held(place.dead_url, sqs=sqs) as held:
        async for letters in held.batches(at_most=MOST_LOOKED_AT, within_s=HOLD_S / 2):
            n_seen += len(letters)
            for letter in letters:
                by_reason.setdefault(letter.reason, []).append(letter)
    rows = [_summary(reason, letters) for reason, letters in by_reason.items()]
    return {
        "queue": place.role,
        "dead_letter_queue": place.dead_url.rsplit("/", 1)[-1],
        "messages": max(place.dead, n_seen),
        "looked_at": n_seen,
        "complete": held.complete,
        "reasons": sorted(rows, key=lambda row: (-row["count"], row["reason"])),
    }


def _summary(reason: str, letters: Sequence[DeadLetter]) -> dict[str, Any]:
    oldest = min(letters, key=lambda letter: letter.sent)
    places = Counter(letter.place for letter in letters if letter.place)
    return {
        "reason": reason,
        "count": len(letters),
        "oldest": oldest.sent.isoformat(),
        "where": [{"place": where, "count": count} for where, count in places.most_common(PLACES)],
        "sample": oldest.sample(),
    }


@dataclass(slots=True, kw_only=True)
class Redrive:
    """Sends the dead letters of one queue back to it; `tell` hears of progress, once a second at most."""

    place: Place
    sqs: "SQSClient"
    reason: str | None = None
    at_most: int | None = None
    dry_run: bool = False
    tell: Callable[[str], None] = lambda _: None
    by_reason: Counter[str] = field(default_factory=Counter)
    n_moved: int = 0
    n_left: int = 0
    """Number of messages that were looked at, and left where they are."""
    how: str = "messages"
    complete: bool = True
    told_at: float = float("-inf")
    _moved: set[int] = field(default_factory=set)
    """Hashes of the bodies of messages that were moved."""

    async def run(self) -> None:
        """Move them. Raises `Refused` if AWS does not do as asked; what was moved until then stays moved."""
        everything = self.reason is None and self.at_most is None and not self.dry_run
        if not (everything and await self._by_task()):
            await self._one_by_one()

    def summary(self) -> dict[str, Any]:
        """Say what became of the messages, as a document."""
        return {
            "queue": self.place.role,
            "how": self.how,
            "dry_run": self.dry_run,
            "moved": self.n_moved,
            "left": self.n_left,
            "complete": self.complete,
            "reasons": dict(self.by_reason.most_common()),
        }

    @property
    def verdict(self) -> str:
        """Say in one sentence what became of the messages."""
        which = f" with the reason {self.reason}" if self.reason else ""
        verb = "would be moved" if self.dry_run else "moved"
        rest = f", {self.n_left} left in place" if self.n_left else ""
        more = "" if self.complete else "; there may be more, which were not looked at"
        return f"{self.n_moved} messages{which} {verb} to {self.place.role}{rest}{more}"

    def _progress(self, text: str) -> None:
        if time.monotonic() - self.told_at >= PROGRESS_S:
            self.told_at = time.monotonic()
            self.tell(text)

    # By SQS itself.

    async def _by_task(self) -> bool:
        """Have SQS move everything; tells whether the endpoint can. The task goes on if this process ends.

        Messages that were sent to the dead-letter queue have no source that SQS knows of, so the destination is named.
        They keep their attributes on this way, which no consumer reads.
        """
        try:
            if not await self._tasks("RUNNING"):
                await self.sqs.start_message_move_task(SourceArn=self.place.dead_arn, DestinationArn=self.place.arn)
        except AWS_ERRORS as error:
            if code_of(error) in MISSING:
                return False
            raise
        self.how = "move_task"
        while True:
            task = (await self._tasks())[0]
            self.n_moved = task.get("ApproximateNumberOfMessagesMoved", 0)
            self._progress(
                f"moved {self.n_moved} of about {task.get('ApproximateNumberOfMessagesToMove', self.n_moved)}"
            )
            if task["Status"] not in {"RUNNING", "CANCELLING"}:
                break
            await asyncio.sleep(1)
        if task["Status"] != "COMPLETED":
            raise Refused(f"the move task ended as {task['Status']} ({task.get('FailureReason', 'no reason given')})")
        return True

    async def _tasks(self, status: str | None = None) -> list[Any]:
        answer = await self.sqs.list_message_move_tasks(SourceArn=self.place.dead_arn, MaxResults=1)
        return [task for task in answer.get("Results", []) if status in {None, task["Status"]}]

    # By this process.

    async def _one_by_one(self) -> None:
        async with Held(self.place.dead_url, sqs=self.sqs) as held:
            # What a dry run or a reason leaves in place is held meanwhile, so that has a bound.
            bound = {"at_most": MOST_LOOKED_AT, "within_s": HOLD_S / 2} if self.dry_run else {}
            async for letters in held.batches(**bound):
                old = [letter for letter in letters if not self._failed_again(letter)]
                chosen = [letter for letter in old if self.reason in {None, letter.reason}]
                if self.at_most is not None:
                    chosen = chosen[: self.at_most - self.n_moved]
                self.n_left += len(letters) - len(chosen)
                await self._move(held, chosen)
                self._progress(f"{'looked at' if self.dry_run else 'moved'} {self.n_moved} of about {self.place.dead}")
                if self.n_moved == self.at_most:
                    break
            else:
                self.complete = held.complete

    def _failed_again(self, letter: DeadLetter) -> bool:
        """Tell what came back since we began, and would go round for ever; SQS's answers tell the time in seconds."""
        return letter.sent > self.place.as_of or (
            letter.sent > self.place.as_of - CLOCK_STEP and hash(letter.body) in self._moved
        )

    async def _move(self, held: "Held", letters: Sequence[DeadLetter]) -> None:
        for some in _packed(letters) if letters else ():
            sent = some if self.dry_run else await self._sent(some)
            self.n_moved += len(sent)
            self.by_reason.update(letter.reason for letter in sent)
            self._moved.update(hash(letter.body) for letter in sent)
            if not self.dry_run:
                await held.delete(sent)
            if len(sent) < len(some):
                raise Refused(f"SQS did not take {len(some) - len(sent)} messages; {self.verdict}; nothing is lost")

    async def _sent(self, letters: Sequence[DeadLetter]) -> list[DeadLetter]:
        """Send up to 10 to their queue; returns those that SQS took."""
        entries: Any = [
            {"Id": str(index), "MessageBody": letter.body, "MessageAttributes": letter.attributes}
            for index, letter in enumerate(letters)
        ]
        answer = await self.sqs.send_message_batch(QueueUrl=self.place.url, Entries=entries)
        return [letters[int(entry["Id"])] for entry in answer.get("Successful", [])]


class Held:
    """Receives the messages of a dead-letter queue, each once; at the end gives back those that are left."""

    def __init__(self, url: str, *, sqs: "SQSClient") -> None:
        """Take the queue and an open client."""
        self._sqs = sqs
        self._url = url
        self._handles: dict[str, str] = {}
        """The receipt handles of what is to be given back, by message id."""
        self._deleted: set[str] = set()
        self.complete = False
        """Whether the whole queue was seen."""

    async def __aenter__(self) -> Self:
        """Begin with nothing."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Make visible what is left; if that fails, it becomes so by itself."""
        for handles in _batches(list(self._handles.values())):
            entries: Any = [
                {"Id": str(i), "ReceiptHandle": one, "VisibilityTimeout": 0} for i, one in enumerate(handles)
            ]
            await self._sqs.change_message_visibility_batch(QueueUrl=self._url, Entries=entries)

    async def batches(
        self, *, at_most: float = float("inf"), within_s: float = float("inf")
    ) -> AsyncIterator[list[DeadLetter]]:
        """Receive new messages, some at a time, until there are none or a bound is reached."""
        ends = time.monotonic() + within_s
        seen: set[str] = set()
        repeats = 0
        while repeats < REPEATS:
            wanted = int(min(BATCH, at_most - len(seen)))
            if wanted <= 0 or time.monotonic() >= ends:
                return
            letters = await self._receive(wanted)
            if not letters:
                break
            # Deleted before, and here again: the delete came too late, or it is SQS's second copy.
            await self.delete([letter for letter in letters if letter.message_id in self._deleted])
            new = [letter for letter in letters if letter.message_id not in seen]
            kept = (letter for letter in letters if letter.message_id not in self._deleted)
            self._handles.update((letter.message_id, letter.receipt_handle) for letter in kept)
            seen |= {letter.message_id for letter in new}
            repeats = 0 if new else repeats + 1
            if new:
                yield new
        self.complete = True

    async def delete(self, letters: Sequence[DeadLetter]) -> None:
        """Delete up to 10; what SQS does not delete is seen again and then deleted."""
        if not letters:
            return
        for letter in letters:
            self._deleted.add(letter.message_id)
            self._handles.pop(letter.message_id, None)
        entries: Any = [{"Id": str(i), "ReceiptHandle": letter.receipt_handle} for i, letter in enumerate(letters)]
        await self._sqs.delete_message_batch(QueueUrl=self._url, Entries=entries)

    async def _receive(self, wanted: int) -> list[DeadLetter]:
        answer = await self._sqs.receive_message(
            QueueUrl=self._url,
            MaxNumberOfMessages=wanted,
            WaitTimeSeconds=1,  # a poll that waits asks all servers of the queue, one that does not only some
            VisibilityTimeout=HOLD_S,
            MessageSystemAttributeNames=["All"],
            MessageAttributeNames=["All"],
        )
        return [_dead_letter(message) for message in answer.get("Messages", [])]


async def place_of(role: str, name: str, *, sqs: "SQSClient") -> Place:
    """Find the queue of the contract's `role`, which AWS calls `name`, and its dead-letter queue.

    Raises:
        Refused: the queue has no dead-letter queue.
    """
    url = (await sqs.get_queue_url(QueueName=name))["QueueUrl"]
    known = (await sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn", "RedrivePolicy"]))["Attributes"]
    if "RedrivePolicy" not in known:
        raise Refused(f"the queue {name} has no dead-letter queue")
    dead_arn = json.loads(known["RedrivePolicy"])["deadLetterTargetArn"]
    dead_url = (await sqs.get_queue_url(QueueName=dead_arn.rsplit(":", 1)[1]))["QueueUrl"]
    answer = await sqs.get_queue_attributes(QueueUrl=dead_url, AttributeNames=["ApproximateNumberOfMessages"])
    dead = int(answer["Attributes"]["ApproximateNumberOfMessages"])
    as_of = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]) + CLOCK_STEP
    return Place(role, url, known["QueueArn"], dead_url, dead_arn, dead, as_of)


def _dead_letter(message: Any) -> DeadLetter:
    given = message.get("MessageAttributes", {})
    system = message["Attributes"]
    told = {name: given[name].get("StringValue", "") for name in TOLD if name in given}
    code = told.get("reason_code", "")
    reason, place = (code if CODE.fullmatch(code) else UNKNOWN), _place(told)
    if "DeadLetterQueueSourceArn" in system:
        # SQS moved it; a reason beside it is of an earlier time, from before a move task.
        reason, place = MAX_RECEIVES, ""
    return DeadLetter(
        message_id=message["MessageId"],
        receipt_handle=message["ReceiptHandle"],
        body=message["Body"],
        attributes={name: _value(given[name]) for name in given if name not in TOLD},
        reason=reason,
        place=place,
        sent=datetime.fromtimestamp(int(system["SentTimestamp"]) / 1000, UTC),
    )


def _place(told: dict[str, str]) -> str:
    raised = " ".join(told[name] for name in ("error_type", "where") if told.get(name))
    return raised or told.get("detail", "")


def _value(attribute: dict[str, Any]) -> dict[str, Any]:
    return {name: attribute[name] for name in ("DataType", "StringValue", "BinaryValue") if name in attribute}


def _packed(letters: Sequence[DeadLetter]) -> Iterable[Sequence[DeadLetter]]:
    """Cut up to 10 into what one SendMessageBatch takes."""
    n_bytes = sum(len(letter.body.encode()) for letter in letters)
    return [letters] if n_bytes <= BATCH_BYTES - BATCH_MARGIN_BYTES else [[letter] for letter in letters]


def _batches(items: Sequence[Any]) -> Iterable[Sequence[Any]]:
    return (items[start : start + BATCH] for start in range(0, len(items), BATCH))
