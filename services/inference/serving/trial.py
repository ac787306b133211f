"""The trial of a new version: it must start, and run on its golden study, before it serves.

A failure that the machine is to blame for, such as too little memory, or a golden study that is not there, says nothing
about a version: the trial is undecided, and is made again at the next look.
"""

import asyncio
from pathlib import Path

from pydicom.errors import InvalidDicomError

from services.inference import outputs
from services.inference.outputs import OutputRefused
from services.inference.package.maps import Map
from services.inference.routing import Route
from services.inference.serving.bounds import serving_of
from services.inference.serving.place import Place
from services.inference.serving.runner import MapRunner, Run, Study
from shared.child import ChildFailed
from shared.concurrency import temporary_folder
from shared.errors import Unavailable
from shared.log import get_logger

log = get_logger()


async def try_version(found: Map, route: Route, *, runner: MapRunner, golden: Place | None) -> str | None:
    """Try a version on its golden study, if it has one; return why it is not good, or None.

    Raises:
        Unavailable: the trial does not say whether it is good.
    """
    async with temporary_folder("golden-") as folder:
        # Fetch.
        study = Study.make(folder)
        if golden is not None:
            await golden.copy_to(study.input)
            if not await asyncio.to_thread(_only_dicom, study.input):
                raise _undecided(found, "no_golden_study")

        # Run.
        log.info("map.trying", map=route.name, map_digest=found.digest, golden=golden is not None)
        try:
            run = await runner.try_out(found, study if golden is not None else None, serving_of(route))
        except ChildFailed as failed:
            if failed.reason_code == "crashed" and failed.error_type == "SIGKILL":
                raise _undecided(found, "crashed") from None
            log.warning("map.not_started", map=route.name, reason=str(failed))
            return "not_started"
        if run is None:
            return None
        if _is_of_the_machine(run):
            raise _undecided(found, run.outcome)
        if run.outcome != "ran":
            log.warning("map.trial_failed", map=route.name, error_type=run.error_type, where=run.where)
            return run.outcome

        # Check.
        sources = sorted(study.input.iterdir())
        try:
            await asyncio.to_thread(outputs.check, study.output, sources, route.outputs)
        except OutputRefused as refused:
            log.warning("map.trial_refused", map=route.name, reason=refused.reason_code, where=refused.where)
            return refused.reason_code
        except InvalidDicomError:
            raise _undecided(found, "golden_study_unreadable") from None
    return None


def _is_of_the_machine(run: Run) -> bool:
    """Tell whether a trial's end says more about the machine, or what else runs on it, than about the version."""
    return (
        run.outcome in {"gpu_lost", "gpu_out_of_memory"}
        or (run.outcome == "out_of_memory" and run.where == "kernel")
        or (run.outcome == "crashed" and run.error_type == "SIGKILL")
    )


def _undecided(found: Map, reason: str) -> Unavailable:
    """Tell that a version must be tried again, and why."""
    log.error("map.trial_undecided", map=found.name, map_digest=found.digest, reason=reason)
    return Unavailable(f"the trial tells nothing of the version ({reason})")


def _only_dicom(folder: Path) -> bool:
    """Remove what is not DICOM, as routing would not give it to a MAP either; tell whether anything is left."""
    for path in folder.iterdir():
        if not outputs.claims_dicom(path):
            path.unlink()
    return any(folder.iterdir())
