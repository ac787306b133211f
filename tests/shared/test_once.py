"""Records that are written once, and the lease on making them: over S3, and in virtual time with all going wrong."""

import asyncio
import json
import math
import signal
import subprocess
import sys
import uuid
from datetime import UTC, datetime, timedelta
from random import Random

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import idempotency as module
from shared.documents.document import Document, Stored
from shared.documents.leases import Lease
from shared.errors import Continue, Leased, Unavailable, Unprocessable
from shared.idempotency import once, store_once, stored
from shared.messages import ReportRequest, ReportRequested
from shared.objects import ObjectMissing, ObjectStore
from shared.queue import circuit, consume, receive_count
from tests.examples import examples
from tests.queue.virtualtime import virtual_time

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
WITHIN_S = 60


class Made(Stored):
    by: str


@pytest.fixture
def objects(aws, local_aws) -> ObjectStore:
    return ObjectStore(aws.s3, local_aws.bucket)


@pytest.fixture
def prefix() -> str:
    return f"test-once/{uuid.uuid4().hex}/"


def do_once(objects, prefix, work, *, lease_s=60.0, clock=lambda: datetime.now(UTC)):
    """Do it, with the record and the lease under `prefix`."""
    lease = Document(f"{prefix}claim.json", Lease)
    return once(made_at(prefix), work, objects=objects, lease=lease, lease_s=lease_s, clock=clock)


def made_at(prefix):
    return Document(f"{prefix}made.json", Made)


def making(by: str):
    """Return a work that makes a record at once."""

    async def work(_: int) -> Made:
        return Made(by=by)

    return work


async def never(_: int) -> Made:
    pytest.fail("nothing was to be done")


async def endless(_: int) -> Made:
    return await asyncio.Event().wait()


async def claim_of(objects, prefix):
    return json.loads(await objects.get(f"{prefix}claim.json"))


async def until(condition) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not condition():
            await asyncio.sleep(0.005)


# Done.


async def test_what_is_done_is_given_and_not_done_again(objects, prefix):
    """The second time the record is there, so neither work nor lease is needed."""
    first = await do_once(objects, prefix, making("first"))
    lease = await objects.get_with_etag(f"{prefix}claim.json")

    assert await do_once(objects, prefix, never) == first == Made(by="first")
    assert await objects.get_with_etag(f"{prefix}claim.json") == lease


async def test_the_first_record_stays(objects, prefix):
    """Of two records under one key the first one counts, for both who stored."""
    first = await store_once(made_at(prefix), Made(by="first"), objects=objects)
    second = await store_once(made_at(prefix), Made(by="second"), objects=objects)

    assert first == second == Made(by="first")


async def test_what_is_no_record_is_handed_back_and_can_be_done_again(objects, prefix):
    """Work may end without a record: nothing is stored, and the lease is free at once."""

    async def nothing(_: int) -> None:
        return None

    assert await do_once(objects, prefix, nothing) is None
    assert await stored(made_at(prefix), objects=objects) is None
    assert await do_once(objects, prefix, making("later")) == Made(by="later")
    assert (await claim_of(objects, prefix))["epoch"] == 2


@pytest.mark.parametrize("name", ["made.json", "claim.json"])
async def test_what_somebody_else_stored_under_our_keys_can_never_be_used(objects, prefix, name):
    """A record or lease that cannot be read is told by its key, not by what it holds."""
    await objects.put(prefix + name, b'{"by": 1, "owner": "DOE^JANE"}')
    with pytest.raises(Unprocessable, match=f"invalid_record: {prefix}{name}$"):
        await do_once(objects, prefix, never)


# Leased.


async def test_one_of_two_workers_works(objects, prefix):
    """While one works the other is turned away; afterwards it is given what the first one made."""
    turned_away = asyncio.Event()

    async def work(_: int) -> Made:
        await turned_away.wait()
        return Made(by="first")

    async def contend() -> Made:
        try:
            return await do_once(objects, prefix, work)
        except Leased:
            turned_away.set()
            return await endless(0)

    contenders = {asyncio.ensure_future(contend()) for _ in range(4)}
    done, waiting = await asyncio.wait(contenders, timeout=WITHIN_S, return_when=asyncio.FIRST_COMPLETED)

    assert [task.result() for task in done] == [Made(by="first")]
    assert len(waiting) == 3
    assert await do_once(objects, prefix, never) == Made(by="first")
    for task in waiting:
        task.cancel()


