"""The fake SQS: each rule that other tests rest on, asked through the client that the services use."""

import asyncio
import json
from contextlib import asynccontextmanager

import pytest
from botocore.exceptions import BotoCoreError, ClientError
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.queue.fakesqs import FakeSqs, Fault, throttled
from tests.queue.sqsmodel import LONGEST_LEASE_S, SqsModel
from tests.queue.virtualtime import virtual_time
from tests.queue.world import ONE_TRY, client_of

NAME = "work"


@asynccontextmanager
async def queue_of(**options):
    """Serve one queue; yield the fake, a client that tries once, and the queue's address."""
    async with FakeSqs.serving() as fake, client_of(fake.url, ONE_TRY) as sqs:
        fake.create(NAME, **options)
        url = (await sqs.get_queue_url(QueueName=NAME))["QueueUrl"]
        yield fake, sqs, url


async def receive(sqs, url, **arguments):
    """Receive at most one message."""
    found = await sqs.receive_message(QueueUrl=url, MessageSystemAttributeNames=["All"], **arguments)
    return found.get("Messages", [None])[0]


def code_of(raised) -> str:
    return raised.value.response["Error"]["Code"]


@virtual_time
async def test_a_received_message_is_hidden_for_its_visibility_and_then_comes_back():
    """Each receive counts, gives another handle, and keeps the time of the first."""
    async with queue_of() as (fake, sqs, url):
        await sqs.send_message(QueueUrl=url, MessageBody="a")
        first = await receive(sqs, url, VisibilityTimeout=10)
        hidden = await receive(sqs, url)
        await asyncio.sleep(10)
        second = await receive(sqs, url)

        assert hidden is None
        assert [m["Attributes"]["ApproximateReceiveCount"] for m in (first, second)] == ["1", "2"]
        assert first["ReceiptHandle"] != second["ReceiptHandle"]
        assert first["MessageId"] == second["MessageId"]
        times = {m["Attributes"]["ApproximateFirstReceiveTimestamp"] for m in (first, second)}
        assert len(times) == 1
        assert fake.model.log[-1].what == "reply"


@virtual_time
async def test_a_long_poll_returns_when_a_message_comes_and_not_before():
    """It waits for what is sent, for what becomes visible, and at most as long as it said."""
    async with queue_of() as (_fake, sqs, url):
        loop = asyncio.get_running_loop()
        poll = asyncio.create_task(receive(sqs, url, WaitTimeSeconds=20, VisibilityTimeout=5))
        await asyncio.sleep(7)
        await sqs.send_message(QueueUrl=url, MessageBody="a")
        await poll
        sent = loop.time()
        again = await receive(sqs, url, WaitTimeSeconds=20, VisibilityTimeout=100)
        expired = loop.time()
        nothing = await receive(sqs, url, WaitTimeSeconds=20)

        assert (sent, expired) == (pytest.approx(7), pytest.approx(12))
        assert again["Body"] == "a"
        assert nothing is None
        assert loop.time() == pytest.approx(32)


