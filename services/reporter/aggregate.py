"""From a month's events to its report: values in, values out.

Months and dates are UTC, by the event's own time. Percentiles are numpy's linear method (Hyndman and Fan's type 7).
"""

from array import array
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import numpy as np

from shared.documents.reports import (
    Durations,
    MapStatistics,
    Report,
    Round,
    SeriesStatistics,
    Training,
    TrainingStatus,
)
from shared.errors import Unprocessable
from shared.messages import (
    CompletedTraining,
    Event,
    InferenceCompleted,
    InferenceFailed,
    InferenceSkipped,
    SeriesReady,
    TrainingCompleted,
    TrainingFailed,
    TrainingRoundCompleted,
    UploadRejected,
    decode,
)

MODALITIES = frozenset(
    """
    ANN ASMT AU BDUS BI BMD CFM CR CT CTPROTOCOL DMS DOC DG DX ECG EEG EMG EOG EPS ES FID GM HC HD IO IOL IVOCT IVUS
    KER KO LEN LS M3D MG MR NM OAM OCT OP OPM OPT OPTBSV OPTENF OPV OSS OT PA PLAN POS PR PT PX REG RESP RF RG RTDOSE
    RTIMAGE RTINTENT RTPLAN RTRAD RTRECORD RTSEGANN RTSTRUCT RWV SEG SM SMR SR SRF STAIN TEXTUREMAP TG US VA XA
    XAPROTOCOL XC
    """.split()  # noqa: SIM905 - as a list it would fill a screen
)
"""Defined terms of Modality (0008,0060), DICOM PS3.3 section C.7.3.1.1.1."""


class _Series(NamedTuple):
    """A series as its latest revision tells it."""

    latest: tuple[datetime, str]
    n_revisions: int
    n_instances: int
    modality: str
    warned: bool


@dataclass(slots=True)
class _Runs:
    """The runs of one version of a MAP."""

    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    seconds: "dict[str, array[float]]" = field(default_factory=lambda: defaultdict(lambda: array("d")))
    """The seconds of completed runs, by device."""
    n_outputs: int = 0

    def add(self, event: InferenceCompleted | InferenceFailed) -> None:
        if isinstance(event, InferenceFailed):
            self.outcomes["failed"] += 1
            self.reasons[event.data.reason_code] += 1
            return
        self.outcomes[event.data.outcome] += 1
        self.n_outputs += len(event.data.outputs)
        if event.data.outcome == "completed":  # a run without a matching series ends at once, and would flatter p50
            self.seconds[event.data.device].append(event.data.duration_s)


class Tally:
    """Takes the events of a month, in any order and number of times, and keeps of each only what the report needs."""

    def __init__(self, month: str) -> None:
        """Begin with no events; those of other months than `month` (YYYY-MM) are passed over."""
        self._month = month
        self._ids: set[str] = set()
        self._n_repeats = 0
        self._n_unreadable = 0
        self._rejections: Counter[str] = Counter()
        self._series: dict[tuple[str, str], _Series] = {}
        self._skipped: Counter[str] = Counter()
        self._runs: dict[tuple[str, str], _Runs] = defaultdict(_Runs)
        self._training: dict[str, list[TrainingRoundCompleted | TrainingCompleted | TrainingFailed]] = defaultdict(list)

    def add_lines(self, lines: bytes) -> None:
        """Add the events of JSON lines; a line that holds no known event is counted and passed over."""
        for line in lines.splitlines():
            try:
                event = decode(line.decode())
            except (Unprocessable, UnicodeDecodeError):
                self._n_unreadable += 1
                continue
            if isinstance(event, Event):
                self.add(event)
            else:
                self._n_unreadable += 1

    def add(self, event: Event) -> None:
        """Add one event, unless its id was added before."""
        if month_of(event.time) != self._month:
            return
        if event.id in self._ids:
            self._n_repeats += 1
            return
        self._ids.add(event.id)
        match event:
            case UploadRejected():
                self._rejections[event.data.reason_code] += 1
            case SeriesReady():
                key = event.data.study_uid, event.data.series_uid
                self._series[key] = _with_revision(self._series.get(key), event)
            case InferenceSkipped():
                self._skipped[known_modality(event.data.modality)] += 1
            case InferenceCompleted() | InferenceFailed():
                self._runs[event.data.map, event.data.map_digest].add(event)
            case TrainingRoundCompleted() | TrainingCompleted() | TrainingFailed():
                self._training[event.data.request_id].append(event)
            case _:  # the contract sends no other event to the reporter
                pass

    def report(self, *, generated_at: datetime) -> Report:
        """Return the report of what was added."""
        maps = [_map_statistics(name, digest, runs) for (name, digest), runs in sorted(self._runs.items())]
        trainings = [_training(events) for events in self._training.values()]
        failed_runs: Counter[str] = Counter()
        for statistics in maps:
            failed_runs.update(statistics.failures_by_reason)
        return Report(
            month=self._month,
            generated_at=generated_at,
            month_is_over=month_of(generated_at) > self._month,
            n_events=len(self._ids),
            n_repeats=self._n_repeats,
            n_unreadable=self._n_unreadable,
            training=tuple(sorted(trainings, key=lambda training: training.request_id)),
            inference=tuple(maps),
            skipped_by_modality=by_count(self._skipped),
            series=_series_statistics(self._series.values()),
            rejections_by_reason=by_count(self._rejections),
            failures_by_reason={
                "inference": by_count(failed_runs),
                "training": by_count(Counter(training.reason_code for training in trainings if training.reason_code)),
            },
        )