async def test_who_waited_for_the_claim_finds_what_its_last_owner_stored(objects, prefix):
    """The record may come between the first look and the lease: it is looked for again."""

    class Overtaken(ObjectStore):
        async def get_with_etag(self, key):
            if key.endswith("claim.json"):
                await store_once(made_at(prefix), Made(by="the last owner"), objects=objects)
            return await super().get_with_etag(key)

    late = Overtaken(objects._s3, objects.bucket)

    assert await do_once(late, prefix, never) == Made(by="the last owner")


@pytest.mark.parametrize("ending", [Unavailable, Continue, ZeroDivisionError, asyncio.CancelledError])
async def test_work_that_ends_early_gives_the_claim_back(objects, prefix, ending):
    """However work fails, the next worker need not wait for the end of the lease."""

    async def failing(_: int) -> Made:
        raise ending

    with pytest.raises(ending):
        await do_once(objects, prefix, failing)

    assert await do_once(objects, prefix, making("next")) == Made(by="next")
    assert (await claim_of(objects, prefix))["epoch"] == 2


async def test_a_worker_that_is_stopped_ends_its_work_and_then_gives_the_claim_back(objects, prefix):
    """At a drain nobody else begins before the cancelled work has ended."""
    working, leases = asyncio.Event(), []

    async def work(_: int) -> Made:
        working.set()
        try:
            return await endless(0)
        finally:
            # All of it takes longer than to give the lease back.
            leases.extend([(await claim_of(objects, prefix))["ends"] for _ in range(10)])

    stopped = asyncio.ensure_future(do_once(objects, prefix, work))
    await asyncio.wait_for(working.wait(), WITHIN_S)
    stopped.cancel()
    await asyncio.gather(stopped, return_exceptions=True)

    assert stopped.cancelled()
    assert len(leases) == 10
    assert min(map(datetime.fromisoformat, leases)) > datetime.now(UTC), "leased until the work had ended"
    assert await do_once(objects, prefix, making("next")) == Made(by="next")


# Stale.


async def test_a_stale_claim_is_taken_over_by_one_with_the_next_epoch(objects, prefix):
    """A lease whose owner died is taken by one of many when it has ended; all others are turned away."""
    dead = {"owner": "dead", "epoch": 7, "ends": "2020-01-01T00:00:00Z"}
    await objects.put(f"{prefix}claim.json", json.dumps(dead).encode())
    epochs: list[int] = []
    turned_away = asyncio.Semaphore(0)

    async def work(epoch: int) -> Made:
        epochs.append(epoch)
        for _ in range(3):
            await turned_away.acquire()
        return Made(by="successor")

    async def contend() -> Made:
        try:
            return await do_once(objects, prefix, work)
        except Leased:
            turned_away.release()
            raise

    async with asyncio.timeout(WITHIN_S):
        results = await asyncio.gather(*(contend() for _ in range(4)), return_exceptions=True)

    assert epochs == [8]
    assert sorted(type(result).__name__ for result in results) == ["Leased", "Leased", "Leased", "Made"]


OWNER = """
import asyncio, os, sys
from datetime import UTC, datetime
from shared.aws import connect
from shared.documents.leases import Lease
from shared.documents.document import Document, Stored
from shared.errors import Leased
from shared.objects import ObjectStore
from tests.shared.test_once import Made, do_once

async def work(_):
    print("working", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    return Made(by="suspended")

async def main():
    async with connect(os.environ) as aws:
        objects = ObjectStore(aws.s3, os.environ["RADQUEUE_BUCKET"])
        try:
            print((await do_once(objects, sys.argv[1], work, lease_s=2)).by, flush=True)
        except Leased:
            print("Leased", flush=True)

asyncio.run(main())
"""


async def test_an_owner_that_was_suspended_past_its_claim_loses(local_aws, objects, prefix):
    """A process is stopped while it works, another takes over and is done: what the first one makes does not count."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, prefix],
        env=local_aws.process_environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        try:
            began = await asyncio.to_thread(owner.stdout.readline)
            owner.send_signal(signal.SIGSTOP)
            async with asyncio.timeout(WITHIN_S):
                while True:
                    try:
                        made = await do_once(objects, prefix, making("successor"))
                        break
                    except Leased:
                        await asyncio.sleep(0.1)
            owner.stdin.write("go on\n")
            owner.stdin.flush()
            owner.send_signal(signal.SIGCONT)
            ended = await asyncio.to_thread(owner.stdout.readline)
        finally:
            owner.kill()

    assert began.strip() == "working"
    assert made == await stored(made_at(prefix), objects=objects) == Made(by="successor")
    assert ended.strip() in {"Leased", "successor"}
    assert (await claim_of(objects, prefix))["epoch"] == 2


@pytest.mark.parametrize("late_first", [False, True])
async def test_of_two_owners_that_do_not_know_of_one_another_one_record_counts(objects, prefix, late_first):
    """An owner that did not notice its lease's end makes a record, too: the first one stored is given to both."""
    working, go_on = asyncio.Event(), asyncio.Event()

    async def late(_: int) -> Made:
        working.set()
        await go_on.wait()
        return Made(by="late")

    owner = asyncio.ensure_future(do_once(objects, prefix, late, lease_s=3600))
    await asyncio.wait_for(working.wait(), WITHIN_S)
    ends = []

    async def successor(_: int) -> Made:
        if late_first:
            go_on.set()
            await owner
            ends.append((await claim_of(objects, prefix))["ends"])
        return Made(by="successor")

    in_two_hours = datetime.now(UTC) + timedelta(hours=2)
    made = await do_once(objects, prefix, successor, clock=lambda: in_two_hours)
    go_on.set()

    assert await owner == made == Made(by="late" if late_first else "successor")
    assert all(datetime.fromisoformat(end) > in_two_hours for end in ends), "the late owner ended no lease but its own"


