"""Everything that people see: results on standard output, progress on standard error."""

import json as json_module
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TransferSpeedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table

from services.ingest.reasons import REASONS, WARNINGS

if TYPE_CHECKING:
    from cli.demo import Demo
    from cli.study.journey import Journey, Series
    from cli.training.following import Training

STYLES = {"pushed": "green", "skipped": "cyan", "no_match": "cyan", "failed": "bold red", "rejected": "red"}
LABELS = {"skipped": "skipped (no route)", "no_match": "no matching series"}
"""Stages that do not explain themselves."""
WIDTH = 160
"""Columns where there is no terminal to ask."""
out = Console(highlight=False, emoji=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH)
err = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True, width=None if sys.stderr.isatty() else WIDTH)


_said: set[str] = set()
"""Lines of `live` that were printed."""


def say(text: str) -> None:
    """Print a result."""
    out.print(escape(text))
    sys.stdout.flush()


def progress(text: str) -> None:
    """Print what happens."""
    err.print(escape(text), style="dim")


def fail(text: str) -> None:
    """Print why it did not work."""
    err.print(f"[bold red]radqueue:[/] {escape(text)}")


def json(document: Any) -> None:
    """Print one JSON document."""
    sys.stdout.write(json_module.dumps(document, indent=1, default=str) + "\n")
    sys.stdout.flush()


def status(found: dict[str, Any]) -> None:
    """Print what `radqueue status` found."""
    out.print(queues_table(found["queues"]))
    for title, rows in found["recent"].items():
        out.print(recent_table(title, rows) if rows else f"No {title} among the newest events.")


def queues_table(counts: dict[str, dict[str, int]]) -> Table:
    """Make the table of the queues; a dead-letter queue that holds something stands out."""
    table = Table("queue", title="Queues", title_justify="left")
    for column in ("waiting", "in flight", "delayed", "dead letters"):
        table.add_column(column, justify="right")
    for name, row in counts.items():
        dead = f"[bold red]{row['dead']}[/]" if row["dead"] else "0"
        table.add_row(name, str(row["visible"]), str(row["in_flight"]), str(row["delayed"]), dead)
    return table


def recent_table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Make a table of what was done lately, one column per key."""
    table = Table(title=title.capitalize(), title_justify="left")
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return "" if value is None else escape(str(value))


@contextmanager
def bytes_progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Show a bar of bytes while the body runs, which tells how many went; without a terminal, a line at the end."""
    if not err.is_terminal:
        yield lambda _: None
        progress(f"uploaded {what}")
        return
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda went: bar.advance(task, went)


