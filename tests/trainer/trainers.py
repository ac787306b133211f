"""Trainers that a test starts, what it asks of them, and their data."""

import asyncio
import io
import json
import os
import signal
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from services.trainer.__main__ import WORKER
from services.trainer.handler import handle
from services.trainer.protocol import Saved
from services.trainer.run import Ports
from services.trainer.settings import TrainerSettings
from shared.child import Child
from shared.messages import TrainingRequest, TrainingRequested
from shared.objects import ObjectStore

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
TINY = {"imageSize": 16, "width": 2, "latentDim": 4, "batchSize": 4, "steps": 3}
ENDLESS = TINY | {"steps": 10_000_000}
WITHIN_S = 60


class Watched(Child):
    """A real child process that remembers what it was asked, and can be killed in the middle of an answer."""

    def __init__(self, *, argv: Sequence[str] = WORKER, kill_at: int | None = None) -> None:
        super().__init__(argv, env={"OMP_NUM_THREADS": "1"})
        self.asked: list[str] = []
        self.kill_at = kill_at
        self.busy = asyncio.Event()
        self.on_checkpoint: Callable[[], None] = lambda: None

    async def call(self, request, *, on_progress=lambda _: None, **options):
        def told(progress):
            on_progress(progress)
            if isinstance(progress, Saved):
                self.on_checkpoint()

        self.asked.append(request.do)
        calling = asyncio.ensure_future(super().call(request, on_progress=told, **options))
        self.busy.set()
        try:
            if len(self.asked) == self.kill_at:
                await until(lambda: self.pid is not None)
                self.kill()
            return await calling
        finally:
            calling.cancel()
            await asyncio.gather(calling, return_exceptions=True)

    def kill(self) -> None:
        assert self.pid is not None
        os.kill(self.pid, signal.SIGKILL)


@dataclass
class Trainer:
    """One trainer over the local AWS; what it publishes is remembered."""

    objects: ObjectStore
    worker: Watched
    work_dir: Path
    published: list = field(default_factory=list)
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, event, *, delay_s=0):
        self.published.append(event)

    async def handle(self, requested: TrainingRequested, **settings) -> None:
        await handle(requested, ports=self.ports(**settings))

    def ports(self, **settings) -> Ports:
        settings |= {"bucket": self.objects.bucket, "work_dir": self.work_dir, "device": "cpu", "min_images": 8}
        chosen = TrainerSettings(threads=1, **settings)
        return Ports(self.objects, self, self.worker, chosen, lambda: datetime.now(UTC), stop=self.stop)

    def ids(self, kind) -> list[str]:
        return [event.id for event in self.published if isinstance(event, kind)]

    async def weights(self) -> dict[str, torch.Tensor]:
        """Return those of the generator that was told of last."""
        body = await self.objects.get(self.published[-1].data.generator_key)
        loaded: dict[str, torch.Tensor] = torch.load(io.BytesIO(body), weights_only=True)
        return loaded


async def until(condition) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not condition():
            await asyncio.sleep(0.005)


def requested(dataset: str, **changes) -> TrainingRequested:
    asked = {"request_id": f"r-{uuid.uuid4().hex}", "overrides": TINY}
    asked |= {"threshold": 1e-9, "max_rounds": 2, "n_images": 5} | changes
    data = TrainingRequest(dataset=dataset, **asked)
    return TrainingRequested.of(data.request_id, data, time=NOON)


async def put_series(objects, dataset, series, *, patient, rng, digest="01" * 8, n=8) -> None:
    stem = f"datasets/{dataset}/{series}.{digest}.c0ffee"
    buffer = io.BytesIO()
    np.save(buffer, np.tanh(rng.normal(size=(n, 32, 32))).astype(np.float32))
    sidecar = {"series_uid": series, "patient_key": patient, "digest": digest, "n": n, "shape": [n, 32, 32]}
    await objects.put(f"{stem}.json", json.dumps(sidecar).encode())
    await objects.put(f"{stem}.npy", buffer.getvalue())


async def document(objects, key):
    return json.loads(await objects.get(key))
