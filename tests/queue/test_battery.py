"""What the queue runtime promises, in virtual time against the fake SQS, judged from the fake's log."""

import asyncio
import itertools
import json
import time

import pytest

from shared.config import Misconfigured
from shared.errors import Unavailable, Unprocessable
from shared.queue import consumer
from tests.queue.fakesqs import Fault, throttled
from tests.queue.sqsmodel import LONGEST_LEASE_S
from tests.queue.virtualtime import virtual_time
from tests.queue.world import QUEUE, World, client_of, months, world


def job(seconds: float):
    """Return a handler that takes that long."""

    async def handle(_) -> None:
        await asyncio.sleep(seconds)

    return handle


async def send_months(here: World, count: int) -> list[str]:
    sent = months(count)
    for month in sent:
        await here.send(month=month)
    return sent


def receives(here: World) -> list[int]:
    """Receive counts of everything that was handed out."""
    return [entry.details["receives"] for entry in here.log("received")]


# Slots and polls.


@virtual_time
async def test_an_idle_consumer_polls_at_most_three_times_in_thirty_seconds():
    """Each poll waits 20 s, one at a time."""
    async with world() as here:
        here.consumer()
        await asyncio.sleep(600)
        polls = here.calls("ReceiveMessage")

        assert len(polls) <= 600 / 30 * 3
        assert {entry.details["asked"]["WaitTimeSeconds"] for entry in polls} == {20}
        assert here.fake.polls == 1


@virtual_time
async def test_no_more_is_fetched_than_slots_are_free():
    """Whatever is received is started at once: nothing waits in the process while its lease runs."""
    async with world() as here:
        sent = await send_months(here, 25)
        worker = here.consumer(job(7), slots=3)
        running, most = set(), 0
        while len(worker.finished) < len(sent):
            running = set(worker.runs) - {month for _, month in worker.finished}
            most = max(most, here.fake.counts(QUEUE)[1])
            assert len(running) <= 3
            await asyncio.sleep(0.5)

        assert most <= 3 + 3  # three run, and three may wait for their deletion
        assert sorted(worker.runs) == sent


@virtual_time
async def test_a_free_slot_is_filled_while_others_are_busy():
    """One long job does not hold up short ones."""
    async with world() as here:

        async def handle(event) -> None:
            await asyncio.sleep(500 if event.data.month == "2001-01" else 1)

        await send_months(here, 20)
        worker = here.consumer(handle, slots=2)
        await here.until(lambda: len(worker.finished) == 19, within_s=60)

        assert worker.runs.count("2001-01") == 1


@virtual_time
async def test_at_most_one_poll_is_in_flight():
    """Also when slots come free while a poll waits."""
    async with world() as here:
        here.consumer(job(3), slots=5)
        for month in months(40):
            await here.send(month=month)
            assert here.fake.polls <= 1
            await asyncio.sleep(0.7)
        await here.emptied()


@pytest.mark.parametrize("kind", ["reset", "error", "throttled", "slow", "lost_reply"])
@virtual_time
async def test_receives_that_fail_for_a_while_are_survived(kind):
    """Fifteen seconds of resets, 5xx, throttling, slow or lost replies: the process lives, all work is done once."""
    async with world() as here:
        until = here.now() + 15
        fault = Fault("ReceiveMessage", kind if kind != "throttled" else "error", times=10**6, until=until, seconds=9)
        if kind == "throttled":
            fault = throttled("ReceiveMessage", 10**6)
            fault.until = until
        here.fake.faults.append(fault)
        worker = here.consumer(visibility_s=30)
        sent = await send_months(here, 15)
        await here.emptied(within_s=200)

        assert not worker.task.done()
        assert sorted(worker.runs) == sent


@virtual_time
async def test_errors_of_receive_are_not_hammered():
    """In ten minutes of errors the calls become rare: a jittered backoff, up to half a minute."""
    async with world() as here:
        here.fake.faults.append(Fault("ReceiveMessage", "error", times=10**6, until=here.now() + 600))
        here.consumer()
        await asyncio.sleep(600)
        last_five_minutes = [entry for entry in here.calls("ReceiveMessage") if entry.at > 300]

        assert 5 <= len(last_five_minutes) <= 240  # each try of the runtime is up to four of the client


@pytest.mark.parametrize("kind", ["reset", "error"])
@virtual_time
async def test_a_start_while_sqs_does_not_answer_is_survived(kind):
    """Fifteen seconds of resets or 5xx at the start: the process waits, then works."""
    async with world() as here:
        here.fake.faults.append(Fault("*", kind, times=10**6, until=here.now() + 15))
        worker = here.consumer()
        await here.send()
        await here.emptied(within_s=60)

        assert not worker.task.done()
        assert worker.runs == ["2026-11"]


