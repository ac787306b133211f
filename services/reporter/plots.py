"""The report's plots as inline SVG: drawn with the page's own colours and font, so light and dark need one copy.

Each mark has a `title`, which browsers show as a tooltip and screen readers read. The numbers stand in a table beside.
"""

import math
from collections.abc import Sequence
from xml.etree.ElementTree import Element

from services.reporter.html import el
from shared.documents.reports import Round

WIDTH = 560.0
LOG_FROM = 20.0
"""Values that span more than this factor are drawn on a logarithmic axis."""
TICK_STEPS = (1, 2, 2.5, 5, 10)
LABEL_CHARACTERS = 26
MOST_ROUND_LABELS = 12


def number(value: float) -> str:
    """Return three significant digits, whole numbers with thousands separated."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "not finite"
    if abs(value) >= 1000:  # noqa: PLR2004 - where digits after the point stop telling anything
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"  # noqa: PLR2004 - as above


def relative(value: float) -> str:
    """Return a relative distance: two decimals tell 1.98 from 2.02, where a threshold may lie between."""
    return f"{value:,.2f}" if math.isfinite(value) else "not finite"


def seconds(value: float) -> str:
    """Return a duration as people say it."""
    if value < 1:
        return f"{1000 * value:.3g} ms"
    if value < 120:  # noqa: PLR2004 - two minutes
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def rounds_plot(rounds: Sequence[Round], label: str) -> Element:
    """Draw relative_fd over the rounds; the line at 1 is the distance of real to real."""
    height, left, right, top, bottom = 230.0, 46.0, 72.0, 16.0, 40.0
    values = [done.evaluation.relative_fd for done in rounds]
    logarithmic = min(values) > 0 and max([*values, 1.0]) / min([*values, 1.0]) > LOG_FROM
    ticks = _log_ticks(min([*values, 1.0]), max([*values, 1.0])) if logarithmic else _ticks(max([*values, 1.0]))
    low, high = (math.log(ticks[0]), math.log(ticks[-1])) if logarithmic else (0.0, ticks[-1])

    def x(number_: int) -> float:
        first, last = rounds[0].round, rounds[-1].round
        share = (number_ - first) / (last - first) if last > first else 0.5
        return left + 14 + share * (WIDTH - left - right - 28)

    def y(value: float) -> float:
        share = ((math.log(value) if logarithmic else value) - low) / (high - low)
        return top + (1 - share) * (height - top - bottom)

    svg = el("svg", viewBox=f"0 0 {WIDTH:g} {height:g}", role="img", aria_label=label)
    for tick in ticks:
        svg.append(el("line", class_="grid", x1=left, x2=WIDTH - right, y1=y(tick), y2=y(tick)))
        svg.append(el("text", number(tick), class_="tick", x=left - 8, y=y(tick) + 4, text_anchor="end"))
    svg.append(el("line", class_="reference", x1=left, x2=WIDTH - right, y1=y(1), y2=y(1)))
    svg.append(el("text", "real vs real", class_="tick", x=WIDTH - right + 6, y=y(1) + 4))
    every = math.ceil(len(rounds) / MOST_ROUND_LABELS)
    for done in rounds[::every]:
        below = height - bottom + 18
        svg.append(el("text", str(done.round), class_="tick", x=x(done.round), y=below, text_anchor="middle"))
    svg.append(el("text", "round", class_="axis", x=(left + WIDTH - right) / 2, y=height - 4, text_anchor="middle"))
    points = " ".join(f"{x(done.round):.1f},{y(done.evaluation.relative_fd):.1f}" for done in rounds)
    svg.append(el("polyline", class_="line", points=points))
    for done in rounds:
        told = f"round {done.round}: {relative(done.evaluation.relative_fd)}{', approved' if done.approved else ''}"
        kind = "dot approved" if done.approved else "dot"
        svg.append(
            el("circle", el("title", told), class_=kind, cx=x(done.round), cy=y(values[rounds.index(done)]), r=5)
        )
    # The last value is written out, clear of the reference line's own label.
    away = -10 if abs(y(values[-1]) - y(1)) > 16 or values[-1] >= 1 else 18  # noqa: PLR2004 - a line of text
    svg.append(
        el(
            "text",
            relative(values[-1]),
            class_="value",
            x=x(rounds[-1].round),
            y=y(values[-1]) + away,
            text_anchor="middle",
        )
    )
    return svg


def durations_plot(rows: Sequence[tuple[str, float, float]], label: str) -> Element:
    """Draw a line from p50 to p95 for each (name, p50_s, p95_s), on one axis of seconds."""
    row, left, right, bottom = 34.0, 190.0, 30.0, 40.0
    height = row * len(rows) + bottom + 8
    ticks = _ticks(max(p95_s for _, _, p95_s in rows))

    def x(value: float) -> float:
        return left + value / ticks[-1] * (WIDTH - left - right)

    svg = el("svg", viewBox=f"0 0 {WIDTH:g} {height:g}", role="img", aria_label=label)
    for tick in ticks:
        svg.append(el("line", class_="grid", x1=x(tick), x2=x(tick), y1=4, y2=height - bottom + 4))
        svg.append(el("text", number(tick), class_="tick", x=x(tick), y=height - bottom + 20, text_anchor="middle"))
    svg.append(el("text", "seconds", class_="axis", x=(left + WIDTH - right) / 2, y=height - 4, text_anchor="middle"))
    for index, (name, p50_s, p95_s) in enumerate(rows):
        middle = 8 + row * (index + 0.5)
        short = name if len(name) <= LABEL_CHARACTERS else name[: LABEL_CHARACTERS - 1] + "…"
        svg.append(el("text", el("title", name), short, class_="name", x=left - 12, y=middle + 4, text_anchor="end"))
        svg.append(el("line", class_="range", x1=x(p50_s), x2=x(p95_s), y1=middle, y2=middle))
        svg.append(
            el("circle", el("title", f"p95: {seconds(p95_s)}"), class_="dot hollow", cx=x(p95_s), cy=middle, r=5)
        )
        svg.append(el("circle", el("title", f"p50: {seconds(p50_s)}"), class_="dot", cx=x(p50_s), cy=middle, r=5))
    return svg


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
