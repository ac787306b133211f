import asyncio
import io
import json
import os
import signal
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import pytest
import structlog
import torch
from PIL import Image

from services.trainer import handler, training, worker
from services.trainer.__main__ import WORKER
from services.trainer.config import TrainingConfig
from services.trainer.handler import Ports, handle
from services.trainer.jsconfig import modify_config, read_config
from services.trainer.networks import Generator, build_gan_model
from services.trainer.settings import TrainerSettings
from shared.child import Child
from shared.config import Misconfigured, load
from shared.errors import Claimed, Continue, Unavailable, Unprocessable
from shared.messages import (
    TrainingCompleted,
    TrainingFailed,
    TrainingRequest,
    TrainingRequested,
    TrainingRoundCompleted,
)
from shared.objects import ObjectStore

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
TINY = {"imageSize": 16, "width": 2, "latentDim": 4, "batchSize": 4, "steps": 3}
ENDLESS = TINY | {"steps": 10_000_000}
WITHIN_S = 60


class Watched(Child):
    """A real child process that remembers what it was asked, and can be killed in the middle of an answer."""

    def __init__(self, *, kill_at: int | None = None) -> None:
        super().__init__(WORKER, env={"OMP_NUM_THREADS": "1"})
        self.asked: list[str] = []
        self.kill_at = kill_at
        self.busy = asyncio.Event()

    async def call(self, request, **options):
        self.asked.append(request["do"])
        calling = asyncio.ensure_future(super().call(request, **options))
        self.busy.set()
        try:
            if len(self.asked) == self.kill_at:
                await until(lambda: self.pid is not None)
                os.kill(self.pid, signal.SIGKILL)
            return await calling
        finally:
            calling.cancel()
            await asyncio.gather(calling, return_exceptions=True)


@dataclass
class Trainer:
    """One trainer over the local AWS; what it publishes is remembered."""

    objects: ObjectStore
    worker: Watched
    published: list = field(default_factory=list)

    async def __call__(self, event, *, delay_s=0):
        self.published.append(event)

    async def handle(self, requested: TrainingRequested, **settings) -> None:
        chosen = TrainerSettings(bucket=self.objects.bucket, threads=1, device="cpu", min_images=8, **settings)
        ports = Ports(self.objects, self, self.worker, chosen, lambda: datetime.now(UTC))
        await handle(requested, ports=ports)

    def ids(self, kind) -> list[str]:
        return [event.id for event in self.published if isinstance(event, kind)]


async def until(condition) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not condition():
            await asyncio.sleep(0.005)


def requested(dataset: str, **changes) -> TrainingRequested:
    asked = {"request_id": f"r-{uuid.uuid4().hex}", "overrides": TINY}
    asked |= {"threshold": 1e-9, "max_rounds": 2, "n_images": 5} | changes
    data = TrainingRequest(dataset=dataset, **asked)
    return TrainingRequested.of(data.request_id, data, time=NOON)


@pytest.fixture
def objects(aws, local_aws) -> ObjectStore:
    return ObjectStore(aws.s3, local_aws.bucket)


@pytest.fixture
async def start():
    """Make trainers; their processes are ended with the test."""
    workers: list[Watched] = []

    def made(objects, **options) -> Trainer:
        workers.append(Watched(**options))
        return Trainer(objects, workers[-1])

    yield made
    for started in workers:
        await started.stop(kill=True)


@pytest.fixture
async def dataset(objects) -> str:
    """Four patients of eight slices as ingest stores them, one with a superseded revision and two series."""
    name = f"d-{uuid.uuid4().hex[:8]}"
    rng = np.random.default_rng(0)
    for number, patient in enumerate("aabcd"):
        await put_series(objects, name, f"1.2.{number}", patient=patient, rng=rng)
    await put_series(objects, name, "1.2.4", patient="d", rng=rng, digest="02" * 8)
    return name