@virtual_time
async def test_a_bug_in_settling_gives_the_message_up(monkeypatch):
    """A message that could not be settled is not extended any more: it comes again after one visibility timeout."""
    async with world() as here:
        bugs = [KeyError("attributes")]
        attributes = consumer.dead_letter_attributes

        def fails_once(*arguments):
            if bugs:
                raise bugs.pop()
            return attributes(*arguments)

        monkeypatch.setattr(consumer, "dead_letter_attributes", fails_once)
        await here.send("not json")
        here.consumer(visibility_s=60)
        await here.emptied(within_s=100)

        assert receives(here) == [1, 2]
        assert [one["reason_code"] for one in here.dead_letters()] == ["not_json"]


@virtual_time
async def test_a_start_without_sqs_is_misconfigured():
    """Where nothing answers, the process does not wait for ever, and says which queue it waited for."""
    async with world() as here:
        here.fake.faults.append(Fault("*", "reset", times=10**6))
        worker = here.consumer()
        async with asyncio.timeout(120):
            with pytest.raises(Misconfigured, match=QUEUE):
                await worker.task


# Leases.


@virtual_time
async def test_a_long_job_on_a_short_visibility_starts_once():
    """Ten seconds of work on three seconds of visibility, with another worker waiting for it."""
    async with world() as here:
        await here.send()
        workers = [here.consumer(job(10), visibility_s=3) for _ in range(2)]
        await here.emptied()

        assert sum(len(worker.runs) for worker in workers) == 1
        assert receives(here) == [1]


@virtual_time
async def test_more_jobs_than_slots_on_a_short_visibility_start_once_each():
    """Eight jobs of 4 s on two slots at 3 s: none is fetched before it can be run, none is redelivered."""
    async with world() as here:
        sent = await send_months(here, 8)
        worker = here.consumer(job(4), slots=2, visibility_s=3)
        await here.emptied()

        assert sorted(worker.runs) == sent
        assert receives(here) == [1] * 8


@pytest.mark.parametrize("late_s", [1, 10, 19])
@virtual_time
async def test_a_message_that_comes_late_in_a_poll_longer_than_its_visibility_is_handled_once(late_s):
    """Its lease began when SQS handed it out, not when the poll began: it must not be given up as expired."""
    async with world() as here:
        worker = here.consumer(job(30), visibility_s=10, poll_s=20)
        await asyncio.sleep(late_s)
        await here.send()
        await here.emptied()

        assert len(worker.finished) == 1
        assert receives(here) == [1]


@virtual_time
async def test_leases_of_many_messages_are_extended_together():
    """Ten messages in flight cost no more calls than one."""
    async with world() as here:
        await send_months(here, 10)
        here.consumer(job(600), slots=10, visibility_s=60)
        await asyncio.sleep(590)

        assert len(here.calls("ChangeMessageVisibilityBatch")) <= 590 / 60 * 4
        assert not here.calls("ChangeMessageVisibility")
        assert receives(here) == [1] * 10


@virtual_time
async def test_a_lease_is_extended_before_it_ends_with_time_to_spare():
    """At every extension at least a quarter of the visibility timeout is left."""
    async with world() as here:
        await here.send()
        here.consumer(job(1000), visibility_s=60)
        await asyncio.sleep(900)
        ends = 60.0
        for entry in here.log("extended"):
            assert entry.at <= ends - 15
            ends = entry.details["visible_at"]

        assert ends > 900


@virtual_time
async def test_errors_of_extension_shorter_than_the_lease_are_survived():
    """Twenty seconds of 5xx, resets and per-entry failures on a lease of 60 s: the job runs once, to its end."""
    async with world() as here:
        for start, kind in ((30, "error"), (150, "reset"), (270, "entries")):
            asyncio.get_running_loop().call_at(
                start,
                here.fake.faults.append,
                Fault("ChangeMessageVisibilityBatch", kind, times=10**6, until=start + 20),
            )
        await here.send()
        worker = here.consumer(job(400), visibility_s=60)
        await here.emptied(within_s=500)

        assert here.log("fault")
        assert len(worker.finished) == 1
        assert receives(here) == [1]


