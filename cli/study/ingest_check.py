"""`radqueue ingest-check`: what ingest would say to each file and series of an archive, here and without AWS.

The files are read by the same children, with the same limits, as in the service. Nothing is sent or kept, and of what
stands in the files only codes and UIDs are told.
"""

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cli import show
from cli.client import Refused
from cli.study.uploads import files
from services.ingest.decoder import Decoder, Rejected
from services.ingest.geometry import Slice, survey
from services.ingest.protocol import Instance, Locate
from services.ingest.reasons import REASONS, WARNINGS
from services.ingest.settings import IngestSettings
from shared.child import ChildFailed
from shared.concurrency import all_of, temporary_folder
from shared.config import load
from shared.errors import Unavailable
from shared.messages import Geometry


@dataclass(frozen=True, slots=True)
class Verdict:
    """What ingest would do with one file."""

    path: str
    """Of the file; a member of an archive is `archive.zip#7`, counted from 0: the names inside are not told."""
    taken: bool
    series_uid: str | None = None
    reason_code: str | None = None
    place: str = ""
    """Which element the refusal is about, which line of code, or which other file."""
    warnings: Sequence[str] = ()
    decoder: str = ""
    """What read its compressed pixels."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Taken:
    """One instance that ingest would store."""

    instance: Instance
    slices: Sequence[Slice]
    modality: str | None
    failure: str = ""
    """Why its series could not be described: a code of `reasons.DEAD_LETTERS`."""


@dataclass(frozen=True, slots=True)
class SeriesVerdict:
    """What ingest would tell of a series."""

    study_uid: str
    series_uid: str
    modality: str | None
    n_instances: int
    geometry: Geometry | None
    """None for a series without images."""
    warnings: Sequence[str]
    """About its geometry, or why that is not known; those of its instances stand with the files."""

    @classmethod
    def of(cls, taken: Sequence[Taken]) -> "SeriesVerdict":
        """Say of the instances of one series how their slices lie."""
        slices = [item for one in taken for item in one.slices]
        failures = sorted({one.failure for one in taken} - {""})
        geometry, _, warnings = survey(slices) if slices and not failures else (None, [], failures)
        first = taken[0].instance
        return cls(first.study_uid, first.series_uid, taken[0].modality, len(taken), geometry, warnings)


@dataclass(slots=True)
class Check:
    """The verdicts on an archive."""

    verdicts: list[Verdict] = field(default_factory=list)
    taken: dict[str, Taken] = field(default_factory=dict)
    """By path as in the verdict."""
    series: list[SeriesVerdict] = field(default_factory=list)
    seconds: float = 0.0

    def conclude(self) -> None:
        """Put the series together; of two data sets under one SOPInstanceUID the first by path stays, as in ingest."""
        self.verdicts.sort(key=lambda verdict: _in_order(verdict.path))
        series: dict[tuple[str, str], dict[str, str]] = {}
        for number, verdict in enumerate(self.verdicts):
            if not verdict.taken:
                continue
            instance = self.taken[verdict.path].instance
            paths = series.setdefault((instance.study_uid, instance.series_uid), {})
            stays = paths.setdefault(instance.sop_instance_uid, verdict.path)
            if self.taken[stays].instance.sha != instance.sha:
                self.verdicts[number] = replace(verdict, taken=False, reason_code="conflicting_duplicate", place=stays)
        self.series = [
            SeriesVerdict.of([self.taken[path] for path in paths.values()]) for _, paths in sorted(series.items())
        ]

    @property
    def n_refused(self) -> int:
        """How many files would go into quarantine."""
        return sum(not verdict.taken for verdict in self.verdicts)

    def counts(self) -> dict[str, dict[str, int]]:
        """Count reasons, warnings, and what decoded the files that were taken."""
        counted = {
            "reasons": Counter(verdict.reason_code for verdict in self.verdicts if verdict.reason_code),
            "warnings": Counter(code for verdict in self.verdicts for code in verdict.warnings),
            "decoders": Counter(verdict.decoder or "not compressed" for verdict in self.verdicts if verdict.taken),
        }
        return {name: dict(counter.most_common()) for name, counter in counted.items()}

    def summary(self) -> dict[str, Any]:
        """Return everything as one JSON document."""
        return {
            "files": [asdict(verdict) for verdict in self.verdicts],
            "series": [
                asdict(one) | {"geometry": one.geometry and one.geometry.model_dump(mode="json")} for one in self.series
            ],
            "taken": len(self.verdicts) - self.n_refused,
            "refused": self.n_refused,
            **self.counts(),
            "seconds": round(self.seconds, 3),
        }


def _in_order(path: str) -> list[str | int]:
    """Return what sorts paths as people do: 10 comes after 9."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"(\d+)", path))]


