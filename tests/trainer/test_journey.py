import asyncio
import io
import uuid
from dataclasses import replace

import numpy as np
import pytest
import structlog
import torch
from PIL import Image

from services.trainer import run, worker
from services.trainer.config import DEFAULT_CONFIG, TrainingConfig
from services.trainer.gan import training
from services.trainer.gan.networks import Generator, build_gan_model
from services.trainer.gan.training import generate_images
from services.trainer.jsconfig import modify_config, read_config
from services.trainer.protocol import Evaluate, Images, Train
from services.trainer.settings import TrainerSettings
from shared.config import Misconfigured, load
from shared.errors import Continue, Leased, Unavailable, Unprocessable
from shared.messages import TrainingCompleted, TrainingFailed, TrainingRoundCompleted
from tests.trainer.trainers import ENDLESS, TINY, WITHIN_S, document, put_series, requested


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
    assert [(told.round, told.steps, told.approved) for told in rounds] == [(1, 3, False), (2, 4, False)]
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
    trainer = start(objects, kill_at=3)
    with pytest.raises(Unavailable, match="crashed"):
        await trainer.handle(asked)
    first = await objects.get(f"{folder}/rounds/1/evaluation.json")
    state = await document(objects, f"{folder}/state.json")
    later = start(objects)
    await later.handle(asked)

    assert trainer.worker.asked == ["train", "evaluate", "train"]
    assert (state["round"], state["attempts"]) == (2, 1)
    assert later.worker.asked == ["train", "evaluate", "generate"]
    assert await objects.get(f"{folder}/rounds/1/evaluation.json") == first
    assert later.ids(TrainingRoundCompleted)[:1] == trainer.ids(TrainingRoundCompleted)
    assert (await document(objects, f"{folder}/lease.json"))["epoch"] == 2
    keys = [item.key.rsplit("/", 1)[-1] async for item in objects.list(f"{folder}/rounds/2/")]
    assert keys == [
        "checkpoint.2.pt",
        "config.2.js",
        "evaluation.json",
        "images.2.png",
        "plan.0.json",
        "trained.0.json",
    ]


async def test_a_crash_in_the_evaluation_does_not_lose_what_was_trained(objects, start, dataset):
    """The process is killed while it judges round one: the next delivery judges it, and does not train it again."""
    asked = requested(dataset, max_rounds=1)
    with pytest.raises(Unavailable, match="crashed"):
        await start(objects, kill_at=2).handle(asked)
    later = start(objects)
    await later.handle(asked)

    assert later.worker.asked == ["evaluate", "generate"]


async def test_asks_to_continue_where_a_round_may_outlast_its_message(objects, start, dataset, monkeypatch):
    """Near the end of its message's 12 hours the trainer stops in the middle of a round, and goes on from there."""
    asked, trainer = requested(dataset, max_rounds=1), start(objects)
    monkeypatch.setattr(run, "remaining_s", lambda: run.HAND_OVER_S + 0.01)
    with pytest.raises(Continue):
        await trainer.handle(asked)
    partial = await document(objects, f"models/{asked.data.request_id}/rounds/1/partial.0.json")
    monkeypatch.undo()
    await trainer.handle(asked)
    weights, called = await trainer.weights(), trainer.worker.asked.copy()
    await trainer.handle(requested(dataset, max_rounds=1))

    assert 1 <= partial["step"] < TINY["steps"]
    assert called == ["train", "train", "evaluate", "generate"]
    assert same(weights, await trainer.weights())


async def test_nothing_is_begun_that_its_message_does_not_outlast(objects, start, dataset, monkeypatch):
    """With too little left of the 12 hours to store anything, the trainer asks to go on in a new message at once."""
    monkeypatch.setattr(run, "remaining_s", lambda: run.HAND_OVER_S)
    trainer = start(objects)
    with pytest.raises(Continue):
        await trainer.handle(requested(dataset))

    assert trainer.worker.asked == []