async def put_series(objects, dataset, series, *, patient, rng, digest="01" * 8, n=8) -> None:
    stem = f"datasets/{dataset}/{series}.{digest}.c0ffee"
    buffer = io.BytesIO()
    np.save(buffer, np.tanh(rng.normal(size=(n, 32, 32))).astype(np.float32))
    sidecar = {"series_uid": series, "patient_key": patient, "digest": digest, "n": n, "shape": [n, 32, 32]}
    await objects.put(f"{stem}.json", json.dumps(sidecar).encode())
    await objects.put(f"{stem}.npy", buffer.getvalue())


async def document(objects, key):
    return json.loads(await objects.get(key))


async def test_two_rounds_to_images(objects, start, dataset):
    """A request becomes two rounds, a model and its images, all where the events say; a repeat repeats the ids."""
    asked = requested(dataset)
    folder = f"models/{asked.data.request_id}"
    trainer = start(objects)
    await trainer.handle(asked)
    rounds = [event.data for event in trainer.published if isinstance(event, TrainingRoundCompleted)]
    end = trainer.published[-1].data
    image = Image.open(io.BytesIO(await objects.get(end.images_key)))
    generator = Generator(TrainingConfig.of(end.config))
    weights = torch.load(io.BytesIO(await objects.get(end.generator_key)), weights_only=True)

    assert [type(event) for event in trainer.published] == [*[TrainingRoundCompleted] * 2, TrainingCompleted]
    assert [(told.round, told.steps, told.approved) for told in rounds] == [(1, 3, False), (2, 3, False)]
    assert rounds[0].config == read_config((await objects.get(rounds[0].config_key)).decode())
    assert rounds[0].config_key == f"{folder}/rounds/1/config.1.js"
    assert "// channels" in (await objects.get(f"{folder}/config.js")).decode()
    assert end.evaluation == min((told.evaluation for told in rounds), key=lambda told: told.relative_fd)
    assert end.evaluation.n == 8
    assert np.load(io.BytesIO(await objects.get(end.images_array_key))).shape == (5, 16, 16)
    assert image.size == (3 * 17 - 1, 2 * 17 - 1)
    assert generator.load_state_dict(weights)
    arrays = (await document(objects, f"{folder}/manifest.json"))["arrays"]
    assert [item["key"].split(".")[-3] for item in arrays] == ["01" * 8] * 4 + ["02" * 8]

    again = start(objects)
    await again.handle(asked)

    assert again.worker.asked == []
    assert again.ids(TrainingCompleted) == trainer.ids(TrainingCompleted)


async def test_goes_on_after_a_kill_without_repeating_a_round(objects, start, dataset):
    """The process is killed in round two: the next delivery trains round two only, and announces the same round one."""
    asked = requested(dataset)
    folder = f"models/{asked.data.request_id}"
    trainer = start(objects, kill_at=2)
    with pytest.raises(Unavailable, match="crashed"):
        await trainer.handle(asked)
    first = await objects.get(f"{folder}/rounds/1/evaluation.json")
    state = await document(objects, f"{folder}/state.json")
    later = start(objects)
    await later.handle(asked)

    assert trainer.worker.asked == ["round", "round"]
    assert (state["round"], state["attempts"]) == (2, 1)
    assert later.worker.asked == ["round", "generate"]
    assert await objects.get(f"{folder}/rounds/1/evaluation.json") == first
    assert later.ids(TrainingRoundCompleted)[:1] == trainer.ids(TrainingRoundCompleted)
    assert (await document(objects, f"{folder}/lease.json"))["epoch"] == 2
    keys = [item.key.rsplit("/", 1)[-1] async for item in objects.list(f"{folder}/rounds/2/")]
    assert keys == ["checkpoint.2.pt", "config.2.js", "evaluation.json", "images.2.png"]