def command(
    context: typer.Context,
    *,
    folder: Annotated[
        Path,
        typer.Argument(
            help="A folder of DICOM files and zips, without its hidden files, or one file.", show_default=False
        ),
    ],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Read every file as ingest would, here and without AWS, and tell what it would take and what it would refuse.

    And of each series how its slices lie: whether they are a regular stack, or what a MAP may stumble over.

    Its limits are the service's: set RADQUEUE_DECODERS, RADQUEUE_MAX_PIXEL_BYTES and so on as there.
    """
    paths = list(files(folder))
    if not paths:
        raise Refused(f"there is no file in {folder}")
    with _bar(len(paths)) as done:
        check = asyncio.run(_check(paths, load(IngestSettings, context.obj), done))
    show.json(check.summary()) if json else _show(check)
    raise typer.Exit(min(check.n_refused, 1))


@contextmanager
def _bar(total: int) -> Iterator[Callable[[], None]]:
    """Show a bar of files while the body runs, on a terminal."""
    columns = TextColumn("checking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=show.err, transient=True, disable=not show.err.is_terminal) as bar:
        task = bar.add_task("checking", total=total)
        yield lambda: bar.advance(task)


async def _check(paths: Sequence[Path], settings: IngestSettings, done: Callable[[], None]) -> Check:
    """Read all files, as many at a time as there are decoders.

    Raises:
        Refused: a file cannot be opened, or this machine cannot go on.
    """
    check, began, left = Check(), time.monotonic(), iter(paths)
    decoder = Decoder(settings)

    async def work(folder: Path) -> None:
        for path in left:
            for verdict, taken in await _verdicts(path, folder, decoder, settings):
                check.verdicts.append(verdict)
                if taken is not None:
                    check.taken[verdict.path] = taken
            done()

    try:
        async with temporary_folder("radqueue-check-") as folder:
            slots = [folder / str(slot) for slot in range(settings.decoders)]
            for slot in slots:
                slot.mkdir()
            await all_of([partial(work, slot) for slot in slots], at_once=len(slots))
    except Unavailable as error:
        raise Refused(str(error)) from None
    except OSError as error:
        raise Refused(f"cannot read {error.filename}: {error.strerror}") from None
    finally:
        await decoder.stop()
    check.conclude()
    check.seconds = time.monotonic() - began
    return check


Found = tuple[Verdict, Taken | None]


async def _verdicts(path: Path, folder: Path, decoder: Decoder, settings: IngestSettings) -> list[Found]:
    """Judge one file, or the members of a zip; what lies in a zip beside its images has no verdict."""
    with path.open("rb"):  # whether it may be read is no question of its content
        pass
    if path.stat().st_size > settings.max_upload_bytes:
        return [_refused(str(path), "too_large")]
    try:
        members = await decoder.unpack(path.resolve(), folder)
    except Rejected as rejected:
        return [_refused(str(path), rejected.reason_code, rejected.place)]
    if members is None:
        return [await _verdict(str(path), path.resolve(), folder / "out", decoder)]
    found = []
    for member in members:
        name = f"{path}#{member.number}"
        if member.reason_code is not None:
            found.append(_refused(name, member.reason_code))
        elif member.path is not None:
            found.append(await _verdict(name, Path(member.path), folder / "out", decoder))
            Path(member.path).unlink()
    return found or [_refused(str(path), "not_dicom")]


def _refused(name: str, reason_code: str, place: str = "", seconds: float = 0.0) -> Found:
    return Verdict(name, taken=False, reason_code=reason_code, place=place, seconds=seconds), None


async def _verdict(name: str, path: Path, out: Path, decoder: Decoder) -> Found:
    began = time.monotonic()
    try:
        instance = await decoder.normalise(path, out)
    except Rejected as rejected:
        return _refused(name, rejected.reason_code, rejected.place, round(time.monotonic() - began, 4))
    seconds = round(time.monotonic() - began, 4)
    verdict = Verdict(
        name,
        taken=True,
        series_uid=instance.series_uid,
        warnings=instance.warnings,
        decoder=instance.decoder,
        seconds=seconds,
    )
    try:
        found = await decoder.series_call(Locate(str(out)))
    except ChildFailed as failed:
        return verdict, Taken(instance, [], None, f"series_{failed.reason_code}")
    return verdict, Taken(instance, found.slices, found.modality)


def _show(check: Check) -> None:
    for verdict in check.verdicts:
        at = f" (at {verdict.place})" if verdict.place else ""
        what = "taken in" if verdict.taken else f"[red]refused[/]: {verdict.reason_code}{escape(at)}"
        more = ", ".join([verdict.decoder] * bool(verdict.decoder) + list(verdict.warnings))
        show.out.print(f"{escape(verdict.path)}: {what}{f', {more}' if more else ''}, {verdict.seconds:.2f} s")
    counts = check.counts()
    for title, meanings in (("reasons", REASONS), ("warnings", WARNINGS)):
        if counts[title]:
            table = Table(title[:-1], "files", "meaning", title=title.capitalize(), title_justify="left")
            for code, n in counts[title].items():
                table.add_row(code, str(n), meanings.get(code, ""))
            show.out.print(table)
    if check.series:
        show.out.print(_table(check.series))
    taken = len(check.verdicts) - check.n_refused
    decoders = _counted(counts["decoders"])
    show.say(f"{len(check.verdicts)} files: {taken} taken in{decoders}, {check.n_refused} refused")
    show.say(f"{len(check.series)} series{_counted(Counter(map(_of, check.series)))}")
    show.say(f"{check.seconds:.1f} s, nothing was sent or kept")


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