@virtual_time
async def test_a_hanging_extension_does_not_cost_the_lease():
    """An extension that is not carried out for longer than the lease must be given up and repeated in time."""
    async with world() as here:
        here.fake.faults.append(Fault("ChangeMessageVisibilityBatch", "slow", times=1, seconds=45))
        await here.send()
        worker = here.consumer(job(200), visibility_s=60)
        await here.emptied()

        assert len(worker.finished) == 1
        assert receives(here) == [1]


@virtual_time
async def test_when_extensions_fail_for_longer_than_the_lease_the_handler_is_told_before_it_ends():
    """Its deadline passes: it is cancelled no later than SQS gives the message away, and nothing is deleted."""
    async with world() as here:
        here.fake.faults.append(Fault("ChangeMessageVisibilityBatch", "error", times=10**6, until=500))
        await here.send()
        worker = here.consumer(job(1000), visibility_s=60)
        await here.until(lambda: bool(worker.cancelled), within_s=100)
        (at, _, error), *_ = worker.cancelled

        assert at <= here.log("received")[0].details["visible_at"]
        assert "lease" in str(error)
        assert not here.log("deleted")


@virtual_time
async def test_a_handler_whose_lease_was_taken_away_is_told_and_its_message_not_deleted():
    """The next extension finds out: the handler is cancelled with the reason, and another worker does the work."""
    async with world() as here:
        message_id = await here.send()
        first = here.consumer(job(100), visibility_s=30, slots=1)
        await asyncio.sleep(5)
        here.fake.model.take_away(here.fake.model.queue(QUEUE), message_id)
        other = here.consumer(job(1), visibility_s=30)
        await here.until(lambda: bool(first.cancelled), within_s=31)
        await here.emptied()

        assert "lease" in str(first.cancelled[0][2])
        assert not first.finished
        assert len(other.finished) == 1
        assert [entry.details["receives"] for entry in here.log("deleted")] == [2]


@virtual_time
async def test_a_handler_that_ends_after_its_lease_was_lost_changes_nothing():
    """Whatever it raises: no delete, no dead letter, no change of visibility for a message that is another's."""
    async with world() as here:

        async def stubborn(_) -> None:
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                await asyncio.sleep(3)
                raise Unprocessable("too_late") from None

        message_id = await here.send()
        worker = here.consumer(stubborn, visibility_s=30, slots=1)
        await asyncio.sleep(5)
        here.fake.model.take_away(here.fake.model.queue(QUEUE), message_id)
        handle = here.fake.model.receive(here.fake.model.queue(QUEUE), 1, 600)[0][1]
        await asyncio.sleep(100)

        assert not here.dead_letters()
        assert not here.log("deleted")
        assert not here.log("delete_without_effect")
        here.fake.model.delete(here.fake.model.queue(QUEUE), handle)
        assert worker.runs == ["2026-11"]


@virtual_time
async def test_a_renewal_never_outlives_its_handler():
    """Once a message is released for a retry nothing extends it, even when the release met a slow extension."""
    async with world() as here:

        async def handle(_) -> None:
            await asyncio.sleep(31)
            raise Unavailable("not yet")

        here.fake.faults.append(Fault("ChangeMessageVisibilityBatch", "slow", times=3, seconds=4))
        await here.send()
        worker = here.consumer(handle, visibility_s=60, retry_base_s=2)
        await here.until(lambda: len(worker.runs) == 3, within_s=200)
        starts = [at for at, _ in worker.started]

        assert all(later - earlier < 31 + 20 for earlier, later in itertools.pairwise(starts))


@virtual_time
async def test_a_finished_message_is_never_released_nor_extended_after_its_deletion():
    """No call names a message that is gone."""
    async with world() as here:
        await send_months(here, 30)
        worker = here.consumer(job(10), visibility_s=12, slots=7)
        await here.emptied()
        await worker.drained()

        assert not here.log("entry_refused")
        assert not here.log("released")
        assert not here.log("delete_without_effect")


# Twelve hours.


@virtual_time
async def test_a_job_of_almost_twelve_hours_runs_once_and_takes_no_real_time():
    """Its lease is extended all the while, up to the last minutes that SQS allows."""
    real = time.process_time()
    async with world() as here:
        await here.send()
        worker = here.consumer(job(LONGEST_LEASE_S - 120), slots=1)
        await here.emptied(within_s=LONGEST_LEASE_S)

        assert len(worker.finished) == 1
        assert receives(here) == [1]
        assert not here.log("entry_refused")

    assert time.process_time() - real < 5


