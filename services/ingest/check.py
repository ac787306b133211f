"""What ingest would say to files that were not uploaded: to each of them, and of each series how its slices lie.

The files are read by the same children, with the same limits, as in the service. Nothing is sent or kept, and of what
stands in the files only codes and UIDs are told. The command line, `radqueue ingest-check` and `radqueue map route`,
uses this module and no other one's insides.
"""

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from services.ingest.assembly import DEFER_BYTES
from services.ingest.decoder import Decoder, Rejected
from services.ingest.geometry import Slice, survey
from services.ingest.protocol import Instance, Locate
from services.ingest.series import describe
from services.ingest.settings import IngestSettings
from shared.child import ChildFailed
from shared.concurrency import all_of, temporary_folder
from shared.documents.revisions import Revision, StoredInstance
from shared.messages import Geometry
from shared.pydicom_silence import silence


@dataclass(frozen=True, slots=True)
class Verdict:
    """What ingest would do with one file."""

    path: str
    """The path of the file; a member of an archive is `archive.zip#7`, counted from 0: names inside are not shown."""
    taken: bool
    series_uid: str | None = None
    reason_code: str | None = None
    place: str = ""
    """Which element the refusal is about, which line of code, or which other file."""
    warnings: Sequence[str] = ()
    decoder: str = ""
    """The library that decoded its compressed pixels."""
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
    """The geometry of the series; None if it has no images."""
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
    """The instances that were taken, by path as in the verdict."""
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


async def check(paths: Sequence[Path], settings: IngestSettings, *, done: Callable[[], None]) -> Check:
    """Read all files, as many at a time as there are decoders; `done` is called after each.

    Raises:
        OSError: a file cannot be opened.
        Unavailable: this machine cannot go on.
    """
    found, began, left = Check(), time.monotonic(), iter(paths)
    decoder = Decoder(settings)

    async def work(folder: Path) -> None:
        for path in left:
            for verdict, taken in await _verdicts(path, folder, decoder, settings):
                found.verdicts.append(verdict)
                if taken is not None:
                    found.taken[verdict.path] = taken
            done()

    try:
        async with temporary_folder("radqueue-check-") as folder:
            slots = [folder / str(slot) for slot in range(settings.decoders)]
            for slot in slots:
                slot.mkdir()
            await all_of([partial(work, slot) for slot in slots], at_once=len(slots))
    finally:
        await decoder.stop()
    found.conclude()
    found.seconds = time.monotonic() - began
    return found


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


def described(folder: Path) -> list[Revision]:
    """Describe the series in a folder as ingest would; what is no DICOM file is passed over."""
    silence()
    headers: dict[tuple[str, str], list[Dataset]] = defaultdict(list)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            header = pydicom.dcmread(path, defer_size=DEFER_BYTES)
            headers[str(header.StudyInstanceUID), str(header.SeriesInstanceUID)].append(header)
        except (InvalidDicomError, AttributeError, OSError, EOFError, ValueError):
            continue
    return [_revision(uids, series) for uids, series in headers.items()]


def _revision(uids: tuple[str, str], headers: list[Dataset]) -> Revision:
    described = describe(headers)
    instances = {str(header.get("SOPInstanceUID", "")) for header in headers}
    return Revision(
        dataset="local",
        study_uid=uids[0],
        series_uid=uids[1],
        digest="0" * 16,
        created=datetime.now(UTC),
        instances=tuple(StoredInstance(sop_instance_uid=uid, sha="0" * 16, key="") for uid in sorted(instances)),
        attributes=described.attributes,
        geometry=described.geometry,
    )
