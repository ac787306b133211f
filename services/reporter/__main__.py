"""Start the reporter: `python -m services.reporter`."""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial

from services.reporter.eventlog import EventLog
from services.reporter.handler import COUNTS, RecentIds, record, report
from services.reporter.settings import ReporterSettings
from shared.aws import Aws
from shared.messages import Message, ReportRequested
from shared.metrics import Metrics
from shared.objects import ObjectStore
from shared.queue import Handler, consume
from shared.service import run


async def serve(settings: ReporterSettings, aws: Aws, metrics: Metrics, stop: asyncio.Event) -> None:
    """Consume the reporting queue until `stop` is set."""
    objects = ObjectStore(aws.s3, settings.bucket)
    events = EventLog(objects, max_events=settings.log_events, max_wait_s=settings.log_wait_s)
    recent = RecentIds(settings.recent_events)

    recorded = partial(record, events=events, metrics=metrics, recent=recent)
    reported = partial(
        report,
        objects=objects,
        events=events,
        clock=lambda: datetime.now(UTC),
        largest_image_bytes=settings.largest_image_bytes,
    )
    handlers: Mapping[type[Message], Handler] = {**dict.fromkeys(COUNTS, recorded), ReportRequested: reported}
    await consume(handlers, aws.sqs, settings.reporting_queue, settings=settings, stop=stop, metrics=metrics)


if __name__ == "__main__":
    run("reporter", ReporterSettings, serve)
