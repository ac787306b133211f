import asyncio
import json
import os
import signal
import subprocess
import sys
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from services.reporter.eventlog import EventLog
from services.reporter.handler import COUNTS, RecentIds, record, report
from services.reporter.settings import ReporterSettings
from shared.config import load
from shared.documents.reports import Report
from shared.errors import Unavailable
from shared.messages import (
    EVENT_TYPES,
    MapRejected,
    MapUpdated,
    RejectedMap,
    ReportRequest,
    ReportRequested,
    UpdatedMap,
)
from shared.metrics import Metrics
from shared.objects import ObjectStore
from tests.reporter.month import (
    MAY,
    digest,
    inference_completed,
    inference_skipped,
    png_grid,
    series_ready,
    training_completed,
    training_round,
    upload_rejected,
    whole_month,
)

ROOT = Path(__file__).parent.parent.parent
JUNE = datetime(2026, 6, 1, 6, tzinfo=UTC)


class Remembered:
    """A CloudWatch that remembers what it was sent."""

    def __init__(self) -> None:
        self.sent = []

    async def put_metric_data(self, **request) -> None:
        self.sent += request["MetricData"]

    def counts(self) -> dict[str, float]:
        return {datum["MetricName"]: sum(datum["Counts"]) for datum in self.sent}


def requested(month=None, *, time=JUNE) -> ReportRequested:
    return ReportRequested.of(str(month), ReportRequest(month=month), time=time)


async def reported(objects, events, month=None, **limits) -> Report:
    """Make a report, and read it back."""
    limit = limits.get("largest_image_bytes", 1_000_000)
    await report(requested(month), objects=objects, events=events, clock=lambda: JUNE, largest_image_bytes=limit)
    return Report.model_validate_json(await objects.get(f"reports/{month or '2026-05'}.json"))


def test_every_event_of_the_reporting_queue_is_recorded():
    """What the contract sends to the reporter is recorded, all but the request for a report."""
    sent = {event for event in EVENT_TYPES if "reporting" in event.queues}

    assert set(COUNTS) == sent - {ReportRequested}


async def test_a_repeat_is_counted_once(objects):
    """Delivered twice in a row and twice at the same time, an event counts once, and is in the log."""
    events = EventLog(objects, max_events=100, max_wait_s=0.05)
    cloudwatch = Remembered()
    metrics = Metrics(cloudwatch, clock=lambda: MAY)
    recent = RecentIds(10)
    first = inference_completed(1, 2.0)
    await record(first, events=events, metrics=metrics, recent=recent)
    await record(first, events=events, metrics=metrics, recent=recent)
    twice = upload_rejected(1, "not_dicom")
    await asyncio.gather(*(record(twice, events=events, metrics=metrics, recent=recent) for _ in range(2)))
    await metrics.flush()

    assert cloudwatch.counts() == {"InferenceDuration": 1, "InferenceOutcomes": 1, "UploadsRejected": 1}
    assert (await reported(objects, events)).n_events == 2


async def test_a_series_without_a_route_is_an_outcome_of_no_map(objects):
    """CloudWatch counts it beside the outcomes of MAPs."""
    cloudwatch = Remembered()
    metrics = Metrics(cloudwatch, clock=lambda: MAY)
    await record(
        inference_skipped(1), events=EventLog(objects, max_events=1, max_wait_s=0), metrics=metrics, recent=RecentIds(1)
    )
    await metrics.flush()
    (sent,) = cloudwatch.sent

    assert sent["MetricName"] == "InferenceOutcomes"
    assert {one["Name"]: one["Value"] for one in sent["Dimensions"]} == {"Map": "none", "Outcome": "no_route"}


async def test_new_versions_of_maps_are_counted(objects):
    """An alarm on a MAP that was rejected needs no more than this metric."""
    cloudwatch = Remembered()
    metrics = Metrics(cloudwatch, clock=lambda: MAY)
    rejected = RejectedMap(map="m", map_digest=digest(1), source="m", reason_code="no_output", serving_digest=digest(2))
    updated = UpdatedMap(map="m", map_digest=digest(3), source="m", previous_digest=digest(2))
    for event in (MapRejected.of("m", rejected, time=MAY), MapUpdated.of("m", updated, time=MAY)):
        log = EventLog(objects, max_events=1, max_wait_s=0)
        await record(event, events=log, metrics=metrics, recent=RecentIds(1))
    await metrics.flush()
    told = [{one["Name"]: one["Value"] for one in sent["Dimensions"]} for sent in cloudwatch.sent]

    assert {sent["MetricName"] for sent in cloudwatch.sent} == {"MapVersions"}
    assert told == [{"Map": "m", "Outcome": "rejected"}, {"Map": "m", "Outcome": "updated"}]


async def test_what_could_not_be_written_is_not_counted(aws):
    """A failed write is no record: it raises, counts nothing, and the next delivery is a first one."""
    bucket = f"later-{uuid.uuid4()}"
    objects = ObjectStore(aws.s3, bucket)
    events = EventLog(objects, max_events=1, max_wait_s=0)
    cloudwatch = Remembered()
    metrics = Metrics(cloudwatch, clock=lambda: MAY)
    recent = RecentIds(10)
    with pytest.raises(Unavailable):
        await record(series_ready(1), events=events, metrics=metrics, recent=recent)
    await metrics.flush()

    assert cloudwatch.sent == []

    await aws.s3.create_bucket(Bucket=bucket)
    await record(series_ready(1), events=events, metrics=metrics, recent=recent)
    await metrics.flush()

    assert cloudwatch.counts() == {"SeriesReady": 1}