@virtual_time
async def test_a_job_beyond_twelve_hours_is_told_before_its_lease_ends():
    """It is cancelled while the message is still its own, and the message comes again."""
    async with world() as here:
        await here.send()
        worker = here.consumer(job(LONGEST_LEASE_S + 3600), slots=1)
        await here.until(lambda: bool(worker.cancelled), within_s=LONGEST_LEASE_S + 10)
        await here.until(lambda: len(worker.runs) == 2)
        at = worker.cancelled[0][0]
        worker.stop.set()

        assert LONGEST_LEASE_S - 600 <= at <= LONGEST_LEASE_S
        assert worker.started[1][0] > at
        assert not here.log("deleted")


@pytest.mark.parametrize("cap_from_first_receive", [False, True])
@virtual_time
async def test_a_message_first_received_long_ago_is_still_handled(cap_from_first_receive):
    """A message that was retried through an outage of a day is done when the outage ends."""
    async with world(max_receives=1000) as here:
        here.fake.model.cap_from_first_receive = cap_from_first_receive

        async def handle(_) -> None:
            await asyncio.sleep(20)
            if here.now() < 13 * 3600:
                raise Unavailable("outage")

        await here.send()
        worker = here.consumer(handle, visibility_s=90)
        await here.emptied(within_s=14 * 3600)

        assert len(worker.finished) == 1
        assert not here.dead_letters()


# Deletes.


@virtual_time
async def test_messages_that_end_together_are_deleted_together():
    """Ten deletions are one call."""
    async with world() as here:
        await send_months(here, 10)
        here.consumer(job(1), slots=10)
        await here.emptied()

        assert len(here.calls("DeleteMessageBatch")) == 1
        assert not here.calls("DeleteMessage")


@pytest.mark.parametrize("kind", ["error", "reset", "lost_reply", "entries", "throttled"])
@virtual_time
async def test_deletes_that_fail_for_a_while_cause_no_second_run(kind):
    """Forty seconds of failing deletes on a lease of 30 s: the lease is kept, and the work is not done again."""
    async with world() as here:
        fault = Fault(
            "DeleteMessageBatch",
            "error" if kind == "throttled" else kind,
            times=10**6,
            until=40,
            places=tuple(range(10)),
        )
        if kind == "throttled":
            fault.status, fault.code = 400, "RequestThrottled"
        here.fake.faults.append(fault)
        sent = await send_months(here, 5)
        workers = [here.consumer(job(1), visibility_s=30) for _ in range(2)]
        await here.emptied(within_s=120)

        assert here.log("fault")
        assert sorted(workers[0].runs + workers[1].runs) == sent
        assert receives(here) == [1] * 5


@virtual_time
async def test_one_entry_that_is_not_deleted_does_not_hold_up_the_others():
    """Per-entry failures are repeated by themselves."""
    async with world() as here:
        here.fake.faults.append(Fault("DeleteMessageBatch", "entries", times=1, places=(3, 7)))
        sent = await send_months(here, 10)
        worker = here.consumer(job(1), slots=10)
        await here.emptied(within_s=30)
        sizes = [len(entry.details["asked"]["Entries"]) for entry in here.calls("DeleteMessageBatch")]

        assert sizes == [10, 2]
        assert sorted(worker.runs) == sent


# Drain.


@pytest.mark.parametrize("after_s", [0, 0.05, 1, 4.99, 12.3])
@virtual_time
async def test_a_stop_with_a_backlog_orphans_nothing(after_s):
    """After the drain each message is either done and deleted or visible: none is hidden."""
    async with world() as here:
        sent = await send_months(here, 60)
        worker = here.consumer(job(5), slots=4, grace_s=20)
        await asyncio.sleep(after_s)
        await worker.drained()
        visible, hidden = here.fake.counts(QUEUE)

        assert hidden == 0
        assert visible + len(worker.finished) == len(sent)
        assert len(here.log("deleted")) == len(worker.finished)


@pytest.mark.parametrize("after_s", [0.001, 0.5, 10, 19.999, 20.0, 20.001, 33.3])
@virtual_time
async def test_a_stop_while_idle_hides_no_later_message(after_s):
    """What is sent when the consumer has ended is received by another within a second."""
    async with world() as here:
        worker = here.consumer()
        await asyncio.sleep(after_s)
        await worker.drained()
        await here.send()
        other = here.consumer()
        await here.until(lambda: bool(other.finished), within_s=1)

        assert not here.log("swallowed")


