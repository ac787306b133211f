"""The journey of a training request: load, train, evaluate, modify, train on, generate.

Everything that a training knows is under `models/<request id>/`, so that any worker can go on with it:

    options.json                what was asked for; a second request of this id must be the same
    lease.json                  who trains: a claim of shared/once.py
    manifest.json               the arrays and their split, as of the first start
    config.js                   the parameters of the round that runs; put there before the request, it is started with
    first_config.js             the parameters of the start, resolved
    rounds/<n>/config.<epoch>.js, checkpoint.<epoch>.pt, images.<epoch>.png
    rounds/<n>/evaluation.json  a completed round; it names the others
    state.json                  the round that runs, and how often it was tried
    generator.pt, generator.json, images.npy, images.png, completed.json    the products; completed.json names them
    failure.json                why it cannot work; deleted when it is tried again

`evaluation.json` and `completed.json` are stored last and only where none is: the first writer wins, and who comes
later announces what the first one stored. What an evaluation names carries the epoch of the lease, so that a worker
which lost the lease without knowing cannot change it.
"""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np

from services.trainer.config import InvalidConfig, TrainingConfig, UnknownParameter, Value
from services.trainer.dataset import Array, Manifest, newest_revisions, series_of, split, summary_of
from services.trainer.jsconfig import modify_config, modify_config_file, read_config
from services.trainer.policy import accepts, best_round, decide
from services.trainer.records import (
    Sidecar,
    StoredCompletion,
    StoredFailure,
    StoredOptions,
    StoredRound,
    StoredState,
)
from services.trainer.settings import TrainerSettings
from shared.child import Child, ChildFailed, Json
from shared.concurrency import all_of, temporary_folder
from shared.errors import Continue, Unavailable, Unprocessable
from shared.log import get_logger
from shared.messages import (
    CompletedTraining,
    Evaluation,
    FailedTraining,
    TrainingCompleted,
    TrainingFailed,
    TrainingRequest,
    TrainingRequested,
    TrainingRound,
    TrainingRoundCompleted,
)
from shared.objects import ObjectMissing, ObjectStore
from shared.once import once, store_once, stored
from shared.queue import Publish, remaining_s

MAX_ATTEMPTS = 3
"""Times that a round's process may fail, or that its losses may diverge, before the training is given up."""
DOWNLOADS = 8
"""Arrays that are fetched at the same time."""
DEFAULT_CONFIG = Path(__file__).with_name("config.js")

log = get_logger()


@dataclass(frozen=True, slots=True)
class Ports:
    """What the journey needs of the world."""

    objects: ObjectStore
    publish: Publish
    worker: Child
    """Runs services.trainer.worker."""
    settings: TrainerSettings
    clock: Callable[[], datetime]
    extractor: Path | None = None
    """The network that the settings name to compare images by."""


class CannotTrain(Exception):  # noqa: N818 - it states an outcome
    """The training cannot work as asked. This is an outcome, stored and announced, no error of the message."""

    def __init__(self, reason_code: str, **numbers: int) -> None:
        """State the reason, and numbers that explain it."""
        super().__init__(reason_code)
        self.reason_code = reason_code
        self.numbers = numbers


async def handle(requested: TrainingRequested, *, ports: Ports) -> None:
    """Train a model until it is approved or its rounds are used up, and announce each round and the end.

    Afterwards the model, its images and every round are under `models/<request id>/`. The same message again goes on
    after the last stored round; stored rounds are announced again, with the same ids. Of two workers with one request,
    one trains. A training that cannot work is an outcome: `failure.json` and `training.failed`.

    Raises:
        Unprocessable: `request_id_taken`, this id was another request's; `invalid_record`.
        Claimed: another worker trains it.
        Unavailable: S3 does not answer, or the training process failed; to be tried again.
        Continue: another round may take longer than this message can be held, or another worker trains for very long.
    """
    request = requested.data
    folder = f"models/{request.request_id}"

    # Check.
    options = StoredOptions(request=request, settings=ports.settings.model_dump(mode="json"))
    if (await store_once(ports.objects, f"{folder}/options.json", options)).request != request:
        raise Unprocessable("request_id_taken")

    # Train, unless it is done.
    async def work(epoch: int) -> StoredCompletion | None:
        await ports.objects.delete(f"{folder}/failure.json")  # of an earlier try: there may be more data now
        try:
            return await _train(request, folder, epoch, ports)
        except CannotTrain as failed:
            reason_code, numbers = failed.reason_code, failed.numbers
            told = FailedTraining(request_id=request.request_id, dataset=request.dataset, reason_code=reason_code)
            failure = StoredFailure(told=told, time=ports.clock(), numbers=numbers)
            await ports.objects.put(f"{folder}/failure.json", failure.model_dump_json(indent=1).encode())
            log.warning("training.failed", request_id=request.request_id, reason_code=reason_code, **numbers)
            await ports.publish(TrainingFailed.of(request.request_id, told, time=requested.time))
            return None

    completion = await once(
        ports.objects,
        f"{folder}/completed.json",
        StoredCompletion,
        work,
        claim=f"{folder}/lease.json",
        lease_s=ports.settings.lease_s,
        clock=ports.clock,
    )

    # Announce.
    if completion is not None:
        log.info(
            "training.completed",
            request_id=request.request_id,
            approved=completion.told.approved,
            rounds=completion.told.rounds,
        )
        await ports.publish(TrainingCompleted.of(request.request_id, completion.told, time=completion.time))


