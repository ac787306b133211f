"""The report as one HTML page that needs nothing beside itself: for people to read, print and send on."""

import base64
import calendar
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC
from itertools import pairwise
from xml.etree.ElementTree import Element

from services.reporter.html import Child, document, el
from services.reporter.plots import durations_plot, number, relative, rounds_plot, seconds
from services.reporter.style import CSS
from shared.documents.reports import MapStatistics, Report, Round, Training, TrainingStatus
from shared.messages import Evaluation, Memorisation

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""The browser itself refuses anything from outside, and any script."""
DIGEST_CHARACTERS = 10
OUTCOMES = ("completed", "no_matching_series", "failed")
STATUS: dict[TrainingStatus, tuple[str, str]] = {
    "approved": ("✓ approved", "pill good"),
    "rounds_used_up": ("not approved: rounds used up", "pill bad"),
    "failed": ("failed", "pill bad"),
    "running": ("no end in this month", "pill open"),
}

Config = Mapping[str, int | float | str | bool]


def page(report: Report, images: Mapping[str, bytes]) -> bytes:
    """Return the page as UTF-8 HTML. `images` are PNG files by request id."""
    year, month = report.month.split("-")
    title = f"{calendar.month_name[int(month)]} {year}"
    return document(
        el(
            "html",
            el(
                "head",
                el("meta", charset="utf-8"),
                el("meta", name="viewport", content="width=device-width, initial-scale=1"),
                el("meta", http_equiv="Content-Security-Policy", content=POLICY),
                el("title", f"radqueue report, {title}"),
                el("style", CSS),
            ),
            el(
                "body",
                el(
                    "main",
                    *_head(report, title),
                    *_training_section(report, images),
                    *_inference_section(report),
                    *_series_section(report),
                    *_refused_section(report),
                    _foot(report),
                ),
            ),
            lang="en",
        )
    )


def _head(report: Report, title: str) -> list[Child]:
    made = f"{report.generated_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    told = f"{_count(report.n_events, 'event')}, by UTC date · made {made} · "
    notices: list[Child] = []
    if not report.month_is_over:
        notices.append(el("p", "This month was not over when the report was made.", class_="notice"))
    if report.n_unreadable:
        lines = _count(report.n_unreadable, "line")
        notices.append(el("p", f"{lines} of the event log could not be read and are not counted.", class_="notice"))
    return [
        el("p", "radqueue · monthly report", class_="eyebrow"),
        el("h1", title),
        el("p", told, el("a", "the same numbers as JSON", href=f"{report.month}.json"), class_="quiet"),
        *notices,
        el("div", *_tiles(report), class_="tiles"),
    ]


def _tiles(report: Report) -> list[Element]:
    runs: Counter[str] = Counter()
    for statistics in report.inference:
        runs.update(statistics.outcomes)
    series = report.series
    approved = sum(training.status == "approved" for training in report.training)
    rejected = sum(report.rejections_by_reason.values())
    reason = next(iter(report.rejections_by_reason), None)
    return [
        _tile(
            "AI runs completed",
            runs["completed"],
            f"{runs['failed']:,} failed, {runs['no_matching_series']:,} unmatched",
        ),
        _tile("Series ready", series.n_series, f"{_count(series.n_instances, 'instance')}"),
        _tile("Models approved", approved, f"of {_count(len(report.training), 'training')}"),
        _tile("Uploads rejected", rejected, f"most often {reason}" if reason else "none"),
    ]


def _tile(name: str, count: int, detail: str) -> Element:
    return el(
        "div",
        el("span", name, class_="quiet"),
        el("b", f"{count:,}"),
        el("span", detail, class_="quiet"),
        class_="tile",
    )


# Training.


def _training_section(report: Report, images: Mapping[str, bytes]) -> list[Child]:
    lead = (
        "Each training repeats train and evaluate until its images are close enough to real ones: it continues, and "
        "changes parameters when it stalls. Relative distance is the Fréchet distance from generated to held-out real "
        "images, divided by the same distance between two disjoint sets of real images: 1 is as good as real."
    )
    if not report.training:
        return [el("h2", "Training"), el("p", "No training in this month.", class_="lead")]
    in_turn = sorted(report.training, key=lambda training: (list(STATUS).index(training.status), training.request_id))
    cards = [_training_card(training, images.get(training.request_id)) for training in in_turn]
    return [el("h2", "Training"), el("p", lead, class_="lead"), *cards]


def _training_card(training: Training, png: bytes | None) -> Element:
    status, kind = STATUS[training.status]
    header = el(
        "header",
        el("h3", training.request_id),
        el("span", status, class_=kind),
        el("span", "dataset ", el("code", training.dataset), class_="quiet"),
        el("span", "reason ", el("code", training.reason_code), class_="quiet") if training.reason_code else None,
    )
    why = training.why_not
    judged = el("p", f"{why[0].upper()}{why[1:]}.", class_="note") if why else None
    picture = _picture(training, png)
    plot = _rounds_figure(training) if training.rounds else None
    figures = [figure for figure in (picture, plot) if figure is not None]
    body = el("div", *figures, class_="pair" if len(figures) > 1 else None)
    if not figures:
        body.append(el("p", "No round was completed in this month.", class_="quiet"))
    table = _rounds_table(training) if training.rounds else None
    return el("article", header, judged, body, table, _config_list(training.config), class_="card stack")


def _picture(training: Training, png: bytes | None) -> Element | None:
    if training.images_key is None:
        return None
    where = el("code", training.images_key)
    if png is None or not png.startswith(PNG_SIGNATURE):
        return el("figure", el("figcaption", "The generated images are not embedded here; they are at ", where))
    width, height = struct.unpack(">II", png[16:24])  # the IHDR chunk comes first, PNG specification section 11.2.1
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    image = el("img", src=source, alt=f"Images generated by {training.request_id}", width=width, height=height)
    return el("figure", el("h4", "Generated images"), image, el("figcaption", where))


def _rounds_figure(training: Training) -> Element:
    judged = training.evaluation or training.rounds[-1].evaluation
    caption = f"{judged.metric} in the space {judged.space}, n = {judged.n:,} images on each side. Floor: real vs real."
    plot = rounds_plot(training.rounds, f"Relative distance of {training.request_id} over its rounds")
    heading = el("h4", "Relative distance by round")
    return el("figure", heading, plot, el("figcaption", caption))


def _rounds_table(training: Training) -> Element:
    head = ("Round", "Steps", "Duration", "Distance", "Floor", "Relative", "Coverage", "Copies", "Changed")
    changes = [None, *(_changes(before.config, after.config) for before, after in pairwise(training.rounds))]
    rows = [_round_row(done, changed) for done, changed in zip(training.rounds, changes, strict=True)]
    table = _table(head, rows, numeric=8)
    used = training.rounds_used
    if used is not None and used > len(training.rounds):
        note = el("p", f"{used} rounds in all; earlier ones are in an earlier month's report.", class_="note")
        return el("div", table, note)
    return table


def _round_row(done: Round, changed: Sequence[str] | None) -> list[Child]:
    found = done.evaluation
    return [
        str(done.round),
        f"{done.steps:,}",
        seconds(done.duration_s),
        number(found.distance),
        number(found.floor),
        el("b", relative(found.relative_fd), el("span", " ✓", class_="mark") if done.approved else None),
        _coverage(found),
        _copies(found.memorisation),
        el("span", *(el("code", change, class_="change") for change in changed)) if changed else "-",
    ]


def _coverage(found: Evaluation) -> str:
    """Tell which share of real images the generated ones cover, and, behind it, how much other real images do."""
    if not found.quality:
        return "-"
    return f"{found.quality.coverage:.2f}" + (f" of {found.real_quality.coverage:.2f}" if found.real_quality else "")


def _copies(found: Memorisation | None) -> Child:
    if found is None:
        return "-"
    told = f"{found.copied_share:.0%}"
    return el("b", told, " flagged") if found.flagged else told


def _changes(before: Config, after: Config) -> list[str]:
    """Name the parameters that differ from one round to the next."""
    told_before = {name: _value(value) for name, value in before.items()}
    told_after = {name: _value(value) for name, value in after.items()}
    return [
        f"{name} {told_before.get(name, 'unset')} → {told_after.get(name, 'unset')}"
        for name in sorted({*before, *after})
        if told_before.get(name) != told_after.get(name)
    ]


def _config_list(config: Config) -> Element | None:
    if not config:
        return None
    entries = [
        el("div", el("dt", el("code", name)), el("dd", el("code", _value(config[name])))) for name in sorted(config)
    ]
    return el("details", el("summary", "Configuration of the model"), el("dl", *entries, class_="config"))


def _value(value: float | str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


# Inference.


def _inference_section(report: Report) -> list[Child]:
    skipped = _skipped_card(report.skipped_by_modality)
    if not report.inference:
        return [el("h2", "Inference"), el("p", "No AI run in this month.", class_="lead"), skipped]
    lead = (
        "One row for each version of a MONAI application package. A run without a matching series is no failure. "
        "Durations are wall time of completed runs alone."
    )
    key = el("div", *(el("span", el("i", class_=name), _words(name)) for name in OUTCOMES), class_="key")
    most = max(sum(statistics.outcomes.values()) for statistics in report.inference)
    head = ("Application", "Version", "", "Runs", "Completed", "Unmatched", "Failed", "Outputs")
    rows = [_outcome_row(statistics, most) for statistics in report.inference]
    outcomes = el(
        "div", el("h4", "Runs by outcome"), key, _table(head, rows, numeric=8, first_numeric=3, wide=2), class_="card"
    )
    return [el("h2", "Inference"), el("p", lead, class_="lead"), outcomes, _durations_card(report.inference), skipped]


def _outcome_row(statistics: MapStatistics, most: int) -> list[Child]:
    counts = [statistics.outcomes.get(name, 0) for name in OUTCOMES]
    parts = [(name, count / most) for name, count in zip(OUTCOMES, counts, strict=True) if count]
    return [
        el("code", statistics.map),
        el("code", statistics.map_digest[:DIGEST_CHARACTERS]),
        _bar(parts),
        f"{sum(counts):,}",
        *(f"{count:,}" for count in counts),
        f"{statistics.n_outputs:,}",
    ]


def _durations_card(inference: Sequence[MapStatistics]) -> Element | None:
    every = [(statistics, durations) for statistics in inference for durations in statistics.durations]
    if not every:
        return None
    several = {statistics.map for statistics in inference}
    rows: list[list[Child]] = []
    marks: list[tuple[str, float, float]] = []
    for statistics, found in every:
        version = "" if len(several) == len(inference) else f"@{statistics.map_digest[:6]}"
        marks.append((f"{statistics.map}{version} · {found.device}", found.p50_s, found.p95_s))
        shown = (seconds(found.p50_s), seconds(found.p95_s), seconds(found.longest_s))
        rows.append([el("code", statistics.map + version), found.device, f"{found.n:,}", *shown])
    key = el("div", el("span", el("i", class_="round"), "p50"), el("span", el("i", class_="ring"), "p95"), class_="key")
    table = _table(("Application", "Device", "n", "p50", "p95", "Longest"), rows, numeric=6, first_numeric=2)
    plot = el("figure", durations_plot(marks, "Durations of completed runs, p50 to p95, in seconds"))
    return el(
        "div", el("h4", "Duration of a completed run"), key, el("div", plot, table, class_="pair even"), class_="card"
    )


def _skipped_card(by_modality: Mapping[str, int]) -> Element | None:
    if not by_modality:
        return None
    heading = el("h4", "Revisions of series that no application takes, by modality")
    return el("div", heading, _counts_table("Modality", by_modality), class_="card")


# Series, and what was refused or failed.


def _series_section(report: Report) -> list[Child]:
    series = report.series
    if not series.n_series:
        return [el("h2", "Series"), el("p", "No series settled in this month.", class_="lead")]
    with_warnings = _count(series.n_with_warnings, "series", "series")
    lead = (
        f"{_count(series.n_series, 'series', 'series')} settled, in {_count(series.n_revisions, 'revision')} "
        f"(a late instance makes a new one); {with_warnings} with a geometry or content warning."
    )
    return [
        el("h2", "Series"),
        el("p", lead, class_="lead"),
        el("div", el("h4", "Series by modality"), _counts_table("Modality", series.by_modality), class_="card"),
    ]


def _refused_section(report: Report) -> list[Child]:
    tables = (
        ("Uploads rejected, by reason", report.rejections_by_reason, "No upload was rejected."),
        ("AI runs failed, by reason", report.failures_by_reason["inference"], "No AI run failed."),
        ("Trainings failed, by reason", report.failures_by_reason["training"], "No training failed."),
    )
    cards = [
        el(
            "div",
            el("h4", name),
            _counts_table("Reason", counts) if counts else el("p", none, class_="quiet"),
            class_="card",
        )
        for name, counts, none in tables
    ]
    return [el("h2", "Rejections and failures"), el("div", *cards, class_="trio")]


def _counts_table(name: str, counts: Mapping[str, int]) -> Element:
    most, total = max(counts.values()), sum(counts.values())
    rows: list[list[Child]] = [
        [el("code", key), _bar([("", count / most)]), f"{count:,}", f"{100 * count / total:.0f} %"]
        for key, count in counts.items()
    ]
    return _table((name, "", "Count", "Share"), rows, numeric=4, first_numeric=2, wide=1)


def _foot(report: Report) -> Element:
    notes = (
        "Months and dates are UTC, by the event's own time; one that comes late is in the month's next report.",
        f"A message may be delivered twice: {_count(report.n_repeats, 'repeat')} of the same event were left out.",
        "Outputs are DICOM instances that were stored in HealthImaging.",
        "p50 and p95 interpolate linearly between order statistics; below n = 20, p95 is close to the longest.",
        "Distances compare only within one feature space and one n. The name FID is used for Inception features alone.",
        "Results are for research, not for clinical use.",
    )
    return el("footer", el("h4", "How to read this"), el("ul", *(el("li", note) for note in notes)), class_="quiet")


# Parts.


def _table(
    head: Sequence[str], rows: Sequence[Sequence[Child]], *, numeric: int, first_numeric: int = 0, wide: int = -1
) -> Element:
    """Return a table whose columns from `first_numeric` up to `numeric` are right-aligned."""

    def kind(column: int) -> str | None:
        if column == wide:
            return "wide"
        return "n" if first_numeric <= column < numeric else None

    header = el("tr", *(el("th", name, class_=kind(column), scope="col") for column, name in enumerate(head)))
    body = [el("tr", *(el("td", cell, class_=kind(column)) for column, cell in enumerate(row))) for row in rows]
    return el("div", el("table", el("thead", header), el("tbody", *body)), class_="scroll")


def _bar(parts: Sequence[tuple[str, float]]) -> Element:
    """Return a bar of parts, each a kind and a share of the whole width."""
    return el(
        "div", *(el("i", class_=kind or None, style=f"width:{100 * share:.2f}%") for kind, share in parts), class_="bar"
    )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _count(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"
