"""The kill sweep over the four services: each is killed at every API call, and started again until its work is done.

Each scenario has a bucket, queues and a data store of its own in one local AWS, and all scenarios of a service give it
the same work. The service reaches AWS through a proxy, which kills it. The judge reads AWS and nothing else.
"""

import asyncio
import contextlib
import os
import random
import re
import select
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

from botocore.exceptions import ClientError

from deploy.local.__main__ import client_environment
from deploy.local.stack import LEASH
from deploy.topology import Named, Topology, create
from shared.aws import Aws, connect
from tests.chaos.journeys import JOURNEYS, Journey, Outcome, World
from tests.chaos.proxy import Proxy
from tests.chaos.sweep import DRAIN_S, HUNG, KILLED, LOOK_S, ROOT, Scenario, Verdict
from tests.conftest import LocalAws, clean_environ, start_local_aws

AT_ONCE = 6
"""Scenarios at the same time; half of each is waiting."""
ORPHAN_S = 10.0
"""Seconds that a process may outlive the service that started it."""
TIMED = re.compile(
    r"(ReceiveMessage|ChangeMessageVisibility|PUT models/r/lease).*:([4-9]|[0-9]{2,})|PUT models/r/progress.*"
)
"""Calls that the clock makes: from the fourth on a kill is like one before; progress.json is of slow machines."""
PATIENCE_S = 300.0
"""Seconds that each process gets."""
SETTINGS = {"POLL_S": "1", "VISIBILITY_S": "10", "GRACE_S": "5", "RETRY_BASE_S": "0.2", "METRICS_FLUSH_S": "3600"}
READY = b"queue.consuming"

Steps = deque[Callable[[], Awaitable[None]]]


@dataclass
class Arena:
    """One local AWS for every scenario."""

    local: LocalAws
    aws: Aws
    folder: Path
    scenarios: int = 0
    places: dict[str, list[str]] = field(default_factory=dict)
    """The boundaries that each service comes to when nobody kills it."""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    """What it leaves then."""

    def __post_init__(self) -> None:
        """Let few scenarios run at once."""
        self.free = asyncio.Semaphore(AT_ONCE)

    async def learn(self, services: Sequence[str]) -> None:
        """Let each service work undisturbed, and remember its boundaries and what it leaves."""
        verdicts = await self.run_all([(service, Scenario()) for service in services])
        for service, verdict in zip(services, verdicts, strict=True):
            outcome, sizes = self.outcomes[service], JOURNEYS[service].sizes
            if verdict.wrong or any(len(outcome[name]) != size for name, size in sizes.items()):
                raise RuntimeError(f"{service} without a kill: {verdict.wrong} {outcome}")

    async def run_all(
        self, tasks: Sequence[tuple[str, Scenario]], tell: Callable[[Verdict], None] = lambda _: None
    ) -> list[Verdict]:
        """Run scenarios side by side, and tell of each as it ends."""

        async def run(service: str, scenario: Scenario) -> Verdict:
            async with self.free:
                verdict = await self.run(service, scenario)
            tell(verdict)
            return verdict

        return await asyncio.gather(*(run(*task) for task in tasks))

    async def run(self, service: str, scenario: Scenario) -> Verdict:
        """Run one scenario, and judge it."""
        world = await self._world()
        journey = JOURNEYS[service](world)
        await journey.prepare()
        steps = deque(journey.steps())
        await steps.popleft()()
        kills, wrong = 0, list[str]()
        for kill_at in (*scenario.kills, None):
            life = Life(world, journey, kill_at, scenario)
            exit_code = await life.live(steps)
            kills += exit_code == KILLED
            wrong += life.wrong
            if exit_code != KILLED:
                break
        return Verdict(scenario, kills, (*wrong, *await self._judge(service, world, journey, life)))

    async def _world(self) -> World:
        self.scenarios += 1
        name = f"scenario{self.scenarios}"
        given = Topology.load()
        own = {
            "bucket": given.bucket.model_copy(update={"name": name}),
            "queues": {role: Named(name=f"{name}-{role}") for role in given.queues},
            "datastore": Named(name=name),
        }
        topology, endpoint_url = given.model_copy(update=own), self.local.endpoint_url
        datastore_id = await asyncio.to_thread(create, topology, endpoint_url=endpoint_url)
        world = World(self.aws, client_environment(topology, endpoint_url, datastore_id), self.folder / name)
        world.folder.mkdir()
        return world

    async def _judge(self, service: str, world: World, journey: Journey, last: "Life") -> list[str]:
        wrong = [f"{role} has dead letters" for role in Topology.load().queues if await world.waiting(role, "-dlq")]
        wrong += [f"{journey.queue} is not empty"] if await world.waiting(journey.queue) else []
        try:
            outcome = await journey.outcome()
        except KeyError as missing:
            return [*wrong, f"something is not there: {missing}"]
        if service not in self.outcomes:
            self.outcomes[service], self.places[service] = outcome, last.proxy.places
        for name, expected in self.outcomes[service].items():
            lost, more = set(expected) - set(outcome[name]), set(outcome[name]) - set(expected)
            wrong += [f"{name}: {one} is missing" for one in lost] + [f"{name}: {one} is too much" for one in more]
            if not lost | more and len(outcome[name]) != len(expected):
                wrong.append(f"{name}: {len(outcome[name])} instead of {len(expected)}")
        return wrong


