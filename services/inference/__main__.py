"""Start the inference worker: `python -m services.inference`."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, closing, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any

import aiohttp
from botocore.exceptions import BotoCoreError, ClientError

from services.inference import stable_studies
from services.inference.handler import infer, route
from services.inference.package.engine import Engine
from services.inference.records import result_prefix
from services.inference.routing import TargetName
from services.inference.serving.gpus import Share
from services.inference.serving.runner import Bounds, MapRunner, WorkerUnfit
from services.inference.serving.versions import Fleet, Place, Sources, serving_of
from services.inference.settings import InferenceSettings
from services.inference.targets.dicomweb import DicomWebTarget
from services.inference.targets.healthimaging import HealthImaging
from services.inference.targets.import_job import ImportJobs
from services.inference.targets.s3_only import S3Only
from services.inference.targets.target import NEEDED, Target, Targets
from shared.aws import Aws
from shared.concurrency import KeyedLocks
from shared.config import Misconfigured
from shared.dicom import silence
from shared.dicomweb import Auth, Basic, Bearer, DicomWeb, SigV4, base_url
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
    silence()
    objects = ObjectStore(aws.s3, settings.bucket)
    publish = await Publisher.open(aws.sqs, settings, *PUBLISHED)

    def clock() -> datetime:
        return datetime.now(UTC)

    allowed = [one.strip() for one in settings.gpus.split(",") if one.strip()]
    async with AsyncExitStack() as stack:
        targets = await stack.enter_async_context(open_targets(settings, aws, objects))
        engine = partial(Engine.find, settings.container_engine, settings.engine_arguments)
        table = Place(settings.maps_file, aws.s3)
        sources = Sources(table.folder, partial(open_ecr, aws), engine, table.file)
        gpus = stack.enter_context(closing(Share(settings.work_dir / "gpus", allowed)))
        fleet = Fleet(table, sources, targets, objects, publish, metrics, clock, gpus)
        await fleet.begin()
        maps = fleet.maps
        await gpus.wait_for(found.map.needs for found in maps.values())
        runner = MapRunner(
            [found.map for found in maps.values()],
            serving={name: serving_of(found.route) for name, found in maps.items()},
            bounds=bounds_of(settings, gpus.devices),
        )
        handle_request = partial(
            infer,
            objects=objects,
            publish=publish,
            maps=maps,
            runner=runner,
            targets=targets,
            clock=clock,
            # A held message stays hidden for half of its visibility timeout at least: the claim of a worker that was
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


def bounds_of(settings: InferenceSettings, gpus: tuple[str, ...] = ()) -> Bounds:
    """Return what every MAP of this worker may use."""
    return Bounds(
        deadline_s=settings.deadline_s,
        start_deadline_s=settings.start_deadline_s,
        recycle_after=settings.recycle_after,
        growth_bytes=settings.map_growth_bytes,
        memory_bytes=settings.map_memory_bytes,
        processes=settings.map_processes,
        gpus=gpus,
    )


def in_turn(handle_request: Callable[[InferenceRequested], Awaitable[None]], stop: asyncio.Event) -> Handler:
    """Let repeats of one request wait for one another, so that the second finds the result and computes nothing.

    Where this process cannot serve any more, it stops: retried here, its requests would fail until SQS gives them up.
    """
    locks = KeyedLocks()

    async def handle(requested: InferenceRequested) -> None:
        try:
            async with locks(result_prefix(requested.data)):
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


@asynccontextmanager
async def open_targets(settings: InferenceSettings, aws: Aws, objects: ObjectStore) -> AsyncIterator[Targets]:
    """Open the targets that the settings name.

    Raises:
        Misconfigured: the one that takes results by default is not named, or the data store does not answer.
    """
    default = settings.push_to or ("dicomweb" if settings.dicomweb_url else "healthimaging")
    async with aiohttp.ClientSession() as session:
        by_name: dict[TargetName, Target] = {"s3": S3Only()}
        if settings.dicomweb_url:
            web = DicomWeb(settings.dicomweb_url, session=session, auth=_dicomweb_auth(settings))
            by_name["dicomweb"] = DicomWebTarget(web)
        if settings.datastore_id:
            await _datastore_answers(settings, aws)
            url = base_url(endpoint_url=aws.endpoint_url, region=aws.region, datastore_id=settings.datastore_id)
            web = DicomWeb(url, session=session, auth=SigV4(aws.credentials, aws.region))
            place = aws.medical_imaging, settings.datastore_id
            by_name["healthimaging"] = HealthImaging(web, *place)
            if settings.import_role_arn:
                imports = ImportJobs(web, *place, objects=objects, role_arn=settings.import_role_arn)
                by_name["healthimaging-import"] = imports
        if default not in by_name:
            raise Misconfigured(f"{NEEDED[default]}: not set. {default} takes the results, as RADQUEUE_PUSH_TO has it.")
        yield Targets(by_name, default, originals=settings.push_originals)


def _dicomweb_auth(settings: InferenceSettings) -> Auth | None:
    if token := settings.dicomweb_token.get_secret_value():
        return Bearer(token)
    password = settings.dicomweb_password.get_secret_value()
    return Basic(settings.dicomweb_username, password) if settings.dicomweb_username else None


def open_ecr(aws: Aws, region: str) -> AbstractAsyncContextManager[Any]:
    """Open a client of ECR, which is only asked once in a while."""
    create: Any = aws.session.create_client  # its overloads list every service by name
    opened: AbstractAsyncContextManager[Any] = create("ecr", region_name=region)
    return opened


async def _datastore_answers(settings: InferenceSettings, aws: Aws) -> None:
    try:
        await aws.medical_imaging.get_datastore(datastoreId=settings.datastore_id)
    except ClientError as error:
        code = error.response["Error"]["Code"]
        raise Misconfigured(f"RADQUEUE_DATASTORE_ID: HealthImaging answers {code} for this data store.") from None
    except BotoCoreError as error:
        raise Misconfigured(f"RADQUEUE_DATASTORE_ID: HealthImaging fails with {type(error).__name__}.") from None


if __name__ == "__main__":
    run("inference", InferenceSettings, serve)
