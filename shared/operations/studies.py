"""What became of a study, and asking once more for what failed of it.

IAM: s3:ListBucket and s3:GetObject on the bucket; sqs:GetQueueUrl and sqs:SendMessage on the inference queue.
"""

import re
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from shared.dicom import is_uid
from shared.messages import EVENT_NAMESPACE, InferenceRequested, InferenceTask
from shared.operations.bucket import Bucket, document
from shared.operations.refused import Refused, WrongUsage

if TYPE_CHECKING:
    from shared.queue import Publish

ENDED = re.compile(r"(results/[^/]+/(?P<series>[^/]+)/[^/]+/[^/@]+@[^/]+/)(?P<ending>result|failure)\.json")


@dataclass(frozen=True, slots=True)
class Ended:
    """What came of one MAP on one series of a study, or on the study as a whole."""

    key: str
    """Of `result.json` or `failure.json`."""
    series: str
    """The part of the key that names the series, or `study`."""
    record: dict[str, Any]
    """What the object says."""

    @property
    def map(self) -> str:
        """The MAP's name."""
        return str(self.record["map"])

    @property
    def failed(self) -> bool:
        """Whether it ended with a failure."""
        return self.key.endswith("/failure.json")

    @property
    def prefix(self) -> str:
        """Where all of this result lies."""
        return self.key.rpartition("/")[0] + "/"


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
        async for _ in objects.list(f"studies/{study_uid}/"):
            raise Refused(f"study {study_uid} has no results yet")
        raise Refused(f"study {study_uid} is not known")
    return found


async def newest_of(study_uid: str, *, objects: Bucket) -> dict[tuple[str, str], Ended]:
    """Do what `newest` does; empty where there is nothing, as while all that failed runs again."""
    aged = [(await _age(ended, objects=objects), ended) async for ended in _ended(study_uid, objects=objects)]
    aged.sort(key=lambda one: one[0])
    return {(ended.series, ended.map): ended for _, ended in aged}


async def retry(study_uid: str, *, objects: Bucket, publish: "Publish", now: datetime) -> dict[tuple[str, str], Ended]:
    """Ask again for what failed of a study, where nothing came after it, and return those failures.

    The request that failed would only be answered by its failure, so this is another event. It is made of the failed
    attempt alone: asked twice, it is the same event, and runs once.

    Raises:
        WrongUsage: this is no UID.
        Refused: nothing of the study failed.
    """
    found = await newest(study_uid, objects=objects)
    failed = {one: ended for one, ended in found.items() if ended.failed}
    if not failed:
        raise Refused(f"nothing of study {study_uid} failed")
    for ended in failed.values():
        task = InferenceTask.model_validate({name: ended.record[name] for name in InferenceTask.model_fields})
        event = InferenceRequested.of(ended.prefix, task, time=now)
        identity = uuid.uuid5(EVENT_NAMESPACE, f"retry {ended.record['attempt']}")
        await publish(event.model_copy(update={"id": str(identity)}))
    return failed


async def _ended(study_uid: str, *, objects: Bucket) -> AsyncIterator[Ended]:
    found = {stored.key: ENDED.fullmatch(stored.key) async for stored in objects.list(f"results/{study_uid}/")}
    for key, match in found.items():
        # A failure may stay behind when another request succeeds.
        if match is None or (match["ending"] == "failure" and f"{match[1]}result.json" in found):
            continue
        record = await document(key, objects=objects)
        if record is not None:
            yield Ended(key, match["series"], record)


async def _age(ended: Ended, *, objects: Bucket) -> tuple[str, str]:
    """Order results by their revisions: one of an older revision may have been finished later."""
    revision = await document(ended.record["inputs"][0]["revision_key"], objects=objects) or {}
    return revision.get("created", ""), ended.record["time"]
