"""What becomes of the inputs: attempts, each of which runs the MAP, and the one whose instances are the result."""

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path, PurePosixPath

from services.inference import outputs as made_outputs
from services.inference.outputs import LONGEST, MadeFile, MadeInstance, Scrubber
from services.inference.serving.runner import LOG_TAIL_BYTES, MapRunner, Run, Study
from services.inference.transfers import TRANSFERS, download_all
from shared.concurrency import all_of, temporary_folder
from shared.documents.inference import Outputs
from shared.documents.revisions import Revision
from shared.errors import Unavailable
from shared.idempotency import make_once
from shared.keys import ResultKeys
from shared.log import get_logger
from shared.messages import InferenceOutput, InferenceTask, OutputFile
from shared.objects import ObjectStore
from shared.queue import receive_count

Clock = Callable[[], datetime]
log = get_logger()


class MapFailed(ValueError):  # noqa: N818 - it states a fact about the run
    """The MAP did not end well: `reason_code` is the run's outcome, `error_type` and `where` are an exception's."""

    def __init__(self, run: Run) -> None:
        """State the facts."""
        super().__init__(run.outcome)
        self.reason_code = run.outcome
        self.error_type = run.error_type
        self.where = run.where


@dataclass(frozen=True, slots=True)
class Unmatched:
    """The MAP ran, and none of its inputs was a series that it takes: there is nothing to push."""

    attempt: str
    duration_s: float
    device: str
    files: tuple[OutputFile, ...] = ()


async def compute(
    task: InferenceTask,
    revisions: Iterable[Revision],
    *,
    attempt: str,
    least: Mapping[str, int] | None,
    objects: ObjectStore,
    runner: MapRunner,
    clock: Clock,
    lease_s: float,
) -> Outputs | Unmatched:
    """Return the winner of all attempts at the result: `outputs.json` names it, once and for all.

    It is this one, made under the lease, unless another worker was faster. `least` is what the MAP must make, by
    modality. The caller has looked for `outputs.json` already: it is looked for again only under the lease.

    Raises:
        Leased, Continue: another worker computes it.
        MapFailed: the MAP failed.
        OutputRefused: the MAP made nothing that can be pushed.
        Unprocessable: `instance_missing`.
        Unavailable: S3 does not answer, the MAP cannot be run here, or it ended for want of the machine's resources.
    """
    places = ResultKeys.of(task)

    async def work(_: int) -> Outputs | Unmatched:
        return await _attempt(
            task, revisions, attempt=attempt, least=least, objects=objects, runner=runner, clock=clock
        )

    return await make_once(places.outputs, work, objects=objects, lease=places.lease, lease_s=lease_s, clock=clock)


async def _attempt(
    task: InferenceTask,
    revisions: Iterable[Revision],
    *,
    attempt: str,
    least: Mapping[str, int] | None,
    objects: ObjectStore,
    runner: MapRunner,
    clock: Clock,
) -> Outputs | Unmatched:
    """Run the MAP on `revisions`, and store what it made under the attempt's own keys. Raises as above."""
    places = ResultKeys.of(task)
    async with temporary_folder("study-") as folder:
        study = Study.make(folder)

        # Fetch: beside the study that computes now, and outside its permit.
        sources = await _download(revisions, study, objects=objects)
        scrubber = await asyncio.to_thread(Scrubber, sources)
        headers = await asyncio.to_thread(made_outputs.headers, sources)

        # Run. What the MAP printed lies beside the result, and in no log.
        run = await runner.run(task.map, study, digest=task.map_digest)
        printed = await asyncio.to_thread(study.log_tail, LONGEST)
        words = await asyncio.to_thread(scrubber.scrub_tail, printed, LOG_TAIL_BYTES)
        await objects.put(places.log(attempt), words)
        log.info("inference.ran", map=task.map, **_facts(run))
        if receive_count() == 1 and _may_be_the_machines(run):
            raise Unavailable("the MAP ended for want of the machine's resources")
        if run.outcome == "no_matching_series":
            return Unmatched(attempt, run.duration_s, run.device)
        if run.outcome != "ran":
            raise MapFailed(run)

        # Check.
        made = await asyncio.to_thread(made_outputs.check, study.output, headers, least)
        others = await asyncio.to_thread(made_outputs.other_files, study.output)

        # Store.
        outputs = [(one.path, _output(one, places.made_instance(attempt, one.sop_instance_uid))) for one in made]
        files = [
            (one.path, _file(one, places.made_file(attempt, index, _name(one, scrubber))))
            for index, one in enumerate(others)
        ]
        uploads = [partial(objects.upload, path, output.key) for path, output in outputs]
        uploads += [partial(objects.upload, path, file.key, media_type=file.media_type) for path, file in files]
        await all_of(uploads, at_once=TRANSFERS)
    return Outputs(
        attempt=attempt,
        outputs=tuple(output for _, output in outputs),
        files=tuple(file for _, file in files),
        duration_s=run.duration_s,
        device=run.device,
        time=clock(),
    )


async def _download(revisions: Iterable[Revision], study: Study, *, objects: ObjectStore) -> list[Path]:
    """Lay the instances where the MAP reads them, and return their paths."""
    instances = [one for revision in revisions for one in revision.instances]
    paths = [study.input / PurePosixPath(one.key).name for one in instances]
    await download_all(zip((one.key for one in instances), paths, strict=True), objects=objects)
    return paths


def _output(one: MadeInstance, key: str) -> InferenceOutput:
    return InferenceOutput(
        sop_class_uid=one.sop_class_uid,
        sop_instance_uid=one.sop_instance_uid,
        series_uid=one.series_uid,
        key=key,
    )


def _file(one: MadeFile, key: str) -> OutputFile:
    return OutputFile(key=key, media_type=one.media_type, n_bytes=one.path.stat().st_size)


def _name(one: MadeFile, scrubber: Scrubber) -> str:
    """Return the file's name without what tells of the patient: a MAP may name a file after one."""
    return scrubber.scrub(os.fsencode(one.path.name)).decode(errors="replace")


def _facts(run: Run) -> dict[str, str | float]:
    return {
        "outcome": run.outcome,
        "duration_s": round(run.duration_s, 3),
        "device": run.device,
        "error_type": run.error_type,
        "where": run.where,
    }


def _may_be_the_machines(run: Run) -> bool:
    """Tell whether another time or another machine may bring another end: this one was short of something."""
    if run.outcome == "crashed" and run.error_type == "SIGKILL":  # not by us, and not for memory
        return True
    return run.outcome == "gpu_out_of_memory" or (run.outcome == "out_of_memory" and run.where == "kernel")
