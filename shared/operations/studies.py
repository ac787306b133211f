"""What became of a study, and asking once more for what failed of it.

IAM: s3:ListBucket and s3:GetObject on the bucket; sqs:GetQueueUrl and sqs:SendMessage on the inference queue.
"""

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from shared import keys
from shared.documents.inference import Failure, Result
from shared.keys import ResultKeys, is_uid
from shared.messages import EVENT_NAMESPACE, InferenceRequested, InferenceTask
from shared.operations.bucket import Bucket, read
from shared.operations.refused import Refused, WrongUsage

if TYPE_CHECKING:
    from shared.queue import Publish


@dataclass(frozen=True, slots=True)
class Ended:
    """What came of one MAP on one series of a study, or on the study as a whole."""

    place: ResultKeys
    series: str
    """The part of the key that names the series, or `study`."""
    record: Result | Failure
    """The content of the object."""


async def newest(study_uid: str, *, objects: Bucket) -> dict[tuple[str, str], Ended]:
    """Return what came last of each MAP on each series of a study, by series (or `study`) and MAP.

    Raises:
        WrongUsage: this is no UID.
        Refused: the study has no results.
    """
    if not is_uid(study_uid):
        raise WrongUsage(f"{study_uid} is no StudyInstanceUID")
    found = await newest_of(study_uid, objects=objects)
    if not found:
        async for _ in objects.list(keys.study_prefix(study_uid)):
            raise Refused(f"study {study_uid} has no results yet")
        raise Refused(f"study {study_uid} is not known")
    return found


async def newest_of(study_uid: str, *, objects: Bucket) -> dict[tuple[str, str], Ended]:
    """Do what `newest` does; empty if there is nothing, as while all that failed runs again."""
    aged = [(await _age(ended, objects=objects), ended) async for ended in _ended(study_uid, objects=objects)]
    aged.sort(key=lambda one: one[0])
    return {(ended.series, ended.record.map): ended for _, ended in aged}


async def retry(
    study_uid: str, *, objects: Bucket, publish: "Publish", now: datetime
) -> dict[tuple[str, str], Failure]:
    """Ask again for what failed of a study, where nothing came after it, and return those failures.

    The request that failed would only be answered by its failure, so this is another event. It is made of the failed
    attempt alone: asked twice, it is the same event, and runs once.

    Raises:
        WrongUsage: this is no UID.
        Refused: nothing of the study failed.
    """
    found = await newest(study_uid, objects=objects)
    failed = {one: ended.record for one, ended in found.items() if isinstance(ended.record, Failure)}
    if not failed:
        raise Refused(f"nothing of study {study_uid} failed")
    for failure in failed.values():
        task = InferenceTask(map=failure.map, map_digest=failure.map_digest, inputs=failure.inputs)
        event = InferenceRequested.of(ResultKeys.of(task).prefix, task, time=now)
        identity = uuid.uuid5(EVENT_NAMESPACE, f"retry {failure.attempt}")
        await publish(event.model_copy(update={"id": str(identity)}))
    return failed


async def _ended(study_uid: str, *, objects: Bucket) -> AsyncIterator[Ended]:
    listed = [keys.stored_result(stored.key) async for stored in objects.list(keys.results_prefix(study_uid))]
    for found in dict.fromkeys(listed):
        if found is None:
            continue
        series, place = found
        # A failure may stay behind when another request succeeds.
        record = await read(place.result, objects=objects) or await read(place.failure, objects=objects)
        if record is not None:
            yield Ended(place, series, record)


async def _age(ended: Ended, *, objects: Bucket) -> tuple[datetime, datetime]:
    """Order results by their revisions: one of an older revision may have been finished later."""
    revision = await read(keys.revision_of(ended.record.inputs[0]), objects=objects)
    return revision.created if revision else datetime.min.replace(tzinfo=UTC), ended.record.time
