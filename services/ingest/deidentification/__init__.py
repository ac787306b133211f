"""De-identification of a data set: DICOM PS3.15 Annex E, Basic Application Level Confidentiality Profile, with options.

Theory of operation. `profile.csv` is table E.1-1 of the standard as data (edition 2024e, with the attributes that the
basic profile has gained until 2026c): for each attribute what the basic profile does, and what each option does
instead. Where the table leaves a choice (X/Z/D), the last one is taken, which is right for attributes of any type.
Where the table says nothing the attribute stays, with exceptions that are stricter than the standard: what
`beyond.csv` lists, persons' names, long free texts, URLs, elements that the data dictionary does not know, and UIDs
that DICOM has not registered.

| action | what is done |
|---|---|
| X | the element is removed |
| Z | its value is emptied |
| D | its value becomes a dummy of its VR; that of PatientID and PatientName is the patient's pseudonym |
| U | its UID is replaced by a keyed one, the same for the same UID wherever it stands |
| C | dates are shifted back; texts keep the words that are medical vocabulary and no part of what names the patient |
| K | kept |

U, C and K are for what fits the VR that the dictionary, or the list of safe private elements, has for it. What does not
may be any text: it is treated as without options, and removed where that would be U. Only the UIDs under which an
instance is stored are written anew with VR UI, whatever they came with.

Everything new is made by HMAC (RFC 2104) with a secret: the same secret gives the same UIDs, pseudonyms and shifts on
any worker, and without it nothing can be found by trying. Sequences are treated alike at any depth. Private elements
are removed; `retain_safe_private` keeps those of `safe_private.csv`, which is table E.3.10-1, and what lies in their
sequences is treated like the rest, as are their UIDs.

`beyond.csv` has attributes that the table does not: those of groups 0008 to 0040 that tell a date of birth, an address
or an identifier, some of other groups, and what is left of an overlay without its data.

What is drawn into the pixels is no attribute: see `pixels.py`.
"""

import contextlib
import csv
import functools
import hashlib
import hmac
import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from enum import StrEnum
from importlib.resources import files
from typing import Any

from pydicom import DataElement, Dataset
from pydicom.datadict import dictionary_has_tag, dictionary_VR, repeater_has_tag
from pydicom.dataelem import RawDataElement
from pydicom.sequence import Sequence
from pydicom.sr.codedict import codes
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID

