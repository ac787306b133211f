"""The stored instances of a series to its training array: which slices are in it, and which are left out by what rule.

| rule | what is left out |
|---|---|
| `burned_in` | in a de-identified dataset: pictures that may show texts, unless a rule blanks the region |
| `colour` | colour pictures |
| `localizer` | scouts: ImageType says so, or the whole series is one of several planes; if the dataset wants it |
| `other_stack` | slices of another size, pixel spacing or direction than those of the largest stack |
| `blank` | slices that show nothing; if the dataset wants it |
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from pydicom import Dataset, dcmread

from services.ingest import arrays
from services.ingest.datasets import BlankRule
from services.ingest.geometry import survey
from services.ingest.pixels import modality_values
from services.ingest.protection import is_clean, screen
from services.ingest.series import Description, Placed, describe, patient_key

DEFER_BYTES = 4096
WARNING_OF = {
    "burned_in": "burned_in_left_out",
    "colour": "colour_skipped",
    "localizer": "localizer_left_out",
    "other_stack": "smaller_stacks_left_out",
    "blank": "blank_left_out",
}
"""Code of `reasons.WARNINGS` by rule."""


def headers_of(paths: Sequence[str]) -> list[Dataset]:
    """Read everything, but leave values as long as pixel data on the disk."""
    return [dcmread(path, defer_size=DEFER_BYTES) for path in paths]


def assemble(
    paths: Sequence[str], out: str, config: arrays.ArrayConfig, secret: str, blank: Sequence[BlankRule]
) -> dict[str, Any]:
    """Make the array of normalised instances and write it to `out` (npy); return what its sidecar tells.

    `blank` is asked only where the configuration says that pictures are screened.
    """
    # Choose.
    headers = headers_of(paths)
    chosen, left_out = _chosen(headers, describe(headers), config, blank)
    geometry, order, _ = survey([placed.slice for placed in chosen]) if chosen else (None, [], [])
    stack = [chosen[index] for index in order[: geometry.n_in_stack if geometry else 0]]
    left_out["other_stack"] += len(chosen) - len(stack)
    rank = {(placed.instance, placed.frame): index for index, placed in enumerate(stack)}

    def frames() -> Iterator[tuple[Placed, arrays.Slices, Dataset]]:
        for instance in sorted({placed.instance for placed in stack}):
            dataset = dcmread(paths[instance])
            if config.screened:
                screen(dataset, blank)
            for number, frame in enumerate(modality_values(dataset)):
                index = rank.get((instance, number))
                if index is not None:
                    yield stack[index], frame, dataset

    # Compute.
    n_pixels = sum(placed.slice.rows * placed.slice.columns for placed in stack)
    window = arrays.window_of(lambda: (frame for _, frame, _ in frames()), n_pixels, config) if stack else (0.0, 1.0)
    array = np.empty((len(stack), config.size, config.size), np.float32)
    kept = np.ones(len(stack), bool)
    valid = True
    for placed, frame, dataset in frames():
        valid = valid and bool(np.isfinite(frame).all())
        inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
        picture = arrays.shrink(frame, window, config.size, placed.slice.pixel_spacing, inverted=inverted)
        index = rank[placed.instance, placed.frame]
        kept[index] = "blank" not in config.leave_out or not arrays.is_blank(picture)
        array[index] = arrays.centred(picture, config.size)
    left_out["blank"] += int((~kept).sum())
    array = array[kept]
    np.save(out, array)

    # Tell.
    warnings = [WARNING_OF[rule] for rule, count in left_out.items() if count]
    return {
        "shape": list(array.shape),
        "window": list(window),
        "pixel_spacing_mm": stack[0].slice.pixel_spacing if stack else None,
        "rows_columns": [stack[0].slice.rows, stack[0].slice.columns] if stack else None,
        "left_out": {rule: count for rule, count in left_out.items() if count},
        "patient_key": patient_key(headers[0], secret),
        "warnings": sorted(warnings + ["array_values_invalid"] * (not valid)),
    }


def _chosen(
    headers: Sequence[Dataset], described: Description, config: arrays.ArrayConfig, blank: Sequence[BlankRule]
) -> tuple[list[Placed], Counter[str]]:
    """Return the frames that no rule about the single picture leaves out, and how many each of these does."""
    scout = described.geometry is not None and described.geometry.verdict == "localizer"
    chosen, left_out = [], Counter[str]()
    for placed in described.order:
        header = headers[placed.instance]
        if config.screened and not is_clean(header, blank):
            left_out["burned_in"] += 1
        elif not arrays.is_grey(header):
            left_out["colour"] += 1
        elif "localizer" in config.leave_out and (scout or placed.slice.localizer):
            left_out["localizer"] += 1
        else:
            chosen.append(placed)
    return chosen, left_out
