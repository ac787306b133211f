"""Start the trainer: `python -m services.trainer`."""

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial

from services.trainer.data.cache import prepare
from services.trainer.evaluation.extractor import fetch_extractor
from services.trainer.handler import handle
from services.trainer.run import Ports, Worker
from services.trainer.sagemaker import SageMaker
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
TOGETHER = (sys.executable, "-m", "services.trainer.distributed")
# Threads that wait for each other must not burn the processor meanwhile: it may be shared with the other services.
WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}


async def serve(settings: TrainerSettings, aws: Aws, metrics: Metrics, stop: asyncio.Event) -> None:
    """Consume the training queue until `stop` is set."""
    async with ports_of(settings, stop, aws=aws) as ports:
        handlers: Mapping[type[Message], Handler] = {TrainingRequested: partial(handle, ports=ports)}
        await consume(handlers, aws.sqs, settings.training_queue, settings=settings, stop=stop, metrics=metrics)


@asynccontextmanager
async def ports_of(settings: TrainerSettings, stop: asyncio.Event, *, aws: Aws) -> AsyncIterator[Ports]:
    """Open the connections and the training process of a trainer; the process ends when the block does."""
    prepare(settings.copies)
    argv = (*TOGETHER, str(settings.processes)) if settings.engine == "torchrun" else WORKER
    local = Child(argv, limits=Limits(memory_bytes=settings.memory_bytes), env=WORKER_ENVIRONMENT)
    objects = ObjectStore(aws.s3, settings.bucket)
    worker: Worker = local
    if settings.engine == "sagemaker":
        worker = SageMaker(settings, client=await aws.client("sagemaker"), objects=objects, local=local)
    try:
        yield Ports(
            objects=objects,
            publish=await Publisher.open(aws.sqs, settings, TrainingRoundCompleted, TrainingCompleted, TrainingFailed),
            worker=worker,
            settings=settings,
            clock=lambda: datetime.now(UTC),
            extractor=await fetch_extractor(settings, s3=aws.s3),
            stop=stop,
        )
    finally:
        await local.stop(kill=True)


if __name__ == "__main__":
    run("trainer", TrainerSettings, serve)
