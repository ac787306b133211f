"""Start the inference worker: `python -m services.inference`."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, closing, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any

from services.inference import stable_studies
from services.inference.handler import infer, route
from services.inference.package.engine import Engine
from services.inference.serving.bounds import bounds_of, serving_of
from services.inference.serving.fleet import Fleet
from services.inference.serving.gpus import Share
from services.inference.serving.place import Place
from services.inference.serving.runner import MapRunner, WorkerUnfit
from services.inference.serving.sources import Sources
from services.inference.serving.table import WatchedTable
from services.inference.serving.versions import Versions
from services.inference.settings import InferenceSettings
from services.inference.targets.configured import open_targets
from shared.aws import Aws
from shared.concurrency import KeyedLocks
from shared.keys import ResultKeys
from shared.messages import (
    InferenceCompleted,
    InferenceFailed,
    InferenceRequested,
    InferenceSkipped,
    MapRejected,
    MapUpdated,
    Message,
    SeriesReady,
    StudySettling,
)
from shared.metrics import Metrics
from shared.objects import ObjectStore
from shared.pydicom_silence import silence
from shared.queue import Handler, Publisher, consume
from shared.service import run

PUBLISHED = (
    InferenceRequested,
    StudySettling,
    InferenceCompleted,
    InferenceFailed,
    InferenceSkipped,
    MapUpdated,
    MapRejected,
)


async def serve(settings: InferenceSettings, aws: Aws, metrics: Metrics, stop: asyncio.Event) -> None:
    """Consume the inference queue until `stop` is set.

    Raises:
        WorkerUnfit: after a stop because a GPU was lost; a new process can handle what was given back.
    """
    # Connect.
    silence()
    objects = ObjectStore(aws.s3, settings.bucket)
    publish = await Publisher.open(aws.sqs, settings, *PUBLISHED)

    def clock() -> datetime:
        return datetime.now(UTC)

    allowed = [one.strip() for one in settings.gpus.split(",") if one.strip()]
    async with AsyncExitStack() as stack:
        targets = await stack.enter_async_context(open_targets(settings, aws, objects))
        engine = partial(Engine.find, settings.container_engine, settings.engine_arguments)
        place = Place(settings.maps_file, aws.s3)
        gpus = stack.enter_context(closing(Share(settings.work_dir / "gpus", allowed)))
        # Read the table and its MAPs, and wait for room on the GPUs.
        fleet = Fleet(
            table=WatchedTable(place=place, require=targets.require, metrics=metrics),
            sources=Sources(place.folder, partial(open_ecr, aws), engine, place.file),
            versions=Versions(objects=objects, publish=publish, clock=clock),
            gpus=gpus,
            metrics=metrics,
        )
        await fleet.begin()
        maps = fleet.maps
        await gpus.wait_for(found.map.needs for found in maps.values())
        runner = MapRunner(
            [found.map for found in maps.values()],
            serving={name: serving_of(found.route) for name, found in maps.items()},
            bounds=bounds_of(settings, gpus.devices),
        )
        # Name the handlers.
        handle_request = partial(
            infer,
            objects=objects,
            publish=publish,
            maps=maps,
            runner=runner,
            targets=targets,
            clock=clock,
            # A held message stays hidden for half of its visibility timeout at least: the lease of a worker that was
            # killed ends first.
            lease_s=settings.visibility_s / 2,
        )
        quiet = stable_studies.Quiet(settings.study_quiet_s, settings.study_max_settle_s)
        routing: dict[str, Any] = {"objects": objects, "publish": publish, "maps": maps, "clock": clock, "quiet": quiet}
        handlers: Mapping[type[Message], Handler] = {
            SeriesReady: partial(route, **routing),
            StudySettling: partial(stable_studies.settle, **routing),
            InferenceRequested: in_turn(handle_request, stop),
        }
        # Start the MAPs, then serve until `stop` is set.
        try:
            await fleet.start(runner)
            async with kept_current(fleet, runner, settings, stop):
                await consume(
                    handlers, aws.sqs, settings.inference_queue, settings=settings, stop=stop, metrics=metrics
                )
        finally:
            await runner.stop()
    if runner.unfit is not None:
        raise runner.unfit


def in_turn(handle_request: Callable[[InferenceRequested], Awaitable[None]], stop: asyncio.Event) -> Handler:
    """Let repeats of one request wait for one another, so that the second finds the result and computes nothing.

    If this process cannot serve any more, it stops: retried here, its requests would fail until SQS gives them up.
    """
    locks = KeyedLocks()

    async def handle(requested: InferenceRequested) -> None:
        try:
            async with locks(ResultKeys.of(requested.data).prefix):
                await handle_request(requested)
        except WorkerUnfit:
            stop.set()
            raise

    return handle


@asynccontextmanager
async def kept_current(
    fleet: Fleet, runner: MapRunner, settings: InferenceSettings, stop: asyncio.Event
) -> AsyncIterator[None]:
    """Follow new versions and a new routing table meanwhile; what goes wrong with that as a bug stops the worker."""
    keeping = asyncio.create_task(
        fleet.keep_current(runner, table_s=settings.maps_look_s, sources_s=settings.map_versions_look_s)
    )
    keeping.add_done_callback(lambda _: stop.set())
    try:
        yield
    finally:
        keeping.cancel()
        with suppress(asyncio.CancelledError):
            await keeping


def open_ecr(aws: Aws, region: str) -> AbstractAsyncContextManager[Any]:
    """Open a client of ECR, which is only asked once in a while."""
    create: Any = aws.session.create_client  # its overloads list every service by name
    opened: AbstractAsyncContextManager[Any] = create("ecr", region_name=region)
    return opened


if __name__ == "__main__":
    run("inference", InferenceSettings, serve)
