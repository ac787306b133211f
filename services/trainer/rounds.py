"""A round: modify, train, evaluate. Each is a function over stored records, and goes on where the last worker ended.

A round that diverges is tried again: its plan, its checkpoints and the record of what was trained carry the number of
the try.
"""

import asyncio
import contextlib
from dataclasses import asdict
from pathlib import Path

from services.trainer.checkpoints import Checkpoints
from services.trainer.config import DEFAULT_CONFIG, InvalidConfig, TrainingConfig, UnknownParameter
from services.trainer.jsconfig import modify_config, read_config
from services.trainer.progress import shown
from services.trainer.protocol import Diverged, Evaluate, Extractor, Images, Job, News, Paused, Train
from services.trainer.reasons import CannotTrain
from services.trainer.run import Ports, Run
from services.trainer.strategy import optuna_search, policy
from shared.child import Json
from shared.documents.training import StoredPlan, StoredRound, StoredState, StoredTrained
from shared.errors import Continue
from shared.idempotency import store_once, stored
from shared.log import get_logger
from shared.messages import TrainingRound, TrainingRoundCompleted
from shared.objects import ObjectMissing

log = get_logger()


async def first_config(run: Run) -> str:
    """Return the config to start with: the one beside the model or the default, with the request's overrides.

    It is stored under a key of its own, because config.js changes with each round.

    Raises:
        CannotTrain: `unknown_parameter`, `invalid_parameter`.
    """
    objects, key = run.ports.objects, run.keys.first_config
    with contextlib.suppress(ObjectMissing):
        return (await objects.get(key)).decode()
    try:
        text = (await objects.get(run.keys.config)).decode()
    except ObjectMissing:
        text = DEFAULT_CONFIG.read_text(encoding="utf-8")
    try:
        text = modify_config(text, run.request.overrides)
        TrainingConfig.of(read_config(text))
    except UnknownParameter:
        raise CannotTrain("unknown_parameter") from None
    except (InvalidConfig, UnicodeDecodeError):
        raise CannotTrain("invalid_parameter") from None
    await objects.put_if_absent(key, text.encode())
    return text


async def modify(run: Run) -> StoredPlan | None:
    """Decide what the next round is to do, and store the plan; None if no further round is needed.

    Afterwards config.js holds the parameters of that round.

    Raises:
        CannotTrain: the round was tried too often; a parameter of the start is wrong; `search_not_installed`.
    """
    # Observe.
    rounds, objects = await run.rounds(), run.ports.objects
    last = rounds[-1] if rounds else None
    text = (await objects.get(last.told.config_key)).decode() if last else await first_config(run)
    state = await run.state(len(rounds) + 1)
    observed = list(map(policy.Observation.of, rounds))

    # Decide.
    decide = optuna_search.decide if run.request.strategy == "optuna" else policy.decide
    situation = policy.Situation(read_config(text), observed, policy.Goal.of(run.request), state.divergences)
    try:
        decision = await asyncio.to_thread(decide, situation)
    except ModuleNotFoundError:
        raise CannotTrain("search_not_installed") from None
    if decision.next == "generate":
        return None

    # Store.
    text = modify_config(text, decision.changes)
    before = rounds[decision.continue_from - 1].step if decision.continue_from else 0
    plan = StoredPlan(
        round=len(rounds) + 1,
        number=state.divergences,
        rule=decision.rule,
        changes=decision.changes,
        continue_from=decision.continue_from,
        until=before + TrainingConfig.of(read_config(text)).steps,
        config=text,
    )
    plan = await store_once(run.keys.round(plan.round).plan(plan.number), plan, objects=objects)
    await objects.put(run.keys.config, plan.config.encode())
    return plan


async def train(run: Run, plan: StoredPlan, images: Json) -> StoredTrained | None:
    """Train as planned, from the last checkpoint; None if the losses diverged, which is counted.

    Args:
        run: the training.
        plan: what `modify` returned.
        images: what `loaded` yields.

    Raises:
        Continue: this worker is to stop, or its message ends soon; all is stored.
        Unavailable: the training process failed.
        CannotTrain: the process failed too often without coming further, or the losses diverged too often.
    """
    ports, keys = run.ports, run.keys.round(plan.round)
    trained = await trained_of(run, plan)
    if trained is not None:
        return trained
    out = _work_dir(run, plan)
    log.info(
        "training.round_started",
        request_id=run.request.request_id,
        round=plan.round,
        rule=plan.rule,
        changes=plan.changes,
        continue_from=plan.continue_from,
    )

    # Fetch where to go on.
    checkpoints = Checkpoints(ports.objects, keys, plan.number, run.epoch)
    await checkpoints.take()
    checkpoint: Path | None = out / "start.pt"
    if not await checkpoints.download(out / "start.pt"):
        if plan.continue_from:
            await ports.objects.download((await run.rounds())[plan.continue_from - 1].checkpoint_key, out / "start.pt")
        else:
            checkpoint = None

    # Train.
    asked = Train(
        images=Images(**images),
        config=str(out / "config.js"),
        checkpoint=str(checkpoint) if checkpoint else None,
        until=plan.until,
        out=str(out),
        checkpoint_s=ports.settings.checkpoint_s,
        stop=str(out / "stop"),
        device=ports.settings.device,
        threads=ports.settings.threads,
        job=Job(run.keys.folder, f"{plan.round}-{plan.number}"),
    )
    async with (
        run.attempt(plan.round, checkpoints.reached),
        checkpoints.stored(),
        run.touched_at_the_end(out / "stop"),
        shown(run, plan) as hear,
    ):

        def told(news: News) -> None:
            checkpoints.told(news)
            hear(news)

        reply = await run.call(plan.round, asked, told)
    if isinstance(reply, Paused):
        log.info("training.paused", request_id=run.request.request_id, round=plan.round, step=checkpoints.reached())
        raise Continue
    if isinstance(reply, Diverged):
        await _note_divergence(run, plan)
        return None

    # Store: what names the others comes last.
    key = keys.checkpoint(run.epoch)
    await ports.objects.upload(out / "checkpoint.pt", key)
    return await store_once(
        keys.trained(plan.number),
        StoredTrained.model_validate({**asdict(reply), "checkpoint_key": key}),
        objects=ports.objects,
    )