STANDARD_ROOT = "1.2.840.10008."
"""The root of the UIDs that PS3.6 Annex A registers; a library knows those of its time only."""
METHOD = "DICOM PS3.15 Annex E, basic profile (radqueue)"
PSEUDONYM_LENGTH = 16
LONGEST_SHIFT_DAYS = 3650
"""Dates go back by one day to so many, never forward: a date in the future would be taken for an error."""
LONGEST_NUMBER = 3
"""Digits, with the point, of a field strength, an angle, a thickness; nobody's number is so short."""
DUMMY_DATE = "19000101"
DUMMIES: Mapping[str, Any] = {
    "AS": "000Y",
    "DA": DUMMY_DATE,
    "DT": DUMMY_DATE,
    "TM": "000000",
    "DS": "0",
    "IS": "0",
    **dict.fromkeys(("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"), "REMOVED"),
    **dict.fromkeys(("FD", "FL"), 0.0),
    **dict.fromkeys(("SL", "SS", "SV", "UL", "US", "UV"), 0),
    **dict.fromkeys(("OB", "OD", "OF", "OL", "OV", "OW"), bytes(8)),
}
TEXTS = {"LO", "LT", "SH", "ST", "UC", "UT"}
FREE_TEXTS = {"LT", "ST", "UT"}
SHORT_TEXTS = {"AE", "CS", "LO", "SH"}
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
FORMATS = {
    "DS": _NUMBER,
    "IS": _NUMBER,
    "DA": re.compile(r"\d{4}\.?\d\d\.?\d\d *"),
    "DT": re.compile(r"\d{4}(\d\d){0,5}(\.\d{1,6})?([+-]\d{4})? *"),
    "TM": re.compile(r"\d\d(:?\d\d){0,2}(\.\d{1,6})? *"),
    "AS": re.compile(r"\d{3}[DWMY]"),
    "UI": re.compile(r"[\d.]+"),
}
"""The values of each VR that leave no room for a text: PS3.5 section 6.2 and its older forms, without ranges."""
_DATE = re.compile(r"\d{8}")
_WORD = re.compile(r"[234][dD]\b|[^\W\d]\w*|\d+(?:\.\d+)?")
_OF_A_KIND = re.compile("(Class|Context|Resource|Scheme|Syntax)UID$")
"""Keywords of UIDs that name a kind of thing, never one thing."""
_PART = re.compile(r"[^\W\d]+|\d+")
IDENTITY = {"SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"}
"""UIDs under which an instance is stored: it must have them."""
IDENTIFIERS = {
    *("PatientID", "OtherPatientIDs", "MedicalRecordLocator", "AccessionNumber", "AdmissionID", "StudyID"),
    *("RequestedProcedureID", "ScheduledProcedureStepID", "PerformedProcedureStepID"),
    *("PlacerOrderNumberImagingServiceRequest", "FillerOrderNumberImagingServiceRequest"),
}
"""What names the patient or the examination beside persons' names: no part of it stays in a description."""
OF_DATES = {"ago", "lip", "may", "out", "set", "tra", "de", "du", "nd", "of", "rd", "st", "th", "the"}
"""Words of the vocabulary that are months in some language, or stand in dates: "12th of May 58" would pass by them."""
TABLES = files("services.ingest.deidentification")


class Option(StrEnum):
    """Options of the basic profile, PS3.15 E.3; the names are those that `datasets.yaml` uses."""

    RETAIN_UIDS = "retain_uids"
    RETAIN_DEVICE_IDENTITY = "retain_device_identity"
    RETAIN_INSTITUTION_IDENTITY = "retain_institution_identity"
    RETAIN_PATIENT_CHARACTERISTICS = "retain_patient_characteristics"
    RETAIN_FULL_DATES = "retain_full_dates"
    RETAIN_MODIFIED_DATES = "retain_modified_dates"
    CLEAN_DESCRIPTORS = "clean_descriptors"
    RETAIN_SAFE_PRIVATE = "retain_safe_private"


BASIC_PROFILE = ("113100", "Basic Application Confidentiality Profile")
CLEAN_PIXEL_DATA = ("113101", "Clean Pixel Data Option")
METHOD_CODES: Mapping[Option, tuple[str, str]] = {
    Option.CLEAN_DESCRIPTORS: ("113105", "Clean Descriptors Option"),
    Option.RETAIN_FULL_DATES: ("113106", "Retain Longitudinal Temporal Information Full Dates Option"),
    Option.RETAIN_MODIFIED_DATES: ("113107", "Retain Longitudinal Temporal Information Modified Dates Option"),
    Option.RETAIN_PATIENT_CHARACTERISTICS: ("113108", "Retain Patient Characteristics Option"),
    Option.RETAIN_DEVICE_IDENTITY: ("113109", "Retain Device Identity Option"),
    Option.RETAIN_UIDS: ("113110", "Retain UIDs Option"),
    Option.RETAIN_SAFE_PRIVATE: ("113111", "Retain Safe Private Option"),
    Option.RETAIN_INSTITUTION_IDENTITY: ("113112", "Retain Institution Identity Option"),
}
"""Codes of the DICOM terminology, PS3.16 CID 7050."""


