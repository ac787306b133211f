"""The two journeys of the reporter: an event is recorded, a report is made.

IAM: s3:GetObject, s3:PutObject and s3:ListBucket on `events/*`, `reports/*` and `models/*`; cloudwatch:PutMetricData.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from datetime import datetime
from typing import Any

from services.reporter.aggregate import Report, Tally, known_modality, month_before, training_status
from services.reporter.eventlog import EventLog
from services.reporter.page import page
from shared import metrics as declared
from shared.log import get_logger
from shared.messages import (
    Event,
    InferenceCompleted,
    InferenceFailed,
    InferenceSkipped,
    MapRejected,
    MapUpdated,
    ReportRequested,
    SeriesReady,
    TrainingCompleted,
    TrainingFailed,
    TrainingRoundCompleted,
    UploadRejected,
)
from shared.metrics import Metrics
from shared.objects import ObjectMissing, ObjectStore

log = get_logger()


class RecentIds:
    """The ids of the last `size` events that were written.

    Best effort: it ends with the process, and another reporter has its own.
    CloudWatch may count a repeat, a report does not.
    """

    def __init__(self, size: int) -> None:
        """Begin with none."""
        self._size = size
        self._ids: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, event_id: str) -> bool:
        """Tell whether the event was written."""
        return event_id in self._ids

    def add(self, event_id: str) -> bool:
        """Remember the id; tells whether it is new."""
        new = event_id not in self._ids
        self._ids[event_id] = None
        self._ids.move_to_end(event_id)
        if len(self._ids) > self._size:
            self._ids.popitem(last=False)
        return new


async def record(event: Event, *, events: EventLog, metrics: Metrics, recent: RecentIds) -> None:
    """Write one event to the log, and count it.

    Returns only when the event is stored, so its message is never deleted before. A second delivery is left out, or
    writes the same event again, which reports discard.

    Raises:
        Unavailable: the log could not be written.
    """
    # Skip what is stored already: an id is remembered only after its write.
    if event.id in recent:
        log.info("event.repeated")
        return

    # Store.
    await events.append(event)

    # Count, the first of two deliveries that waited for the same write.
    if recent.add(event.id):
        COUNTS[type(event)](event, metrics)


async def report(
    request: ReportRequested,
    *,
    objects: ObjectStore,
    events: EventLog,
    clock: Callable[[], datetime],
    largest_image_bytes: int,
) -> None:
    """Make the report of one month from the event log: `reports/<YYYY-MM>.json`, and a page for people beside it.

    It holds every event that was received before the request; one that comes later is in the next report of the month,
    which replaces this one. So any number of requests may run. The request itself is not put into the log: it tells
    nothing of the work that reports are about, and the report says when it was made.

    Raises:
        Unavailable: the object store does not answer.
    """
    month = request.data.month or month_before(request.time)

    # Flush.
    await events.flush()

    # Read and add up, beside the event loop: a month may hold a million lines.
    tally = Tally(month)
    async for lines in events.read(month):
        await asyncio.to_thread(tally.add_lines, lines)
    made = await asyncio.to_thread(tally.report, generated_at=clock())

    # Fetch the images.
    images = await _images(made, largest_image_bytes, objects=objects)

    # Store: the numbers first, which the page links to.
    await objects.put(f"reports/{month}.json", made.model_dump_json(indent=2).encode())
    await objects.put(f"reports/{month}.html", await asyncio.to_thread(page, made, images))
    log.info("report.made", month=month, events=made.n_events, repeats=made.n_repeats, unreadable=made.n_unreadable)


async def _images(made: Report, largest_bytes: int, *, objects: ObjectStore) -> dict[str, bytes]:
    """Return the image grid of each completed training by request id; one that is gone or too large is left out."""
    images = {}
    for training in made.training:
        if training.images_key is None:
            continue
        try:
            if await objects.size(training.images_key) <= largest_bytes:
                images[training.request_id] = await objects.get(training.images_key)
            else:
                log.warning("report.image_too_large", request_id=training.request_id)
        except ObjectMissing:
            log.warning("report.image_gone", request_id=training.request_id)
    return images


# What CloudWatch is told of each event.


def _count_series(event: SeriesReady, metrics: Metrics) -> None:
    metrics.put(declared.SERIES_READY, 1, at=event.time, Modality=known_modality(event.data.modality))


def _count_rejection(event: UploadRejected, metrics: Metrics) -> None:
    metrics.put(declared.UPLOADS_REJECTED, 1, at=event.time, Reason=event.data.reason_code)


def _count_skipped(event: InferenceSkipped, metrics: Metrics) -> None:
    metrics.put(declared.INFERENCE_OUTCOMES, 1, at=event.time, Map="none", Outcome=event.data.reason_code)


def _count_completed_run(event: InferenceCompleted, metrics: Metrics) -> None:
    run = event.data
    metrics.put(declared.INFERENCE_OUTCOMES, 1, at=event.time, Map=run.map, Outcome=run.outcome)
    if run.outcome == "completed":
        metrics.put(declared.INFERENCE_DURATION, run.duration_s, at=event.time, Map=run.map)


def _count_failed_run(event: InferenceFailed, metrics: Metrics) -> None:
    run = event.data
    metrics.put(declared.INFERENCE_OUTCOMES, 1, at=event.time, Map=run.map, Outcome="failed")
    metrics.put(declared.INFERENCE_FAILURES, 1, at=event.time, Map=run.map, Reason=run.reason_code)


def _count_updated_map(event: MapUpdated, metrics: Metrics) -> None:
    metrics.put(declared.MAP_VERSIONS, 1, at=event.time, Map=event.data.map, Outcome="updated")


def _count_rejected_map(event: MapRejected, metrics: Metrics) -> None:
    metrics.put(declared.MAP_VERSIONS, 1, at=event.time, Map=event.data.map, Outcome="rejected")


def _count_round(event: TrainingRoundCompleted, metrics: Metrics) -> None:
    found = event.data.evaluation
    where = {"Dataset": event.data.dataset, "Space": found.space}
    metrics.put(declared.FRECHET_DISTANCE, found.distance, at=event.time, **where)
    metrics.put(declared.RELATIVE_FRECHET_DISTANCE, found.relative_fd, at=event.time, **where)
    metrics.put(declared.TRAINING_ROUNDS, 1, at=event.time, Dataset=event.data.dataset)


def _count_completed_training(event: TrainingCompleted, metrics: Metrics) -> None:
    metrics.put(declared.TRAINING_OUTCOMES, 1, at=event.time, Outcome=training_status(event.data.approved))


def _count_failed_training(event: TrainingFailed, metrics: Metrics) -> None:
    metrics.put(declared.TRAINING_OUTCOMES, 1, at=event.time, Outcome="failed")
    metrics.put(declared.TRAINING_FAILURES, 1, at=event.time, Reason=event.data.reason_code)


COUNTS: dict[type[Event], Callable[[Any, Metrics], None]] = {
    SeriesReady: _count_series,
    UploadRejected: _count_rejection,
    InferenceSkipped: _count_skipped,
    InferenceCompleted: _count_completed_run,
    InferenceFailed: _count_failed_run,
    MapUpdated: _count_updated_map,
    MapRejected: _count_rejected_map,
    TrainingRoundCompleted: _count_round,
    TrainingCompleted: _count_completed_training,
    TrainingFailed: _count_failed_training,
}
"""Every event that is recorded."""
