"""Metrics: each declared once here, collected in memory, sent to CloudWatch in batches.

Theory of operation. `put` adds a value to a table of (metric, dimensions, minute) to how often each value was seen, and
never waits. `flush` takes the table, sends it as PutMetricData with Values and Counts (so that percentiles work), and
puts back what CloudWatch did not take. Metrics are best effort: a process that dies loses what it had not sent, and a
request whose answer got lost is sent twice. The event log has the exact numbers.

Each combination of dimension values is a metric of its own, which CloudWatch bills and keeps for 15 months, so a
dimension takes few values: a dataset or a MAP, never a request, a series or anything else that grows with use.

IAM: cloudwatch:PutMetricData on the namespaces below.
"""

import asyncio
import contextlib
import math
import re
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

from shared.aws_errors import AWS_ERRORS, Kind, code_of, kind_of
from shared.log import get_logger

if TYPE_CHECKING:
    from types_aiobotocore_cloudwatch import CloudWatchClient
    from types_aiobotocore_cloudwatch.type_defs import MetricDatumTypeDef

# Limits of PutMetricData: https://docs.aws.amazon.com/AmazonCloudWatch/latest/APIReference/API_PutMetricData.html
REQUEST_METRICS = 1_000
REQUEST_BYTES = 1_000_000
DATUM_VALUES = 150
"""Different values in one metric of a request."""
LARGEST_VALUE = 2.0**360
OLDEST = timedelta(days=14)
NEWEST = timedelta(hours=2)
DIMENSION_CHARACTERS = 255

BUFFER_VALUES = 50_000
"""Different values kept in memory while CloudWatch does not answer; the oldest go first."""
DATUM_BYTES, VALUE_BYTES, DIMENSION_BYTES = 400, 120, 120
"""Upper bounds of what each adds to a request in the wordiest of CloudWatch's protocols."""

Unit = Literal["Count", "None", "Seconds"]
log = get_logger()


class UndeclaredMetric(Exception):  # noqa: N818 - it states a fact about the code
    """The code put a metric that is not declared here, or with other dimensions than declared."""


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """A declaration. Each is compared by identity, which makes looking it up cheap."""

    namespace: str
    name: str
    unit: Unit
    dimensions: tuple[str, ...]
    meaning: str


GAN = "GANModelMetrics"
RADQUEUE = "radqueue"

# The feature space is a dimension: distances in different spaces are different quantities, and must not be averaged.
FRECHET_DISTANCE = Metric(
    GAN, "FrechetDistance", "None", ("Dataset", "Space"), "Fréchet distance, generated to held-out real"
)
RELATIVE_FRECHET_DISTANCE = Metric(
    GAN, "RelativeFrechetDistance", "None", ("Dataset", "Space"), "FrechetDistance over that of real to real"
)
SERIES_READY = Metric(RADQUEUE, "SeriesReady", "Count", ("Modality",), "settled revisions of series")
UPLOADS_REJECTED = Metric(RADQUEUE, "UploadsRejected", "Count", ("Reason",), "objects put into quarantine")
INFERENCE_OUTCOMES = Metric(RADQUEUE, "InferenceOutcomes", "Count", ("Map", "Outcome"), "how MAPs ended; no_route too")
INFERENCE_FAILURES = Metric(RADQUEUE, "InferenceFailures", "Count", ("Map", "Reason"), "MAPs that failed")
INFERENCE_DURATION = Metric(RADQUEUE, "InferenceDuration", "Seconds", ("Map",), "wall time of MAPs that completed")
MAP_VERSIONS = Metric(RADQUEUE, "MapVersions", "Count", ("Map", "Outcome"), "new versions of MAPs: updated or rejected")
MAP_SOURCE_FAILURES = Metric(RADQUEUE, "MapSourceFailures", "Count", ("Map",), "looks at a MAP's source that failed")
ROUTING_TABLES_REFUSED = Metric(RADQUEUE, "RoutingTablesRefused", "Count", (), "new routing tables that are broken")
TRAINING_ROUNDS = Metric(RADQUEUE, "TrainingRounds", "Count", ("Dataset",), "rounds of train and evaluate")
TRAINING_OUTCOMES = Metric(RADQUEUE, "TrainingOutcomes", "Count", ("Outcome",), "trainings that ended, in any way")
TRAINING_FAILURES = Metric(RADQUEUE, "TrainingFailures", "Count", ("Reason",), "trainings that failed")


