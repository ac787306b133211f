"""The two journeys of the inference worker: a settled series to its MAPs, and one MAP to one result at its target."""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from services.inference import stable_studies
from services.inference.computing import MapFailed, Unmatched, compute
from services.inference.outputs import OutputRefused
from services.inference.pushing import Pushed, push
from services.inference.serving.runner import MapRunner
from services.inference.serving.versions import InstalledMap
from services.inference.targets.target import PushRejected, Targets
from shared import keys
from shared.documents.document import Document
from shared.documents.inference import Failure, Outputs, Result, RoutedMap, Routing
from shared.documents.revisions import Revision
from shared.errors import Unavailable, Unprocessable
from shared.idempotency import store_once, stored
from shared.keys import ResultKeys
from shared.log import get_logger
from shared.messages import (
    CompletedInference,
    FailedInference,
    InferenceCompleted,
    InferenceFailed,
    InferenceRequested,
    InferenceSkipped,
    InferenceTask,
    SeriesReady,
    SeriesRef,
    SkippedInference,
)
from shared.objects import ObjectStore
from shared.queue import Publish

ANNOUNCED_OUTPUTS = 500
REROUTE_S = 5

Clock = Callable[[], datetime]
log = get_logger()


async def route(
    ready: SeriesReady,
    *,
    objects: ObjectStore,
    publish: Publish,
    maps: Mapping[str, InstalledMap],
    clock: Clock,
    quiet: stable_studies.Quiet,
) -> None:
    """Give one revision to the MAPs whose conditions it meets.

    Afterwards `routing.json` says which, and each was sent one request; for those that read a study as a whole a worker
    will look at the study later. That no MAP takes it is an outcome, and is announced. A second delivery sends the same
    requests again, and those end at the results that are there.

    Raises:
        Unprocessable: `revision_missing`, `invalid_revision`.
        Unavailable: S3 or SQS does not answer.
    """
    # Fetch.
    series = SeriesRef.model_validate(ready.data.model_dump())
    revision = await _revision(keys.revision_of(series), objects=objects)

    # Choose.
    takers = [found for found in maps.values() if found.route.takes(revision)]

    # Store: the first worker's choice stands, also where another one has newer MAPs.
    routing = await store_once(
        keys.routing(series),
        Routing(
            maps=tuple(
                RoutedMap(map=found.map.name, map_digest=found.map.digest)
                for found in takers
                if found.route.level == "series"
            ),
            study_maps=tuple(found.map.name for found in takers if found.route.level == "study"),
            modality=ready.data.modality,
            time=clock(),
        ),
        objects=objects,
    )

    # Ask, or announce that no MAP takes it.
    if not routing.maps and not routing.study_maps:
        log.info("inference.no_route", series=series.series_uid)
        skipped = SkippedInference(**series.model_dump(), modality=routing.modality, reason_code="no_route")
        await publish(InferenceSkipped.of(keys.revision_results_prefix(series), skipped, time=routing.time))
    for chosen in routing.maps:
        task = InferenceTask(map=chosen.map, map_digest=chosen.map_digest, inputs=(series,))
        await publish(_requested(task, routing.time))
    # A revision that no such MAP takes may replace one that they were given: then their inputs change as well.
    reads_studies = any(found.route.level == "study" for found in maps.values())
    if routing.study_maps or (reads_studies and revision.supersedes):
        await stable_studies.expect_settling(
            series.study_uid, objects=objects, publish=publish, clock=clock, quiet=quiet
        )