async def trained_of(run: Run, plan: StoredPlan) -> StoredTrained | None:
    """Return the record of the training that the plan asks for; None if it is not trained yet."""
    return await stored(run.keys.round(plan.round).trained(plan.number), objects=run.ports.objects)


async def evaluate(run: Run, plan: StoredPlan, trained: StoredTrained, images: Json) -> StoredRound | None:
    """Judge what was trained, store the round and announce it; None if an image is not finite: it diverged."""
    objects, keys, out = run.ports.objects, run.keys.round(plan.round), _work_dir(run, plan)

    # Evaluate.
    await objects.download(trained.checkpoint_key, out / "checkpoint.pt")
    asked = Evaluate(
        images=Images(**images),
        config=str(out / "config.js"),
        checkpoint=str(out / "checkpoint.pt"),
        out=str(out),
        device=run.ports.settings.device,
        threads=run.ports.settings.threads,
        extractor=_extractor(run.ports),
    )
    reply = await run.ask(plan.round, asked, reached=trained.step)
    if reply.evaluation is None:
        await _note_divergence(run, plan)
        return None

    # Store. The evaluation comes last: it names the others, and makes the round one that is never trained again.
    images_key, config_key = keys.images(run.epoch), keys.config(run.epoch)
    await objects.upload(out / "images.png", images_key)
    await objects.put(config_key, plan.config.encode())
    parameters = read_config(plan.config)
    told = TrainingRound(
        request_id=run.request.request_id,
        dataset=run.request.dataset,
        round=plan.round,
        steps=int(parameters["steps"]),
        rule=plan.rule,
        evaluation=reply.evaluation,
        approved=False,
        config=parameters,
        config_key=config_key,
        duration_s=round(trained.trained_s + reply.seconds, 3),
    )
    done = StoredRound(
        **trained.model_dump(),
        told=told,
        time=run.ports.clock(),
        images_key=images_key,
        continued_from=plan.continue_from,
        n_features=reply.n_features,
    )
    why_not = policy.why_not(policy.Observation.of(done), policy.Goal.of(run.request))
    done = done.model_copy(update={"told": told.model_copy(update={"approved": not why_not, "why_not": why_not})})
    await Checkpoints(objects, keys, plan.number, run.epoch).delete()
    done = await store_once(keys.evaluation, done, objects=objects)
    await run.store_state(StoredState(round=plan.round + 1))
    log.info(
        "training.round_stored",
        request_id=run.request.request_id,
        round=plan.round,
        relative_fd=done.told.evaluation.relative_fd,
        approved=done.told.approved,
        warnings=done.told.evaluation.warnings,
        duration_s=done.told.duration_s,
    )

    # Announce.
    await announce(run, done)
    return done


async def announce(run: Run, done: StoredRound) -> None:
    """Announce a completed round; a second announcement is the same event."""
    await run.ports.publish(TrainingRoundCompleted.of(run.request.request_id, done.told, time=done.time))


async def _note_divergence(run: Run, plan: StoredPlan) -> None:
    """Count a divergence: the next plan is for another try. Raises `CannotTrain` if there were too many."""
    log.warning("training.diverged", request_id=run.request.request_id, round=plan.round)
    divergences = max((await run.state(plan.round)).divergences, plan.number + 1)
    await run.store_state(StoredState(round=plan.round, divergences=divergences, failed_of="diverged"))


def _extractor(ports: Ports) -> Extractor | None:
    if ports.extractor is None:
        return None
    settings = ports.settings
    return Extractor(str(ports.extractor), settings.features_sha256 or "", settings.features_size)


def _work_dir(run: Run, plan: StoredPlan) -> Path:
    """Return a folder for the files of the try, with its config.js."""
    out = run.work_dir / f"{plan.round}.{plan.number}"
    out.mkdir(exist_ok=True)
    (out / "config.js").write_text(plan.config, encoding="utf-8", newline="")
    return out