# Lost.


async def test_a_claim_that_was_taken_over_stops_the_work(objects, prefix):
    """A worker whose lease another one took stops, says so, and leaves the other's lease alone."""
    other = {"owner": "another", "epoch": 7, "ends": "2999-01-01T00:00:00Z"}
    stopped = asyncio.Event()

    async def work(_: int) -> Made:
        await objects.put(f"{prefix}claim.json", json.dumps(other).encode())
        try:
            return await endless(0)
        finally:
            stopped.set()

    with pytest.raises(Leased, match="lost"):
        await do_once(objects, prefix, work, lease_s=6)

    assert stopped.is_set()
    assert await claim_of(objects, prefix) == other


class Faulty(ObjectStore):
    """A store where writes of the lease go wrong as told: `error` is raised once, `unanswered` are stored only."""

    unanswered = 0
    error: Exception | None = None
    renewals = 0

    async def put_if_match(self, key, body, etag):
        error, self.error = self.error, None
        if error is not None:
            raise error
        stored = await super().put_if_match(key, body, etag)
        if self.unanswered:
            self.unanswered -= 1
            await asyncio.Event().wait()
        self.renewals += stored is not None
        return stored


@pytest.fixture
def faulty(aws, local_aws) -> Faulty:
    return Faulty(aws.s3, local_aws.bucket)


async def test_a_renewal_whose_answer_got_lost_is_no_lost_claim(faulty, prefix):
    """S3 stores a renewal and does not answer: the lease is still known as ours, renewed, and given back."""
    faulty.unanswered = 1

    async def work(_: int) -> Made:
        await until(lambda: faulty.renewals >= 3)
        return Made(by="owner")

    made = await do_once(faulty, prefix, work, lease_s=5)
    lease = await claim_of(faulty, prefix)

    assert made == Made(by="owner")
    assert lease["epoch"] == 1
    assert datetime.fromisoformat(lease["ends"]) <= datetime.now(UTC), "it was given back"


async def test_a_claim_is_given_back_also_in_the_middle_of_a_renewal(faulty, prefix):
    """Work ends while S3 has stored a renewal and not yet answered: the next worker need not wait all the same."""
    faulty.unanswered = 1

    async def work(_: int) -> None:
        await until(lambda: not faulty.unanswered)

    await do_once(faulty, prefix, work, lease_s=5)

    assert await do_once(faulty, prefix, making("next")) == Made(by="next")


async def test_a_claim_whose_answer_got_lost_is_ours(objects, prefix):
    """The first write was stored and its answer lost, so that its repetition is refused: the lease says who won."""

    class Repeating(ObjectStore):
        async def put_if_absent(self, key, body):
            await super().put_if_absent(key, body)
            return await super().put_if_absent(key, body)

        async def put_if_match(self, key, body, etag):
            await super().put_if_match(key, body, etag)
            return await super().put_if_match(key, body, etag)

    repeating = Repeating(objects._s3, objects.bucket)

    async def nothing(epoch: int) -> int:
        return epoch

    assert await do_once(repeating, prefix, nothing) == 1
    assert await do_once(repeating, prefix, nothing) == 2


async def test_a_bug_in_a_renewal_is_no_lost_claim(faulty, prefix):
    """What is no answer of S3 is raised as what it is."""
    faulty.error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        await do_once(faulty, prefix, endless, lease_s=6)


# With a queue.


