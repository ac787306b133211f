import hashlib
import json

import pytest
import torch

from services.trainer import run
from services.trainer.checkpoints import Checkpoints
from services.trainer.protocol import Saved
from shared.documents.training import StoredPartial
from shared.errors import Continue, Leased, Unavailable
from shared.keys import RoundKeys
from tests.trainer.trainers import TINY, document, requested

STEPS = 100
"""Enough for a kill at a checkpoint to come before the end of the round."""


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def same(one, other) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def in_steps(dataset, **changes):
    return requested(dataset, max_rounds=1, overrides=TINY | {"steps": STEPS}, **changes)


async def uninterrupted(trainer, dataset) -> dict[str, torch.Tensor]:
    """Return the weights of a training of one round that nothing disturbs."""
    await trainer.handle(in_steps(dataset))
    return await trainer.weights()


async def test_a_process_killed_again_and_again_ends_as_if_it_had_not_been(objects, start, dataset, monkeypatch):
    """However often it is killed: an attempt that came further counts for nothing, and the model is the same."""
    monkeypatch.setattr(run, "MAX_ATTEMPTS", 2)
    asked, trainer = in_steps(dataset), start(objects)
    key = f"models/{asked.data.request_id}/rounds/1/partial.0.json"
    steps = []
    trainer.worker.on_checkpoint = trainer.worker.kill
    for _ in range(run.MAX_ATTEMPTS):
        with pytest.raises(Unavailable, match="crashed"):
            await trainer.handle(asked, checkpoint_s=0.01)
        steps.append((await document(objects, key))["step"])
    trainer.worker.on_checkpoint = lambda: None
    await trainer.handle(asked, checkpoint_s=0.01)
    weights = await trainer.weights()
    left = [item.key async for item in objects.list(f"models/{asked.data.request_id}/rounds/1/partial.")]

    assert steps == sorted(set(steps))
    assert steps[-1] < STEPS
    assert same(weights, await uninterrupted(trainer, dataset))
    assert left == []


async def test_a_stopped_service_saves_and_gives_the_message_back(objects, start, dataset):
    """At SIGTERM the round is stored where it is, and another trainer ends it with the same model."""
    asked, first, second = in_steps(dataset), start(objects), start(objects)
    first.worker.on_checkpoint = first.stop.set
    with pytest.raises(Continue):
        await first.handle(asked, checkpoint_s=0.01)
    partial = await document(objects, f"models/{asked.data.request_id}/rounds/1/partial.0.json")
    stored = [item.key async for item in objects.list(f"models/{asked.data.request_id}/rounds/1/partial.0.")]
    await second.handle(asked)
    weights = await second.weights()

    assert 0 < partial["step"] < STEPS
    assert stored == [partial["key"], partial["key"].replace(f"1.{partial['step']}.pt", "json")]
    assert same(weights, await uninterrupted(second, dataset))


async def test_a_training_of_the_version_before_is_gone_on_with(objects, start, dataset):
    """Documents without a `schema_version`, which no trainer wrote then, change nothing: the model is the same."""
    asked, first, second = in_steps(dataset), start(objects), start(objects)
    first.worker.on_checkpoint = first.stop.set
    with pytest.raises(Continue):
        await first.handle(asked, checkpoint_s=0.01)
    stored = [item.key async for item in objects.list(f"models/{asked.data.request_id}/") if item.key.endswith(".json")]
    for key in stored:
        told = await document(objects, key)

        assert told.pop("schema_version") == 1
        await objects.put(key, json.dumps(told).encode())
    await second.handle(asked)
    weights = await second.weights()

    assert {key.rpartition("/")[2] for key in stored} >= {"options.json", "manifest.json", "plan.0.json", "lease.json"}
    assert same(weights, await uninterrupted(second, dataset))


