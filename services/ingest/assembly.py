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
from dataclasses import dataclass

import numpy as np
from pydicom import Dataset, dcmread

from services.ingest import arrays
from services.ingest.datasets import BlankRule
from services.ingest.geometry import survey
from services.ingest.pixels import modality_values
from services.ingest.protection import is_clean, screen
from services.ingest.protocol import ArrayConfig, Assembled
from services.ingest.reading import PIXEL_DATA
from services.ingest.series import Description, Placed, describe, patient_key, pixel_shape

DEFER_BYTES = 4096
Window = tuple[float, float]
WARNING_OF = {
    "burned_in": "burned_in_left_out",
    "colour": "colour_skipped",
    "localizer": "localizer_left_out",
    "other_stack": "smaller_stacks_left_out",
    "blank": "blank_left_out",
}
"""Code of `reasons.WARNINGS` by rule."""


@dataclass(frozen=True, slots=True)
class Series:
    """The stored instances of a series: `headers` has everything but values as long as pixel data."""

    paths: Sequence[str]
    headers: Sequence[Dataset]
    description: Description

    @classmethod
    def read(cls, paths: Sequence[str]) -> "Series":
        """Read the headers, and describe them."""
        headers = [dcmread(path, defer_size=DEFER_BYTES) for path in paths]
        return cls(paths, headers, describe(headers))


def measure(series: Series, config: ArrayConfig, blank: Sequence[BlankRule]) -> Window | None:
    """Return the percentiles of the slices that an array would have; None where they tell of no window."""
    stack, _ = _stack(series, config, blank)
    frames = (frame for _, frame, _ in _frames(series, stack, config, blank))
    return arrays.percentile_window(
        frames, sum(item.slice.rows * item.slice.columns for item in stack), config.percentiles
    )


def assemble(series: Series, out: str, config: ArrayConfig, secret: str, blank: Sequence[BlankRule]) -> Assembled:
    """Make the array of normalised instances and write it to `out` (npy); return what its sidecar tells.

    `blank` is asked only where the configuration says that pictures are screened. Without a window there is nothing to
    see in any slice.
    """
    # Choose.
    stack, left_out = _stack(series, config, blank)

    # Compute.
    array = np.empty((len(stack), config.size, config.size), np.float32)
    kept = np.ones(len(stack), bool)
    valid = True
    for index, frame, dataset in _frames(series, stack, config, blank):
        valid = valid and bool(np.isfinite(frame).all())
        inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
        shape = stack[index].slice.pixel_spacing or pixel_shape(dataset)
        if config.window is None:
            kept[index] = False
            continue
        picture = arrays.shrink(frame, config.window, config.size, shape, inverted=inverted)
        kept[index] = "blank" not in config.leave_out or not arrays.is_blank(picture)
        array[index] = arrays.centred(picture, config.size)
    left_out["blank"] += int((~kept).sum())
    array = array[kept]
    np.save(out, array)

    # Tell.
    warnings = [WARNING_OF[rule] for rule, count in left_out.items() if count]
    return Assembled(
        shape=list(array.shape),
        pixel_spacing_mm=stack[0].slice.pixel_spacing if stack else None,
        rows_columns=[stack[0].slice.rows, stack[0].slice.columns] if stack else None,
        left_out={rule: count for rule, count in left_out.items() if count},
        patient_key=patient_key(series.headers[0], secret),
        warnings=sorted(warnings + ["array_values_invalid"] * (not valid)),
    )


def _stack(series: Series, config: ArrayConfig, blank: Sequence[BlankRule]) -> tuple[list[Placed], Counter[str]]:
    """Return the frames of the array in order, and how many others each rule leaves out; `blank` is asked later."""
    chosen, left_out = _chosen(series.headers, series.description, config, blank)
    geometry = series.description.geometry
    if left_out and chosen:  # what is left may have another order
        geometry, order, _ = survey([placed.slice for placed in chosen])
        chosen = [chosen[index] for index in order]
    stack = chosen[: geometry.n_in_stack if geometry else 0]
    left_out["other_stack"] += len(chosen) - len(stack)
    return stack, left_out


def _frames(
    series: Series, stack: Sequence[Placed], config: ArrayConfig, blank: Sequence[BlankRule]
) -> Iterator[tuple[int, arrays.Slices, Dataset]]:
    """Yield the frames of a stack in the order of their files: index, modality values, and the instance."""
    rank = {(placed.instance, placed.frame): index for index, placed in enumerate(stack)}
    for instance in sorted({placed.instance for placed in stack}):
        dataset = series.headers[instance]
        if config.screened:  # which changes it
            dataset = dcmread(series.paths[instance])
            screen(dataset, blank)
        deferred = dataset.get_item("PixelData", keep_deferred=True)
        for number, frame in enumerate(modality_values(dataset)):
            index = rank.get((instance, number))
            if index is not None:
                yield index, frame, dataset
        dataset[PIXEL_DATA] = deferred  # lets go of the pixels


def _chosen(
    headers: Sequence[Dataset], described: Description, config: ArrayConfig, blank: Sequence[BlankRule]
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