@pytest.mark.parametrize("after_s", [0.0, 0.5, 5, 15])
@virtual_time
async def test_a_message_that_the_last_poll_takes_is_given_back_at_once(after_s):
    """A message sent between the stop and the end of the poll in flight is visible to another worker within seconds."""
    async with world() as here:
        worker = here.consumer()
        await asyncio.sleep(3)
        worker.stop.set()
        await asyncio.sleep(after_s)
        await here.send()
        sent_at = here.now()
        other = here.consumer()
        await here.until(lambda: bool(other.finished), within_s=60)

        assert other.started[0][0] - sent_at <= 2
        assert not worker.started


@virtual_time
async def test_a_stop_during_a_poll_that_does_not_answer_hides_nothing_for_a_visibility_timeout():
    """Where the last poll had to be abandoned, what is running is released so that the dead poll cannot swallow it."""
    async with world() as here:
        await here.send()
        worker = here.consumer(job(600), slots=2, grace_s=3, visibility_s=90, poll_s=20)
        await here.until(lambda: bool(worker.started))
        await asyncio.sleep(5)
        here.fake.faults.append(Fault("ReceiveMessage", "slow_reply", times=10**6, until=here.now() + 30, seconds=300))
        await asyncio.sleep(25)
        await worker.drained()
        ended = here.now()
        here.fake.faults.clear()
        other = here.consumer(job(1))
        await here.until(lambda: bool(other.finished), within_s=120)

        assert other.started[0][0] - ended <= 30
        assert not here.log("swallowed")


@virtual_time
async def test_a_long_job_is_handed_back_after_the_grace_period_and_picked_up_by_another():
    """Forty seconds of work, three of grace: cancelled, visible before the last poll would end, and done elsewhere."""
    async with world() as here:
        await here.send()
        worker = here.consumer(job(40), grace_s=3)
        await asyncio.sleep(2)
        other = here.consumer(job(40))
        stopped = here.now()
        await worker.drained()
        await here.emptied()

        assert worker.cancelled[0][0] == pytest.approx(stopped + 3, abs=0.5)
        assert other.started[0][0] <= stopped + 3 + 21
        assert len(other.finished) == 1
        assert receives(here) == [1, 2]


@virtual_time
async def test_leases_are_kept_during_the_drain():
    """A job that uses its grace period is not given to another worker, however short the visibility timeout is."""
    async with world() as here:
        await here.send()
        worker = here.consumer(job(40), grace_s=60, visibility_s=10)
        other = here.consumer(job(40), visibility_s=10)
        await asyncio.sleep(1)
        runner = worker if worker.started else other
        await runner.drained()
        await here.emptied()

        assert len(runner.finished) == 1
        assert receives(here) == [1]


@virtual_time
async def test_a_stop_while_sqs_answers_errors_ends_within_its_bounds():
    """With every call failing the drain ends all the same, and nothing is deleted that was not done."""
    async with world() as here:
        await send_months(here, 5)
        worker = here.consumer(job(30), grace_s=5, slots=5)
        await here.until(lambda: len(worker.started) == 5)
        here.fake.faults.append(Fault("*", "error", times=10**6))
        stopped = here.now()
        await worker.drained()
        took = here.now() - stopped
        here.fake.faults.clear()

        assert took < 90
        assert not here.log("deleted")
        other = here.consumer(job(1))
        await here.emptied()
        assert len(other.finished) == 5


@virtual_time
async def test_what_was_finished_is_deleted_before_the_drain_ends():
    """Also where the first deletes fail."""
    async with world() as here:
        here.fake.faults.append(Fault("DeleteMessageBatch", "error", times=6))
        sent = await send_months(here, 10)
        worker = here.consumer(job(2), slots=10, grace_s=30)
        await here.until(lambda: len(worker.finished) == 10)
        await worker.drained()

        assert here.fake.counts(QUEUE) == (0, 0)
        assert sorted(worker.runs) == sent


# Fates.


@pytest.mark.parametrize(
    ("body", "reason"), [("no json at all", "not_json"), ('{"specversion": "1.0", "type": "x"}', "unknown_type")]
)
@virtual_time
async def test_an_undecodable_body_reaches_the_dead_letter_queue_with_its_reason(body, reason):
    """At once, as it came, and not through the queue's own redrive."""
    async with world() as here:
        await here.send(body)
        here.consumer()
        await here.emptied(within_s=5)

        assert [(letter["body"], letter["reason_code"]) for letter in here.dead_letters()] == [(body, reason)]
        assert not here.log("dead_lettered")