def test_only_the_last_ids_are_remembered():
    """The memory is bounded, and forgets the oldest first."""
    recent = RecentIds(2)
    new = [recent.add(event_id) for event_id in ("a", "b", "a", "c")]

    assert new == [True, True, False, True]
    assert [event_id in recent for event_id in "abc"] == [True, False, True]


async def test_a_report_holds_what_was_received_before_it(objects):
    """Events that still wait for their write are flushed first, and are in the report and on the page."""
    events = EventLog(objects, max_events=1000, max_wait_s=3600)
    metrics = Metrics(Remembered(), clock=lambda: MAY)
    recent = RecentIds(1000)
    png = png_grid()
    await objects.put("models/thorax-32/images.png", png)
    waiting = [
        asyncio.create_task(record(event, events=events, metrics=metrics, recent=recent)) for event in whole_month()
    ]
    await asyncio.sleep(0)
    made = await reported(objects, events)
    await asyncio.wait_for(asyncio.gather(*waiting), 10)
    html = (await objects.get("reports/2026-05.html")).decode()

    assert (made.month, made.generated_at, made.n_repeats) == ("2026-05", JUNE, 6)
    assert made.series.n_series == 148
    assert html.count("data:image/png;base64,") == 1
    assert "models/knee-mr-first-try/images.png" in html


async def test_a_report_can_be_made_again(objects):
    """A late event is in the next report of the same month, which replaces the first."""
    events = EventLog(objects, max_events=1, max_wait_s=0)
    await events.append(series_ready(1))
    before = await reported(objects, events, "2026-05")
    await events.append(series_ready(2, time=MAY + timedelta(days=30, hours=23)))
    after = await reported(objects, events, "2026-05")
    again = await reported(objects, events, "2026-05")

    assert (before.series.n_series, after.series.n_series) == (1, 2)
    assert after == again


async def test_a_large_image_is_named_not_embedded(objects):
    """An image above the limit is not read; the page says where it is."""
    events = EventLog(objects, max_events=1, max_wait_s=0)
    await objects.put("models/r/images.png", png_grid())
    await events.append(training_completed("r", 1, 1.5))
    await reported(objects, events, largest_image_bytes=100)
    html = (await objects.get("reports/2026-05.html")).decode()

    assert "data:image" not in html
    assert "models/r/images.png" in html


async def test_the_service_from_queue_to_report(local_aws, aws, own_queues, objects):
    """The process takes events and a request from SQS, writes log, metrics and report, and stops on SIGTERM."""
    request_id = f"run-{uuid.uuid4().hex[:8]}"
    now = datetime.now(UTC).replace(microsecond=0)
    rounds = [training_round(request_id, number, 6 / number, time=now) for number in (1, 2, 3)]
    done = training_completed(request_id, 3, 2.0, time=now)
    map_name = f"map-{uuid.uuid4().hex[:8]}"
    runs = [inference_completed(number, number + 0.5, name=map_name, time=now) for number in range(4)]
    await objects.put(f"models/{request_id}/images.png", png_grid())
    url = (await aws.sqs.get_queue_url(QueueName=own_queues.reporting_queue))["QueueUrl"]

    async def send(*bodies) -> None:
        for body in bodies:
            await aws.sqs.send_message(QueueUrl=url, MessageBody=body)

    await send(*(event.body() for event in (*rounds, done, *runs, runs[0])))
    settings = {"bucket": objects.bucket, "reporting_queue": own_queues.reporting_queue, "poll_s": 1, "grace_s": 5}
    environ = local_aws.process_environ | {f"RADQUEUE_{name.upper()}": str(value) for name, value in settings.items()}
    process = subprocess.Popen(
        [sys.executable, "-m", "services.reporter"], cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True
    )
    try:
        async with asyncio.timeout(20):
            while sum([summary.size async for summary in objects.list("events/")]) < sum(
                len(event.body()) + 1 for event in (*rounds, done, *runs)
            ):
                await asyncio.sleep(0.05)
            await send(requested(now.strftime("%Y-%m"), time=now).body())
            while not await objects.exists(f"reports/{now:%Y-%m}.html"):
                await asyncio.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, logged = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    made = Report.model_validate_json(await objects.get(f"reports/{now:%Y-%m}.json"))
    html = (await objects.get(f"reports/{now:%Y-%m}.html")).decode()
    (training,) = made.training
    (statistics,) = made.inference

    assert process.returncode == 0, logged
    assert [round(done.evaluation.relative_fd, 3) for done in training.rounds] == [6, 3, 2]
    assert (training.status, training.images_key) == ("approved", f"models/{request_id}/images.png")
    assert (statistics.map, statistics.durations[0].n, statistics.durations[0].p50_s) == (map_name, 4, 2.0)
    assert made.n_events == 8
    assert html.count("data:image/png;base64,") == 1
    assert {json.loads(line)["event"] for line in logged.splitlines()} >= {"eventlog.written", "report.made"}
    assert await in_cloudwatch(aws, map_name) == 4


async def in_cloudwatch(aws, map_name) -> float:
    """Return how many durations CloudWatch holds of a MAP."""
    now = datetime.now(UTC)
    answer = await aws.cloudwatch.get_metric_statistics(
        Namespace="radqueue",
        MetricName="InferenceDuration",
        Dimensions=[{"Name": "Map", "Value": map_name}],
        StartTime=now - timedelta(hours=1),
        EndTime=now + timedelta(minutes=1),
        Period=60,
        Statistics=["SampleCount"],
    )
    return sum(point["SampleCount"] for point in answer["Datapoints"])


def test_settings_come_from_the_environment():
    """Every field has a description, and is read from its variable."""
    settings = load(ReporterSettings, os.environ | {"RADQUEUE_LOG_WAIT_S": "0.5"})

    assert settings.log_wait_s == 0.5
    assert all(field.description for field in ReporterSettings.model_fields.values())
