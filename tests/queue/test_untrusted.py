"""What senders and servers get wrong: no delivery ends a worker, and none holds up good work."""

import asyncio

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from shared.config import Misconfigured, ServiceSettings
from shared.errors import Leased, Unavailable
from shared.queue import consume
from shared.queue.sqs import SqsQueue
from tests.queue.fakesqs import Fault
from tests.queue.virtualtime import virtual_time
from tests.queue.world import QUEUE, months, world

GOOD = {
    "MessageId": "a-good-one",
    "ReceiptHandle": "its-handle",
    "Body": "{}",
    "Attributes": {
        "ApproximateReceiveCount": "2",
        "ApproximateFirstReceiveTimestamp": "1700000001500",
        "SentTimestamp": "1700000000000",
    },
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def paths(found, path=()):
    """Return the way to every value of a delivery."""
    yield path
    if isinstance(found, dict):
        for name, inner in found.items():
            yield from paths(inner, (*path, name))


def altered(found, path, change):
    """Return a copy in which the value at the end of `path` is changed, or left out where `change` is Ellipsis."""
    if not path:
        return change
    name, *rest = path
    copy = dict(found)
    if not rest and change is ...:
        del copy[name]
    else:
        copy[name] = altered(copy[name], rest, change)
    return copy


CONTINUED = GOOD | {"MessageAttributes": {"attempt": {"DataType": "String", "StringValue": "1"}}}
DELIVERY = st.builds(
    altered, st.just(CONTINUED), st.sampled_from([path for path in paths(CONTINUED) if path]), JSON | st.just(...)
)


class Answering:
    """An SQS client whose every poll brings the same answer."""

    def __init__(self, answer):
        self.answer = answer

    async def receive_message(self, **_):
        return self.answer


async def received(answer):
    return await SqsQueue(Answering(answer), QUEUE, "url", "dead-letter-url").receive(10, wait_s=0, visibility_s=30)


@given(answer=JSON.filter(lambda found: isinstance(found, dict)) | st.fixed_dictionaries({"Messages": JSON}))
def test_no_answer_to_a_poll_is_an_exception(answer):
    """Whatever a server answers, there are messages in it or there are none."""
    assert isinstance(asyncio.run(received(answer)), list)


@given(delivery=DELIVERY | JSON)
def test_a_delivery_that_is_wrong_takes_none_of_its_poll_along(delivery):
    """The good one beside it is as it always is; what can be told of the bad one names a field, and no value."""
    *bad, good = asyncio.run(received({"Messages": [delivery, GOOD]}))

    assert (good.message_id, good.receive_count, good.waited_s, good.attempt) == ("a-good-one", 2, 1.5, 0)
    assert good.fault is None
    assert all(one.body for one in bad)
    assert {one.fault.reason_code for one in bad if one.fault} <= {"invalid_delivery"}


@pytest.mark.parametrize("path", [path for path in paths(GOOD) if path and path != ("ReceiptHandle",)])
async def test_a_field_that_is_left_out_is_named(path):
    """A server that leaves out an attribute must not end the worker; the dead letter says which it was."""
    (bad,) = await received({"Messages": [altered(GOOD, path, ...)]})

    expected = "ApproximateReceiveCount" if path == ("Attributes",) else path[-1]
    assert (bad.fault.reason_code, bad.fault.detail) == ("invalid_delivery", expected)


async def test_nothing_can_be_done_without_a_handle():
    """It is left to the queue's own redrive policy."""
    assert await received({"Messages": [altered(GOOD, ("ReceiptHandle",), ...)]}) == []


@pytest.mark.parametrize("attempt", ["first", "", "-1", "1.5", "9" * 5000, "\u0661"])
@virtual_time
async def test_an_attribute_that_is_no_number_is_dead_lettered_and_the_worker_lives(attempt):
    """One such message once killed each worker at every restart."""
    async with world() as here:
        queue = here.fake.model.queue(QUEUE)
        attributes = {"attempt": {"DataType": "String", "StringValue": attempt}}
        here.fake.model.send(queue, '{"from": "somebody"}', attributes)
        await here.send(month="2001-01")
        worker = here.consumer()
        await here.emptied()

        assert worker.runs == ["2001-01"]
        assert not worker.task.done()
        (letter,) = here.dead_letters()
        assert (letter["body"], letter["reason_code"]) == ('{"from": "somebody"}', "invalid_delivery")


@virtual_time
async def test_messages_that_cannot_be_decoded_never_hold_up_good_ones():
    """Sixty in a row, as a lifecycle rule leaves behind: the first good one begins within five seconds."""
    async with world() as here:
        began = here.now()
        for _ in range(60):
            await here.send("not json")
        for month in months(3):
            await here.send(month=month)
        worker = here.consumer(slots=3)
        await here.emptied()

        assert len(here.dead_letters()) == 60
        assert worker.started[0][0] - began < 5


@virtual_time
async def test_bad_messages_do_not_close_a_circuit_that_an_outage_opened():
    """They say nothing of what does not answer: work goes on when it does, and nothing is dead-lettered for it."""
    async with world() as here:
        until = here.now() + 300

        async def handle(_):
            if here.now() < until:
                raise ConnectionError

        for month in months(12):
            await here.send(month=month)
        worker = here.consumer(handle, slots=12, retry_base_s=1000)
        await here.until(lambda: worker.ended >= 12)
        polls = len(here.calls("ReceiveMessage"))
        for _ in range(5):
            await here.send("not json")
        await asyncio.sleep(30)

        assert len(here.calls("ReceiveMessage")) - polls < 5
        assert {letter["body"] for letter in here.dead_letters()} <= {"not json"}


@virtual_time
async def test_what_is_finished_and_not_deleted_is_bounded():
    """Where deletes fail, work stops before much of it would have to be done again after a kill."""
    async with world() as here:
        here.fake.faults.append(Fault("DeleteMessageBatch", "error", times=10**6, until=here.now() + 18))
        for month in months(100):
            await here.send(month=month)
        worker = here.consumer(slots=2)
        await asyncio.sleep(18)

        assert len(worker.finished) <= 2 + 10
        await here.emptied()
        assert sorted(worker.runs) == months(100)


@virtual_time
async def test_a_poll_that_never_answers_is_given_up_seconds_after_its_wait():
    """Botocore's own repeats would hold the slot for minutes, and their time would count against the lease."""
    async with world() as here:
        here.fake.faults.append(Fault("ReceiveMessage", "slow", times=1, seconds=10**6))
        began = here.now()
        worker = here.consumer(poll_s=10)
        await asyncio.sleep(1)
        await here.send()
        await here.emptied()

        assert worker.started[0][0] - began < 10 + 5 + 5
        assert worker.cancelled == []


@virtual_time
async def test_a_fate_is_told_once_it_has_come_about(monkeypatch):
    """While SQS does not take the delete, nothing says that the message is gone."""
    told = []
    monkeypatch.setattr("shared.queue.consumer._Consumer._tell", lambda *_: told.append(True))
    async with world() as here:
        here.fake.faults.append(Fault("DeleteMessageBatch", "error", times=10**6, until=here.now() + 18))
        await here.send()
        worker = here.consumer()
        await here.until(lambda: worker.ended == 1)
        await asyncio.sleep(10)
        before = list(told)
        await here.emptied()
        await worker.drained()

        assert (before, told) == ([], [True])


@virtual_time
async def test_a_queue_that_is_created_while_the_service_starts_is_waited_for():
    """Not there yet is no misconfiguration before the patience ends."""
    async with world() as here:
        late = f"{QUEUE}-late"
        consuming = asyncio.create_task(consume_from(here, late))
        await asyncio.sleep(10)
        here.fake.create(late)
        await asyncio.sleep(10)

        assert not consuming.done()
        assert [one for one in here.log("call", late) if one.details["operation"] == "ReceiveMessage"]
        consuming.cancel()


@virtual_time
async def test_a_fifo_queue_is_refused():
    """It would hold up everything behind one message that fails."""
    async with world() as here:
        with pytest.raises(Misconfigured, match="FIFO"):
            await consume_from(here, "work.fifo")


@virtual_time
async def test_a_dead_letter_queue_that_cannot_be_sent_to_is_told_at_the_start():
    """Else the first bad message would come for ever; nothing is sent to find it out."""
    async with world() as here:
        here.fake.faults.append(Fault("SendMessageBatch", "error", times=10**6, status=403, code="AccessDenied"))
        with pytest.raises(Misconfigured, match=f"{QUEUE}-dlq cannot be sent to: AccessDenied"):
            await consume_from(here, QUEUE)

        assert here.log("sent", f"{QUEUE}-dlq") == []


@virtual_time
async def test_a_redrive_policy_that_takes_good_work_away_is_warned_of():
    """Kills and outages are receives, too."""
    with structlog.testing.capture_logs() as lines:
        async with world(max_receives=3) as here:
            here.consumer()
            await asyncio.sleep(1)

    assert {"event": "queue.few_receives", "queue": QUEUE, "max_receive_count": 3, "least": 20}.items() <= lines[
        0
    ].items()


async def consume_from(here, queue):
    await consume({}, here.sqs, queue, settings=ServiceSettings(), stop=asyncio.Event())


async def killed(here, *, times):
    """Receive what is there and never be heard of again, so many times."""
    for _ in range(times):
        url = (await here.sqs.get_queue_url(QueueName=QUEUE))["QueueUrl"]
        found = {}
        while "Messages" not in found:
            found = await here.sqs.receive_message(QueueUrl=url, VisibilityTimeout=1, WaitTimeSeconds=20)
        await asyncio.sleep(1)


@virtual_time
async def test_kills_are_no_bugs():
    """Two kills, as by a deployment, and then one exception: the work is tried again, and done."""
    async with world() as here:
        failing = [KeyError()]

        async def handle(_):
            if failing:
                raise failing.pop()

        await here.send()
        await killed(here, times=2)
        worker = here.consumer(handle)
        await here.emptied()

        assert len(worker.finished) == 1
        assert here.dead_letters() == []


@virtual_time
async def test_what_was_in_work_at_five_kills_is_dead_lettered():
    """It may be what kills the workers: it is not begun once more, and the reason is told."""
    async with world() as here:
        await here.send()
        await killed(here, times=5)
        worker = here.consumer()
        await here.emptied()

        assert worker.runs == []
        assert [letter["reason_code"] for letter in here.dead_letters()] == ["worker_died"]


@pytest.mark.parametrize("error", [Unavailable("an outage"), Leased("by another")])
@virtual_time
async def test_no_outage_ever_counts_as_a_kill_or_a_bug(error):
    """Thirty times given back, four kills and two exceptions among them: the work is done in the end."""
    async with world() as here:
        endings = [error] * 15 + [KeyError()] + [error] * 15 + [KeyError()]

        async def handle(_):
            if endings:
                raise endings.pop(0)

        await here.send()
        await killed(here, times=4)
        worker = here.consumer(handle, retry_base_s=0.01)
        await here.emptied(within_s=10**5)

        assert len(worker.finished) == 1
        assert here.dead_letters() == []


@virtual_time
async def test_a_spot_notice_is_no_kill():
    """A long job that ten workers in a row give back when they are told to stop is still done by the next."""
    async with world() as here:

        async def handle(_):
            await asyncio.sleep(600)

        await here.send()
        for _ in range(10):
            worker = here.consumer(handle, grace_s=0)
            await here.until(lambda worker=worker: bool(worker.started))
            await worker.drained()
        last = here.consumer(handle)
        await here.emptied(within_s=1200)

        assert len(last.finished) == 1
        assert here.dead_letters() == []


@virtual_time
async def test_the_third_bug_is_the_last_whatever_lies_between():
    """Outages and kills between them neither add to bugs nor make them forgotten."""
    async with world() as here:
        endings = [KeyError(), Unavailable("x"), KeyError(), Unavailable("x"), KeyError()]

        async def handle(_):
            raise endings.pop(0)

        await here.send()
        here.consumer(handle, retry_base_s=0.01)
        await here.emptied()

        (letter,) = here.dead_letters()
        assert (letter["reason_code"], letter["receive_count"]) == ("bug", "5")
