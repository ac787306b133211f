import asyncio
import contextlib
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from shared import metrics as declared
from shared.metrics import INFERENCE_DURATION, METRICS, SERIES_READY, UPLOADS_REJECTED, Metrics, UndeclaredMetric

NOON = datetime(2026, 5, 4, 12, 0, 30, tzinfo=UTC)


class Remembered:
    """A CloudWatch that remembers what it was sent, and fails as often as told."""

    def __init__(self, *failures) -> None:
        self.requests = []
        self.failures = list(failures)

    async def put_metric_data(self, **request) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.requests.append(request)

    def data(self) -> list[dict]:
        return [datum for request in self.requests for datum in request["MetricData"]]


def collector(*failures) -> tuple[Remembered, Metrics]:
    cloudwatch = Remembered(*failures)
    return cloudwatch, Metrics(cloudwatch, clock=lambda: NOON)


def refusal(code) -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": ""}}, "PutMetricData")


OFFLINE = EndpointConnectionError(endpoint_url="http://127.0.0.1:1")


def test_an_undeclared_metric_raises_at_once():
    """A metric that is not in the table, or has other dimensions, is a bug that shows where it is made."""
    _, metrics = collector()
    with pytest.raises(UndeclaredMetric):
        metrics.put(replace(SERIES_READY, name="SeriesReddy"), 1, Modality="CT")
    for dimensions in ({}, {"Reason": "x"}, {"Modality": "CT", "Reason": "x"}):
        with pytest.raises(UndeclaredMetric):
            metrics.put(SERIES_READY, 1, **dimensions)


def test_each_metric_is_declared_once():
    """Every declaration of the module is in the table, under a name of its own."""
    written = [value for value in vars(declared).values() if isinstance(value, declared.Metric)]

    assert sorted(written, key=str) == sorted(METRICS, key=str)
    assert len({(metric.namespace, metric.name) for metric in METRICS}) == len(METRICS)
    assert all(metric.meaning for metric in METRICS)


async def test_values_of_a_minute_are_aggregated():
    """Equal values of one minute are a count, another minute or dimension is another datum."""
    cloudwatch, metrics = collector()
    for seconds in (1.5, 1.5, 2.0):
        metrics.put(INFERENCE_DURATION, seconds, at=NOON, Map="a")
    metrics.put(INFERENCE_DURATION, 1.5, at=NOON + timedelta(minutes=1), Map="a")
    metrics.put(INFERENCE_DURATION, 1.5, Map="b")
    await metrics.flush()
    first, *others = cloudwatch.data()

    assert (first["Values"], first["Counts"]) == ([1.5, 2.0], [2, 1])
    assert (first["Timestamp"], first["Unit"]) == (NOON.replace(second=0), "Seconds")
    assert len(others) == 2
    assert len(cloudwatch.requests) == 1


async def test_requests_stay_within_the_limits():
    """No request has more than 1,000 metrics or 150 values in one, and none mixes namespaces; nothing is lost."""
    cloudwatch, metrics = collector()
    for number in range(2_300):
        metrics.put(UPLOADS_REJECTED, 1, Reason=f"r{number}")
    for number in range(1_000):
        metrics.put(INFERENCE_DURATION, number, Map="a")
    metrics.put(declared.FRECHET_DISTANCE, 3.5, Dataset="d", Space="s")
    await metrics.flush()

    assert max(len(request["MetricData"]) for request in cloudwatch.requests) <= 1_000
    assert max(len(datum["Values"]) for datum in cloudwatch.data()) <= 150
    assert {request["Namespace"] for request in cloudwatch.requests} == {"radqueue", "GANModelMetrics"}
    assert sum(sum(datum["Counts"]) for datum in cloudwatch.data()) == 3_301


async def test_an_outage_loses_nothing():
    """What CloudWatch did not take goes with the next flush, together with what came since."""
    cloudwatch, metrics = collector(OFFLINE, refusal("ThrottlingException"))
    metrics.put(SERIES_READY, 1, Modality="CT")
    await metrics.flush()
    metrics.put(SERIES_READY, 1, Modality="CT")
    await metrics.flush()
    metrics.put(SERIES_READY, 1, Modality="CT")
    await metrics.flush()
    await metrics.flush()

    assert [datum["Counts"] for datum in cloudwatch.data()] == [[3.0]]


async def test_a_refused_request_is_not_repeated_for_ever():
    """What CloudWatch calls wrong is left out, and later values go through."""
    cloudwatch, metrics = collector(refusal("InvalidParameterValue"))
    metrics.put(SERIES_READY, 1, Modality="CT")
    await metrics.flush()
    metrics.put(SERIES_READY, 1, Modality="MR")
    await metrics.flush()

    assert [datum["Dimensions"][0]["Value"] for datum in cloudwatch.data()] == ["MR"]


