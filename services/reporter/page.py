"""The report as one HTML page that needs nothing beside itself: for people to read, print and send on.

What is shown is computed here; how it is shown is in templates/, which escape every text.
"""

import base64
import calendar
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, get_args

from jinja2 import Environment, PackageLoader, StrictUndefined

from services.reporter import formats, plots
from shared.documents.reports import Durations, MapStatistics, Report, Round, TrainingStatus

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
OUTCOMES = ("completed", "no_matching_series", "failed")

Config = Mapping[str, int | float | str | bool]


class Picture(NamedTuple):
    """A PNG file as it stands in the page."""

    source: str
    width: int
    height: int


def page(report: Report, images: Mapping[str, bytes]) -> bytes:
    """Return the page as UTF-8 HTML. `images` are PNG files by request id."""
    year, month = report.month.split("-")
    statuses = get_args(TrainingStatus)
    html = TEMPLATES.get_template("report.html.j2").render(
        report=report,
        title=f"{calendar.month_name[int(month)]} {year}",
        most_runs=max((sum(statistics.outcomes.values()) for statistics in report.inference), default=0),
        runs=sum((Counter(statistics.outcomes) for statistics in report.inference), Counter()),
        trainings=sorted(report.training, key=lambda found: (statuses.index(found.status), found.request_id)),
        pictures={request_id: _picture(png) for request_id, png in images.items()},
        outcomes=OUTCOMES,
        durations=_durations(report.inference),
    )
    return html.encode("utf-8", "replace")


def _picture(png: bytes) -> Picture | None:
    """Return the picture; None if the file is no PNG."""
    if not png.startswith(PNG_SIGNATURE):
        return None
    width, height = struct.unpack(">II", png[16:24])  # the IHDR chunk comes first, PNG specification section 11.2.1
    return Picture("data:image/png;base64," + base64.b64encode(png).decode(), width, height)


def _durations(inference: Sequence[MapStatistics]) -> list[tuple[str, Durations]]:
    """Return the durations by application and device; its version is in the name where an application has several."""
    several = len({statistics.map for statistics in inference}) < len(inference)
    return [
        (f"{statistics.map}@{statistics.map_digest[:6]}" if several else statistics.map, found)
        for statistics in inference
        for found in statistics.durations
    ]


def _with_changes(rounds: Sequence[Round]) -> list[tuple[Round, list[str]]]:
    """Return each round and what parameters changed before it."""
    return [(rounds[0], []), *((after, _changes(before.config, after.config)) for before, after in pairwise(rounds))]


def _changes(before: Config, after: Config) -> list[str]:
    """Name the parameters that differ from one round to the next."""
    told_before = {name: formats.parameter(value) for name, value in before.items()}
    told_after = {name: formats.parameter(value) for name, value in after.items()}
    return [
        f"{name} {told_before.get(name, 'unset')} → {told_after.get(name, 'unset')}"
        for name in sorted({*before, *after})
        if told_before.get(name) != told_after.get(name)
    ]


def _templates() -> Environment:
    """Return what renders the templates; a name that they do not know is an error, never an empty text."""
    templates = Environment(
        loader=PackageLoader("services.reporter"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=formats.coordinate,
    )
    told = (formats.number, formats.relative, formats.seconds, formats.thousands, formats.count, formats.utc)
    for function in (*told, formats.parameter, formats.coverage):
        templates.filters[function.__name__] = function
    for axis in (plots.rounds_axis, plots.distance_axis, plots.seconds_axis):
        templates.globals[axis.__name__] = axis
    templates.globals["with_changes"] = _with_changes
    return templates


TEMPLATES = _templates()