async def test_a_damaged_checkpoint_costs_its_round_and_no_more(objects, start, dataset):
    """Half of a checkpoint is not gone on from: the round begins anew, and ends with the same model."""
    asked, first, second = in_steps(dataset), start(objects), start(objects)
    first.worker.on_checkpoint = first.stop.set
    with pytest.raises(Continue):
        await first.handle(asked, checkpoint_s=0.01)
    partial = await document(objects, f"models/{asked.data.request_id}/rounds/1/partial.0.json")
    body = await objects.get(partial["key"])
    await objects.put(partial["key"], body[: len(body) // 2])
    await second.handle(asked)

    assert same(await second.weights(), await uninterrupted(second, dataset))


async def test_a_worker_that_lost_its_lease_moves_no_pointer_and_deletes_nothing(objects, tmp_path):
    """Who takes over goes on from the last checkpoint; what the former owner still saves is not pointed to."""
    folder = f"models/{tmp_path.name}/rounds/1"
    former, owner = (Checkpoints(objects, RoundKeys(folder), 0, epoch) for epoch in (1, 2))
    await former.take()
    await saved(former, tmp_path, step=10)
    await owner.take()
    await saved(former, tmp_path, step=20)
    pointer = await document(objects, f"{folder}/partial.0.json")
    fetched = await owner.download(tmp_path / "fetched.pt")
    body = (tmp_path / "fetched.pt").read_bytes()
    await saved(owner, tmp_path, step=15)
    moved = await document(objects, f"{folder}/partial.0.json")

    assert pointer == pointer_to(f"{folder}/partial.0.1.10.pt", step=10)
    assert (fetched, body) == (True, b"10")
    assert moved == pointer_to(f"{folder}/partial.0.2.15.pt", step=15)
    assert not await objects.exists(pointer["key"])
    with pytest.raises(Leased):
        await former.take()


async def test_a_pointer_that_a_former_owner_moved_late_is_taken_over_where_it_is(objects, tmp_path, monkeypatch):
    """A write of the former owner that comes between the new one's look and its write is not lost, but gone on from."""
    folder = f"models/{tmp_path.name}/rounds/1"
    former, owner = (Checkpoints(objects, RoundKeys(folder), 0, epoch) for epoch in (1, 2))
    await saved(former, tmp_path, step=10)
    put, late = objects.put_if_match, [20]

    async def put_late(*given):
        if late:
            await saved(former, tmp_path, step=late.pop())
        return await put(*given)

    monkeypatch.setattr(objects, "put_if_match", put_late)
    await owner.take()

    assert owner.pointer == StoredPartial(epoch=2, step=20, key=f"{folder}/partial.0.1.20.pt", sha256=sha256(b"20"))
    assert await owner.download(tmp_path / "fetched.pt")


async def test_a_take_over_between_the_former_owners_look_and_its_write_holds(objects, tmp_path, monkeypatch):
    """A former owner that looked just before it was taken over from writes nothing over the new owner's pointer."""
    folder = f"models/{tmp_path.name}/rounds/1"
    former, owner = (Checkpoints(objects, RoundKeys(folder), 0, epoch) for epoch in (1, 2))
    await saved(former, tmp_path, step=10)
    get, late = objects.get_with_etag, [owner]

    async def get_before(key):
        seen = await get(key)
        if late:
            await late.pop().take()
        return seen

    monkeypatch.setattr(objects, "get_with_etag", get_before)
    await saved(former, tmp_path, step=20)

    assert await document(objects, f"{folder}/partial.0.json") == owner.pointer.model_dump()
    assert (owner.pointer.epoch, owner.pointer.step) == (2, 10)


def pointer_to(key, *, step):
    """Return what is stored of a pointer of the second owner's."""
    return {"schema_version": 1, "epoch": 2, "step": step, "key": key, "sha256": sha256(str(step).encode())}


async def saved(checkpoints, folder, *, step) -> None:
    path = folder / f"{step}.pt"
    path.write_bytes(str(step).encode())
    async with checkpoints.stored():
        checkpoints.told(Saved(str(path), step))