def deidentify(dataset: Dataset, options: Iterable[Option], secret: str, *, pixels_cleaned: bool = False) -> None:
    """De-identify the data set in place, and have it say so (PS3.15 E.1.1).

    Args:
        dataset: without a file meta group, which is written anew anyway.
        options: those chosen; of the two that retain dates, full dates win.
        secret: key of all pseudonyms.
        pixels_cleaned: whether annotations were blanked.
    """
    chosen = frozenset(options)
    patient = _text(dataset, "PatientID") or _text(dataset, "StudyInstanceUID")
    _Cleaner(chosen, secret, patient, _names_in(dataset)).clean(dataset)
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = METHOD
    methods = [BASIC_PROFILE, *([CLEAN_PIXEL_DATA] if pixels_cleaned else [])]
    methods += [METHOD_CODES[option] for option in sorted(chosen)]
    dataset.DeidentificationMethodCodeSequence = [_code(*method) for method in methods]
    dataset.LongitudinalTemporalInformationModified = _dates_are(chosen)


def pseudonym(patient: str, secret: str) -> str:
    """Return what stands for the patient: equal for one patient and secret, and nothing is read from it."""
    return _keyed(secret, "patient", patient).hex()[:PSEUDONYM_LENGTH].upper()


def keyed_uid(uid: str, secret: str) -> str:
    """Return the UID that stands for `uid`: a UUID-derived one, PS3.5 section B.2."""
    return f"2.25.{int.from_bytes(_keyed(secret, 'uid', uid)[:16], 'big')}"


def keyed_hash(value: str, secret: str, n_digits: int) -> str:
    """Return hex digits that stand for a hash, which by itself would show whoever has the original that it is one."""
    return _keyed(secret, "hash", value).hex()[:n_digits]


def _keyed(secret: str, kind: str, value: str) -> bytes:
    return hmac.new(secret.encode(), f"{kind}:{value}".encode(), hashlib.sha256).digest()


