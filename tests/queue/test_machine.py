"""Any interleaving of sends, polls, endings, deaths, duplicates, expiries, faults and late deletes: nothing is lost.

The machine drives real consumers against the fake SQS in virtual time. After each step it checks what must always
hold, and at the end it heals everything, starts one more consumer, and expects the queue to become empty with all work
done, unless it was to be dead-lettered.
"""

import asyncio
from collections import Counter
from contextlib import ExitStack

from botocore.exceptions import BotoCoreError, ClientError
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shared.errors import Unavailable, Unprocessable
from shared.messages import decode
from tests.examples import examples
from tests.queue.fakesqs import Fault
from tests.queue.sqsmodel import ACCOUNT, Stored, StoredQueue
from tests.queue.virtualtime import VirtualLoop, virtual_clocks
from tests.queue.world import QUEUE, Worker, World, months, world

VISIBILITY_S = 12
SLOTS = 3
STRANGER_S = 3
OPERATIONS = ["ReceiveMessage", "DeleteMessageBatch", "ChangeMessageVisibilityBatch", "SendMessage", "*"]
KINDS = ["error", "reset", "lost_reply", "slow", "slow_reply", "entries"]
ENDINGS = ["return", "return", "unavailable", "unprocessable", "bug"]
DEAD_ENDINGS = {"unprocessable", "bug"}


class Mortal:
    """A client that can die: from then on its calls are neither sent nor ever answered, as after SIGKILL."""

    def __init__(self, sqs) -> None:
        self._sqs = sqs
        self.dead = asyncio.Event()
        self.buried = asyncio.Event()
        """Set at the end of a test, so that what still waits can be cleared away."""

    def __getattr__(self, operation):
        """Return the operation, which ends when the client dies."""

        async def call(**arguments):
            doing = asyncio.ensure_future(getattr(self._sqs, operation)(**arguments))
            died = asyncio.ensure_future(self.dead.wait())
            try:
                if not self.dead.is_set():
                    await asyncio.wait([doing, died], return_when=asyncio.FIRST_COMPLETED)
                await self.live()
                return doing.result()
            finally:
                doing.cancel()
                died.cancel()

        return call

    async def live(self) -> None:
        """Return for the living only."""
        if self.dead.is_set():
            await self.buried.wait()
            raise ConnectionError