async def test_a_message_that_is_turned_away_for_long_is_neither_lost_nor_dead_lettered(
    aws, objects, own_queues, prefix, monkeypatch
):
    """Two workers get one request: one works once, the other's message comes back anew, and no circuit opens."""
    monkeypatch.setattr(module, "PATIENCE", 4)
    monkeypatch.setattr(circuit, "FAILURES", 2)
    chosen = own_queues.model_copy(update={"slots": 1, "retry_base_s": 0.01})
    endings: list[tuple[str, int]] = []
    epochs: list[int] = []
    stop = asyncio.Event()

    async def work(epoch: int) -> Made:
        epochs.append(epoch)
        await until(lambda: ("Continue", 4) in endings and endings[-1] == ("Leased", 1))
        return Made(by="the only one")

    async def handle(_: ReportRequested) -> None:
        ending = "done"
        try:
            await do_once(objects, prefix, work)
        except (Leased, Continue) as turned_away:
            ending = type(turned_away).__name__
            raise
        finally:
            endings.append((ending, receive_count()))

    url = (await aws.sqs.get_queue_url(QueueName=chosen.reporting_queue))["QueueUrl"]
    body = ReportRequested.of("twice", ReportRequest(), time=NOON).body()
    for _ in range(2):
        await aws.sqs.send_message(QueueUrl=url, MessageBody=body)
    with structlog.testing.capture_logs() as lines:
        workers = [
            asyncio.ensure_future(
                consume({ReportRequested: handle}, aws.sqs, chosen.reporting_queue, settings=chosen, stop=stop)
            )
            for _ in range(2)
        ]
        await until(lambda: [ending for ending, _ in endings].count("done") == 2)
        stop.set()
        await asyncio.gather(*workers)
    left = [
        sum(int(count) for name, count in (await _counts(aws, queue)).items() if name != "QueueArn")
        for queue in (chosen.reporting_queue, f"{chosen.reporting_queue}-dlq")
    ]

    assert epochs == [1]
    assert ("Leased", 3) in endings
    assert left == [0, 0]
    assert "circuit.opened" not in {line["event"] for line in lines}


async def _counts(aws, queue):
    url = (await aws.sqs.get_queue_url(QueueName=queue))["QueueUrl"]
    names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    return (await aws.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=names))["Attributes"]


# In virtual time.

LEASE_S = 9.0
READ_TIMEOUT_S = 5.0


class Simulated(ObjectStore):
    """One worker's way to an S3 in memory, in virtual time.

    A request goes on its way also if its sender gives up or dies. By chance it takes long, gets lost, is repeated by
    the client because its answer got lost, or is not answered; for a while the worker is cut off.
    """

    def __init__(self, bucket: dict, chance: Random, faults: float) -> None:
        super().__init__(None, "memory")
        self.objects = bucket
        self.chance = chance
        self.faults = faults
        self.cut_off_at = chance.uniform(0, 3 * LEASE_S) if faults else math.inf
        self.cut_off_s = chance.uniform(0, 3 * LEASE_S)
        self.dead = False

    async def get_with_etag(self, key):
        found = await self._ask(lambda: self.objects.get(key))
        if found is None:
            raise ObjectMissing
        return found

    async def _put_if(self, key, body, condition):
        def put() -> str | None:
            there = self.objects.get(key)
            if (
                (there is not None)
                if "IfNoneMatch" in condition
                else (there is None or there[1] != condition["IfMatch"])
            ):
                return None
            self.objects[key] = body, str(hash(body))
            return self.objects[key][1]

        return await self._ask(put)

    async def _ask(self, effect):
        if self.dead:
            await asyncio.Event().wait()
        fate = "answered"
        if 0 <= asyncio.get_running_loop().time() - self.cut_off_at < self.cut_off_s:
            fate = "lost"
        elif self.chance.random() < self.faults:
            fate = self.chance.choice(["lost", "unanswered", "repeated", "slow"])

        async def travel():
            if fate == "lost":
                return None
            await asyncio.sleep(self.chance.uniform(0.01, 2 * LEASE_S if fate == "slow" else 0.2))
            answer = effect()
            return effect() if fate == "repeated" else answer

        travelling = asyncio.ensure_future(travel())
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                answer = await asyncio.shield(travelling)
                await (asyncio.Event().wait() if fate in {"lost", "unanswered"} else asyncio.sleep(0.01))
        except TimeoutError:
            raise Unavailable("S3: ReadTimeoutError") from None
        return answer