async def _train(request: TrainingRequest, folder: str, epoch: int, ports: Ports) -> StoredCompletion:
    """Run the rounds that are missing, then make the products. Raises `CannotTrain`."""
    # Load.
    config = await _first_config(request, folder, ports.objects)
    async with temporary_folder("training-") as work_dir:
        manifest = await _manifest(request, folder, work_dir, ports)
        paths = await _download(manifest.arrays, work_dir, ports.objects)
        sides: dict[str, list[str]] = {"train": [], "held_out": []}
        for array, path in zip(manifest.arrays, paths, strict=True):
            sides["held_out" if array.held_out else "train"].append(str(path))
        run = _Run(request, folder, epoch, ports, work_dir, sides)

        # Train, evaluate, modify, train on.
        rounds: list[StoredRound] = []
        trained = 0
        while len(rounds) < request.max_rounds and not (rounds and rounds[-1].told.approved):
            done = await stored(ports.objects, run.evaluation_key(len(rounds) + 1), StoredRound)
            if done is None:
                if trained and remaining_s() < ports.settings.round_deadline_s:
                    raise Continue
                done = await _train_round(run, config, rounds)
                trained += 1
            await ports.publish(TrainingRoundCompleted.of(request.request_id, done.told, time=done.time))
            config = (await ports.objects.get(done.told.config_key)).decode()
            rounds.append(done)

        # Generate.
        return await _complete(run, rounds)


@dataclass(frozen=True, slots=True)
class _Run:
    """A training while this worker has its lease."""

    request: TrainingRequest
    folder: str
    epoch: int
    ports: Ports
    work_dir: Path
    arrays: dict[str, list[str]]
    """Paths of the local copies, by side of the split: `train`, `held_out`."""

    def evaluation_key(self, number: int) -> str:
        """Return where a completed round is stored."""
        return f"{self.folder}/rounds/{number}/evaluation.json"


# Load.


async def _manifest(request: TrainingRequest, folder: str, work_dir: Path, ports: Ports) -> Manifest:
    """Return the stored manifest, so that a training that goes on sees the data it began with; else store one."""
    key = f"{folder}/manifest.json"
    begun_with = await stored(ports.objects, key, Manifest)
    if begun_with is not None:
        return begun_with
    arrays = await _arrays(request.dataset, ports.objects)
    if not arrays:
        raise CannotTrain("no_data")
    paths = await _download(arrays, work_dir, ports.objects)
    manifest = await asyncio.to_thread(_split, request.dataset, arrays, paths)
    n_training, n_held_out = manifest.n_images(held_out=False), manifest.n_images(held_out=True)
    min_images = ports.settings.min_images
    if min(n_training, n_held_out) < min_images:
        raise CannotTrain("too_little_data", n_training=n_training, n_held_out=n_held_out, min_images=min_images)
    return await store_once(ports.objects, key, manifest)


async def _arrays(dataset: str, objects: ObjectStore) -> list[Array]:
    """List the newest array of each series. Ingest stores a sidecar before its array."""
    listed = {item.key: item async for item in objects.list(f"datasets/{dataset}/")}
    arrays = []
    for key in newest_revisions({key: item.last_modified for key, item in listed.items() if key.endswith(".npy")}):
        sidecar_key = f"{key.removesuffix('.npy')}.json"
        if sidecar_key not in listed:
            log.warning("training.array_without_sidecar", series=series_of(key))
            continue
        sidecar = Sidecar.model_validate_json(await objects.get(sidecar_key))
        series = sidecar.series_uid or series_of(key)
        group = sidecar.patient_key or series
        arrays.append(Array(key=key, etag=listed[key].etag, series_uid=series, group=group, n=sidecar.n))
    return arrays


async def _download(arrays: Sequence[Array], work_dir: Path, objects: ObjectStore) -> list[Path]:
    """Fetch the arrays that are not there yet; returns their paths."""

    async def fetch(array: Array) -> Path:
        path = work_dir / f"{hashlib.sha256(array.key.encode()).hexdigest()}.npy"
        if not path.exists():
            await objects.download(array.key, path)
        return path

    try:
        return await all_of((partial(fetch, array) for array in arrays), at_once=DOWNLOADS)
    except ObjectMissing:
        raise CannotTrain("array_gone") from None


