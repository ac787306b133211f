"""What is told of a series: its allow-listed attributes and its geometry, from the headers of its instances."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydicom import Dataset
from pydicom.multival import MultiValue

from services.ingest.arrays import is_picture
from services.ingest.deidentification import pseudonym
from services.ingest.geometry import Slice, survey
from services.ingest.pixels import functional_group
from services.ingest.reading import noted_in, text_of
from shared.documents.revisions import SERIES_ATTRIBUTES
from shared.messages import Geometry

MAX_TEXT = 64

Value = str | int | float | list[str] | list[float] | None


@dataclass(frozen=True, slots=True)
class Placed:
    """One frame and where it is found."""

    instance: int
    """Index into the headers."""
    frame: int
    slice: Slice


@dataclass(frozen=True, slots=True)
class Description:
    """A series; `order` lists its frames stack by stack, the largest first, along the normal."""

    attributes: dict[str, Value]
    geometry: Geometry | None
    order: list[Placed]
    warnings: list[str]


def describe(headers: Sequence[Dataset]) -> Description:
    """Describe a series by the headers of its instances (pixels are not needed); the first one's attributes count."""
    placed = [Placed(index, frame, item) for index, header in enumerate(headers) for frame, item in _slices(header)]
    warnings = {code for header in headers for code in noted_in(header.file_meta)}
    if len({text_of(header, "PatientID") for header in headers}) > 1:
        warnings.add("mixed_patient")
    if not placed:
        return Description(_attributes(headers, headers[0]), None, [], sorted(warnings))
    geometry, order, found = survey([item.slice for item in placed])
    first = headers[placed[order[0]].instance]
    return Description(
        _attributes(headers, first), geometry, [placed[index] for index in order], sorted(warnings | set(found))
    )


def patient_key(header: Dataset, secret: str) -> str:
    """Return what stands for the patient in a dataset: equal for one patient, and nothing is read from it.

    Where there is no PatientID the study stands for the patient. It is keyed also where the instance is de-identified:
    what says so of itself may not be.
    """
    return pseudonym(text_of(header, "PatientID") or text_of(header, "StudyInstanceUID"), secret)


def numbers_of(dataset: Dataset, keyword: str, n: int) -> tuple[float, ...] | None:
    """Return `n` finite numbers; None where the element is missing, unreadable or has another count."""
    try:
        value = dataset.get(keyword)
        numbers = tuple(float(part) for part in (value if n > 1 else [value]))
    except Exception:  # noqa: BLE001 - pydicom converts here, and raises what the value makes it raise
        return None
    return numbers if len(numbers) == n and all(math.isfinite(number) for number in numbers) else None


def pixel_shape(header: Dataset) -> tuple[float, float] | None:
    """Return the height and width of a pixel where there is no PixelSpacing, if only as a ratio; None: not known."""
    for keyword in ("ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio"):
        shape = numbers_of(header, keyword, 2)
        if shape is not None and min(shape) > 0:
            return shape[0], shape[1]
    return None


def _slices(header: Dataset) -> list[tuple[int, Slice]]:
    if not is_picture(header):
        return []
    n_frames = int(header.get("NumberOfFrames") or 1)
    return [(frame, _slice(header, frame)) for frame in range(n_frames)]


def _slice(header: Dataset, frame: int) -> Slice:
    position = numbers_of(_source(header, frame, "PlanePositionSequence"), "ImagePositionPatient", 3)
    orientation = numbers_of(_source(header, frame, "PlaneOrientationSequence"), "ImageOrientationPatient", 6)
    spacing = numbers_of(_source(header, frame, "PixelMeasuresSequence"), "PixelSpacing", 2)
    tilt = numbers_of(header, "GantryDetectorTilt", 1)
    number = numbers_of(header, "InstanceNumber", 1)
    return Slice(
        position=(position[0], position[1], position[2]) if position else None,
        orientation=orientation,
        rows=int(header.Rows),
        columns=int(header.Columns),
        pixel_spacing=(spacing[0], spacing[1]) if spacing and min(spacing) > 0 else None,
        tilt_tag_deg=tilt[0] if tilt else None,
        instance_number=int(number[0]) if number else 0,
        modality=text_of(header, "Modality") or None,
        patient_position=text_of(header, "PatientPosition"),
        localizer="LOCALIZER" in _image_type(header),
    )


def _image_type(header: Dataset) -> list[str]:
    value = _value(header, "ImageType")
    return [str(part) for part in value] if isinstance(value, list) else [str(value)]


def _source(header: Dataset, frame: int, group: str) -> Dataset:
    return functional_group(header, frame, group) or header


def _attributes(headers: Sequence[Dataset], first: Dataset) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for keyword in SERIES_ATTRIBUTES:
        value = _value(first, keyword)
        if value not in (None, "", []):
            found[keyword] = value
    found["NumberOfSeriesRelatedInstances"] = len(headers)
    return found


def _value(dataset: Dataset, keyword: str) -> Value:
    try:
        value = dataset.get(keyword)
    except Exception:  # noqa: BLE001 - as above
        return None
    if isinstance(value, MultiValue):
        parts = [_single(part) for part in value]
        if all(isinstance(part, float | int) for part in parts):
            return [float(part) for part in parts if part is not None]
        return [str(part) for part in parts]
    return _single(value)


def _single(value: object) -> str | int | float | None:
    if value is None:
        return None
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return str(value).strip()[:MAX_TEXT]