async def infer(
    requested: InferenceRequested,
    *,
    objects: ObjectStore,
    publish: Publish,
    maps: Mapping[str, InstalledMap],
    runner: MapRunner,
    targets: Targets,
    clock: Clock,
    lease_s: float,
) -> None:
    """Turn one request into one result at its target, and announce it.

    Any number of workers may do this at the same time, and be killed anywhere: MAPs draw random UIDs, so each attempt
    makes other files, but the first `outputs.json` decides whose files are the result, and all workers push those.
    `claim.json` keeps the others from computing meanwhile; it ends `lease_s` seconds after its owner's death.

    A failure is an outcome as well, and stands in `failure.json`: the same event again announces that failure, and runs
    nothing. To try again, ask by an event with another id, or delete `failure.json` and send the same one: the ids of
    what `route` sends depend on series and MAP alone.

    Raises:
        Unprocessable: `revision_missing`, `instance_missing`, `invalid_revision`, `invalid_record`.
        Leased, Continue: another worker computes it.
        Unavailable: S3, SQS or the target does not answer, the MAP's process cannot be started, or this worker does
            not have the MAP, which in a rolling deployment another one has.
    """
    task, attempt = requested.data, uuid.uuid4().hex
    served = maps.get(task.map)

    # Repeat: what was answered before is announced again, as the same event.
    known = await _known(requested, objects=objects)
    if known.answer is not None:
        await _announce(known.answer, publish=publish)
        return

    # Check: if it is yet to be computed, it is still wanted, and of the version that serves here.
    if known.outputs is None and await _is_superseded(task, served, objects=objects):
        return
    installed = _installed(task, served)
    if known.outputs is None and installed.map.digest != task.map_digest:
        await _ask_again(requested, installed.map.digest, publish=publish)
        return

    # Fetch.
    revisions = [await _revision(keys.revision_of(series), objects=objects) for series in task.inputs]

    answer: Result | Failure
    try:
        # Compute, unless another attempt has.
        computed = known.outputs or await compute(
            task,
            revisions,
            attempt=attempt,
            least=installed.route.outputs,
            objects=objects,
            runner=runner,
            clock=clock,
            lease_s=lease_s,
        )
        # Push the winner's instances, which may be another attempt's.
        pushed = Pushed()
        if isinstance(computed, Outputs):
            pushed = await push(task, computed, revisions, route=installed.route, objects=objects, targets=targets)
        answer = _result(task, computed, pushed, clock())
    except (MapFailed, OutputRefused, PushRejected) as failed:
        answer = _failure(requested, attempt, failed, clock())

    # Store, then announce.
    await _announce(await _stored(answer, objects=objects), publish=publish)


@dataclass(frozen=True, slots=True)
class _Known:
    """What S3 holds for a request when it arrives."""

    answer: Result | Failure | None = None
    """The answer that an earlier delivery of the request was given."""
    outputs: Outputs | None = None
    """The outputs of the attempt that won."""


async def _known(requested: InferenceRequested, *, objects: ObjectStore) -> _Known:
    """Look for what is there already; the failure of an earlier request is removed, for it would tell of this one."""
    places = ResultKeys.of(requested.data)
    done = await stored(places.result, objects=objects)
    if done is not None:
        return _Known(answer=done)
    failed = await stored(places.failure, objects=objects)
    if failed is not None and failed.request_id == requested.id:
        return _Known(answer=failed)
    if failed is not None:
        await objects.delete(places.failure.key)
    return _Known(outputs=await stored(places.outputs, objects=objects))


async def _is_superseded(task: InferenceTask, served: InstalledMap | None, *, objects: ObjectStore) -> bool:
    """Tell whether a newer revision, or a newer state of the study, makes the request needless."""
    newer = await _superseded_by(task.inputs, objects=objects)
    of_study = served is not None and served.route.level == "study"
    if newer is None and not (of_study and await stable_studies.is_superseded(task, objects=objects)):
        return False
    log.info("inference.superseded", map=task.map, by=newer)
    return True


async def _superseded_by(inputs: Sequence[SeriesRef], *, objects: ObjectStore) -> str | None:
    """Return the digest of a newer revision of an input, whose own request makes this one needless."""
    for series in inputs:
        own = keys.revision(series.study_uid, series.series_uid, series.digest)
        async for found in objects.list(keys.revisions_prefix(series.study_uid, series.series_uid)):
            document = keys.stored_revision(found.key)
            if document is not None and document != own:
                revision = await _revision(document, objects=objects)
                if revision.supersedes == series.digest:
                    return revision.digest
    return None