def _split(dataset: str, arrays: Sequence[Array], paths: Sequence[Path]) -> Manifest:
    try:
        summaries = {
            array.key: summary_of(np.load(path, allow_pickle=False)) for array, path in zip(arrays, paths, strict=True)
        }
    except ValueError:
        raise CannotTrain("invalid_array") from None
    return split(dataset, arrays, summaries)


async def _first_config(request: TrainingRequest, folder: str, objects: ObjectStore) -> str:
    """Return the config to start with: the one beside the model or the default, with the request's overrides.

    It is kept, since config.js changes with each round, and before the first one is stored, too, where that diverges.
    """
    key = f"{folder}/first_config.js"
    with contextlib.suppress(ObjectMissing):
        return (await objects.get(key)).decode()
    try:
        text = (await objects.get(f"{folder}/config.js")).decode()
    except ObjectMissing:
        text = DEFAULT_CONFIG.read_text(encoding="utf-8")
    try:
        text = modify_config(text, request.overrides)
        TrainingConfig.of(read_config(text))
    except UnknownParameter:
        raise CannotTrain("unknown_parameter") from None
    except (InvalidConfig, UnicodeDecodeError):
        raise CannotTrain("invalid_parameter") from None
    await objects.put_if_absent(key, text.encode())
    return text


# One round.


async def _train_round(run: _Run, config: str, rounds: Sequence[StoredRound]) -> StoredRound:
    """Choose parameters, train, evaluate, and store the round after `rounds`; `config` is the last one's config.js."""
    number, objects = len(rounds) + 1, run.ports.objects
    out = run.work_dir / str(number)
    out.mkdir()
    began = run.ports.clock()

    state = await _state(run, number)
    reply: Json = {"diverged": True}
    while reply["diverged"]:
        # Modify.
        decision = decide(read_config(config), [done.observation() for done in rounds], state.divergences)
        (out / "config.js").write_text(config, encoding="utf-8", newline="")
        modify_config_file(out / "config.js", **decision.changes)
        text = (out / "config.js").read_bytes()
        await objects.put(f"{run.folder}/config.js", text)
        log.info(
            "training.round_started",
            request_id=run.request.request_id,
            round=number,
            rule=decision.rule,
            changes=decision.changes,
            continue_from=decision.continue_from,
        )

        # Train and evaluate.
        checkpoint = None
        if decision.continue_from:
            checkpoint = out / "start.pt"
            await objects.download(rounds[decision.continue_from - 1].checkpoint_key, checkpoint)
        asked = {
            "do": "round",
            **run.arrays,
            "config": str(out / "config.js"),
            "checkpoint": str(checkpoint) if checkpoint else None,
            "out": str(out),
            "extractor": _extractor(run.ports),
        }
        reply = await _call(run, state, asked)
        if reply["diverged"]:
            state = state.model_copy(update={"divergences": state.divergences + 1, "failed_of": "diverged"})
            await _store_state(run, state)
            log.warning("training.diverged", request_id=run.request.request_id, round=number)
            _check(state)

    # Store. The evaluation comes last: it names the others, and makes the round one that is never trained again.
    parameters = read_config(text.decode())
    folder = f"{run.folder}/rounds/{number}"
    checkpoint_key, images_key = f"{folder}/checkpoint.{run.epoch}.pt", f"{folder}/images.{run.epoch}.png"
    config_key = f"{folder}/config.{run.epoch}.js"
    await objects.upload(out / "checkpoint.pt", checkpoint_key)
    await objects.upload(out / "images.png", images_key)
    await objects.put(config_key, text)
    now = run.ports.clock()
    evaluation = Evaluation.model_validate(reply["evaluation"])
    done = StoredRound(
        told=TrainingRound(
            request_id=run.request.request_id,
            dataset=run.request.dataset,
            round=number,
            steps=reply["steps"],
            evaluation=evaluation,
            approved=accepts(evaluation.relative_fd, run.request.threshold, copies=evaluation.copies),
            config=parameters,
            config_key=config_key,
            duration_s=round((now - began).total_seconds(), 3),
        ),
        time=now,
        checkpoint_key=checkpoint_key,
        images_key=images_key,
        margin=reply["margin"],
        rule=decision.rule,
        continued_from=decision.continue_from,
        device=reply["device"],
        n_features=reply["evaluation"]["d"],
        warnings=tuple(reply["evaluation"]["warnings"]),
        losses=tuple(reply["losses"]),
    )
    done = await store_once(objects, run.evaluation_key(number), done)
    await _store_state(run, StoredState(round=number + 1))
    log.info(
        "training.round_stored",
        request_id=run.request.request_id,
        round=number,
        relative_fd=done.told.evaluation.relative_fd,
        approved=done.told.approved,
        warnings=done.warnings,
        duration_s=done.told.duration_s,
    )
    return done


