"""What a MAP wrote, checked before anyone else sees it. Reads headers; nothing of a value ever reaches a message."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from shared.dicom import is_uid

COPIED = ("StudyInstanceUID", "PatientID", "StudyDate", "AccessionNumber", "StudyID")
"""What a derived object must have from its source: where they differ, HealthImaging keeps it as a non-primary image
set, which no DICOMweb search shows."""
IDENTIFYING = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID")
PREAMBLE_BYTES, MAGIC = 128, b"DICM"


class OutputRefused(ValueError):  # noqa: N818 - it states a fact about the output
    """What the MAP wrote cannot be pushed: `no_output`, `invalid_output` or `attributes_differ`.

    `where` lists the keywords of the attributes that are wrong.
    """

    def __init__(self, reason_code: str, *keywords: str) -> None:
        """State the reason and the attributes."""
        super().__init__(" ".join((reason_code, *keywords)))
        self.reason_code = reason_code
        self.where = ",".join(keywords)


@dataclass(frozen=True, slots=True)
class MadeInstance:
    """One DICOM instance that a MAP made."""

    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    series_uid: str


def check(output: Path, sources: Sequence[Path]) -> list[MadeInstance]:
    """Return the DICOM instances in the folder `output`, sorted by UID; files that are no DICOM are left out.

    `sources` are the files that the MAP was given.

    Raises:
        OutputRefused: there is none, or one of them is not what the archive takes.
    """
    paths = [path for path in sorted(output.rglob("*")) if path.is_file() and _claims_dicom(path)]
    if not paths:
        raise OutputRefused("no_output")
    headers = [_header(path) for path in sources]
    made = sorted((_made(path, headers) for path in paths), key=lambda one: one.sop_instance_uid)
    uids = {one.sop_instance_uid for one in made}
    if len(uids) < len(made) or uids & {str(header.get("SOPInstanceUID")) for header in headers}:
        raise OutputRefused("invalid_output", "SOPInstanceUID")
    return made


def _made(path: Path, sources: Sequence[Dataset]) -> MadeInstance:
    try:
        header = _header(path)
        found = {keyword: _text(header, keyword) for keyword in (*IDENTIFYING, *COPIED)}
        found["TransferSyntaxUID"] = _text(header.file_meta, "TransferSyntaxUID")
    except (InvalidDicomError, EOFError, ValueError, TypeError, AttributeError, KeyError, NotImplementedError):
        raise OutputRefused("invalid_output") from None
    wrong = [keyword for keyword in (*IDENTIFYING, "TransferSyntaxUID") if not is_uid(found[keyword])]
    if wrong:
        raise OutputRefused("invalid_output", *wrong)
    differing = [keyword for keyword in COPIED if all(found[keyword] != _text(source, keyword) for source in sources)]
    if differing:
        raise OutputRefused("attributes_differ", *differing)
    return MadeInstance(path, *(found[keyword] for keyword in IDENTIFYING))


def _header(path: Path) -> Dataset:
    return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[*IDENTIFYING, *COPIED])


def _text(header: Dataset, keyword: str) -> str:
    """Return the value as text; a missing element and an empty one say the same."""
    value = header.get(keyword)
    return "" if value is None else str(value).strip()


def _claims_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(PREAMBLE_BYTES)
        return file.read(len(MAGIC)) == MAGIC or path.suffix.lower() == ".dcm"