async def test_asks_to_continue_where_a_round_may_outlast_its_message(objects, start, dataset, monkeypatch):
    """Near the end of its message's 12 hours the trainer stops after a round, and the same work goes on from there."""
    monkeypatch.setattr(handler, "remaining_s", lambda: 60.0)
    trainer = start(objects)
    asked = requested(dataset)
    with pytest.raises(Continue):
        await trainer.handle(asked)
    first = trainer.worker.asked.copy()
    await trainer.handle(asked)

    assert first == ["round"]
    assert trainer.worker.asked == ["round", "round", "generate"]
    assert len(set(trainer.ids(TrainingRoundCompleted))) == 2
    assert len(trainer.ids(TrainingCompleted)) == 1


async def test_same_request_has_the_same_first_round(objects, start, dataset):
    """On a CPU the same data, parameters and seed lead to the same evaluation in two processes; approval ends it."""
    evaluations = []
    for _ in range(2):
        trainer = start(objects)
        await trainer.handle(requested(dataset, threshold=1e9))
        evaluations.append(trainer.published[-1].data.evaluation)

    assert evaluations[0] == evaluations[1]
    assert trainer.worker.asked == ["round", "generate"]
    assert trainer.published[-1].data.approved


async def test_crashing_process_is_given_up_after_three_attempts(objects, start, dataset):
    """A round whose process dies three times is an outcome, announced with its reason, and with the same id again."""
    asked = requested(dataset)
    for _ in range(2):
        with pytest.raises(Unavailable):
            await start(objects, kill_at=1).handle(asked)
    third, fourth = start(objects, kill_at=1), start(objects)
    await third.handle(asked)
    await fourth.handle(asked)

    assert third.published[-1].data.reason_code == "crashed"
    assert fourth.ids(TrainingFailed) == third.ids(TrainingFailed)
    assert fourth.worker.asked == []


async def test_divergence_is_tried_slower_and_then_given_up(objects, start, dataset):
    """Losses without bound are tried three times, each slower than before, and then are an outcome."""
    asked = requested(dataset, overrides=TINY | {"gamma": 0.0, "beta2": 0.0, "learningRate": 1.0, "steps": 150})
    trainer = start(objects)
    await trainer.handle(asked)
    config = read_config((await objects.get(f"models/{asked.data.request_id}/config.js")).decode())

    assert trainer.published[-1].data.reason_code == "diverged"
    assert trainer.worker.asked == ["round"] * 3
    assert config["learningRate"] == 0.25


async def test_one_of_two_workers_trains(objects, start, dataset):
    """While one worker trains, the other gives the message back; stopped, the first leaves the lease to the other."""
    asked = requested(dataset, overrides=ENDLESS)
    first, second = start(objects), start(objects)
    training = asyncio.create_task(first.handle(asked))
    await asyncio.wait_for(first.worker.busy.wait(), WITHIN_S)
    with pytest.raises(Claimed):
        await second.handle(asked)
    assert second.worker.asked == []

    training.cancel()
    await asyncio.gather(training, return_exceptions=True)
    assert training.cancelled()
    assert not first.worker.alive

    taken_over = asyncio.create_task(second.handle(asked))
    await asyncio.wait_for(second.worker.busy.wait(), WITHIN_S)
    taken_over.cancel()
    await asyncio.gather(taken_over, return_exceptions=True)
    assert first.published == second.published == []


@pytest.mark.parametrize(
    ("changes", "patients", "reason_code"),
    [
        ({}, {}, "no_data"),
        ({}, {"a": 8, "b": 7}, "too_little_data"),
        ({}, {"a": 80}, "too_little_data"),
        ({"overrides": {"learningrate": 1.0}}, {"a": 8, "b": 8}, "unknown_parameter"),
        ({"overrides": {"steps": 0}}, {"a": 8, "b": 8}, "invalid_parameter"),
    ],
)
async def test_what_cannot_work_is_an_outcome(objects, start, changes, patients, reason_code):
    """A request that cannot be trained as asked is stored and announced as failed, and needs no process."""
    dataset = f"d-{uuid.uuid4().hex[:8]}"
    rng = np.random.default_rng(0)
    for number, (patient, n) in enumerate(patients.items()):
        await put_series(objects, dataset, f"1.3.{number}", patient=patient, rng=rng, n=n)
    asked = requested(dataset, **changes)
    trainer = start(objects)
    await trainer.handle(asked)

    assert [event.data.reason_code for event in trainer.published] == [reason_code]
    assert (await document(objects, f"models/{asked.data.request_id}/failure.json"))["told"][
        "reason_code"
    ] == reason_code
    assert trainer.worker.asked == []


