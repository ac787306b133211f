"""Start the trainer: `python -m services.trainer`."""

import asyncio
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial

from services.trainer.extractor import fetch_extractor
from services.trainer.handler import Ports, handle
from services.trainer.settings import TrainerSettings
from shared.aws import Aws
from shared.child import Child, Limits
from shared.messages import (
    Message,
    TrainingCompleted,
    TrainingFailed,
    TrainingRequested,
    TrainingRoundCompleted,
)
from shared.metrics import Metrics
from shared.objects import ObjectStore
from shared.queue import Handler, Publisher, consume
from shared.service import run

WORKER = (sys.executable, "-m", "services.trainer.worker")
# Threads that wait for each other must not burn the processor meanwhile: it may be shared with the other services.
WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}


async def serve(settings: TrainerSettings, aws: Aws, metrics: Metrics, stop: asyncio.Event) -> None:
    """Consume the training queue until `stop` is set."""
    worker = Child(WORKER, limits=Limits(memory_bytes=settings.memory_bytes), env=WORKER_ENVIRONMENT)
    ports = Ports(
        objects=ObjectStore(aws.s3, settings.bucket),
        publish=await Publisher.open(aws.sqs, settings, TrainingRoundCompleted, TrainingCompleted, TrainingFailed),
        worker=worker,
        settings=settings,
        clock=lambda: datetime.now(UTC),
        extractor=await fetch_extractor(settings, aws.s3),
    )
    handlers: Mapping[type[Message], Handler] = {TrainingRequested: partial(handle, ports=ports)}
    try:
        await consume(handlers, aws.sqs, settings.training_queue, settings=settings, stop=stop, metrics=metrics)
    finally:
        await worker.stop(kill=True)


if __name__ == "__main__":
    run("trainer", TrainerSettings, serve)