@contextmanager
def count_progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Show a bar of things while the body runs, which tells how many more were done; nothing without a terminal."""
    if not err.is_terminal:
        yield lambda _: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda more: bar.advance(task, more)


@contextmanager
def live(table: Callable[[], RenderableType], lines: Callable[[], list[str]]) -> Iterator[Callable[[], None]]:
    """Show what changes while the body runs, which calls what it is given to have it looked at again.

    A terminal shows `table`; anything else gets each of `lines` once.
    """
    if err.is_terminal:
        with Live(table(), console=err, refresh_per_second=4, transient=True) as shown:
            yield lambda: shown.update(table())
        return

    def seen() -> None:
        for line in lines():
            if line not in _said:
                _said.add(line)
                progress(line)

    yield seen


def journey_table(journey: "Journey") -> Table:
    """Show where every series is."""
    columns = "series", "dataset", "modality", "images", "geometry", "stage", "MAP", "warnings"
    table = Table(*columns, title="Uploads", title_justify="left", caption=escape("\n".join(journey.hints())))
    for series in journey.series:
        stage = f"[{STYLES.get(series.stage, 'default')}]{_stage(series)}[/] {_reached(series):.1f} s"
        what = series.dataset, escape(series.modality), str(series.n_instances), series.verdict or ""
        table.add_row(_short(series.series_uid), *what, stage, _outcomes(series), ", ".join(series.warnings))
    return table


def journey_lines(journey: "Journey") -> list[str]:
    """Tell what came to an end."""
    ended = (series for series in journey.series if series.ended)
    lines = [f"series {_short(one.series_uid)} {_stage(one)} after {_reached(one):.1f} s" for one in ended]
    lines += journey.hints()
    return lines + [f"{one.path} refused: {one.reason_code}" for one in journey.all_rejections]


def journey(followed: "Journey") -> None:
    """Print where every series ended, and what was refused and why, equal reasons together."""
    if followed.series:
        out.print(journey_table(followed))
        warnings(code for series in followed.series for code in series.warnings)
        failures(one for series in followed.series for one in series.maps.values() if one["outcome"] == "failed")
    together: dict[str, dict[str, None]] = defaultdict(dict)
    for rejection in followed.all_rejections:
        at = f" (at {rejection.place})" if rejection.place else ""
        together[rejection.reason_code][f"  {rejection.path}{at}"] = None
    for code, lines in together.items():
        out.print(f"[red]refused[/]: {code}: {escape(REASONS.get(code, ''))}")
        say("\n".join(lines))
    counts = Counter(_stage(series) for series in followed.series if series.stage != "rejected")
    if refused := len(followed.all_rejections):
        counts["refused"] = refused
    say(", ".join(f"{count} {what}" for what, count in counts.items()))


def warnings(codes: Iterable[str]) -> None:
    """Print what each of these warnings means."""
    for code in sorted(set(codes)):
        out.print(f"[yellow]warning[/]: {code}: {escape(WARNINGS.get(code, ''))}")


def failures(found: Iterable[dict[str, Any]]) -> None:
    """Print why MAPs failed, where, what to do and where the logs are, equal failures together."""
    together: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for one in found:
        place = " ".join(filter(None, (one.get("error_type"), one.get("where"))))
        together[one["map"], one["reason_code"], place].append(one)
    for (name, code, place), alike in together.items():
        at = f" ({place})" if place else ""
        out.print(f"[bold red]failed[/]: {escape(f'{name}: {code}{at}')}: {escape(alike[0]['why'])}.")
        say(f"  {alike[0]['remedy']}")
        paths(f"log: {log}" for log in dict.fromkeys(one["log"] for one in alike) if log)


def _stage(series: "Series") -> str:
    return LABELS.get(series.stage, series.stage)


def _short(uid: str) -> str:
    return f"…{uid[-12:]}"


def _reached(series: "Series") -> float:
    return series.seconds.get(series.stage, 0.0)


def _outcomes(series: "Series") -> str:
    return ", ".join(f"{name} {result.get('reason_code', result['outcome'])}" for name, result in series.maps.items())


def training_table(training: "Training") -> RenderableType:
    """Show the rounds of a training, and how far the one that runs is."""
    title = f"Training {training.request_id}, {training.goal}: {training.state}"
    table = Table("round", title=escape(title), title_justify="left")
    table.add_column("rule", no_wrap=True)  # cut off, `overfitted` and `overpowered` are the same
    table.add_column("steps")
    for column in ("distance", "floor", "relative", "coverage", "copies", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("warnings")
    for done in training.rounds:
        found = done["evaluation"]
        relative = f"[{'green' if done['approved'] else 'default'}]{found['relative_fd']:.2f}[/]"
        numbers = f"{found['distance']:.2f}", f"{found['floor']:.2f}", relative, _coverage(found), _copies(found)
        noticed = ", ".join(found.get("warnings") or [])
        table.add_row(
            str(done["round"]), done["rule"], str(done["steps"]), *numbers, f"{done['duration_s']:.1f}", noticed
        )
    if training.ended or training.progress is None:
        return table
    told = training.progress
    bar = ProgressBar(total=told["of_steps"], completed=told["step"], width=40)
    return Group(table, Columns([bar, escape(_progress(told))]))


def _coverage(found: dict[str, Any]) -> str:
    """Tell which share of real images the generated ones cover, and, behind it, how much other real images do."""
    if not found.get("quality"):
        return ""
    real = found.get("real_quality")
    return f"{found['quality']['coverage']:.2f}" + (f" of {real['coverage']:.2f}" if real else "")


def _copies(found: dict[str, Any]) -> str:
    tested = found.get("memorisation")
    if not tested:
        return "not tested"
    return "[bold red]found[/]" if tested["flagged"] else "none"


def _progress(told: dict[str, Any]) -> str:
    losses = f"losses {told['generator_loss']:.2f} (generator), {told['discriminator_loss']:.2f} (discriminator)"
    steps = f"step {told['step']} of {told['of_steps']}, {told['images_seen']} images seen"
    return f"round {told['round']}: {steps}, {losses}"


def training_lines(training: "Training") -> list[str]:
    """Tell each tenth of a round, each round and the state."""
    lines = []
    ended = {done["round"]: done for done in training.rounds}
    for number in sorted({*ended, *(number for number, _ in training.noted)}):
        lines += [_progress(told) for (of, _), told in training.noted.items() if of == number]
        if (done := ended.get(number)) is not None:
            lines.append(_round_line(done))
    return [*lines, f"training {training.request_id}: {training.state}"]


def _round_line(done: dict[str, Any]) -> str:
    found = done["evaluation"]
    told = [f"{found['metric']} {found['distance']:.2f}", f"relative {found['relative_fd']:.2f}"]
    if covered := _coverage(found):
        told.append(f"coverage {covered}")
    if (found.get("memorisation") or {}).get("flagged"):
        told.append("copies found")
    noticed = f", warnings: {', '.join(found['warnings'])}" if found.get("warnings") else ""
    return f"round {done['round']} ({done['rule']}): {', '.join(told)}, {done['duration_s']:.1f} s{noticed}"


def training(ended: "Training") -> None:
    """Print how a training ended."""
    if ended.rounds:
        out.print(training_table(ended))
    if ended.reason_code:
        say(f"The training {ended.request_id} failed: {ended.why}")
    elif ended.completion and not ended.approved:
        why = f" and {ended.why}" if ended.why else ""
        say(f"The training {ended.request_id} was not approved: its rounds are used up{why}. The best model is kept.")


def demo_table(
    journey: "Journey | None", training: "Training | None", counts: dict[str, dict[str, int]]
) -> RenderableType:
    """Show both journeys and the queues."""
    shown: list[RenderableType] = [queues_table(counts)]
    if training is not None:
        shown.insert(0, training_table(training))
    if journey is not None:
        shown.insert(0, journey_table(journey))
    return Group(*shown)


def demo_lines(journey: "Journey | None", training: "Training | None") -> list[str]:
    """Tell what came to an end in both journeys."""
    return [*(journey_lines(journey) if journey else []), *(training_lines(training) if training else [])]


def demo(ran: "Demo") -> None:
    """Print what the demo did, and where to look."""
    if ran.journey is not None:
        journey(ran.journey)
        if ran.own:
            say("Dataset samples: the project's own files, sent beside yours to be skipped and refused.")
    if ran.training is not None:
        training(ran.training)
    if ran.report:
        report(ran.report)
    seconds = ", ".join(f"{name.replace('_', ' ')} {spent:.1f}" for name, spent in ran.seconds.items())
    say(f"Seconds: {seconds}")
    if ran.pages:
        say("Look at:")
        paths([*ran.pictures, *ran.pages])
    for failure in ran.failures:
        fail(failure)
    out.print(f"[bold {'red' if ran.failures else 'green'}]{ran.verdict}[/]")


def report(made: dict[str, Any]) -> None:
    """Print a month's report in short."""
    table = Table("what", "how many", title=f"Report of {made['month']}", title_justify="left")
    series = made["series"]
    table.add_row("events", str(made["n_events"]))
    table.add_row("series, revisions", f"{series['n_series']}, {series['n_revisions']}")
    for statistics in made["inference"]:
        for outcome, count in statistics["outcomes"].items():
            table.add_row(escape(f"{statistics['map']} {outcome}"), str(count))
        for times in statistics["durations"]:
            table.add_row(f"  seconds p50, p95 on {times['device']}", f"{times['p50_s']:.2f}, {times['p95_s']:.2f}")
    for trained in made["training"]:
        found = trained["evaluation"]
        distance = f", relative distance {found['relative_fd']:.2f}" if found else ""
        reason = f": {trained['reason_code']}" if trained["reason_code"] else ""
        table.add_row(escape(f"training {trained['request_id']}"), f"{trained['status']}{reason}{distance}")
    for reason, count in made["rejections_by_reason"].items():
        table.add_row(f"refused: {reason}", str(count))
    out.print(table)


def paths(every: Iterable[Path | str]) -> None:
    """Print where something is, a line each."""
    for path in every:
        say(f"  {path}")
