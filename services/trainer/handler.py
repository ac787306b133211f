"""The journey of a training request: load, train, evaluate, modify, retrain, generate.

The whole state of a training is under `models/<request id>/`, so that any worker can go on with it:

    options.json                the request; a second request of this id must be the same
    lease.json                  which worker trains: a lease of shared/idempotency.py
    manifest.json               the arrays and their split, as of the first start
    config.js                   the parameters of the current round; one that is there before the request is the start
    first_config.js             the parameters of the start, resolved
    rounds/<n>/plan.<try>.json  what the round is to do, and why; a round that diverges is tried again
    rounds/<n>/partial.<try>.json, partial.<try>.<epoch>.<step>.pt     its checkpoints; checkpoints.py
    rounds/<n>/trained.<try>.json, checkpoint.<epoch>.pt               it is trained
    rounds/<n>/evaluation.json, images.<epoch>.png, config.<epoch>.js  it is completed
    state.json                  the current round, and how often it was tried
    progress.json               how far it is, for people who watch
    generator.pt, …             the products: completion.py lists them
    completed.json              the end of the training
    failure.json                why it cannot work; deleted when it is tried again

Each part of the journey is a function over these records. It stores its own record last, and only if there is none: the
first writer wins, and later ones go on with what the first one stored. An object that a record names has the epoch of
the lease in its key, so a worker that lost the lease without knowing cannot change it. `steps.py` has the workflow
steps: the same parts as commands.
"""

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import TypeVar

from services.trainer.completion import complete
from services.trainer.data.loading import loaded
from services.trainer.reasons import CannotTrain
from services.trainer.rounds import announce, evaluate, first_config, modify, train
from services.trainer.run import Ports, Run
from services.trainer.strategy.policy import Goal, Observation, best_round
from shared.concurrency import temporary_folder
from shared.documents.training import StoredCompletion, StoredFailure, StoredOptions
from shared.errors import Unprocessable
from shared.idempotency import once, store, store_once
from shared.keys import TrainingKeys
from shared.log import get_logger
from shared.messages import FailedTraining, TrainingCompleted, TrainingFailed, TrainingRequest, TrainingRequested

Result = TypeVar("Result")

log = get_logger()


async def handle(requested: TrainingRequested, *, ports: Ports) -> None:
    """Train a model until it is approved or its rounds are used up, and announce each round and the end.

    Afterwards the model, its images and every round are under `models/<request id>/`. The same message again goes on
    after the last checkpoint; stored rounds are announced again, with the same ids. Of two workers with one request,
    only one trains. A training that cannot work is an outcome: `failure.json` and `training.failed`.

    Raises:
        Unprocessable: `request_id_taken`, this id was another request's; `invalid_record`.
        Leased: another worker trains it.
        Unavailable: S3 does not answer, or the training process failed; to be tried again.
        Continue: this worker is to stop, or the message cannot be held much longer; or another worker trains for very
            long.
    """
    # Check.
    request = requested.data
    await accept(request, asked_at=requested.time, ports=ports)

    # Train, unless it is done.
    completion = await under_lease(request, _train, asked_at=requested.time, ports=ports)

    # Announce.
    if completion is not None:
        await announce_completion(completion, ports=ports)


async def accept(request: TrainingRequest, *, asked_at: datetime, ports: Ports) -> None:
    """Store the request. Raises `Unprocessable` if its id is that of another request."""
    options = StoredOptions(request=request, settings=ports.settings.model_dump(mode="json"), time=asked_at)
    stored = await store_once(TrainingKeys(request.request_id).options, options, objects=ports.objects)
    if stored.request != request:
        raise Unprocessable("request_id_taken")


async def under_lease(
    request: TrainingRequest,
    work: Callable[[Run], Awaitable[StoredCompletion | Result]],
    *,
    asked_at: datetime,
    ports: Ports,
) -> StoredCompletion | Result | None:
    """Return the end of the training; if it has not ended, do some work of it while holding its lease.

    Returns None if the training cannot work, which is stored and announced. Raises as `once`.
    """
    keys = TrainingKeys(request.request_id)

    async def do(epoch: int) -> StoredCompletion | Result | None:
        await ports.objects.delete(keys.failure.key)  # of an earlier try: there may be more data now
        try:
            async with temporary_folder("training-") as work_dir:
                return await work(Run(request, keys, epoch, ports, work_dir))
        except CannotTrain as failed:
            told = FailedTraining(
                request_id=request.request_id,
                dataset=request.dataset,
                reason_code=failed.reason_code,
                numbers=failed.numbers,
            )
            await store(keys.failure, StoredFailure(told=told, time=ports.clock()), objects=ports.objects)
            log.warning(
                "training.failed", request_id=request.request_id, reason_code=failed.reason_code, **failed.numbers
            )
            await ports.publish(TrainingFailed.of(request.request_id, told, time=asked_at))
            return None

    return await once(
        keys.completed,
        do,
        objects=ports.objects,
        lease=keys.lease,
        lease_s=ports.settings.lease_s,
        clock=ports.clock,
    )


async def announce_completion(completion: StoredCompletion, *, ports: Ports) -> None:
    """Announce the end of a training; a second announcement is the same event."""
    told = completion.told
    log.info("training.completed", request_id=told.request_id, approved=told.approved, rounds=told.rounds)
    await ports.publish(TrainingCompleted.of(told.request_id, told, time=completion.time))


async def _train(run: Run) -> StoredCompletion:
    """Do the rest of a training, from where its records end. Raises `CannotTrain`."""
    # Load.
    await first_config(run)
    async with loaded(run.request, run.keys.manifest, run.ports.settings, objects=run.ports.objects) as images:
        for done in await run.rounds():
            await announce(run, done)

        # Train, evaluate, modify, retrain.
        while (plan := await modify(run)) is not None:
            trained = await train(run, plan, images)
            if trained is not None:
                await evaluate(run, plan, trained, images)

    # Generate.
    return await generate(run)


async def generate(run: Run) -> StoredCompletion:
    """Make the products of the best round."""
    rounds = await run.rounds()
    return await complete(run, rounds, best_round(list(map(Observation.of, rounds)), Goal.of(run.request)))
