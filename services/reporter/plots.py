"""The axes of the report's plots: where a value stands on the drawing. What is drawn is in templates/plots.svg.j2."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shared.documents.reports import Durations, Round

LOG_FROM = 20.0
"""Values that span more than this factor are drawn on a logarithmic axis."""
TICK_STEPS = (1, 2, 2.5, 5, 10)
MOST_ROUND_LABELS = 12


@dataclass(frozen=True, slots=True)
class Axis:
    """A mapping of values to places: `low` stands at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of a value."""
        low, high, at = (
            map(math.log, (self.low, self.high, value)) if self.logarithmic else (self.low, self.high, value)
        )
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)


def rounds_axis(rounds: Sequence[Round], start: float, end: float) -> Axis:
    """Return the axis of the rounds' numbers, of which so many are ticks as there is space for."""
    every = math.ceil(len(rounds) / MOST_ROUND_LABELS)
    ticks = [done.round for done in rounds[::every]]
    return Axis(rounds[0].round, rounds[-1].round, start, end, ticks)


def distance_axis(rounds: Sequence[Round], start: float, end: float) -> Axis:
    """Return the axis of the rounds' relative distance; 1, the distance of real to real, is on it."""
    values = [1.0, *(done.evaluation.relative_fd for done in rounds)]
    low, high = min(values), max(values)
    logarithmic = low > 0 and high / low > LOG_FROM
    ticks = _log_ticks(low, high) if logarithmic else _ticks(high)
    return Axis(ticks[0], ticks[-1], start, end, ticks, logarithmic)


def seconds_axis(runs: Sequence[tuple[str, Durations]], start: float, end: float) -> Axis:
    """Return the axis of the runs' durations, from 0 to beyond the highest p95."""
    ticks = _ticks(max(found.p95_s for _, found in runs))
    return Axis(ticks[0], ticks[-1], start, end, ticks)


def _ticks(highest: float) -> list[float]:
    """Return about five round numbers from 0 to at least `highest`."""
    if highest <= 0:
        return [0.0, 1.0]
    magnitude = 10.0 ** math.floor(math.log10(highest / 4))
    step = next(step * magnitude for step in TICK_STEPS if highest / (step * magnitude) <= 5)  # noqa: PLR2004 - ticks
    return [step * index for index in range(math.ceil(highest / step - 1e-9) + 1)]


def _log_ticks(lowest: float, highest: float) -> list[float]:
    """Return powers of ten (and their threefold, where few) around both."""
    first, last = math.floor(math.log10(lowest)), math.ceil(math.log10(highest))
    every = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 3)]
    below = max(tick for tick in every if tick <= lowest * 1.0001)
    above = min((tick for tick in every if tick >= highest * 0.9999), default=every[-1])
    ticks = [tick for tick in every if below <= tick <= above]
    return ticks if len(ticks) <= 8 else [ticks[0], *ticks[1:-1][::2], ticks[-1]]  # noqa: PLR2004 - ticks
