"""The two journeys of the inference worker: a settled series to its MAPs, and one MAP to one result at its target."""

import asyncio
import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path, PurePosixPath

from services.inference import outputs as made_outputs
from services.inference import stable_studies
from services.inference.outputs import LONGEST, MadeInstance, OutputRefused, Scrubber
from services.inference.records import (
    Failure,
    Outputs,
    Result,
    RoutedMap,
    Routing,
    result_prefix,
    routing_prefix,
)
from services.inference.routing import Route
from services.inference.serving.runner import LOG_TAIL_BYTES, MapRunner, Run, Study
from services.inference.serving.versions import InstalledMap
from services.inference.targets.target import Instance, PushRejected, Target, Targets
from shared.concurrency import all_of, temporary_folder
from shared.dicom import Revision, revision_key, series_prefix
from shared.errors import Unavailable, Unprocessable
from shared.idempotency import once, store_once, stored
from shared.log import get_logger
from shared.messages import (
    CompletedInference,
    FailedInference,
    InferenceCompleted,
    InferenceFailed,
    InferenceOutput,
    InferenceRequested,
    InferenceSkipped,
    InferenceTask,
    OutputFile,
    SeriesReady,
    SeriesRef,
    SkippedInference,
)
from shared.objects import ObjectMissing, ObjectStore
from shared.queue import Publish, receive_count

ANNOUNCED_OUTPUTS = 500
REROUTE_S = 5
TRANSFERS = 8
"""Objects of one study that are downloaded or uploaded at the same time."""

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

    Afterwards `routing.json` says which, and each was sent one request; for those that read a study as a whole somebody
    will look at the study. None is an outcome, and is announced. A second delivery sends the same requests again, and
    those end at the results that are there.

    Raises:
        Unprocessable: `revision_missing`, `invalid_revision`.
        Unavailable: S3 or SQS does not answer.
    """
    # Fetch.
    series = SeriesRef.model_validate(ready.data.model_dump())
    revision = await _revision(objects, series.revision_key)

    # Choose.
    takers = [found for found in maps.values() if found.route.takes(revision)]

    # Store: the first worker's choice stands, also where another one has newer MAPs.
    routing = await store_once(
        objects,
        f"{routing_prefix(series)}routing.json",
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
    )

    # Ask, or tell that there is nobody to ask.
    if not routing.maps and not routing.study_maps:
        log.info("inference.no_route", series=series.series_uid)
        skipped = SkippedInference(**series.model_dump(), modality=routing.modality, reason_code="no_route")
        await publish(InferenceSkipped.of(routing_prefix(series), skipped, time=routing.time))
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
    makes other files, but the first `outputs.json` decides whose files are the result, and everyone pushes those.
    `claim.json` keeps the others from computing meanwhile; it ends `lease_s` seconds after its owner's death.

    A failure is an outcome as well, and stands in `failure.json`: the same event again announces that failure, and runs
    nothing. To try again, ask by an event with another id, or delete `failure.json` and send the same one: the ids of
    what `route` sends depend on series and MAP alone.

    Raises:
        Unprocessable: `revision_missing`, `instance_missing`, `invalid_revision`, `invalid_record`.
        Claimed, Continue: another worker computes it.
        Unavailable: S3, SQS or the target does not answer, the MAP's process cannot be started, or this worker does
            not have the MAP, which in a rolling deployment another one has.
    """
    task = requested.data
    served = maps.get(task.map)
    route = served.route if served is not None else None
    least = route.outputs if route is not None else None
    prefix = result_prefix(task)
    attempt = uuid.uuid4().hex

    # Repeat: what is done is announced again, as the same event.
    done = await stored(objects, f"{prefix}result.json", Result)
    if done is not None:
        await _announce(done, publish)
        return
    failed = await stored(objects, f"{prefix}failure.json", Failure)
    if failed is not None and failed.request_id == requested.id:
        await _announce_failure(failed, publish)
        return
    if failed is not None:
        await objects.delete(failed.failure_key)  # it would tell of this request while it runs

    try:
        # What is pushed lies where the MAP could put nothing in its place.
        async with temporary_folder("study-") as folder, temporary_folder("push-") as pushing:
            study = Study.make(folder)
            # Compute, unless somebody has.
            outputs = await stored(objects, f"{prefix}outputs.json", Outputs)
            if outputs is None:
                newer = await _superseded_by(objects, task.inputs)
                of_study = route is not None and route.level == "study"
                if newer is not None or (of_study and await stable_studies.is_superseded(task, objects)):
                    log.info("inference.superseded", map=task.map, by=newer)
                    return
                installed = _installed(task, served).map
                if installed.digest != task.map_digest:
                    log.info("inference.rerouted", map=task.map, map_digest=installed.digest)
                    current = task.model_copy(update={"map_digest": installed.digest})
                    # With a delay: while another worker still has the older version, it sends this back at once.
                    await publish(_requested(current, requested.time), delay_s=REROUTE_S)
                    return
                computed = await once(
                    objects,
                    f"{prefix}outputs.json",
                    Outputs,
                    lambda _: _compute(task, attempt, study, objects=objects, runner=runner, clock=clock, least=least),
                    claim=f"{prefix}claim.json",
                    lease_s=lease_s,
                    clock=clock,
                )
                if isinstance(computed, Result):
                    await _announce(await store_once(objects, f"{prefix}result.json", computed), publish)
                    return
                outputs = computed

            # Push the winner's instances, which may be another attempt's; of de-identified series they stay in S3.
            # Where to, only the MAP's route says.
            target, originals = await _target(task, targets, _installed(task, served).route, objects)
            if originals:
                await _push_originals(task, pushing, objects=objects, target=target)
            pushed = await _push(task, outputs, pushing, objects=objects, target=target)
    except _Failed as reason:
        failure = Failure(
            **task.model_dump(),
            request_id=requested.id,
            attempt=attempt,
            reason_code=reason.reason_code,
            failure_key=f"{prefix}failure.json",
            error_type=reason.error_type,
            where=reason.where,
            time=clock(),
        )
        await _announce_failure(await store_once(objects, failure.failure_key, failure), publish)
        return

    # Store, then announce.
    result = Result(
        **task.model_dump(),
        outcome="completed",
        result_key=f"{prefix}result.json",
        outputs=pushed,
        files=outputs.files,
        pushed_to=target.name,
        duration_s=outputs.duration_s,
        device=outputs.device,
        attempt=outputs.attempt,
        time=clock(),
    )
    await _announce(await store_once(objects, result.result_key, result), publish)


