"""`radqueue ingest-check`: what ingest would say to each file and series of an archive, here and without AWS.

`services/ingest/check.py` reads the files; here is the command, and what it shows.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cli import show
from cli.options import Json
from cli.study.uploads import files
from services.ingest.check import Check, SeriesVerdict, check
from services.ingest.reasons import REASONS, WARNINGS
from services.ingest.settings import IngestSettings
from shared.config import load
from shared.errors import Unavailable
from shared.operations.refused import Refused


def command(
    context: typer.Context,
    *,
    folder: Annotated[
        Path,
        typer.Argument(
            help="A folder of DICOM files and zips, without its hidden files, or one file.", show_default=False
        ),
    ],
    json: Json = False,
) -> None:
    """Read every file as ingest would, here and without AWS, and tell what it would take and what it would refuse.

    And of each series how its slices lie: whether they are a regular stack, or what a MAP may stumble over.

    Its limits are the service's: set RADQUEUE_DECODERS, RADQUEUE_MAX_PIXEL_BYTES and so on as there.
    """
    paths = list(files(folder))
    if not paths:
        raise Refused(f"there is no file in {folder}")
    found = _checked(paths, load(IngestSettings, context.obj))
    show.json(found.summary()) if json else _show(found)
    raise typer.Exit(min(found.n_refused, 1))


def _checked(paths: Sequence[Path], settings: IngestSettings) -> Check:
    try:
        with _bar(len(paths)) as done:
            return asyncio.run(check(paths, settings, done=done))
    except Unavailable as error:
        raise Refused(str(error)) from None
    except OSError as error:
        raise Refused(f"cannot read {error.filename}: {error.strerror}") from None


@contextmanager
def _bar(total: int) -> Iterator[Callable[[], None]]:
    """Show a bar of files while the body runs, on a terminal."""
    columns = TextColumn("checking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=show.err, transient=True, disable=not show.err.is_terminal) as bar:
        task = bar.add_task("checking", total=total)
        yield lambda: bar.advance(task)


def _show(found: Check) -> None:
    for verdict in found.verdicts:
        at = f" (at {verdict.place})" if verdict.place else ""
        what = "taken in" if verdict.taken else f"[red]refused[/]: {verdict.reason_code}{escape(at)}"
        more = ", ".join([verdict.decoder] * bool(verdict.decoder) + list(verdict.warnings))
        show.out.print(f"{escape(verdict.path)}: {what}{f', {more}' if more else ''}, {verdict.seconds:.2f} s")
    counts = found.counts()
    for title, meanings in (("reasons", REASONS), ("warnings", WARNINGS)):
        if counts[title]:
            table = Table(title[:-1], "files", "meaning", title=title.capitalize(), title_justify="left")
            for code, n in counts[title].items():
                table.add_row(code, str(n), meanings.get(code, ""))
            show.out.print(table)
    if found.series:
        show.out.print(_table(found.series))
    taken = len(found.verdicts) - found.n_refused
    decoders = _counted(counts["decoders"])
    show.say(f"{len(found.verdicts)} files: {taken} taken in{decoders}, {found.n_refused} refused")
    show.say(f"{len(found.series)} series{_counted(Counter(map(_of, found.series)))}")
    show.say(f"{found.seconds:.1f} s, nothing was sent or kept")


def _counted(counts: dict[str, int]) -> str:
    told = ", ".join(f"{name} {n}" for name, n in sorted(counts.items(), key=lambda item: -item[1]))
    return f" ({told})" if told else ""


def _table(series: Sequence[SeriesVerdict]) -> Table:
    table = Table("series", "modality", "instances", "verdict", "spacing mm", "tilt deg", "warnings", title="Series")
    table.title_justify = "left"
    for one in series:
        numbers = (one.geometry and one.geometry.spacing_mm, one.geometry and one.geometry.tilt_deg)
        cells = [one.series_uid, one.modality or "", str(one.n_instances), _of(one)]
        cells += ["" if number is None else f"{number:g}" for number in numbers]
        table.add_row(*map(escape, cells), ", ".join(one.warnings))
    return table


def _of(series: SeriesVerdict) -> str:
    if series.geometry:
        return series.geometry.verdict
    return "not described" if series.warnings else "no image"
