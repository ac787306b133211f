"""A training while one worker has its lease, and the process that computes for it."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from services.trainer.reasons import CannotTrain
from services.trainer.settings import TrainerSettings
from shared.child import ChildFailed, Progress, Request
from shared.documents.training import StoredRound, StoredState
from shared.errors import Continue, Unavailable, Unprocessable
from shared.idempotency import store, stored
from shared.keys import TrainingKeys
from shared.log import get_logger
from shared.messages import TrainingRequest
from shared.objects import ObjectStore
from shared.queue import Publish, remaining_s

MAX_ATTEMPTS = 3
"""Times that a round's process may fail without coming further, or that its losses may diverge, before the training is
given up."""
HAND_OVER_S = 300.0
"""Seconds before the end of the message's 12 hours at which a training is stored; it goes on in a new message."""

Reply = TypeVar("Reply")

log = get_logger()


class Worker(Protocol):
    """Carries out the requests of protocol.py; `Child` and `SageMaker` do."""

    async def call(self, request: Request[Reply], *, deadline_s: float, on_progress: Progress | None = None) -> Reply:
        """Carry out a request as services/trainer/worker.py does. Raises as `Child.call`."""


@dataclass(frozen=True, slots=True)
class Ports:
    """The connections to the outside that a training needs."""

    objects: ObjectStore
    publish: Publish
    worker: Worker
    """Runs services.trainer.worker, here or elsewhere."""
    settings: TrainerSettings
    clock: Callable[[], datetime]
    extractor: Path | None = None
    """The network that the settings name to compare images by."""
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the service is to stop: a training is stored then, and given back."""


@dataclass(frozen=True, slots=True)
class Run:
    """A training while this worker has its lease."""

    request: TrainingRequest
    keys: TrainingKeys
    epoch: int
    """The epoch of the lease: objects whose names carry it were stored by this worker alone."""
    ports: Ports
    work_dir: Path

    async def rounds(self) -> list[StoredRound]:
        """Return the completed rounds."""
        rounds: list[StoredRound] = []
        while done := await stored(self.keys.round(len(rounds) + 1).evaluation, objects=self.ports.objects):
            rounds.append(done)
        return rounds

    async def state(self, number: int) -> StoredState:
        """Return how often round `number` was tried. Raises `CannotTrain` if it was tried too often."""
        state = await stored(self.keys.state, objects=self.ports.objects)
        if state is None or state.round != number:  # what is stored of another round no longer counts
            state = StoredState(round=number)
        return _checked(state)

    async def store_state(self, state: StoredState) -> None:
        """Store how often a round was tried. Raises `CannotTrain` if too often, with the same reason each time."""
        await store(self.keys.state, state, objects=self.ports.objects)
        _checked(state)

    async def ask(self, number: int, asked: Request[Reply], *, reached: int = 0) -> Reply:
        """Have the training process do one thing for round `number`, which is at step `reached`."""
        async with self.attempt(number, lambda: reached):
            return await self.call(number, asked)

    @contextlib.asynccontextmanager
    async def attempt(self, number: int, reached: Callable[[], int]) -> AsyncIterator[None]:
        """Count a failure of the training process in the block; the next delivery tries again.

        `reached` returns the step of the last checkpoint. An attempt that came further than the one before it
        counts as the first again: a training may outlive any number of machines.
        """
        state = await self.state(number)
        try:
            yield
        except ChildFailed as failed:
            step = reached()
            before = state.attempts if step <= state.reached else 0
            state = state.model_copy(
                update={"attempts": before + 1, "reached": step, "failed_of": failed.reason_code},
            )
            log.warning(
                "training.process_failed",
                request_id=self.request.request_id,
                round=number,
                reason_code=failed.reason_code,
                error_type=failed.error_type,
                where=failed.where,
                attempt=state.attempts,
            )
            await self.store_state(state)
            raise Unavailable(f"the training process failed: {failed.reason_code}") from None

    async def call(self, number: int, asked: Request[Reply], told: Progress = lambda _: None) -> Reply:
        """Have the training process do one thing; `told` receives its reports on the way.

        Raises:
            ChildFailed: no reply came.
            CannotTrain: the process says so.
            Continue: this worker is to stop, or its message ends soon.
        """
        ports, settings = self.ports, self.ports.settings
        if ports.stop.is_set() or remaining_s() <= HAND_OVER_S:
            raise Continue
        bound = log.bind(request_id=self.request.request_id, round=number)

        def on_progress(news: Any) -> None:
            told(news)
            bound.info("training.progress", **asdict(news))

        try:
            return await ports.worker.call(asked, deadline_s=settings.round_deadline_s, on_progress=on_progress)
        except Unprocessable as refused:
            raise CannotTrain(refused.reason_code) from None

    @contextlib.asynccontextmanager
    async def touched_at_the_end(self, path: Path) -> AsyncIterator[None]:
        """While the block runs, make a file as soon as this worker is to stop, or its message ends soon."""
        watching = asyncio.create_task(self._touch(path))
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _touch(self, path: Path) -> None:
        left_s = remaining_s() - HAND_OVER_S
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if math.isinf(left_s) else left_s):
                await self.ports.stop.wait()
        path.touch()


def _checked(state: StoredState) -> StoredState:
    if max(state.attempts, state.divergences) >= MAX_ATTEMPTS:
        raise CannotTrain(state.failed_of)
    return state
