"""What a MAP wrote and printed, checked before it leaves the worker; nothing of a value ever reaches a message."""

import json
import mimetypes
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom._dicom_dict import DicomDictionary
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from shared.keys import is_uid

COPIED = ("StudyInstanceUID", "PatientID", "StudyDate", "AccessionNumber", "StudyID")
"""The attributes that a derived object must have from its source: if they differ, HealthImaging keeps it as a
non-primary image set, which no DICOMweb search shows."""
IDENTIFYING = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID")
PATIENT_GROUP, TEXTS = 0x0010, {"DA", "LO", "LT", "PN", "SH", "ST", "UC", "UT"}
PERSONAL = [
    *(
        tag
        for tag, (vr, *_) in DicomDictionary.items()
        if vr == "PN" or (tag >> 16 == PATIENT_GROUP and vr in {*TEXTS, "SQ"})
    ),
    tag_for_keyword("AccessionNumber") or 0,
]
"""The tags whose values tell who a patient is: texts and dates of the patient's group (PS3.6 section 6), the names of
other people, and the number of the order."""
PERSONAL_TAGS = frozenset(PERSONAL)
SHORTEST = 3
"""The fewest bytes of a value that is looked for: a shorter one identifies nobody, and occurs everywhere."""
SCRUBBED = b"***"
LONGEST = 1024
"""The most bytes of a value that are looked for (PS3.5 table 6.2-1); of a longer text, the beginning is."""
PREAMBLE_BYTES, MAGIC = 128, b"DICM"


