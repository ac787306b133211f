"""The instances of a result on their way to its target and, if wanted, those of the series that it is about."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from services.inference.routing import Route, TargetName
from services.inference.targets.target import Instance, Target, Targets
from services.inference.transfers import download_all
from shared.concurrency import temporary_folder
from shared.documents.inference import Outputs
from shared.documents.revisions import Revision
from shared.log import get_logger
from shared.messages import InferenceOutput, InferenceTask
from shared.objects import ObjectStore

log = get_logger()


@dataclass(frozen=True, slots=True)
class Pushed:
    """Where the instances of a result are now."""

    outputs: tuple[InferenceOutput, ...] = ()
    """The instances of the result, each with the image set that holds it."""
    to: TargetName | None = None
    """The target that took them; None if there was nothing to push."""


async def push(
    task: InferenceTask,
    outputs: Outputs,
    revisions: Sequence[Revision],
    *,
    route: Route,
    objects: ObjectStore,
    targets: Targets,
) -> Pushed:
    """Push the stored instances of the attempt that `outputs` names, to the target of the MAP's route.

    Pushing them again changes nothing.

    Raises:
        PushRejected: the target refuses them, or does not show them.
        Unprocessable: `instance_missing`.
        Unavailable: S3 or the target does not answer.
    """
    target, originals = targets.of(route)
    if any(revision.deidentified for revision in revisions):  # a PACS has no patient for them
        target, originals = targets.by_name["s3"], False
    # Download what is pushed into a folder that the MAP could not write to, then push it.
    async with temporary_folder("push-") as folder:
        if originals:
            await _push_originals(revisions, folder / "originals", objects=objects, target=target)
        image_sets = await _push_outputs(task, outputs, folder / "results", objects=objects, target=target)
    held = [one.model_copy(update={"image_set_id": image_sets[one.series_uid]}) for one in outputs.outputs]
    return Pushed(tuple(held), target.name)


async def _push_originals(revisions: Iterable[Revision], folder: Path, *, objects: ObjectStore, target: Target) -> None:
    """Push the instances of the inputs that the target does not show, so that a viewer has both.

    They are fetched anew: what lay in the study's folder was in the MAP's hands.
    """
    await asyncio.to_thread(folder.mkdir)
    for revision in revisions:
        uids = revision.study_uid, revision.series_uid
        shown = await target.shown(*uids)
        if shown is None:
            return
        keys = {one.sop_instance_uid: one.key for one in revision.instances if one.sop_instance_uid not in shown}
        wanted = {key: Instance(folder / f"{uid}.dcm", *uids, uid) for uid, key in keys.items()}
        await download_all([(key, one.path) for key, one in wanted.items()], objects=objects)
        await _push(list(wanted.values()), target=target)


async def _push_outputs(
    task: InferenceTask, outputs: Outputs, folder: Path, *, objects: ObjectStore, target: Target
) -> dict[str, str | None]:
    """Push what the MAP made, and return the image set of each series."""
    await asyncio.to_thread(folder.mkdir)
    study_uid = task.inputs[0].study_uid
    wanted = {
        one.key: Instance(folder / PurePosixPath(one.key).name, study_uid, one.series_uid, one.sop_instance_uid)
        for one in outputs.outputs
    }
    if target.name != "s3":
        await download_all([(key, one.path) for key, one in wanted.items()], objects=objects)
    return await _push(list(wanted.values()), target=target)


async def _push(instances: Sequence[Instance], *, target: Target) -> dict[str, str | None]:
    image_sets = await target.push(instances)
    found = sorted(filter(None, image_sets.values()))
    log.info("inference.pushed", instances=len(instances), to=target.name, image_sets=found)
    return image_sets
