"""Start ingest: `python -m services.ingest`."""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from services.ingest.datasets import Datasets, read
from services.ingest.decoder import Decoder
from services.ingest.handler import handle_uploads
from services.ingest.ports import Ports
from services.ingest.settings import IngestSettings
from services.ingest.stable_series import handle_settling
from shared.aws import Aws
from shared.config import Misconfigured
from shared.messages import Message, ObjectsCreated, SeriesReady, SeriesSettling, UploadRejected
from shared.metrics import Metrics
from shared.objects import ObjectStore
from shared.queue import Handler, Publisher, consume
from shared.service import run


async def serve(settings: IngestSettings, aws: Aws, metrics: Metrics, stop: asyncio.Event) -> None:
    """Consume the ingest queue until `stop` is set.

    Raises:
        Misconfigured: `datasets.yaml` cannot be used.
    """
    datasets = _datasets(settings)
    decoder = Decoder(settings)
    ports = Ports(
        objects=ObjectStore(aws.s3, settings.bucket),
        publish=await Publisher.open(aws.sqs, settings, SeriesSettling, SeriesReady, UploadRejected),
        decoder=decoder,
        settings=settings,
        clock=lambda: datetime.now(UTC),
        datasets=datasets,
    )
    handlers: Mapping[type[Message], Handler] = {
        ObjectsCreated: partial(handle_uploads, ports=ports),
        SeriesSettling: partial(handle_settling, ports=ports),
    }
    try:
        await consume(handlers, aws.sqs, settings.ingest_queue, settings=settings, stop=stop, metrics=metrics)
    finally:
        await decoder.stop()


def _datasets(settings: IngestSettings) -> Datasets:
    if not settings.datasets_file:
        return Datasets()
    try:
        text = Path(settings.datasets_file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Misconfigured(f"RADQUEUE_DATASETS_FILE: cannot be read ({type(error).__name__}).") from None
    return read(text, settings.patient_secret.get_secret_value())


if __name__ == "__main__":
    run("ingest", IngestSettings, serve)