@virtual_time
async def test_a_handler_that_raises_a_bug_reaches_the_dead_letter_queue_at_the_third_receive():
    """With the reason code, while other messages are handled."""
    async with world() as here:

        async def handle(event) -> None:
            if event.data.month == "2001-01":
                raise KeyError("secret")

        await send_months(here, 3)
        worker = here.consumer(handle)
        await here.emptied()
        (letter,) = here.dead_letters()

        assert worker.runs.count("2001-01") == 3
        assert (letter["reason_code"], letter["receive_count"]) == ("bug", "3")
        assert "secret" not in json.dumps(letter)


@virtual_time
async def test_a_dead_letter_that_cannot_be_sent_is_not_deleted():
    """The message stays in the queue until its dead letter is safe."""
    async with world() as here:
        here.fake.faults.append(Fault("SendMessage", "error", times=10**6, until=100))
        await here.send("no json")
        here.consumer(visibility_s=20)
        await asyncio.sleep(99)

        assert not here.log("deleted")
        await here.emptied()
        assert len(here.dead_letters()) == 1


@virtual_time
async def test_retries_are_delayed_by_receive_count_through_visibility():
    """Each wait is at most twice the last ceiling and at most 300 s; waiting holds no slot."""
    async with world() as here:

        async def handle(event) -> None:
            if event.data.month == "2026-11" and here.now() < 3600:
                raise Unavailable("not yet")

        await here.send()
        worker = here.consumer(handle, slots=1, retry_base_s=2)
        await here.until(lambda: len(worker.runs) >= 3)
        await here.send(month="2026-12")
        await here.until(lambda: "2026-12" in worker.runs, within_s=25)
        await here.emptied(within_s=8000)
        starts = [at for at, month in worker.started if month == "2026-11"]
        waits = [later - earlier for earlier, later in itertools.pairwise(starts)]

        assert all(wait <= min(300, 2 * 2**index) + 61 for index, wait in enumerate(waits))
        assert max(waits) > 30
        assert len(starts) < 50


@virtual_time
async def test_when_everything_fails_alike_polling_pauses_and_nothing_is_dead_lettered():
    """An hour of an outage with a backlog of 200 costs few runs; afterwards all work is done."""
    async with world() as here:

        async def handle(_) -> None:
            if here.now() < 3600:
                raise Unavailable("outage")

        sent = await send_months(here, 200)
        worker = here.consumer(handle)
        await asyncio.sleep(3600)
        during = len(worker.runs)
        await here.emptied(within_s=7200)

        assert during < 1000
        assert sorted(month for _, month in worker.finished) == sent
        assert not here.dead_letters()
        assert not here.log("dead_lettered")


# At least once.


@virtual_time
async def test_a_duplicate_is_handled_and_deleted_by_itself():
    """Two copies with one id, at the same time in one process: both end, neither takes the other's lease."""
    async with world() as here:
        here.fake.faults.append(Fault("ReceiveMessage", "duplicate", times=1))
        worker = here.consumer(job(50), visibility_s=12)
        await here.send()
        await here.emptied()

        assert len(worker.finished) == 2
        assert len(here.log("deleted")) == 2
        assert receives(here) == [1, 1]


@virtual_time
async def test_a_lost_reply_to_a_receive_delays_its_messages_by_one_visibility_timeout():
    """Nobody got them, nobody deleted them, and they come back."""
    async with world() as here:
        here.fake.faults.append(Fault("ReceiveMessage", "lost_reply", times=1))
        sent = await send_months(here, 3)
        worker = here.consumer(visibility_s=30)
        await here.emptied(within_s=60)

        assert sorted(worker.runs) == sent


@virtual_time
async def test_a_dead_worker_s_messages_come_back_within_one_visibility_timeout():
    """A client that vanishes with its process neither extends nor deletes."""
    async with world() as here:
        await here.send()
        async with client_of(here.fake.url) as doomed:
            worker = here.consumer(job(300), sqs=doomed, visibility_s=60)
            await asyncio.sleep(100)
            here.workers.remove(worker)
            _kill(worker)
            died = here.now()
        other = here.consumer(job(1), visibility_s=60)
        await here.until(lambda: bool(other.finished), within_s=70)

        assert other.started[0][0] - died <= 61


def _kill(worker) -> None:
    """Take every task of a consumer off the loop, as SIGKILL would: none gets to clean up."""
    ours = asyncio.current_task()
    doomed = [
        task
        for task in asyncio.all_tasks()
        if task is not ours and "shared/queue" in getattr(task.get_coro(), "cr_code", task).co_filename
    ]
    for task in doomed:
        task.cancel()