@dataclass(frozen=True, slots=True)
class _Cleaner:
    options: frozenset[Option]
    secret: str
    patient: str
    names: frozenset[str]
    """Words, in lower case, of what names the patient or another person."""

    def clean(self, dataset: Dataset) -> None:
        """Clean one level, and what lies below."""
        private = _safe_private_in(dataset) if Option.RETAIN_SAFE_PRIVATE in self.options else {}
        for tag in list(dataset.keys()):
            vrs = private.get(tag, ()) if tag.is_private else _dictionary_vrs(tag)
            if not vrs:
                del dataset[tag]
                continue
            try:
                if tag.is_private:
                    _read_as(vrs[0], tag, dataset)
                element = dataset[tag]
                cleaned = self._cleaned(element, vrs)
            except Exception:  # noqa: BLE001 - pydicom raises what the value makes it raise
                cleaned = None  # what cannot be read cannot be shown to be harmless
            if cleaned is None:
                del dataset[tag]
            elif cleaned is not element:
                dataset[tag] = cleaned

    def _cleaned(self, element: DataElement, vrs: Collection[str]) -> DataElement | None:
        """Return the element to have instead, which may have the VRs; None for none."""
        if element.keyword in IDENTITY and element.VR != "UI":
            element = DataElement(element.tag, "UI", str(element.value).strip(" \0"))
        match self._action(element, vrs):
            case "X":
                return None
            case "Z":
                return DataElement(element.tag, element.VR, self._stand_in(element, empty=True))
            case "D":
                return DataElement(element.tag, element.VR, self._stand_in(element, empty=False))
            case "C":
                return self._with_clean_value(element)
        if element.VR == "SQ":
            for item in element.value:
                self.clean(item)
        if element.VR == "UI" and Option.RETAIN_UIDS not in self.options:
            return DataElement(element.tag, "UI", self._keyed_uids(element))
        return element

    def _action(self, element: DataElement, vrs: Collection[str]) -> str:
        row = _row(element.tag)
        if row is None:
            harmless = element.tag.is_private or element.VR not in {"PN", "UR", *FREE_TEXTS}
            return "K" if harmless and _fits(element, vrs) else "X"
        basic = row["basic"][-1]
        asked = {row[option] for option in self.options if row.get(option)}
        action = next((action for action in "KC" if action in asked), basic)
        return action if action in "XZD" or _fits(element, vrs) else basic.replace("U", "X")

    def _stand_in(self, element: DataElement, *, empty: bool) -> Any:
        if element.keyword in {"PatientID", "PatientName"}:
            return pseudonym(self.patient, self.secret)
        if element.VR == "UI":  # not even empty: what refers to it must go on doing so
            return self._keyed_uids(element)
        if element.VR == "SQ":
            return Sequence()
        return None if empty else DUMMIES.get(element.VR)

    def _keyed_uids(self, element: DataElement) -> list[str]:
        uids = [element.value] if isinstance(element.value, str) else list(element.value or [])
        of_a_kind = _OF_A_KIND.search(element.keyword) is not None

        def is_dicom_own(uid: str) -> bool:  # anybody can make others below its root, for instances too
            return bool(UID(uid).type) or (of_a_kind and uid.startswith(STANDARD_ROOT))

        return [uid if not uid or is_dicom_own(uid) else keyed_uid(uid, self.secret) for uid in uids]

    def _with_clean_value(self, element: DataElement) -> DataElement | None:
        if element.VR == "SQ":
            for item in element.value:
                self.clean(item)
            return element
        values = element.value if element.VM > 1 else [element.value]
        if element.VR in {"DA", "DT"}:
            return DataElement(element.tag, element.VR, [self._shifted(str(value or "")) for value in values])
        if element.VR == "TM":  # whole days are shifted, so times of day stay
            return element
        if element.VR in TEXTS:
            harmless = [self._harmless(str(value or ""), numbers=len(values) == 1) for value in values]
            return DataElement(element.tag, element.VR, harmless)
        return None

    def _shifted(self, text: str) -> str:
        """Shift a date or a date with time back by the patient's days; what is none is emptied."""
        if not _DATE.match(text):
            return ""
        days = 1 + int.from_bytes(_keyed(self.secret, "shift", self.patient)[:4], "big") % LONGEST_SHIFT_DAYS
        then = date(int(text[:4]), int(text[4:6]), int(text[6:8])) - timedelta(days=days)
        return f"{then:%Y%m%d}{text[8:]}"

    def _harmless(self, text: str, *, numbers: bool) -> str:
        """Keep the words that are vocabulary and no name of this data set, and short numbers that stand alone.

        Numbers without a word that stays between them all go: they may be a date of birth or a telephone number. So
        may those of several values be, which are asked for without `numbers`.
        """
        found = (word for word in _WORD.findall(text) if _is_number(word) or self._is_harmless(word))
        kept: list[str] = []
        for of_numbers, run in itertools.groupby(found, key=_is_number):
            words = list(run)
            alone = len(words) == 1 and len(words[0]) <= LONGEST_NUMBER and words[0] not in self.names
            kept += words if (alone and numbers) or not of_numbers else []
        return " ".join(kept)

    def _is_harmless(self, word: str) -> bool:
        return word.lower() in _vocabulary() and word.lower() not in self.names


def _is_number(word: str) -> bool:
    return word[0].isdecimal() and word[-1].isdecimal()


def _safe_private_in(dataset: Dataset) -> dict[BaseTag, tuple[str]]:
    """Return the VR of safe private elements, and of the creators that reserve their blocks (PS3.5 7.8.1)."""
    kept: dict[BaseTag, tuple[str]] = {}
    for tag in dataset.keys():  # noqa: SIM118 - a data set iterates over elements
        creator_tag = Tag(tag.group, tag.element >> 8)
        if not tag.is_private or tag.is_private_creator or creator_tag not in dataset:
            continue
        creator = str(dataset[creator_tag].value or "").strip()
        vr = _safe_private().get((tag.group, creator, tag.element & 0xFF))
        if vr:
            kept |= {tag: (vr,), creator_tag: ("LO",)}
    return kept