def _installed(task: InferenceTask, served: InstalledMap | None) -> InstalledMap:
    if served is None:
        log.warning("inference.unknown_map", map=task.map)
        raise Unavailable("this worker does not have the MAP")
    return served


async def _ask_again(requested: InferenceRequested, map_digest: str, *, publish: Publish) -> None:
    """Ask for the version that serves here instead of the one that was asked for."""
    log.info("inference.rerouted", map=requested.data.map, map_digest=map_digest)
    current = requested.data.model_copy(update={"map_digest": map_digest})
    # With a delay: while another worker still has the older version, it sends this back at once.
    await publish(_requested(current, requested.time), delay_s=REROUTE_S)


async def _revision(document: Document[Revision], *, objects: ObjectStore) -> Revision:
    revision = await stored(document, objects=objects)
    if revision is None:
        raise Unprocessable("revision_missing")
    return revision


def _requested(task: InferenceTask, time: datetime) -> InferenceRequested:
    return InferenceRequested.of(ResultKeys.of(task).prefix, task, time=time)


def _result(task: InferenceTask, computed: Outputs | Unmatched, pushed: Pushed, time: datetime) -> Result:
    return Result(
        **task.model_dump(),
        outcome="completed" if isinstance(computed, Outputs) else "no_matching_series",
        result_key=ResultKeys.of(task).result.key,
        outputs=pushed.outputs,
        files=computed.files,
        pushed_to=pushed.to,
        duration_s=computed.duration_s,
        device=computed.device,
        attempt=computed.attempt,
        time=time,
    )


def _failure(
    requested: InferenceRequested, attempt: str, failed: MapFailed | OutputRefused | PushRejected, time: datetime
) -> Failure:
    return Failure(
        **requested.data.model_dump(),
        request_id=requested.id,
        attempt=attempt,
        reason_code=failed.reason_code,
        failure_key=ResultKeys.of(requested.data).failure.key,
        error_type=failed.error_type if isinstance(failed, MapFailed) else "",
        where=failed.where,
        time=time,
    )


async def _stored(answer: Result | Failure, *, objects: ObjectStore) -> Result | Failure:
    """Store an answer, unless another worker gave one; returns the one that stands."""
    places = ResultKeys.of(answer)
    if isinstance(answer, Result):
        return await store_once(places.result, answer, objects=objects)
    return await store_once(places.failure, answer, objects=objects)


async def _announce(answer: Result | Failure, *, publish: Publish) -> None:
    """Announce what is stored, so that a repeat is the same event."""
    if isinstance(answer, Failure):
        await _announce_failure(answer, publish=publish)
    else:
        await _announce_result(answer, publish=publish)


async def _announce_result(result: Result, *, publish: Publish) -> None:
    first = {
        "outputs": result.outputs[:ANNOUNCED_OUTPUTS],
        "n_outputs": len(result.outputs),
        "files": result.files[:ANNOUNCED_OUTPUTS],
    }
    completed = CompletedInference.model_validate(result.model_dump() | first)
    await publish(InferenceCompleted.of(ResultKeys.of(completed).prefix, completed, time=result.time))
    log.info("inference.done", map=completed.map, outcome=completed.outcome, outputs=len(completed.outputs))


async def _announce_failure(failure: Failure, *, publish: Publish) -> None:
    failed = FailedInference.model_validate(failure.model_dump())
    await publish(InferenceFailed.of(ResultKeys.of(failed).prefix, failed, time=failure.time))
    place = {"error_type": failure.error_type, "where": failure.where}
    log.warning("inference.failed", map=failed.map, reason=failed.reason_code, **place)