class _Failed(Exception):  # noqa: N818 - it states what became of the attempt
    """This attempt ends as `failure.json`."""

    def __init__(self, reason_code: str, error_type: str = "", where: str = "") -> None:
        super().__init__(reason_code)
        self.reason_code = reason_code
        self.error_type = error_type
        self.where = where


async def _compute(
    task: InferenceTask,
    attempt: str,
    study: Study,
    *,
    objects: ObjectStore,
    runner: MapRunner,
    clock: Clock,
    least: Mapping[str, int] | None,
) -> Outputs | Result:
    """Run the MAP, and store what it made under the attempt's own keys; `least` is what it must make, by modality.

    Raises:
        _Failed: the MAP failed, or made nothing that can be pushed.
    """
    prefix = result_prefix(task)
    attempt_prefix = f"{prefix}attempts/{attempt}/"

    # Fetch: beside the study that computes now, and outside its permit.
    sources = await _download_inputs(task.inputs, study, objects)
    scrubber = await asyncio.to_thread(Scrubber, sources)
    headers = await asyncio.to_thread(made_outputs.headers, sources)

    # Run. What the MAP printed lies beside the result, and in no log.
    run = await runner.run(task.map, study, digest=task.map_digest)
    printed = await asyncio.to_thread(study.log_tail, LONGEST)
    await objects.put(f"{attempt_prefix}log.txt", await asyncio.to_thread(scrubber.scrub_tail, printed, LOG_TAIL_BYTES))
    log.info("inference.ran", map=task.map, **_told(run))
    if receive_count() == 1 and _may_be_the_machines(run):
        raise Unavailable("the MAP ended for want of the machine's resources")
    if run.outcome == "no_matching_series":
        return Result(
            **task.model_dump(),
            outcome="no_matching_series",
            result_key=f"{prefix}result.json",
            duration_s=run.duration_s,
            device=run.device,
            attempt=attempt,
            time=clock(),
        )
    if run.outcome != "ran":
        raise _Failed(run.outcome, run.error_type, run.where)

    # Check.
    try:
        made = await asyncio.to_thread(made_outputs.check, study.output, headers, least)
    except OutputRefused as refused:
        raise _Failed(refused.reason_code, "", refused.where) from None
    others = await asyncio.to_thread(made_outputs.other_files, study.output)

    # Store. A MAP may name a file after the patient.
    outputs = tuple(_output(one, f"{attempt_prefix}{one.sop_instance_uid}.dcm") for one in made)
    files = tuple(
        OutputFile(
            key=f"{attempt_prefix}files/{index}/{scrubber.scrub(os.fsencode(one.path.name)).decode(errors='replace')}",
            media_type=one.media_type,
            n_bytes=one.path.stat().st_size,
        )
        for index, one in enumerate(others)
    )
    uploads = [partial(objects.upload, one.path, output.key) for one, output in zip(made, outputs, strict=True)]
    uploads += [
        partial(objects.upload, one.path, file.key, media_type=file.media_type)
        for one, file in zip(others, files, strict=True)
    ]
    await all_of(uploads, at_once=TRANSFERS)
    return Outputs(
        attempt=attempt,
        outputs=outputs,
        files=files,
        duration_s=run.duration_s,
        device=run.device,
        time=clock(),
    )