MESSAGES_RECEIVED = Metric(RADQUEUE, "MessagesReceived", "Count", ("Queue",), "messages received, repeats too")
MESSAGE_FATES = Metric(RADQUEUE, "MessageFates", "Count", ("Queue", "Fate"), "handled messages by what became of them")
HANDLER_SECONDS = Metric(RADQUEUE, "HandlerSeconds", "Seconds", ("Queue",), "wall time of handlers, however they ended")
MESSAGE_AGE = Metric(RADQUEUE, "MessageAge", "Seconds", ("Queue",), "from being sent to the first receive")
IN_FLIGHT = Metric(RADQUEUE, "InFlight", "Count", ("Queue",), "messages in slots, after each poll that brought some")
LEASE_EXTENSIONS = Metric(RADQUEUE, "LeaseExtensions", "Count", ("Queue",), "visibility timeouts that were extended")
LEASE_LOSSES = Metric(RADQUEUE, "LeaseLosses", "Count", ("Queue",), "messages that were lost to another worker")
RELEASED_AT_DRAIN = Metric(RADQUEUE, "ReleasedAtDrain", "Count", ("Queue",), "messages given back at a stop")
DEAD_LETTERS = Metric(RADQUEUE, "DeadLetters", "Count", ("Queue", "Reason"), "messages sent to the dead-letter queue")
CIRCUIT_OPENED = Metric(RADQUEUE, "CircuitOpened", "Count", ("Queue",), "polling paused: everything fails alike")

METRICS: tuple[Metric, ...] = (
    FRECHET_DISTANCE,
    RELATIVE_FRECHET_DISTANCE,
    SERIES_READY,
    UPLOADS_REJECTED,
    INFERENCE_OUTCOMES,
    INFERENCE_FAILURES,
    INFERENCE_DURATION,
    MAP_VERSIONS,
    MAP_SOURCE_FAILURES,
    ROUTING_TABLES_REFUSED,
    TRAINING_ROUNDS,
    TRAINING_OUTCOMES,
    TRAINING_FAILURES,
    MESSAGES_RECEIVED,
    MESSAGE_FATES,
    HANDLER_SECONDS,
    MESSAGE_AGE,
    IN_FLIGHT,
    LEASE_EXTENSIONS,
    LEASE_LOSSES,
    RELEASED_AT_DRAIN,
    DEAD_LETTERS,
    CIRCUIT_OPENED,
)


class _Series(NamedTuple):
    """The key that values are aggregated under; a tuple, since one is made and hashed for each value."""

    metric: Metric
    dimensions: tuple[tuple[str, str], ...]
    minute: int
    """The minute, counted from 1970: CloudWatch's resolution."""

    @property
    def time(self) -> datetime:
        return datetime.fromtimestamp(self.minute * 60, UTC)


_Table = dict[_Series, Counter[float]]


