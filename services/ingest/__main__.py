"""Start ingest: `python -m services.ingest`."""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial

from services.ingest.decoder import Decoder
from services.ingest.handler import handle_uploads
from services.ingest.ports import Ports
from services.ingest.settings import IngestSettings
from services.ingest.settling import handle_settling
from shared.aws import Aws
from shared.messages import Message, ObjectsCreated, SeriesReady, SeriesSettling, UploadRejected
from shared.metrics import Metrics
from shared.objects import ObjectStore
from shared.queue import Handler, Publisher, consume
from shared.service import run


async def serve(settings: IngestSettings, aws: Aws, metrics: Metrics, stop: asyncio.Event) -> None:
    """Consume the ingest queue until `stop` is set."""
    decoder = Decoder(settings)
    ports = Ports(
        objects=ObjectStore(aws.s3, settings.bucket),
        publish=await Publisher.open(aws.sqs, settings, SeriesSettling, SeriesReady, UploadRejected),
        decoder=decoder,
        settings=settings,
        clock=lambda: datetime.now(UTC),
    )
    handlers: Mapping[type[Message], Handler] = {
        ObjectsCreated: partial(handle_uploads, ports=ports),
        SeriesSettling: partial(handle_settling, ports=ports),
    }
    try:
        await consume(handlers, aws.sqs, settings.ingest_queue, settings=settings, stop=stop, metrics=metrics)
    finally:
        await decoder.stop()


if __name__ == "__main__":
    run("ingest", IngestSettings, serve)