async def _push_originals(task: InferenceTask, pushing: Path, *, objects: ObjectStore, target: Target) -> None:
    """Push the instances of the inputs that the target does not show, so that a viewer has both.

    They are fetched anew: what lies in the study's folder was in the MAP's hands.

    Raises:
        _Failed: `push_rejected`, `not_primary`.
    """
    folder = pushing / "originals"
    await asyncio.to_thread(folder.mkdir)
    for series in task.inputs:
        shown = await target.shown(series.study_uid, series.series_uid)
        if shown is None:
            return
        revision = await _revision(objects, series.revision_key)
        keys = {one.sop_instance_uid: one.key for one in revision.instances if one.sop_instance_uid not in shown}
        wanted = {key: Instance(folder / f"{uid}.dcm", *_uids(series), uid) for uid, key in keys.items()}
        await _download([(key, one.path) for key, one in wanted.items()], objects)
        await _pushed(list(wanted.values()), target)


async def _push(
    task: InferenceTask, outputs: Outputs, pushing: Path, *, objects: ObjectStore, target: Target
) -> tuple[InferenceOutput, ...]:
    """Push the stored instances, and return them with the image sets that hold them now.

    Raises:
        _Failed: `push_rejected`, `not_primary`.
    """
    folder = pushing / "results"
    await asyncio.to_thread(folder.mkdir)
    instances = [
        Instance(
            folder / PurePosixPath(output.key).name,
            task.inputs[0].study_uid,
            output.series_uid,
            output.sop_instance_uid,
        )
        for output in outputs.outputs
    ]
    if target.name != "s3":
        keys = [output.key for output in outputs.outputs]
        await _download(zip(keys, (one.path for one in instances), strict=True), objects)
    image_sets = await _pushed(instances, target)
    return tuple(
        output.model_copy(update={"image_set_id": image_sets[output.series_uid]}) for output in outputs.outputs
    )


async def _pushed(instances: Sequence[Instance], target: Target) -> dict[str, str | None]:
    try:
        image_sets = await target.push(instances)
    except PushRejected as rejected:
        raise _Failed(rejected.reason_code, where=rejected.where) from None
    found = sorted(filter(None, image_sets.values()))
    log.info("inference.pushed", instances=len(instances), to=target.name, image_sets=found)
    return image_sets