class Metrics:
    """Collects values, and sends them when told to."""

    def __init__(
        self, cloudwatch: "CloudWatchClient", *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        """Take an open aiobotocore CloudWatch client."""
        self._cloudwatch = cloudwatch
        self._clock = clock
        self._table: defaultdict[_Series, Counter[float]] = defaultdict(Counter)
        self._n_values = 0

    def put(self, metric: Metric, value: float, /, *, at: datetime | None = None, **dimensions: str) -> None:
        """Collect one value, as of `at` (now). A value that CloudWatch cannot take is logged and left out.

        Raises:
            UndeclaredMetric: the metric is not in `METRICS`, or its dimensions are others.
        """
        told = _told(metric, tuple(dimensions.items()))
        if not math.isfinite(value) or abs(value) > LARGEST_VALUE:
            log.warning("metrics.value_left_out", metric=metric.name)
            return
        counts = self._table[_Series(metric, told, int((at or self._clock()).timestamp() // 60))]
        before = len(counts)
        counts[float(value)] += 1
        self._grew(len(counts) - before)

    async def flush(self) -> None:
        """Send what was collected. What CloudWatch does not take now stays for the next flush."""
        table, self._table, self._n_values = self._table, defaultdict(Counter), 0
        waiting = deque(_requests(_in_window(table, self._clock())))
        unsent = []
        try:
            while waiting:
                if not await self._send(waiting[0]):
                    unsent.append(waiting[0])
                waiting.popleft()
        finally:  # on cancellation too
            for batch in (*unsent, *waiting):
                for series, values in batch:
                    self._add(series, values)

    async def keep_flushing(self, every_s: float, stop: asyncio.Event) -> None:
        """Flush every `every_s` seconds until `stop` is set; the caller flushes a last time after its own end."""
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), every_s)
            try:
                await self.flush()
            except Exception:  # a bug here must not end the service whose work it counts
                log.exception("metrics.flush_failed")

    def _add(self, series: _Series, values: Counter[float]) -> None:
        counts = self._table[series]
        before = len(counts)
        counts.update(values)
        self._grew(len(counts) - before)

    def _grew(self, n_values: int) -> None:
        self._n_values += n_values
        if self._n_values > BUFFER_VALUES:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        """Make room: a tenth at once, so that a full buffer does not sort itself at every value."""
        oldest = sorted(self._table, key=lambda series: series.minute)
        n_before = self._n_values
        for series in oldest:
            if self._n_values <= BUFFER_VALUES * 0.9:
                break
            self._n_values -= len(self._table.pop(series))
        log.warning("metrics.dropped", values=n_before - self._n_values, why="buffer_full")

    async def _send(self, batch: "list[tuple[_Series, Counter[float]]]") -> bool:
        """Send one request. Returns True if it was taken or refused for good, so that it need not be sent again."""
        namespace = batch[0][0].metric.namespace
        try:
            await self._cloudwatch.put_metric_data(Namespace=namespace, MetricData=[_datum(*entry) for entry in batch])
        except AWS_ERRORS as error:
            refused = kind_of(error) is Kind.INVALID
            event = "metrics.refused" if refused else "metrics.not_sent"
            log.warning(event, namespace=namespace, metrics=len(batch), error=code_of(error))
            return refused
        return True


@lru_cache(maxsize=4096)
def _told(metric: Metric, dimensions: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Check the dimensions, and return what CloudWatch takes, in the declared order."""
    if metric not in METRICS:
        raise UndeclaredMetric(f"{metric.name} is not declared in shared/metrics.py")
    given = dict(dimensions)
    if set(given) != set(metric.dimensions):
        raise UndeclaredMetric(f"{metric.name} takes the dimensions {', '.join(metric.dimensions)}")
    return tuple((name, _dimension_value(given[name])) for name in metric.dimensions)


def _dimension_value(text: str) -> str:
    """Return what CloudWatch takes: 1 to 255 characters of ASCII, not only spaces, not starting with a colon."""
    return re.sub(r"[^ -~]", "?", text).lstrip(": ").rstrip()[:DIMENSION_CHARACTERS] or "none"


def _in_window(table: _Table, now: datetime) -> _Table:
    """Leave out what is older or newer than CloudWatch takes: one such value would have the whole request refused."""
    kept = {
        series: values
        for series, values in table.items()
        # A minute of margin, since the series stands at the minute's beginning and CloudWatch's clock is not ours.
        if now - OLDEST + timedelta(minutes=1) < series.time < now + NEWEST - timedelta(minutes=1)
    }
    if len(kept) < len(table):
        log.warning("metrics.dropped", series=len(table) - len(kept), why="outside_cloudwatch_window")
    return kept


def _requests(table: _Table) -> "Iterator[list[tuple[_Series, Counter[float]]]]":
    """Cut the table into requests of one namespace each, within CloudWatch's limits."""
    for namespace in sorted({series.metric.namespace for series in table}):
        batch: list[tuple[_Series, Counter[float]]] = []
        n_bytes = 0
        for entry in _data(table, namespace):
            entry_bytes = _bytes_at_most(*entry)
            if batch and (len(batch) == REQUEST_METRICS or n_bytes + entry_bytes > REQUEST_BYTES):
                yield batch
                batch, n_bytes = [], 0
            batch.append(entry)
            n_bytes += entry_bytes
        yield batch


def _data(table: _Table, namespace: str) -> Iterable[tuple[_Series, Counter[float]]]:
    for series, values in table.items():
        if series.metric.namespace == namespace:
            every = list(values.items())
            for start in range(0, len(every), DATUM_VALUES):
                yield series, Counter(dict(every[start : start + DATUM_VALUES]))


def _bytes_at_most(series: _Series, values: Counter[float]) -> int:
    # Three bytes per character: the query protocol percent-encodes.
    dimensions = sum(DIMENSION_BYTES + 3 * len(name + value) for name, value in series.dimensions)
    return DATUM_BYTES + dimensions + VALUE_BYTES * len(values)


def _datum(series: _Series, values: Counter[float]) -> "MetricDatumTypeDef":
    return {
        "MetricName": series.metric.name,
        "Dimensions": [{"Name": name, "Value": value} for name, value in series.dimensions],
        "Timestamp": series.time,
        "Values": list(values),
        "Counts": [float(count) for count in values.values()],
        "Unit": series.metric.unit,
    }