class OutputRefused(ValueError):  # noqa: N818 - it states a fact about the output
    """What the MAP wrote cannot be pushed: `no_output`, `outputs_missing`, `invalid_output` or `attributes_differ`.

    `where` lists the keywords of the attributes that are wrong, or the modalities that are missing.
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
    modality: str = ""


@dataclass(frozen=True, slots=True)
class MadeFile:
    """Something else that a MAP made."""

    path: Path
    media_type: str


def headers(sources: Iterable[Path]) -> list[Dataset]:
    """Read what `check` compares with from the files of a study; before a MAP has them, for it may change them."""
    return [_header(path) for path in sources]


def check(
    output: Path, sources: Sequence[Path | Dataset], least: Mapping[str, int] | None = None
) -> list[MadeInstance]:
    """Return the DICOM instances in the folder `output`, sorted by UID; files that are not DICOM are left out.

    `sources` are the files that the MAP was given, or their `headers`. `least` says how many instances of each
    modality there must be; if it is empty, any file will do, and without it at least one instance must be there.

    Raises:
        OutputRefused: there are too few, or one of them is not what its target takes.
    """
    paths = [path for path in files(output) if claims_dicom(path)]
    if not paths and (least != {} or not files(output)):
        raise OutputRefused("no_output")
    given = [one if isinstance(one, Dataset) else _header(one) for one in sources]
    made = sorted((_made(path, given) for path in paths), key=lambda one: one.sop_instance_uid)
    uids = {one.sop_instance_uid for one in made}
    if len(uids) < len(made) or uids & {str(header.get("SOPInstanceUID")) for header in given}:
        raise OutputRefused("invalid_output", "SOPInstanceUID")
    counts = Counter(one.modality for one in made)
    missing = [modality for modality, n in (least or {}).items() if counts[modality] < n]
    if missing:
        raise OutputRefused("outputs_missing", *missing)
    return made


def other_files(output: Path) -> list[MadeFile]:
    """Return the files in the folder `output` that are not DICOM, sorted; no link is followed."""
    return [MadeFile(path, _media_type(path.name)) for path in files(output) if not claims_dicom(path)]


class Scrubber:
    """Replaces what tells of the patient in a text that is stored where it is not expected."""

    def __init__(self, sources: Iterable[Path]) -> None:
        """Read what is to be looked for from the files of the study."""
        found = {value for path in sources for value in _personal(_personal_header(path))}
        spellings = {spelling for value in found for spelling in _spellings(value)}
        longest_first = sorted(map(re.escape, spellings), key=len, reverse=True)
        self._pattern = re.compile(
            rb"(?<![0-9A-Za-z])(?:" + b"|".join(longest_first) + rb")(?![0-9A-Za-z])", re.IGNORECASE
        )
        self._any = bool(spellings)

    def scrub(self, text: bytes) -> bytes:
        """Return the text with each value, and each word of a name, replaced; it never gets longer."""
        return self._pattern.sub(SCRUBBED, text) if self._any else text

    def scrub_tail(self, text: bytes, n_bytes: int) -> bytes:
        """Return the last `n_bytes` of a text, scrubbed; `text` holds up to LONGEST bytes more.

        What is cut in two at its beginning cannot be recognised, and is left out.
        """
        return self.scrub(text)[LONGEST:] if len(text) > n_bytes else self.scrub(text)


def _personal_header(path: Path) -> Dataset:
    return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=PERSONAL)


def _personal(header: Dataset) -> Iterator[str]:
    for element in header.iterall():
        if element.VR not in TEXTS or element.tag not in PERSONAL_TAGS:
            continue
        for value in element.value if element.VM > 1 else [element.value]:
            text = str(value or "").strip()
            yield text
            if element.VR == "PN":
                yield from re.split(r"[\^=\s,]+", text)
                yield " ".join(filter(None, re.split(r"[\^=]+", text)))
                yield from _joined(text)
            if element.VR == "DA":
                yield f"{text[:4]}-{text[4:6]}-{text[6:]}"


def _joined(name: str) -> Iterator[str]:
    """Give each component group of a name (PS3.5 section 6.2.1), and its parts without a separator, in both orders."""
    for group in name.split("="):
        parts = [part.strip() for part in group.split("^") if part.strip()]
        yield group.strip("^ ")
        for some in (parts, parts[:2]):
            yield "".join(some)
            yield "".join(reversed(some))


def _spellings(value: str) -> Iterator[bytes]:
    """Give a value in the encodings, escapes and cases in which programs print it."""
    if len(value.encode()) < SHORTEST:
        return
    for cased in {value, value.lower(), value.upper()}:
        for text in {cased, ascii(cased)[1:-1], json.dumps(cased)[1:-1]}:
            yield text.encode()[:LONGEST]
            latin = text.encode("latin-1", errors="replace")[:LONGEST]
            # A name in another script would become question marks alone, which occur everywhere.
            if not text.isascii() and len(latin.replace(b"?", b"")) >= SHORTEST:
                yield latin


def _media_type(name: str) -> str:
    kind, encoding = mimetypes.guess_type(name)
    return "application/gzip" if encoding == "gzip" else kind or "application/octet-stream"


def files(output: Path) -> list[Path]:
    """Return the files below the folder, sorted; links to files or folders are left out."""
    if output.is_symlink():
        return []
    paths = sorted(Path(folder, name) for folder, _, names in os.walk(output, followlinks=False) for name in names)
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def _made(path: Path, sources: Sequence[Dataset]) -> MadeInstance:
    try:
        header = _header(path)
        found = {keyword: _text(header, keyword) for keyword in (*IDENTIFYING, *COPIED, "Modality")}
        found["TransferSyntaxUID"] = _text(header.file_meta, "TransferSyntaxUID")
    except (InvalidDicomError, EOFError, ValueError, TypeError, AttributeError, KeyError, NotImplementedError):
        raise OutputRefused("invalid_output") from None
    wrong = [keyword for keyword in (*IDENTIFYING, "TransferSyntaxUID") if not is_uid(found[keyword])]
    if wrong:
        raise OutputRefused("invalid_output", *wrong)
    differing = [keyword for keyword in COPIED if all(found[keyword] != _text(source, keyword) for source in sources)]
    if differing:
        raise OutputRefused("attributes_differ", *differing)
    return MadeInstance(path, *(found[keyword] for keyword in (*IDENTIFYING, "Modality")))


def _header(path: Path) -> Dataset:
    return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[*IDENTIFYING, *COPIED, "Modality"])


def _text(header: Dataset, keyword: str) -> str:
    """Return the value as text; a missing element and an empty one say the same."""
    value = header.get(keyword)
    return "" if value is None else str(value).strip()


def claims_dicom(path: Path) -> bool:
    """Tell whether a file is DICOM, or says so by its name."""
    with path.open("rb") as file:
        file.seek(PREAMBLE_BYTES)
        return file.read(len(MAGIC)) == MAGIC or path.suffix.lower() == ".dcm"
