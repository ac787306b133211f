"""The images that the networks see, from the arrays of a dataset."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from services.trainer.data.manifest import opened
from shared.errors import Unprocessable

AIR = -1.0
"""The brightness that pads a slice that is not square."""
AT_ONCE = 32
"""Slices that are scaled at the same time: little memory is needed beside the result, however large an array is."""


def load_images(paths: Sequence[str], size: int, labels: Sequence[int] | None = None) -> tuple[Tensor, Tensor | None]:
    """Read arrays (n, H, W) and return all their slices as (N, 1, size, size) float32 in [-1, 1], and their labels.

    A slice that is not square is padded with air; a larger one is scaled down with antialiasing, without which the
    generator would learn the moiré, and the distance would measure it. Arrays are mapped into memory and not read as a
    whole, so that little memory is needed beside the result.

    Args:
        paths: `.npy` files.
        size: rows and columns of the images.
        labels: the class of each array.

    Returns:
        The images, and (N,) int64, the class of each; None without `labels`.

    Raises:
        Unprocessable: `images_too_small`, a slice would have to be scaled up; `invalid_array`.
    """
    counts = [len(_opened(path)) for path in paths]
    images = torch.empty((sum(counts), 1, size, size))
    done = 0
    for array in map(_opened, paths):  # one at a time: what is mapped counts as memory in use
        for first in range(0, len(array), AT_ONCE):
            slices = array[first : first + AT_ONCE]
            _put(slices, images[done : done + len(slices)])
            done += len(slices)
    return images, None if labels is None else torch.tensor(labels).repeat_interleave(torch.tensor(counts))


def _opened(path: str) -> npt.NDArray[Any]:
    try:
        return opened(Path(path))
    except ValueError:
        raise Unprocessable("invalid_array") from None


def _put(slices: npt.NDArray[Any], images: Tensor) -> None:
    """Write slices (n, H, W), brought to size, into images (n, 1, size, size)."""
    if not np.isfinite(slices).all():
        raise Unprocessable("invalid_array")
    size = images.shape[-1]
    rows, columns = slices.shape[1:]
    side = max(rows, columns)
    if side < size:
        raise Unprocessable("images_too_small")
    if rows == columns == size:
        np.clip(slices, -1, 1, out=images.numpy()[:, 0], casting="same_kind")
        return
    right, below = side - columns, side - rows
    padding = (right // 2, right - right // 2, below // 2, below - below // 2)
    scaled = functional.pad(torch.from_numpy(slices.astype(np.float32))[:, None], padding, value=AIR)
    if side != size:
        scaled = functional.interpolate(scaled, (size, size), mode="bilinear", antialias=True, align_corners=False)
    images.copy_(scaled.clamp(-1, 1))