async def test_same_request_has_the_same_first_round(objects, start, dataset):
    """On a CPU the same data, parameters and seed lead to the same evaluation in two processes; approval ends it."""
    evaluations = []
    for _ in range(2):
        trainer = start(objects)
        await trainer.handle(requested(dataset, threshold=1e9, min_coverage=0))
        evaluations.append(trainer.published[-1].data.evaluation)

    assert evaluations[0] == evaluations[1]
    assert trainer.worker.asked == ["train", "evaluate", "generate"]
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
    assert trainer.worker.asked == ["train"] * 3
    assert config["learningRate"] == 0.25


async def test_one_of_two_workers_trains(objects, start, dataset):
    """While one worker trains, the other gives the message back; stopped, the first leaves the lease to the other."""
    asked = requested(dataset, overrides=ENDLESS)
    first, second = start(objects), start(objects)
    training = asyncio.create_task(first.handle(asked))
    await asyncio.wait_for(first.worker.busy.wait(), WITHIN_S)
    with pytest.raises(Leased):
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
    assert sorted(failure["told"]["numbers"].values()) == [2, 5, 8, 8]
    assert (
        failure["told"]["numbers"].items() <= next(line for line in lines if line["event"] == "training.failed").items()
    )

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


def same(one, other) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_round_builds_the_networks_once(tmp_path, monkeypatch):
    """Where a checkpoint is there, nothing is started anew beside it."""
    asked = round_in(tmp_path)
    built = []
    monkeypatch.setattr(training, "build_gan_model", lambda *given: built.append(given) or build_gan_model(*given))
    worker.train_round(asked, lambda _: None)
    going_on = replace(asked, checkpoint=str(tmp_path / "checkpoint.pt"), until=6)
    reply = worker.train_round(going_on, lambda _: None)

    assert len(built) == 2
    assert reply.step == 6


def test_classes_reach_the_networks_and_the_images_that_are_judged(tmp_path, monkeypatch):
    """A round with classes trains networks that know them, and judges as many of each as are held out."""
    asked = round_in(tmp_path)
    fewer = str(tmp_path / "fewer.npy")
    np.save(fewer, np.load(asked.images.train[0])[:8])
    both = [*asked.images.train, fewer]
    images = Images(both, both, ["few", "many"], train_labels=[1, 0], held_out_labels=[1, 0])
    drawn = []

    def watched(*given, labels, **options):
        drawn.append(labels)
        return generate_images(*given, labels=labels, **options)

    monkeypatch.setattr(worker, "generate_images", watched)
    worker.train_round(replace(asked, images=images), lambda _: None)
    checkpoint, out = str(tmp_path / "checkpoint.pt"), str(tmp_path)
    reply = worker.evaluate_round(Evaluate(images, asked.config, checkpoint, out, device="cpu", threads=1))

    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["n_classes"] == 2
    assert drawn[0].bincount().tolist() == [32, 64]
    assert reply.evaluation.n == 24


def round_in(folder):
    config, slices = folder / "config.js", [str(folder / "slices.npy")]
    config.write_text(modify_config(DEFAULT_CONFIG.read_text(encoding="utf-8"), TINY), encoding="utf-8")
    np.save(slices[0], np.tanh(np.random.default_rng(0).normal(size=(16, 16, 16))).astype(np.float32))
    return Train(
        images=Images(slices, slices),
        config=str(config),
        checkpoint=None,
        until=3,
        out=str(folder),
        checkpoint_s=60.0,
        stop=str(folder / "stop"),
        device="cpu",
        threads=1,
    )


async def test_request_id_belongs_to_one_request(objects, start):
    """A second request of the same id with other wishes is refused; the first one's model stays what it is."""
    trainer = start(objects)
    asked = requested("nothing-here")
    await trainer.handle(asked)
    other = requested("nothing-here", request_id=asked.data.request_id, n_images=6)
    with pytest.raises(Unprocessable, match="request_id_taken"):
        await trainer.handle(other)

    assert len(trainer.published) == 1