def _extractor(ports: Ports) -> Json | None:
    if ports.extractor is None:
        return None
    settings = ports.settings
    return {"path": str(ports.extractor), "sha256": settings.features_sha256, "size": settings.features_size}


async def _state(run: _Run, number: int) -> StoredState:
    """Return how often round `number` was tried; what is stored of another round no longer counts."""
    state = await stored(run.ports.objects, f"{run.folder}/state.json", StoredState)
    if state is None or state.round != number:
        state = StoredState(round=number)
    _check(state)
    return state


def _check(state: StoredState) -> None:
    """Raise `CannotTrain` where a round was tried often enough, with the same reason at each delivery."""
    if max(state.attempts, state.divergences) >= MAX_ATTEMPTS:
        raise CannotTrain(state.failed_of)


async def _store_state(run: _Run, state: StoredState) -> None:
    await run.ports.objects.put(f"{run.folder}/state.json", state.model_dump_json().encode())


async def _call(run: _Run, state: StoredState, asked: Json) -> Json:
    """Have the training process do one thing. What it fails of is counted, and tried again with the next delivery."""
    settings = run.ports.settings
    bound = log.bind(request_id=run.request.request_id, round=state.round)
    try:
        reply: Json = await run.ports.worker.call(
            {**asked, "device": settings.device, "threads": settings.threads},
            deadline_s=settings.round_deadline_s,
            on_progress=lambda progress: bound.info("training.progress", **progress),
        )
    except Unprocessable as refused:
        raise CannotTrain(refused.reason_code) from None
    except ChildFailed as failed:
        state = state.model_copy(update={"attempts": state.attempts + 1, "failed_of": failed.reason_code})
        await _store_state(run, state)
        bound.warning(
            "training.process_failed",
            reason_code=failed.reason_code,
            error_type=failed.error_type,
            where=failed.where,
            attempt=state.attempts,
        )
        _check(state)
        raise Unavailable(f"the training process failed: {failed.reason_code}") from None
    return reply


# The end.


async def _complete(run: _Run, rounds: Sequence[StoredRound]) -> StoredCompletion:
    """Make the products of the best round, store them, and say what completed.json is to hold."""
    best = best_round([done.observation() for done in rounds])
    chosen, objects = rounds[best - 1], run.ports.objects
    out = run.work_dir / "products"
    out.mkdir()
    (out / "config.js").write_bytes(await objects.get(chosen.told.config_key))
    await objects.download(chosen.checkpoint_key, out / "checkpoint.pt")
    asked = {
        "do": "generate",
        "config": str(out / "config.js"),
        "checkpoint": str(out / "checkpoint.pt"),
        "n_images": run.request.n_images,
        "out": str(out),
    }
    reply = await _call(run, await _state(run, len(rounds) + 1), asked)

    # Store.
    for name in ("generator.pt", "images.npy", "images.png"):
        await objects.upload(out / name, f"{run.folder}/{name}")
    weights = (out / "generator.pt").read_bytes()
    description = _generator_description(run, chosen, reply, hashlib.sha256(weights).hexdigest())
    await objects.put(f"{run.folder}/generator.json", json.dumps(description, indent=1).encode())
    told = CompletedTraining(
        request_id=run.request.request_id,
        dataset=run.request.dataset,
        approved=chosen.told.approved,
        rounds=len(rounds),
        evaluation=chosen.told.evaluation,
        config=chosen.told.config,
        generator_key=f"{run.folder}/generator.pt",
        images_key=f"{run.folder}/images.png",
        images_array_key=f"{run.folder}/images.npy",
    )
    return StoredCompletion(told=told, time=run.ports.clock(), best_round=best)


def _generator_description(run: _Run, chosen: StoredRound, reply: Json, sha256: str) -> dict[str, object]:
    """Say what generator.pt is, how good it is, and of which data it was made."""
    config: dict[str, Value] = chosen.told.config
    return {
        "file": "generator.pt",
        "sha256": sha256,
        "format": "state_dict of services.trainer.networks.Generator, tensors only",
        "input": {"z": ["N", config["latentDim"]], "distribution": "standard normal"},
        "output": {"images": ["N", 1, config["imageSize"], config["imageSize"]], "range": [-1, 1]},
        "config": config,
        "round": chosen.told.round,
        "images_seen": reply["images_seen"],
        "evaluation": chosen.told.evaluation.model_dump(mode="json"),
        "manifest_key": f"{run.folder}/manifest.json",
        "intended_use": "research; not for clinical use",
    }
