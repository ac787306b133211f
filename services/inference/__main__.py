"""Start the inference worker: `python -m services.inference`."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import aiohttp
from botocore.exceptions import BotoCoreError, ClientError

from services.inference.archive import Archive
from services.inference.handler import InstalledMap, infer, route
from services.inference.maps import load
from services.inference.records import result_prefix
from services.inference.routing import read
from services.inference.runner import MapChanged, MapRunner
from services.inference.settings import InferenceSettings
from shared.aws import Aws
from shared.child import ChildFailed
from shared.concurrency import KeyedLocks
from shared.config import Misconfigured
from shared.dicom import silence
from shared.dicomweb import Basic, DicomWeb, SigV4, base_url
from shared.log import get_logger
from shared.messages import (
    InferenceCompleted,
    InferenceFailed,
    InferenceRequested,
    InferenceSkipped,
    Message,
    SeriesReady,
)
from shared.metrics import Metrics
from shared.objects import ObjectStore
from shared.queue import Handler, Publisher, consume
from shared.service import run

log = get_logger()


async def serve(settings: InferenceSettings, aws: Aws, metrics: Metrics, stop: asyncio.Event) -> None:
    """Consume the inference queue until `stop` is set.

    Raises:
        MapChanged: after a stop because a MAP was changed on disk; a new process can handle what was given back.
    """
    silence()
    maps = installed_maps(settings.maps_file)
    objects = ObjectStore(aws.s3, settings.bucket)
    publish = await Publisher.open(
        aws.sqs, settings, InferenceRequested, InferenceCompleted, InferenceFailed, InferenceSkipped
    )
    runner = MapRunner(
        [found.map for found in maps.values()],
        deadline_s=settings.deadline_s,
        start_deadline_s=settings.start_deadline_s,
        recycle_after=settings.recycle_after,
        memory_bytes=settings.map_memory_bytes,
    )

    def clock() -> datetime:
        return datetime.now(UTC)

    async with open_archive(settings, aws) as archive:
        handle_request = partial(
            infer, objects=objects, publish=publish, maps=maps, runner=runner, archive=archive, clock=clock
        )
        handlers: Mapping[type[Message], Handler] = {
            SeriesReady: partial(route, objects=objects, publish=publish, maps=maps, clock=clock),
            InferenceRequested: in_turn(handle_request, stop),
        }
        try:
            await _start_maps(runner, maps)
            await consume(handlers, aws.sqs, settings.inference_queue, settings=settings, stop=stop, metrics=metrics)
        finally:
            await runner.stop()
    if runner.changed:
        raise MapChanged


def in_turn(handle_request: Callable[[InferenceRequested], Awaitable[None]], stop: asyncio.Event) -> Handler:
    """Let repeats of one request wait for one another, so that the second finds the result and computes nothing.

    Where a MAP has changed, the worker stops: retried here, its requests would fail until SQS gives them up.
    """
    locks = KeyedLocks()

    async def handle(requested: InferenceRequested) -> None:
        try:
            async with locks(result_prefix(requested.data)):
                await handle_request(requested)
        except MapChanged:
            stop.set()
            raise

    return handle


def installed_maps(maps_file: Path) -> dict[str, InstalledMap]:
    """Read the routing table and the MAPs that it names.

    Raises:
        Misconfigured: the file or a source cannot be used.
    """
    try:
        text = maps_file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Misconfigured(f"RADQUEUE_MAPS_FILE: {maps_file} cannot be read ({type(error).__name__}).") from None
    table = read(text)
    return {one.name: InstalledMap(load(one.name, maps_file.parent / one.source), one) for one in table.maps}


@asynccontextmanager
async def open_archive(settings: InferenceSettings, aws: Aws) -> AsyncIterator[Archive]:
    """Open the archive that takes the results.

    Raises:
        Misconfigured: none is named, or the data store does not answer.
    """
    async with aiohttp.ClientSession() as session:
        if settings.dicomweb_url:
            user, password = settings.dicomweb_username, settings.dicomweb_password.get_secret_value()
            auth = Basic(user, password) if user else None
            yield Archive(DicomWeb(settings.dicomweb_url, session=session, auth=auth))
            return
        await _datastore_answers(settings, aws)
        url = base_url(endpoint_url=aws.endpoint_url, region=aws.region, datastore_id=settings.datastore_id)
        web = DicomWeb(url, session=session, auth=SigV4(aws.credentials, aws.region))
        yield Archive(web, healthimaging=aws.medical_imaging, datastore_id=settings.datastore_id)


async def _start_maps(runner: MapRunner, maps: dict[str, InstalledMap]) -> None:
    """Import every MAP now: one that cannot be imported is a mistake of the deployment, not of a study."""
    for name, installed in maps.items():
        try:
            device = await runner.start(name)
        except ChildFailed as failed:
            raise Misconfigured(f"maps.yaml: {name}: cannot be imported ({failed}).") from None
        log.info("map.ready", map=name, map_digest=installed.map.digest, device=device)


async def _datastore_answers(settings: InferenceSettings, aws: Aws) -> None:
    if not settings.datastore_id:
        raise Misconfigured("RADQUEUE_DATASTORE_ID: not set. The HealthImaging data store that takes the results.")
    try:
        await aws.medical_imaging.get_datastore(datastoreId=settings.datastore_id)
    except ClientError as error:
        code = error.response["Error"]["Code"]
        raise Misconfigured(f"RADQUEUE_DATASTORE_ID: HealthImaging answers {code} for this data store.") from None
    except BotoCoreError as error:
        raise Misconfigured(f"RADQUEUE_DATASTORE_ID: HealthImaging fails with {type(error).__name__}.") from None


if __name__ == "__main__":
    run("inference", InferenceSettings, serve)