@dataclass
class Life:
    """One process of a service, from its start to its end."""

    world: World
    journey: Journey
    kill_at: str | None
    scenario: Scenario
    wrong: list[str] = field(default_factory=list)

    async def live(self, steps: Steps) -> int:
        """Let the service work until it dies or nothing is left to do; returns how it ended."""
        self.proxy = Proxy(self.world.environ["AWS_ENDPOINT_URL"], self.kill_at)
        async with self.proxy.serving():
            process = await self._start()
            self.proxy.pid = process.pid
            try:
                exit_code = await self._see(process, steps)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            await self._bury()
        for role in self.journey.hears:
            self.wrong += await self.world.listen(role)
        if exit_code not in {0, KILLED}:
            self.wrong.append(f"the service ended with {exit_code}: {self._log()[-2000:].decode()}")
        left = [path for path in (self.world.folder / "work").rglob("*") if path.is_file()]
        if exit_code == 0 and left:
            self.wrong.append(f"{len(left)} files are left on the disk")
        return exit_code

    async def _start(self) -> asyncio.subprocess.Process:
        settings = {f"RADQUEUE_{name}": value for name, value in SETTINGS.items()} | self.journey.environ
        own = {"AWS_ENDPOINT_URL": self.proxy.url, "RADQUEUE_WORK_DIR": str(self.world.folder / "work")}
        mutant = ["tests.chaos.mutants", self.scenario.mutant] if self.scenario.mutant else []
        program = [sys.executable, "-m", *mutant, f"services.{self.journey.service}"]
        leash = [sys.executable, "-I", "-S", str(LEASH), str(os.getpid())]
        with (self.world.folder / "log").open("wb") as log:
            return await asyncio.create_subprocess_exec(
                *leash,
                *program,
                cwd=ROOT,
                env=clean_environ() | self.world.environ | settings | own | {"OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    async def _see(self, process: asyncio.subprocess.Process, steps: Steps) -> int:
        """Give it its work, step by step, and end it when all is done."""
        deadline = time.monotonic() + PATIENCE_S
        while process.returncode is None and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_S)
            if READY not in self._log() or await self.world.waiting(self.journey.queue):
                continue
            if not steps:
                break
            await steps.popleft()()
        if process.returncode is None:
            process.terminate()
        try:
            return await asyncio.wait_for(process.wait(), DRAIN_S)
        except TimeoutError:
            return HUNG

    async def _bury(self) -> None:
        """See that what it had started ended with it, and let its leases end now: time would do that, too."""
        for child in self.proxy.children:
            ended, _, _ = await asyncio.to_thread(select.select, [child], [], [], ORPHAN_S)
            if not ended:
                self.wrong.append("a child outlives the service")
                signal.pidfd_send_signal(child, signal.SIGKILL)
        url = await self.world.url(self.journey.queue)
        for handle in self.proxy.handles:
            with contextlib.suppress(ClientError):  # the message is deleted, or visible
                await self.world.aws.sqs.change_message_visibility(
                    QueueUrl=url, ReceiptHandle=handle, VisibilityTimeout=0
                )

    def _log(self) -> bytes:
        return (self.world.folder / "log").read_bytes()


@contextlib.asynccontextmanager
async def arena(folder: Path) -> AsyncIterator[Arena]:
    """Start the local AWS, and stop it at the end."""
    local = start_local_aws(folder / "aws")
    try:
        with patch.dict(os.environ, local.environ):
            async with connect(os.environ) as aws:
                yield Arena(local, aws, folder)
    finally:
        await asyncio.to_thread(local.stop)


def every_kill(places: Sequence[str]) -> list[Scenario]:
    """Return a scenario for each boundary but those that are like others."""
    return [Scenario((place,)) for place in sorted(set(places)) if not TIMED.fullmatch(place)]


def sampled(places: Sequence[str], count: int, seed: int = 0) -> list[Scenario]:
    """Choose kills by a seed."""
    return random.Random(seed).sample(every_kill(places), count)  # noqa: S311 - a sample