async def test_failure_is_told_with_its_numbers_until_the_request_is_tried_again(objects, start):
    """Too little data says how much there is; when there is more, the same request trains, and no failure is told."""
    small = f"d-{uuid.uuid4().hex[:8]}"
    rng = np.random.default_rng(0)
    await put_series(objects, small, "1.3.0", patient="a", rng=rng, n=8)
    await put_series(objects, small, "1.3.1", patient="b", rng=rng, n=5)
    asked = requested(small, overrides=ENDLESS)
    key = f"models/{asked.data.request_id}/failure.json"
    trainer = start(objects)
    with structlog.testing.capture_logs() as lines:
        await trainer.handle(asked)
    failure = await document(objects, key)

    assert failure["told"]["reason_code"] == "too_little_data"
    assert sorted(failure["numbers"].values()) == [5, 8, 8]
    assert failure["numbers"].items() <= next(line for line in lines if line["event"] == "training.failed").items()

    await put_series(objects, small, "1.3.2", patient="c", rng=rng)
    await put_series(objects, small, "1.3.1", patient="b", rng=rng, digest="02" * 8)
    again = asyncio.create_task(trainer.handle(asked))
    await asyncio.wait_for(trainer.worker.busy.wait(), WITHIN_S)

    assert not await objects.exists(key)

    again.cancel()
    await asyncio.gather(again, return_exceptions=True)


async def test_what_is_stored_under_a_key_of_ours_by_somebody_else_is_for_the_dead_letter_queue(
    objects, start, dataset
):
    """A record that cannot be read never can, and is no bug of the trainer."""
    asked = requested(dataset)
    await objects.put(f"models/{asked.data.request_id}/completed.json", b"{}")
    with pytest.raises(Unprocessable, match="invalid_record"):
        await start(objects).handle(asked)


def test_a_trainer_has_one_slot():
    """A second training in one process would hold a lease and wait; the settings say so, and do not allow it."""
    with pytest.raises(Misconfigured, match="RADQUEUE_SLOTS"):
        load(TrainerSettings, {"RADQUEUE_SLOTS": "2"})


def test_a_resumed_round_builds_the_networks_once(tmp_path, monkeypatch):
    """Where a checkpoint is there, nothing is started anew beside it."""
    config = tmp_path / "config.js"
    config.write_text(modify_config(handler.DEFAULT_CONFIG.read_text(encoding="utf-8"), TINY), encoding="utf-8")
    np.save(tmp_path / "slices.npy", np.tanh(np.random.default_rng(0).normal(size=(16, 16, 16))).astype(np.float32))
    slices = [str(tmp_path / "slices.npy")]
    asked = {"train": slices, "held_out": slices, "config": str(config), "out": str(tmp_path), "device": "cpu"}
    asked |= {"threads": 1, "tell": lambda _: None}
    built = []
    monkeypatch.setattr(training, "build_gan_model", lambda config: built.append(config) or build_gan_model(config))
    worker.train_round(**asked, checkpoint=None)
    reply = worker.train_round(**asked, checkpoint=str(tmp_path / "checkpoint.pt"))

    assert len(built) == 2
    assert reply["steps"] == 3


async def test_request_id_belongs_to_one_request(objects, start):
    """A second request of the same id with other wishes is refused; the first one's model stays what it is."""
    trainer = start(objects)
    asked = requested("nothing-here")
    await trainer.handle(asked)
    other = requested("nothing-here", request_id=asked.data.request_id, n_images=6)
    with pytest.raises(Unprocessable, match="request_id_taken"):
        await trainer.handle(other)

    assert len(trainer.published) == 1