@virtual_time
async def test_a_delayed_message_is_not_seen_before_its_time():
    """DelaySeconds hides a message, which counts as delayed and not as in flight."""
    async with queue_of() as (_fake, sqs, url):
        await sqs.send_message(QueueUrl=url, MessageBody="a", DelaySeconds=900)
        found = (await sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"]))["Attributes"]
        early = await receive(sqs, url)
        await asyncio.sleep(900)

        assert found["ApproximateNumberOfMessagesDelayed"] == "1"
        assert found["ApproximateNumberOfMessagesNotVisible"] == "0"
        assert early is None
        assert (await receive(sqs, url))["Body"] == "a"


@virtual_time
async def test_a_stale_handle_neither_deletes_nor_extends():
    """After the second receive the first handle's deletion has no effect, and its extension is refused."""
    async with queue_of() as (fake, sqs, url):
        await sqs.send_message(QueueUrl=url, MessageBody="a")
        first = await receive(sqs, url, VisibilityTimeout=5)
        await asyncio.sleep(5)
        await receive(sqs, url, VisibilityTimeout=5)
        await sqs.delete_message(QueueUrl=url, ReceiptHandle=first["ReceiptHandle"])
        with pytest.raises(ClientError, match="not available for visibility timeout change") as refused:
            await sqs.change_message_visibility(
                QueueUrl=url, ReceiptHandle=first["ReceiptHandle"], VisibilityTimeout=60
            )

        assert code_of(refused) == "InvalidParameterValue"
        assert fake.counts(NAME) == (0, 1)


@virtual_time
async def test_an_expired_handle_neither_deletes_nor_extends():
    """When the visibility timeout has passed, both are refused although nobody else has received the message."""
    async with queue_of() as (fake, sqs, url):
        await sqs.send_message(QueueUrl=url, MessageBody="a")
        handle = (await receive(sqs, url, VisibilityTimeout=5))["ReceiptHandle"]
        await asyncio.sleep(5)
        with pytest.raises(ClientError) as not_extended:
            await sqs.change_message_visibility(QueueUrl=url, ReceiptHandle=handle, VisibilityTimeout=60)
        with pytest.raises(ClientError, match="expired") as not_deleted:
            await sqs.delete_message(QueueUrl=url, ReceiptHandle=handle)

        assert code_of(not_extended) == "AWS.SimpleQueueService.MessageNotInflight"
        assert isinstance(not_extended.value, sqs.exceptions.MessageNotInflight)
        assert code_of(not_deleted) == "InvalidParameterValue"
        assert fake.counts(NAME) == (1, 0)


@virtual_time
async def test_a_handle_that_was_never_given_out_is_invalid():
    """So is the handle of another queue."""
    async with queue_of() as (fake, sqs, url):
        fake.create("other")
        await sqs.send_message(QueueUrl=url, MessageBody="a")
        handle = (await receive(sqs, url))["ReceiptHandle"]
        other = (await sqs.get_queue_url(QueueName="other"))["QueueUrl"]
        for address, given_handle in ((url, "nonsense"), (other, handle)):
            with pytest.raises(ClientError) as refused:
                await sqs.delete_message(QueueUrl=address, ReceiptHandle=given_handle)

            assert code_of(refused) == "ReceiptHandleIsInvalid"


@virtual_time
async def test_a_lease_ends_twelve_hours_after_its_receive():
    """Extensions do not move that limit, and one beyond it is refused, not shortened."""
    async with queue_of() as (fake, sqs, url):
        await sqs.send_message(QueueUrl=url, MessageBody="a")
        handle = (await receive(sqs, url, VisibilityTimeout=3600))["ReceiptHandle"]
        for _ in range(11):
            await asyncio.sleep(3500)
            await sqs.change_message_visibility(QueueUrl=url, ReceiptHandle=handle, VisibilityTimeout=3600)
        await asyncio.sleep(3500)
        with pytest.raises(ClientError, match="beyond the limit") as refused:
            await sqs.change_message_visibility(QueueUrl=url, ReceiptHandle=handle, VisibilityTimeout=3600)
        left = LONGEST_LEASE_S - 12 * 3500
        await sqs.change_message_visibility(QueueUrl=url, ReceiptHandle=handle, VisibilityTimeout=left)
        await asyncio.sleep(left - 1)
        before = fake.counts(NAME)
        await asyncio.sleep(1)

        assert code_of(refused) == "InvalidParameterValue"
        assert before == (0, 1)
        assert fake.counts(NAME) == (1, 0)


@virtual_time
async def test_the_receive_after_the_last_allowed_one_moves_the_message_to_the_dead_letter_queue():
    """It keeps its id, its body and the time it was sent, and says where it came from."""
    async with queue_of(max_receives=2) as (_fake, sqs, url):
        sent = await sqs.send_message(QueueUrl=url, MessageBody="a")
        for _ in range(2):
            await receive(sqs, url, VisibilityTimeout=0)
        gone = await receive(sqs, url)
        dlq = (await sqs.get_queue_url(QueueName=f"{NAME}-dlq"))["QueueUrl"]
        dead = await receive(sqs, dlq)

        assert gone is None
        assert (dead["MessageId"], dead["Body"]) == (sent["MessageId"], "a")
        assert dead["Attributes"]["ApproximateReceiveCount"] == "1"
        assert dead["Attributes"]["DeadLetterQueueSourceArn"].endswith(f":{NAME}")


@virtual_time
async def test_a_poll_whose_client_went_away_still_takes_messages():
    """The message is hidden for its visibility although nobody got it, and then comes back."""
    async with queue_of() as (fake, sqs, url):
        poll = asyncio.create_task(receive(sqs, url, WaitTimeSeconds=20, VisibilityTimeout=60))
        await asyncio.sleep(1)
        poll.cancel()
        await asyncio.gather(poll, return_exceptions=True)
        await asyncio.sleep(1)
        await sqs.send_message(QueueUrl=url, MessageBody="a")
        await asyncio.sleep(1)
        hidden = fake.counts(NAME)
        later = await receive(sqs, url, WaitTimeSeconds=20)
        while later is None:
            later = await receive(sqs, url, WaitTimeSeconds=20)

        assert hidden == (0, 1)
        assert [entry.what for entry in fake.model.log].count("swallowed") == 1
        assert asyncio.get_running_loop().time() == pytest.approx(62)


@virtual_time
async def test_batches_answer_for_each_entry():
    """One bad handle fails its own entry; too many, none, or twins fail the call."""
    async with queue_of() as (fake, sqs, url):
        answer = await sqs.send_message_batch(
            QueueUrl=url, Entries=[{"Id": str(i), "MessageBody": f"m{i}"} for i in range(3)]
        )
        found = (await sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10))["Messages"]
        handles = [message["ReceiptHandle"] for message in found]
        changed = await sqs.change_message_visibility_batch(
            QueueUrl=url,
            Entries=[
                {"Id": "good", "ReceiptHandle": handles[0], "VisibilityTimeout": 60},
                {"Id": "bad", "ReceiptHandle": "nonsense", "VisibilityTimeout": 60},
            ],
        )
        entries = [{"Id": str(i), "ReceiptHandle": handle} for i, handle in enumerate(handles)]
        deleted = await sqs.delete_message_batch(QueueUrl=url, Entries=entries)

        assert [entry["Id"] for entry in answer["Successful"]] == ["0", "1", "2"]
        assert [entry["Id"] for entry in changed["Successful"]] == ["good"]
        assert [(e["Id"], e["Code"], e["SenderFault"]) for e in changed["Failed"]] == [
            ("bad", "ReceiptHandleIsInvalid", True)
        ]
        assert len(deleted["Successful"]) == 3
        assert fake.counts(NAME) == (0, 0)
        for wrong, code in (
            (entries * 4, "TooManyEntriesInBatchRequest"),
            ([], "EmptyBatchRequest"),
            ([entries[0], entries[0]], "BatchEntryIdsNotDistinct"),
        ):
            with pytest.raises(ClientError) as refused:
                await sqs.delete_message_batch(QueueUrl=url, Entries=wrong)

            assert code_of(refused).endswith(code)