def month_of(time: datetime) -> str:
    """Return the UTC month as YYYY-MM."""
    return time.astimezone(UTC).strftime("%Y-%m")


def month_before(time: datetime) -> str:
    """Return the UTC month before that of `time` as YYYY-MM."""
    return month_of(time.astimezone(UTC).replace(day=1) - timedelta(days=1))


def known_modality(modality: str | None) -> str:
    """Return a defined term, `other` or `none`: the value comes from a file, and may be anything."""
    if not modality:
        return "none"
    return modality if modality in MODALITIES else "other"


def training_status(approved: bool) -> TrainingStatus:  # noqa: FBT001 - the event's own field
    """Name the two ways in which a training completes."""
    return "approved" if approved else "rounds_used_up"


def by_count(counts: Counter[str]) -> dict[str, int]:
    """Order by falling count, then by name, so that the same events give the same report."""
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


def _with_revision(series: _Series | None, event: SeriesReady) -> _Series:
    """Return the series with one revision more; a later one replaces what an earlier one told."""
    n_revisions = 1 + (series.n_revisions if series else 0)
    if series and series.latest > _order(event):
        return series._replace(n_revisions=n_revisions)
    told = event.data
    return _Series(_order(event), n_revisions, told.n_instances, known_modality(told.modality), bool(told.warnings))


def _series_statistics(every: Collection[_Series]) -> SeriesStatistics:
    return SeriesStatistics(
        n_series=len(every),
        n_revisions=sum(series.n_revisions for series in every),
        n_instances=sum(series.n_instances for series in every),
        n_with_warnings=sum(series.warned for series in every),
        by_modality=by_count(Counter(series.modality for series in every)),
    )


def _map_statistics(name: str, digest: str, runs: _Runs) -> MapStatistics:
    return MapStatistics(
        map=name,
        map_digest=digest,
        outcomes=by_count(runs.outcomes),
        failures_by_reason=by_count(runs.reasons),
        durations=tuple(_durations(device, runs.seconds[device]) for device in sorted(runs.seconds)),
        n_outputs=runs.n_outputs,
    )


def _durations(device: str, seconds: "array[float]") -> Durations:
    p50_s, p95_s = np.percentile(seconds, [50, 95], method="linear")
    return Durations(device=device, n=len(seconds), p50_s=float(p50_s), p95_s=float(p95_s), longest_s=max(seconds))


def _training(events: list[TrainingRoundCompleted | TrainingCompleted | TrainingFailed]) -> Training:
    in_order = sorted(events, key=_order)
    # A round that was done again, after a lost checkpoint, replaces the first try.
    rounds = {event.data.round: _round(event) for event in in_order if isinstance(event, TrainingRoundCompleted)}
    in_turn = tuple(rounds[number] for number in sorted(rounds))
    ends = [event.data for event in in_order if isinstance(event, TrainingCompleted | TrainingFailed)]
    first = in_order[0].data
    last_end = ends[-1] if ends else None
    if isinstance(last_end, CompletedTraining):
        return Training(
            request_id=last_end.request_id,
            dataset=last_end.dataset,
            status=training_status(last_end.approved),
            rounds=in_turn,
            rounds_used=last_end.rounds,
            evaluation=last_end.evaluation,
            why_not=last_end.why_not,
            config=last_end.config,
            generator_key=last_end.generator_key,
            images_key=last_end.images_key,
            images_array_key=last_end.images_array_key,
        )
    return Training(
        request_id=first.request_id,
        dataset=first.dataset,
        status="failed" if last_end else "running",
        reason_code=last_end.reason_code if last_end else None,
        rounds=in_turn,
        evaluation=in_turn[-1].evaluation if in_turn else None,
        why_not=in_turn[-1].why_not if in_turn else "",
        config=in_turn[-1].config if in_turn else {},
    )


def _round(event: TrainingRoundCompleted) -> Round:
    told = event.data
    return Round(
        round=told.round,
        time=event.time,
        steps=told.steps,
        duration_s=told.duration_s,
        evaluation=told.evaluation,
        approved=told.approved,
        why_not=told.why_not,
        config=told.config,
    )


def _order(event: Event) -> tuple[datetime, str]:
    return event.time, event.id
