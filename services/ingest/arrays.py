"""The training array of a series: `(N, H, W) float32` in [-1, 1], slices in order along the normal.

Modality values (HU in CT), polarity as MONOCHROME2, one window for the whole dataset, resized with antialiasing at
their physical aspect, centred on -1. A window per slice or per series would make them impossible to compare.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset

from services.ingest.reading import text_of

Slices = NDArray[np.float32]
PERCENTILE_SAMPLES = 4_000_000
"""Values that percentiles are taken from, spread evenly over the slices: memory stays bounded."""
NO_PICTURE = {"SEG", "RTDOSE", "RTSTRUCT", "PR", "SR", "KO", "DOC", "REG", "FID"}
"""Modalities whose pixels, if any, are no picture."""
BLANK_RANGE = 0.02
"""A slice whose lightest and darkest parts are nearer to each other than a hundredth of the window shows nothing."""


def is_picture(dataset: Dataset) -> bool:
    """Tell whether an instance has pixels that a generative model could learn from, colour included."""
    return "PixelData" in dataset and text_of(dataset, "Modality") not in NO_PICTURE


def is_grey(dataset: Dataset) -> bool:
    """Tell whether the pixels are one grey value each."""
    return text_of(dataset, "PhotometricInterpretation") in {"MONOCHROME1", "MONOCHROME2"}


def percentile_window(
    frames: Iterable[Slices], n_pixels: int, percentiles: tuple[float, float]
) -> tuple[float, float] | None:
    """Return the percentiles of frames that have `n_pixels` together; None where all values are the same, or none."""
    step = max(1, n_pixels // PERCENTILE_SAMPLES)
    values = np.concatenate([np.ravel(frame)[::step] for frame in frames] or [np.empty(0, np.float32)])
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = (float(value) for value in np.percentile(values, percentiles))
    return (low, high) if low < high else None


def shrink(
    frame: Slices, window: tuple[float, float], size: int, pixel_shape: Sequence[float] | None, *, inverted: bool
) -> Slices:
    """Map one frame to [-1, 1] and resize it so that its longer side, as it is in the world, has `size` pixels.

    `pixel_shape` is the height and the width of a pixel, in any unit; `inverted` says that low values are bright
    (MONOCHROME1).
    """
    low, high = window
    unit = np.clip(frame, np.float32(low), np.float32(high))
    if np.isnan(unit).any():
        unit = np.nan_to_num(unit, nan=low)
    unit -= np.float32(low)
    unit *= np.float32((-2 if inverted else 2) / (high - low))
    unit += np.float32(1 if inverted else -1)
    pixel_height, pixel_width = pixel_shape or (1.0, 1.0)
    height, width = frame.shape[0] * pixel_height, frame.shape[1] * pixel_width
    scale = size / max(height, width)
    fitted = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Pillow widens its kernel by the scale when it shrinks, so nothing aliases.
    resized = np.asarray(Image.fromarray(unit).resize(fitted, Image.Resampling.BICUBIC))
    clipped: Slices = np.clip(resized, -1, 1)
    return clipped


def is_blank(picture: Slices) -> bool:
    """Tell whether a shrunk frame shows nothing."""
    return float(np.ptp(picture)) < BLANK_RANGE


def centred(picture: Slices, size: int) -> Slices:
    """Put a shrunk frame into the middle of `(size, size)`, on -1."""
    canvas = np.full((size, size), -1, np.float32)
    top, left = (size - picture.shape[0]) // 2, (size - picture.shape[1]) // 2
    canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return canvas
