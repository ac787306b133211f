"""Asking for a training: the checks that can be made before anybody works on it, and the request.

IAM: s3:ListBucket and s3:GetObject on the bucket; sqs:GetQueueUrl and sqs:SendMessage on the training queue.
"""

from datetime import datetime
from typing import TYPE_CHECKING

from shared.messages import TrainingRequest, TrainingRequested
from shared.operations.bucket import Bucket, document
from shared.operations.refused import Refused

if TYPE_CHECKING:
    from shared.queue import Publish


async def check(request: TrainingRequest, *, objects: Bucket) -> None:
    """Make sure that the request is no other one's, and has something to train on.

    Raises:
        Refused: it would be refused, or never be worked on.
    """
    await require_same(request, objects=objects)
    await _require_data(request, objects=objects)


async def require_same(request: TrainingRequest, *, objects: Bucket) -> None:
    """Make sure that an id which was used before was this very request's. Raises `Refused`."""
    taken = await document(f"models/{request.request_id}/options.json", objects=objects)
    if taken is None:
        return
    asked, before = request.model_dump(mode="json"), taken["request"]
    if differing := [name for name, value in asked.items() if name in before and before[name] != value]:
        raise Refused(
            f"the request {request.request_id} was made before, with another {', '.join(differing)}: ask as before to "
            "go on with it, or with another --request-id for a new training"
        )


async def _require_data(request: TrainingRequest, *, objects: Bucket) -> None:
    """Make sure that there is something to train on, where the bucket can tell. Raises `Refused`."""
    if request.data_uri is not None:
        return
    for dataset in request.classes.values() or [request.dataset]:
        async for _ in objects.list(f"datasets/{dataset}/"):
            break
        else:
            raise Refused(f"there is no training data in the dataset {dataset}: upload images to it first")


async def ask(request: TrainingRequest, *, publish: "Publish", now: datetime) -> None:
    """Send the request to the trainer."""
    await publish(TrainingRequested.of(request.request_id, request, time=now))