@virtual_time
async def test_faults_happen_as_often_as_asked_and_to_that_operation_only():
    """Errors and resets leave the queue as it was; after a lost reply the call has taken effect."""
    async with queue_of() as (fake, sqs, url):
        for fault, effect in (
            (Fault("SendMessage", "error", times=2), 0),
            (throttled("SendMessage", 2), 0),
            (Fault("SendMessage", "reset", times=2), 0),
            (Fault("SendMessage", "lost_reply", times=2), 2),
        ):
            fake.faults[:] = [fault]
            before = sum(fake.counts(NAME))
            for _ in range(2):
                with pytest.raises((BotoCoreError, ClientError)):
                    await sqs.send_message(QueueUrl=url, MessageBody="a")

            assert sum(fake.counts(NAME)) - before == effect
        await sqs.send_message(QueueUrl=url, MessageBody="a")

        assert sum(fake.counts(NAME)) == 3


@virtual_time
async def test_a_slow_call_takes_effect_late_and_a_slow_reply_comes_late():
    """The difference is when the queue changes."""
    async with queue_of() as (fake, sqs, url):
        for kind, at in (("slow", 10), ("slow_reply", 0)):
            fake.faults[:] = [Fault("SendMessage", kind, seconds=10)]
            start = asyncio.get_running_loop().time()
            await sqs.send_message(QueueUrl=url, MessageBody=kind)
            (sent,) = [e.at for e in fake.model.log if e.what == "sent" and e.details["body"] == kind]

            assert asyncio.get_running_loop().time() == pytest.approx(start + 10)
            assert sent == pytest.approx(start + at)


@virtual_time
async def test_a_duplicate_is_a_second_copy_with_the_same_id():
    """Each copy has a lease of its own and must be deleted by itself."""
    async with queue_of() as (fake, sqs, url):
        fake.faults.append(Fault("ReceiveMessage", "duplicate"))
        await sqs.send_message(QueueUrl=url, MessageBody="a")
        one, two = await receive(sqs, url), await receive(sqs, url)
        await sqs.delete_message(QueueUrl=url, ReceiptHandle=one["ReceiptHandle"])

        assert one["MessageId"] == two["MessageId"]
        assert fake.counts(NAME) == (0, 1)
        await sqs.delete_message(QueueUrl=url, ReceiptHandle=two["ReceiptHandle"])
        assert fake.counts(NAME) == (0, 0)


@virtual_time
async def test_a_lease_can_be_taken_away():
    """The holder's next extension is refused."""
    async with queue_of() as (fake, sqs, url):
        await sqs.send_message(QueueUrl=url, MessageBody="a")
        message = await receive(sqs, url, VisibilityTimeout=60)
        fake.model.take_away(fake.model.queue(NAME), message["MessageId"])
        with pytest.raises(ClientError) as refused:
            await sqs.change_message_visibility(
                QueueUrl=url, ReceiptHandle=message["ReceiptHandle"], VisibilityTimeout=60
            )

        assert code_of(refused).endswith("MessageNotInflight")