class World:
    """Workers that want one thing done, and what they did."""

    def __init__(self, chance: Random) -> None:
        self.chance = chance
        self.bucket: dict = {}
        self.epochs: list[int] = []
        self.given: list[Made] = []
        self.working: set[str] = set()
        self.most_at_once = 0

    async def worker(self, name: str, store: Simulated, skew_s: float, work_s: float) -> None:
        """Try until it is done, as a queue would."""
        loop = asyncio.get_running_loop()

        async def work(epoch: int) -> Made:
            self.epochs.append(epoch)
            self.working.add(name)
            self.most_at_once = max(self.most_at_once, len(self.working))
            try:
                await asyncio.sleep(work_s)
            finally:
                self.working.discard(name)
            return Made(by=f"{name}, epoch {epoch}")

        def clock() -> datetime:
            return NOON + timedelta(seconds=loop.time() + skew_s)

        while True:
            try:
                self.given.append(await do_once(store, "", work, lease_s=LEASE_S, clock=clock))
            except Unavailable:
                await asyncio.sleep(self.chance.uniform(0.1, LEASE_S))
            else:
                return


@settings(max_examples=examples(200), deadline=None, print_blob=True)
@given(st.integers(0, 2**32), st.floats(0, 0.3), st.sampled_from([0.0, 0.0, 1.0]))
def test_any_interleaving_makes_one_record(seed, faults, skewed):
    """Workers die and S3 fails at any place: one record, given to all; no epoch twice; never two at work in step."""

    @virtual_time
    async def run() -> None:
        chance = Random(seed)  # noqa: S311 - a test
        world, tasks = World(chance), {}
        for number in range(3):
            store = Simulated(world.bucket, chance, faults)
            skew_s = skewed * chance.uniform(-LEASE_S, LEASE_S)
            work_s = chance.uniform(0, 3 * LEASE_S)
            tasks[asyncio.ensure_future(world.worker(f"w{number}", store, skew_s, work_s))] = store
        for task, store in list(tasks.items())[: chance.randint(0, 2)]:
            await asyncio.sleep(chance.uniform(0, 4 * LEASE_S))
            store.dead = True
            task.cancel()
        living = [task for task, store in tasks.items() if not store.dead]
        async with asyncio.timeout(1e5):
            await asyncio.gather(*living)
        record = Made.model_validate_json(world.bucket["made.json"][0])

        assert {made.by for made in world.given} <= {record.by}
        assert len(set(world.epochs)) == len(world.epochs)
        assert skewed or world.most_at_once == 1
        assert len(world.given) >= len(living)

    run()


async def _killed(world: World, kill_s: float) -> None:
    """Have a worker that would work for ever die, cut off from everything, `kill_s` after it began."""
    store = Simulated(world.bucket, world.chance, faults=0)
    killed = asyncio.ensure_future(world.worker("killed", store, 0, 1e9))
    await asyncio.sleep(kill_s)
    store.dead = True
    killed.cancel()


@pytest.mark.parametrize("kill_s", [1.5, 3.3, 50.0, 1e3])
def test_a_killed_owner_holds_the_others_up_for_one_lease_at_most(kill_s):
    """A second worker, which asks all the time, begins when the lease of the dead one has ended, and not before."""

    @virtual_time
    async def run() -> None:
        world = World(Random(1))  # noqa: S311 - a test
        loop = asyncio.get_running_loop()
        turned_away: list[float] = []

        async def work(_: int) -> Made:
            return Made(by="successor")

        await _killed(world, kill_s)
        while "made.json" not in world.bucket:
            try:
                clock = lambda: NOON + timedelta(seconds=loop.time())  # noqa: E731
                await do_once(Simulated(world.bucket, world.chance, 0), "", work, lease_s=LEASE_S, clock=clock)
            except Leased:
                turned_away.append(loop.time())

        assert kill_s + LEASE_S / 2 < turned_away[-1] <= kill_s + LEASE_S
        assert world.epochs == [1]

    run()


@virtual_time
async def test_a_claim_that_s3_does_not_renew_is_believed_in_until_its_end_only():
    """Where every renewal hangs, work is cancelled at the very end of the lease: another worker may begin then."""
    world = World(Random(1))  # noqa: S311 - a test
    loop = asyncio.get_running_loop()
    began = ended = 0.0

    async def work(_: int) -> Made:
        nonlocal began, ended
        began, store.dead = loop.time(), True
        try:
            return await endless(0)
        finally:
            ended = loop.time()

    store = Simulated(world.bucket, world.chance, faults=0)
    with pytest.raises(Leased, match="lost"):
        await do_once(store, "", work, lease_s=LEASE_S, clock=lambda: NOON + timedelta(seconds=loop.time()))
    lease = json.loads(world.bucket["claim.json"][0])

    assert ended == pytest.approx((datetime.fromisoformat(lease["ends"]) - NOON).total_seconds(), abs=1e-5)
    assert began < LEASE_S < ended + 1