def _read_as(vr: str, tag: BaseTag, dataset: Dataset) -> None:
    """Read an element by its VR in the list where it has none: implicit encodings do not tell that of a private one.

    A sequence stays what it is, and goes: read in another encoding than its own, its values would hold its elements.
    """
    element = dataset[tag]
    if element.VR == "UN" and vr != "SQ":
        value = element.value
        dataset[tag] = RawDataElement(tag, vr, len(value), value, 0, is_implicit_VR=False, is_little_endian=True)


def _dictionary_vrs(tag: BaseTag) -> list[str]:
    """Return the VRs that the data dictionary has for an attribute; none where it does not know it."""
    known = dictionary_has_tag(tag) or repeater_has_tag(tag)
    return dictionary_VR(tag).split(" or ") if known else []


def _fits(element: DataElement, vrs: Collection[str]) -> bool:
    """Tell whether the element is what its tag says: pydicom reads what does not fit as a text, which may be any."""
    if element.VR not in vrs and not {element.VR, *vrs} <= SHORT_TEXTS:
        return False
    values = element.value if element.VM > 1 else [element.value]
    pattern = FORMATS.get(element.VR)
    return pattern is None or all(value in (None, "") or pattern.fullmatch(str(value)) for value in values)


def _text(dataset: Dataset, keyword: str) -> str:
    try:
        return str(dataset.get(keyword) or "").strip(" \0")
    except Exception:  # noqa: BLE001 - as above
        return ""


def _names_in(dataset: Dataset) -> frozenset[str]:
    """Return the words, and their parts, of all persons' names and of identifiers, at any depth."""
    words: set[str] = set()
    for tag in list(dataset.keys()):
        with contextlib.suppress(Exception):  # as above; an unreadable element is removed anyway
            element = dataset[tag]
            if element.VR == "SQ":
                words |= {word for item in element.value for word in _names_in(item)}
            elif element.VR == "PN" or element.keyword in IDENTIFIERS:
                text = str(element.value).replace("_", " ").lower()
                words |= {*_WORD.findall(text), *_PART.findall(text)}
    return frozenset(words)


def _code(value: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
    return item


def _dates_are(options: frozenset[Option]) -> str:
    if Option.RETAIN_FULL_DATES in options:
        return "UNMODIFIED"
    return "MODIFIED" if Option.RETAIN_MODIFIED_DATES in options else "REMOVED"


@functools.cache
def _profile() -> dict[str, dict[str, str]]:
    """Return the standard's table, and what goes beyond it."""
    texts = [(TABLES / name).read_text("ascii") for name in ("beyond.csv", "profile.csv")]
    return {row["tag"]: row for text in texts for row in csv.DictReader(text.splitlines())}


def _row(tag: BaseTag) -> dict[str, str] | None:
    """Return the row of an attribute; groups 50xx and 60xx repeat."""
    exact = f"{int(tag):08X}"
    rows = _profile()
    return rows.get(exact) or rows.get(f"{exact[:2]}xx{exact[4:]}") or rows.get(f"{exact[:2]}xxxxxx")


@functools.cache
def _safe_private() -> dict[tuple[int, str, int], str]:
    """Return the VR of safe private elements, by group, creator and place in the creator's block."""
    rows = csv.DictReader((TABLES / "safe_private.csv").read_text("ascii").splitlines())
    return {(int(row["group"], 16), row["creator"], int(row["element"], 16)): row["vr"] for row in rows}


@functools.cache
def _vocabulary() -> frozenset[str]:
    """Return the words of DICOM's and SNOMED's terms, as pydicom has them, and what protocols say besides."""
    terms = [*codes.DCM.dir(), *codes.SCT.dir()]
    words = {word.lower() for term in terms for word in re.findall(r"[A-Z]?[a-z]+", term)}
    protocol_words = (TABLES / "protocol_words.txt").read_text("ascii").split()
    return (frozenset(word for word in words if len(word) > 1) | set(protocol_words)) - OF_DATES