@virtual_time
async def test_a_move_task_returns_what_was_moved_to_the_dead_letter_queue():
    """Messages go back to the queue that they came from, as new messages, at the asked rate."""
    async with queue_of(max_receives=1) as (fake, sqs, url):
        for index in range(10):
            await sqs.send_message(QueueUrl=url, MessageBody=str(index))
        await sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10, VisibilityTimeout=0)
        await receive(sqs, url)
        arn = fake.model.queue(f"{NAME}-dlq").arn
        await sqs.start_message_move_task(SourceArn=arn, MaxNumberOfMessagesPerSecond=2)
        await asyncio.sleep(2.1)
        (halfway,) = (await sqs.list_message_move_tasks(SourceArn=arn))["Results"]
        await asyncio.sleep(5)
        (done,) = (await sqs.list_message_move_tasks(SourceArn=arn))["Results"]

        assert (halfway["Status"], halfway["ApproximateNumberOfMessagesMoved"]) == ("RUNNING", 5)
        assert (done["Status"], done["ApproximateNumberOfMessagesMoved"]) == ("COMPLETED", 10)
        assert fake.counts(NAME) == (10, 0)


@virtual_time
async def test_a_move_task_needs_a_destination_for_what_was_sent_to_the_dead_letter_queue():
    """A message that a consumer sent there has no source; with a destination it moves."""
    async with queue_of() as (fake, sqs, _url):
        queue, dlq = fake.model.queue(NAME), fake.model.queue(f"{NAME}-dlq")
        fake.model.send(dlq, "a")
        await sqs.start_message_move_task(SourceArn=dlq.arn)
        await asyncio.sleep(1)
        (failed,) = (await sqs.list_message_move_tasks(SourceArn=dlq.arn))["Results"]
        await sqs.start_message_move_task(SourceArn=dlq.arn, DestinationArn=queue.arn)
        await asyncio.sleep(1)
        (done,) = (await sqs.list_message_move_tasks(SourceArn=dlq.arn))["Results"]

        assert (failed["Status"], failed["FailureReason"]) == ("FAILED", "CouldNotDetermineMessageSource")
        assert done["Status"] == "COMPLETED"
        assert fake.counts(NAME) == (1, 0)


@virtual_time
async def test_what_does_not_exist_and_what_is_out_of_range_is_refused():
    """With the codes by which clients tell errors apart."""
    async with queue_of() as (_fake, sqs, url):
        with pytest.raises(sqs.exceptions.QueueDoesNotExist) as missing:
            await sqs.get_queue_url(QueueName="nowhere")

        assert code_of(missing) == "AWS.SimpleQueueService.NonExistentQueue"
        for arguments in ({"MaxNumberOfMessages": 11}, {"WaitTimeSeconds": 21}, {"VisibilityTimeout": 43_201}):
            with pytest.raises(ClientError) as refused:
                await sqs.receive_message(QueueUrl=url, **arguments)

            assert code_of(refused) == "InvalidParameterValue"


@settings(max_examples=examples(200), derandomize=True, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["send", "receive", "delete", "extend", "wait"]), st.integers(0, 5)), max_size=40
    )
)
def test_the_model_neither_loses_nor_invents_messages(steps):
    """Whatever is asked: what was sent is in the queue, in its dead-letter queue, or was deleted, exactly once."""
    now, handles = [0.0], []
    model = SqsModel(lambda: now[0])
    dlq = model.create_queue("dlq")
    queue = model.create_queue(
        "q", {"RedrivePolicy": json.dumps({"deadLetterTargetArn": dlq.arn, "maxReceiveCount": 2})}
    )
    sent = 0
    for step, number in steps:
        if step == "send":
            model.send(model.queue("q"), "x", delay_s=number)
            sent += 1
        elif step == "receive":
            handles += [handle for _, handle in model.receive(model.queue("q"), 1 + number, number)]
        elif step == "wait":
            now[0] += number
        elif handles:
            handle = handles[number % len(handles)]
            try:
                if step == "delete":
                    model.delete(model.queue("q"), handle)
                else:
                    model.change_visibility(model.queue("q"), handle, number)
            except Exception as refused:  # noqa: BLE001 - whichever it is, the state is what counts
                assert type(refused).__name__ == "Refused"  # noqa: PT017
        gone = sum(entry.what == "deleted" for entry in model.log)

        assert len(queue.messages) + len(dlq.messages) + gone == sent