def _uids(series: SeriesRef) -> tuple[str, str]:
    return series.study_uid, series.series_uid


def _may_be_the_machines(run: Run) -> bool:
    """Tell whether another time or another machine may bring another end: this one was short of something."""
    if run.outcome == "crashed" and run.error_type == "SIGKILL":  # not by us, and not for memory
        return True
    return run.outcome == "gpu_out_of_memory" or (run.outcome == "out_of_memory" and run.where == "kernel")


def _installed(task: InferenceTask, served: InstalledMap | None) -> InstalledMap:
    if served is None:
        log.warning("inference.unknown_map", map=task.map)
        raise Unavailable("this worker does not have the MAP")
    return served


async def _superseded_by(objects: ObjectStore, inputs: Sequence[SeriesRef]) -> str | None:
    """Return the digest of a newer revision of an input, whose own request makes this one needless."""
    for series in inputs:
        prefix = f"{series_prefix(series.study_uid, series.series_uid)}revisions/"
        async for found in objects.list(prefix):
            if found.key != revision_key(series.study_uid, series.series_uid, series.digest):
                revision = await _revision(objects, found.key)
                if revision.supersedes == series.digest:
                    return revision.digest
    return None


async def _target(task: InferenceTask, targets: Targets, route: Route, objects: ObjectStore) -> tuple[Target, bool]:
    """Return where the results go, and whether the inputs go there; no PACS has a patient for what has none."""
    revisions = [await _revision(objects, series.revision_key) for series in task.inputs]
    if any(revision.deidentified for revision in revisions):
        return targets.by_name["s3"], False
    return targets.of(route)


async def _revision(objects: ObjectStore, key: str) -> Revision:
    try:
        return Revision.parse(await objects.get(key))
    except ObjectMissing:
        raise Unprocessable("revision_missing") from None


async def _download_inputs(inputs: Sequence[SeriesRef], study: Study, objects: ObjectStore) -> list[Path]:
    wanted = []
    for series in inputs:
        revision = await _revision(objects, series.revision_key)
        wanted += [(one.key, study.input / PurePosixPath(one.key).name) for one in revision.instances]
    await _download(wanted, objects)
    return [path for _, path in wanted]


async def _download(wanted: Iterable[tuple[str, Path]], objects: ObjectStore) -> None:
    try:
        await all_of((partial(objects.download, key, path) for key, path in wanted), at_once=TRANSFERS)
    except ObjectMissing:
        raise Unprocessable("instance_missing") from None


def _requested(task: InferenceTask, time: datetime) -> InferenceRequested:
    return InferenceRequested.of(result_prefix(task), task, time=time)


def _output(one: MadeInstance, key: str) -> InferenceOutput:
    return InferenceOutput(
        sop_class_uid=one.sop_class_uid, sop_instance_uid=one.sop_instance_uid, series_uid=one.series_uid, key=key
    )


def _told(run: Run) -> dict[str, str | float]:
    return {
        "outcome": run.outcome,
        "duration_s": round(run.duration_s, 3),
        "device": run.device,
        "error_type": run.error_type,
        "where": run.where,
    }


async def _announce(result: Result, publish: Publish) -> None:
    """Announce what is stored, so that a repeat is the same event."""
    announced = {
        "outputs": result.outputs[:ANNOUNCED_OUTPUTS],
        "n_outputs": len(result.outputs),
        "files": result.files[:ANNOUNCED_OUTPUTS],
    }
    told = CompletedInference.model_validate(result.model_dump() | announced)
    await publish(InferenceCompleted.of(result_prefix(told), told, time=result.time))
    log.info("inference.done", map=told.map, outcome=told.outcome, outputs=len(told.outputs))


async def _announce_failure(failure: Failure, publish: Publish) -> None:
    told = FailedInference.model_validate(failure.model_dump())
    await publish(InferenceFailed.of(result_prefix(told), told, time=failure.time))
    place = {"error_type": failure.error_type, "where": failure.where}
    log.warning("inference.failed", map=told.map, reason=told.reason_code, **place)
