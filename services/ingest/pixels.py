"""What stored values mean: each frame in modality units (HU in CT), by one table of rules (PS3.3 C.11.1).

Bit depth, sign, planes and packing are undone by pydicom, which reads what `reading` has normalised; the polarity of
MONOCHROME1 is no matter of units, and is turned where a picture is made. Colours have no modality values.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.pixels.utils import pixel_array

Stored = NDArray[np.generic]
Values = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Rule:
    """How stored values become modality values."""

    name: str
    applies: Callable[[Dataset], bool]
    """Tells whether the rule applies to the item that is asked."""
    values: Callable[[Stored, Dataset], Values]


def modality_values(dataset: Dataset) -> Iterator[Values]:
    """Yield each frame `(rows, columns) float32` in modality units."""
    stored = pixel_array(dataset)
    frames = stored if int(dataset.get("NumberOfFrames") or 1) > 1 else stored[np.newaxis]
    for index, frame in enumerate(frames):
        yield _values(frame, [*_groups(dataset, index, "PixelValueTransformationSequence"), dataset])


def functional_group(dataset: Dataset, frame: int, keyword: str) -> Dataset | None:
    """Return an item of the functional groups of one frame, or of all frames; None where there is none."""
    return next(iter(_groups(dataset, frame, keyword)), None)


def _groups(dataset: Dataset, frame: int, keyword: str) -> list[Dataset]:
    """Return the item of the frame itself, and the item of all frames (PS3.3 C.7.6.16)."""
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    groups = [*per_frame[frame : frame + 1], *shared[:1]]
    return [group[keyword][0] for group in groups if group.get(keyword)]


def _values(frame: Stored, sources: list[Dataset]) -> Values:
    """Apply the first rule that the nearest source has; without any, stored values are modality values."""
    for source in sources:
        for rule in RULES:
            if rule.applies(source):
                return rule.values(frame, source)
    return np.asarray(frame, np.float32)


def _by_table(frame: Stored, source: Dataset) -> Values:
    """Look values up; those beyond the table take its first or last entry (PS3.3 C.11.1.1)."""
    item = source.ModalityLUTSequence[0]
    entries = item.LUTData
    if isinstance(entries, bytes):
        n_entries = int(item.LUTDescriptor[0]) or 2**16
        entries = np.frombuffer(entries, np.uint8 if len(entries) < 2 * n_entries else "<u2")[:n_entries]
    first = int(item.LUTDescriptor[1])
    # It has the sign of the stored values, whatever VR it was written with (PS3.3 C.11.1.1).
    first = int(np.array(first).astype(np.int16 if frame.dtype.kind == "i" else np.uint16))
    index = np.clip(frame.astype(np.int64) - first, 0, len(entries) - 1)
    return np.asarray(entries, np.float32)[index]


def _by_line(frame: Stored, source: Dataset) -> Values:
    """Slope and intercept; one that is missing changes nothing (PS3.3 C.11.1.1.2)."""
    slope, intercept = (source.get(keyword) for keyword in ("RescaleSlope", "RescaleIntercept"))
    values = frame.astype(np.float64)  # in place from here on: another frame of numbers of 64 bits costs more than sums
    values *= float(1 if slope in {None, ""} else slope)
    values += float(intercept or 0)
    return values.astype(np.float32)


RULES = (
    Rule("modality_lut", lambda source: bool(source.get("ModalityLUTSequence")), _by_table),
    Rule(
        "rescale",
        lambda source: any(source.get(name) not in {None, ""} for name in ("RescaleSlope", "RescaleIntercept")),
        _by_line,
    ),
)
"""The rules, the first first; a source is the functional group of the frame, that of all frames, or the instance."""
