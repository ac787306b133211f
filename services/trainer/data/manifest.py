"""Which arrays of a dataset a training uses, and which of their patients it keeps back for evaluation."""

import hashlib
import math
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.documents.training import Array, Manifest
from shared.keys import ARRAY_SUFFIX

HELD_OUT = 0.25
"""Share of the patients that is kept out of the training, at least one."""
DRAWS = 100
"""Number of splits that are compared."""
GRID = 4
ROUNDING = 1e-3
"""How far values may lie outside -1 to 1, because of rounding."""
OF_INGEST = re.compile(r"(?P<series>.+)\.[0-9a-f]{16,64}\.[0-9a-f]+\.npy")
"""The name of an array that ingest made: series UID, digest of the revision, hash of how it was made."""

Vector = npt.NDArray[np.float64]


class NotNormalised(ValueError):  # noqa: N818 - it states a fact
    """The values of an array are not brightnesses in [-1, 1]."""


def newest_revisions(keys: Mapping[str, datetime]) -> list[str]:
    """Return, of `<folder>/<series uid>.<digest>.<config hash>.npy` keys and their times, the newest per series.

    A key of another form is a series of its own.
    """
    newest: dict[str, str] = {}
    for key, modified in sorted(keys.items()):
        series = series_of(key)
        if series not in newest or keys[newest[series]] <= modified:
            newest[series] = key
    return sorted(newest.values())


def series_of(key: str) -> str:
    """Return the series UID in an array's key; for one that ingest did not make, the whole key stands for it."""
    made = OF_INGEST.fullmatch(key.rsplit("/", 1)[-1])
    return made["series"] if made else key.removesuffix(ARRAY_SUFFIX)


def split(dataset: str, arrays: Iterable[Array], summaries: Mapping[str, Vector]) -> Manifest:
    """Keep a quarter of the patients for the evaluation, all of a patient's slices on one side.

    Some splits are drawn by a hash of the patients' keys, and the one whose sides are most alike is taken. Patients
    differ, and with few of them a blind draw can keep back the odd ones: their distance to the others would then hide
    how far the generated images are from real ones.

    Of each class a quarter of its patients is kept back, at least one, so a class of two patients or more is on both
    sides. If patients have images of several classes, splits for which this holds are
    preferred.

    Args:
        dataset: its name, a part of what is hashed.
        arrays: what to split; the order does not matter.
        summaries: by the arrays' keys, what `summary_of` returned.

    Returns:
        The manifest; the same dataset is always split the same way.
    """
    by_group: defaultdict[str, list[Array]] = defaultdict(list)
    for array in sorted(arrays, key=lambda array: array.key):
        by_group[array.group].append(array)
    weights = np.array([sum(array.n for array in group) for group in by_group.values()], np.float64)
    sums = np.stack(
        [np.sum([array.n * summaries[array.key] for array in group], axis=0) for group in by_group.values()]
    )
    spread = (sums / weights[:, None]).std(axis=0) + 1e-6
    classes: defaultdict[str | None, list[int]] = defaultdict(list)
    for index, group in enumerate(by_group.values()):
        for class_name in dict.fromkeys(array.class_name for array in group):
            classes[class_name].append(index)

    def unlikeness(kept_back: list[int]) -> float:
        inside = np.isin(np.arange(len(weights)), kept_back)
        if any(inside[members].all() or not inside[members].any() for members in classes.values()):
            return math.inf
        means = [sums[side].sum(axis=0) / weights[side].sum() for side in (inside, ~inside)]
        return float(np.square((means[0] - means[1]) / spread).sum())

    chosen = min(_draws(dataset, list(by_group), list(classes.values())), key=unlikeness)
    kept_back = {list(by_group)[index] for index in chosen}
    marked = (
        array.model_copy(update={"held_out": array.group in kept_back})
        for group in by_group.values()
        for array in group
    )
    return Manifest(dataset=dataset, arrays=tuple(sorted(marked, key=lambda array: array.key)))


def opened(path: Path) -> npt.NDArray[Any]:
    """Map the slices (n, H, W) of an array into memory.

    Raises:
        ValueError: the file is damaged, or holds no slices of numbers.
    """
    try:
        array: npt.NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except (tokenize.TokenError, OverflowError):  # NumPy means to raise ValueError, but passes on those of some headers
        raise ValueError("not a NumPy file") from None
    if array.dtype.kind not in "fiu":
        raise ValueError("not numbers")
    if array.ndim != 3 or min(array.shape) == 0:  # noqa: PLR2004 - slices, rows, columns
        raise ValueError("not an array of slices")
    return array


def summary_of(slices: npt.NDArray[np.floating]) -> Vector:
    """Return what `split` compares: mean and spread over the slices (n, H, W) of each cell of a 4x4 grid.

    Raises:
        NotNormalised: values are not in [-1, 1].
        ValueError: the slices are too small, or values are not finite.
    """
    if min(slices.shape[1:]) < GRID:
        raise ValueError("not an array of slices")
    n, rows, columns = len(slices), slices.shape[1] // GRID, slices.shape[2] // GRID
    cells = slices[:, : GRID * rows, : GRID * columns].reshape(n, GRID, rows, GRID, columns).mean(axis=(2, 4))
    summary = np.concatenate((cells.mean(axis=0).ravel(), cells.std(axis=0).ravel())).astype(np.float64)
    low, high = slices.min(), slices.max()  # of all pixels: the cells leave some out at the edges
    if not np.isfinite([low, high]).all():
        raise ValueError("not finite")
    if low < -1 - ROUNDING or high > 1 + ROUNDING:
        raise NotNormalised("not in [-1, 1]")
    return summary


def _draws(dataset: str, groups: Sequence[str], classes: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield the indices of the groups that each draw keeps back; `classes` are the indices of each class."""
    for draw in range(DRAWS):
        ranks = [hashlib.sha256(f"{dataset}/{draw}/{group}".encode()).digest() for group in groups]
        kept_back: set[int] = set()
        # The rarest class first: a patient of it may have images of a common one, too, and counts there.
        for members in sorted(classes, key=lambda members: (len(members), members)):
            n_missing = max(1, math.floor(HELD_OUT * len(members))) - len(kept_back.intersection(members))
            free = sorted(set(members) - kept_back, key=ranks.__getitem__)
            kept_back.update(free[: max(0, n_missing)])
        yield sorted(kept_back)