class QueueMachine(RuleBasedStateMachine):
    """One queue, some consumers, and a stranger who holds receipt handles for too long."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.runner = self.stack.enter_context(asyncio.Runner(loop_factory=VirtualLoop))
        self.stack.enter_context(virtual_clocks(self.runner.get_loop()))
        scope = world(max_receives=200)
        self.here: World = self.runner.run(scope.__aenter__())
        self.stack.callback(lambda: self.runner.run(scope.__aexit__(None, None, None)))
        self.alive: list[tuple[Mortal, Worker]] = []
        self.corpses: list[tuple[Mortal, Worker]] = []
        self.everyone: list[Worker] = []
        self.stranger: list[tuple[Stored, int, str]] = []
        """What the stranger received: the message, at which of its receives, and the handle."""
        self.sent: dict[str, str] = {}
        self.endings: dict[str, str] = {}
        self.healed = False

    @property
    def queue(self) -> StoredQueue:
        return self.here.fake.model.queue(QUEUE)

    @initialize()
    def begin(self) -> None:
        """One consumer and one message of each kind are there from the start."""
        self.start_a_worker()
        self.send(ENDINGS, 0)

    @rule(endings=st.lists(st.sampled_from(ENDINGS), min_size=1, max_size=4), delay_s=st.sampled_from([0, 0, 5]))
    def send(self, endings, delay_s) -> None:
        """Messages, and how the handler of each will end for as long as nothing is healed."""
        for ending in endings:
            month = months(len(self.sent) + 1)[-1]
            self.endings[month] = ending
            self.sent[self.runner.run(self.here.send(month=month, delay_s=delay_s))] = month

    @precondition(lambda self: len(self.alive) < 3)
    @rule()
    def start_a_worker(self) -> None:
        """Another consumer of the same queue. It finds its queue: a failure there ends a process, as it should."""
        mortal = Mortal(self.here.sqs)

        async def handle(event) -> None:
            await self.handle(event.data.month)
            await mortal.live()

        async def start() -> Worker:
            worker = self.here.consumer(handle, sqs=mortal, visibility_s=VISIBILITY_S, slots=SLOTS, grace_s=4)
            await asyncio.sleep(0.01)
            return worker

        faults, self.here.fake.faults[:] = list(self.here.fake.faults), []
        worker = self.runner.run(start())
        self.here.fake.faults[:] = faults
        self.alive.append((mortal, worker))
        self.everyone.append(worker)

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 2))
    def kill(self, which) -> None:
        """It dies without a word: nothing that it would do from now on reaches SQS."""
        mortal, worker = self.alive.pop(which % len(self.alive))
        mortal.dead.set()
        self.here.workers.remove(worker)
        self.corpses.append((mortal, worker))

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 2))
    def drain(self, which) -> None:
        """It stops as by SIGTERM."""
        _, worker = self.alive.pop(which % len(self.alive))
        self.runner.run(worker.drained())
        self.here.workers.remove(worker)

    @rule(seconds=st.sampled_from([0.05, 0.5, 2, 7, 13, 31]))
    def time_passes(self, seconds) -> None:
        """Leases are extended, or expire."""
        self.runner.run(asyncio.sleep(seconds))

    @rule(operation=st.sampled_from(OPERATIONS), kind=st.sampled_from(KINDS), times=st.integers(1, 6))
    def something_fails(self, operation, kind, times) -> None:
        """For some calls, and never for longer than half a minute."""
        until = self.here.now() + 30
        self.here.fake.faults.append(Fault(operation, kind, times=times, until=until, seconds=5, places=(0, 2)))

    @precondition(lambda self: self.queue.messages)
    @rule(which=st.integers(0, 9))
    def duplicate(self, which) -> None:
        """A message is delivered once more."""
        self.here.fake.model.duplicate(self.queue, self._some(which).message_id)

    @precondition(lambda self: self.queue.messages)
    @rule(which=st.integers(0, 9))
    def take_away(self, which) -> None:
        """A lease ends before its time."""
        self.here.fake.model.take_away(self.queue, self._some(which).message_id)

    @rule()
    def a_stranger_receives(self) -> None:
        """Somebody takes a message with a short visibility, and does nothing with it in time."""
        for message, handle in self.here.fake.model.receive(self.queue, 1, STRANGER_S):
            self.stranger.append((message, message.receives, handle))

    @precondition(lambda self: self.stranger)
    @rule(which=st.integers(0, 9))
    def a_late_delete(self, which) -> None:
        """The stranger deletes when his time is over."""
        message, _, handle = self.stranger.pop(which % len(self.stranger))
        self.runner.run(self._delete_late(message, handle))

    @invariant()
    def consumers_live_within_their_slots(self) -> None:
        """No consumer ever ends by itself, and none runs more than its slots."""
        for _, worker in self.alive:
            assert not worker.task.done()
            assert len(worker.started) - worker.ended <= SLOTS

    @invariant()
    def nothing_is_deleted_that_was_not_done(self) -> None:
        """Each deletion comes after the end of a good run, after a dead letter, or after the message was sent again."""
        done = self._done()
        months_of = {entry.message_id: decode(entry.details["body"]).data.month for entry in self.here.log("sent")}
        copies = Counter(months_of.values())
        for month, deleted in Counter(months_of[entry.message_id] for entry in self.here.log("deleted")).items():
            assert month in done or deleted < copies[month]

    @invariant()
    def only_bad_work_is_dead_lettered(self) -> None:
        """Never by the queue itself. What was received five times and not heard of may be what kills workers."""
        bad = {month for month, ending in self.endings.items() if ending in DEAD_ENDINGS}
        for letter in self.here.dead_letters():
            if letter["reason_code"] == "worker_died":
                assert int(letter["receive_count"]) > 5
            else:
                assert letter["reason_code"] in {"drawn", "bug"}
                assert decode(letter["body"]).data.month in bad
        assert not self.here.log("dead_lettered")

    def teardown(self) -> None:
        """Heal everything: then all work gets done, and the queue becomes empty."""
        with self.stack:
            self.healed = True
            self.here.fake.faults.clear()
            self.start_a_worker()
            self.runner.run(self.here.emptied(within_s=3600))
            self.nothing_is_deleted_that_was_not_done()
            self.only_bad_work_is_dead_lettered()
            missing = set(self.sent.values()) - self._done()
            for mortal, worker in self.corpses:
                mortal.buried.set()
                worker.task.cancel()
            self.runner.run(_ended([worker.task for _, worker in self.corpses]))

            assert not missing

    async def handle(self, month) -> None:
        """End as it was drawn; some runs are longer than the visibility timeout."""
        await asyncio.sleep(1 + 7 * (int(month[-2:]) % 4))
        ending = "return" if self.healed else self.endings[month]
        if ending == "unavailable":
            raise Unavailable("drawn")
        if ending == "unprocessable":
            raise Unprocessable("drawn")
        if ending == "bug":
            raise KeyError("drawn")

    async def _delete_late(self, message, handle) -> None:
        await asyncio.sleep(max(0.0, message.received_at + STRANGER_S - self.here.now()))
        url = f"{self.here.fake.url}/{ACCOUNT}/{QUEUE}"
        try:
            await self.here.sqs.delete_message(QueueUrl=url, ReceiptHandle=handle)
        except (BotoCoreError, ClientError):
            return

    def _some(self, which: int) -> Stored:
        stored = list(self.queue.messages.values())
        return stored[which % len(stored)]

    def _dead(self) -> set[str]:
        bodies = [letter["body"] for letter in self.here.dead_letters()]
        return {month for month in self.sent.values() if any(f'"{month}"' in body for body in bodies)}

    def _done(self) -> set[str]:
        return {month for worker in self.everyone for _, month in worker.finished} | self._dead()


async def _ended(tasks) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(
    max_examples=examples(125),
    stateful_step_count=25,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