async def test_a_cancelled_flush_keeps_its_values():
    """A flush that is cancelled while it waits for CloudWatch puts everything back."""
    cloudwatch, metrics = collector()
    asked = asyncio.Event()

    async def hang(**_) -> None:
        asked.set()
        await asyncio.Event().wait()

    take = cloudwatch.put_metric_data
    cloudwatch.put_metric_data = hang
    metrics.put(SERIES_READY, 1, Modality="CT")
    flush = asyncio.create_task(metrics.flush())
    await asked.wait()
    flush.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await flush
    cloudwatch.put_metric_data = take
    await metrics.flush()

    assert [datum["Counts"] for datum in cloudwatch.data()] == [[1.0]]


async def test_the_buffer_is_bounded(monkeypatch):
    """Without CloudWatch the memory stays bounded, and the newest values are those that are kept."""
    monkeypatch.setattr(declared, "BUFFER_VALUES", 100)
    cloudwatch, metrics = collector()
    for minute in range(1_000):
        metrics.put(SERIES_READY, 1, at=NOON - timedelta(minutes=1_000 - minute), Modality="CT")
    await metrics.flush()
    kept = [datum["Timestamp"] for datum in cloudwatch.data()]

    assert 50 <= len(kept) <= 100
    assert max(kept) == NOON.replace(second=0) - timedelta(minutes=1)
    assert min(kept) > NOON - timedelta(minutes=102)


async def test_what_cloudwatch_cannot_take_is_left_out():
    """Not-a-numbers and times outside CloudWatch's window do not spoil the request of the others."""
    cloudwatch, metrics = collector()
    for value in (float("nan"), float("inf"), 1e300):
        metrics.put(INFERENCE_DURATION, value, Map="a")
    for at in (NOON - timedelta(days=14), NOON + timedelta(hours=2)):
        metrics.put(INFERENCE_DURATION, 1, at=at, Map="a")
    metrics.put(INFERENCE_DURATION, 2, Map=":  é\n" + "x" * 300)
    await metrics.flush()
    (datum,) = cloudwatch.data()

    assert datum["Values"] == [2.0]
    assert datum["Dimensions"][0]["Value"] == "??" + "x" * 253


async def test_flushing_goes_on_until_stopped():
    """The background loop sends again and again, and a last time when it is stopped."""
    cloudwatch, metrics = collector(OFFLINE)
    stop = asyncio.Event()
    loop = asyncio.create_task(metrics.keep_flushing(0.01, stop))
    metrics.put(SERIES_READY, 1, Modality="CT")
    async with asyncio.timeout(5):
        while not cloudwatch.requests:
            await asyncio.sleep(0.005)
    metrics.put(SERIES_READY, 1, Modality="MR")
    stop.set()
    await asyncio.wait_for(loop, 5)

    assert [datum["Dimensions"][0]["Value"] for datum in cloudwatch.data()] == ["CT", "MR"]


async def test_cloudwatch_gives_back_what_was_put(aws):
    """Over HTTP: count, sum and maximum of what was put, under the declared names and dimensions."""
    metrics = Metrics(aws.cloudwatch)
    name = f"map-{uuid.uuid4()}"
    now = datetime.now(UTC)
    for seconds in (1.5, 1.5, 4.0):
        metrics.put(INFERENCE_DURATION, seconds, at=now, Map=name)
    dataset = f"dataset-{uuid.uuid4()}"
    metrics.put(declared.FRECHET_DISTANCE, 12.5, at=now, Dataset=dataset, Space="random-conv")
    await metrics.flush()

    async def statistic(metric, stat, *dimensions) -> list[float]:
        query = {
            "Id": "found",
            "MetricStat": {
                "Metric": {"Namespace": metric.namespace, "MetricName": metric.name, "Dimensions": list(dimensions)},
                "Period": 60,
                "Stat": stat,
            },
        }
        times = {"StartTime": now - timedelta(minutes=5), "EndTime": now + timedelta(minutes=5)}
        answer = await aws.cloudwatch.get_metric_data(MetricDataQueries=[query], **times)
        return answer["MetricDataResults"][0]["Values"]

    by_map = {"Name": "Map", "Value": name}
    listed = await aws.cloudwatch.list_metrics(
        Namespace="GANModelMetrics", Dimensions=[{"Name": "Dataset", "Value": dataset}]
    )

    assert await statistic(INFERENCE_DURATION, "SampleCount", by_map) == [3.0]
    assert await statistic(INFERENCE_DURATION, "Sum", by_map) == [7.0]
    assert await statistic(INFERENCE_DURATION, "Maximum", by_map) == [4.0]
    assert [metric["MetricName"] for metric in listed["Metrics"]] == ["FrechetDistance"]
