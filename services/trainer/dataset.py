"""Which arrays of a dataset a training uses, and which of their patients it keeps back for evaluation."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

HELD_OUT = 0.25
"""Share of the patients that is kept out of the training, at least one."""
DRAWS = 100
"""Splits that are compared."""
GRID = 4

Vector = npt.NDArray[np.float64]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Array(_Frozen):
    """One array of slices, (n, H, W) float32 in [-1, 1], as it stood when the training began."""

    key: str
    etag: str
    series_uid: str
    group: str
    """Whose slices these are: the patient's key, or the series where it is unknown. A group is never split."""
    n: int
    held_out: bool = False


class Manifest(_Frozen):
    """The data of a training; stored beside the model."""

    dataset: str
    arrays: tuple[Array, ...]

    def n_images(self, *, held_out: bool) -> int:
        """Count the images of one side of the split."""
        return sum(array.n for array in self.arrays if array.held_out == held_out)


def newest_revisions(keys: Mapping[str, datetime]) -> list[str]:
    """Return, of `<folder>/<series uid>.<digest>.<config hash>.npy` keys and their times, the newest per series."""
    newest: dict[str, str] = {}
    for key, modified in sorted(keys.items()):
        series = series_of(key)
        if series not in newest or keys[newest[series]] <= modified:
            newest[series] = key
    return sorted(newest.values())


def series_of(key: str) -> str:
    """Return the series UID in an array's key; a UID has dots itself, digest and hash have none."""
    return key.rsplit("/", 1)[-1].rsplit(".", 3)[0]


def split(dataset: str, arrays: Iterable[Array], summaries: Mapping[str, Vector]) -> Manifest:
    """Keep a quarter of the patients for the evaluation, all of a patient's slices on one side.

    Of some splits, drawn by a hash of the patients' keys, the one is taken whose sides are most alike. Patients differ,
    and with few of them a blind draw can keep back the odd ones: their distance to the others would then hide how far
    the generated images are from anything.

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

    def unlikeness(kept_back: list[int]) -> float:
        inside = np.isin(np.arange(len(weights)), kept_back)
        if inside.all():
            return 0.0
        means = [sums[side].sum(axis=0) / weights[side].sum() for side in (inside, ~inside)]
        return float(np.square((means[0] - means[1]) / spread).sum())

    chosen = min(_draws(dataset, list(by_group)), key=unlikeness)
    kept_back = {list(by_group)[index] for index in chosen}
    marked = (
        array.model_copy(update={"held_out": array.group in kept_back})
        for group in by_group.values()
        for array in group
    )
    return Manifest(dataset=dataset, arrays=tuple(sorted(marked, key=lambda array: array.key)))


def summary_of(slices: npt.NDArray[np.floating]) -> Vector:
    """Return what `split` compares: mean and spread over the slices (n, H, W) of each cell of a 4x4 grid.

    Raises:
        ValueError: no slices of numbers.
    """
    if slices.ndim != 3 or min(slices.shape) == 0 or min(slices.shape[1:]) < GRID:  # noqa: PLR2004 - slices, rows, columns
        raise ValueError("not an array of slices")
    n, rows, columns = len(slices), slices.shape[1] // GRID, slices.shape[2] // GRID
    cells = slices[:, : GRID * rows, : GRID * columns].reshape(n, GRID, rows, GRID, columns).mean(axis=(2, 4))
    summary = np.concatenate((cells.mean(axis=0).ravel(), cells.std(axis=0).ravel())).astype(np.float64)
    if not np.isfinite(summary).all():
        raise ValueError("not finite")
    return summary


def _draws(dataset: str, groups: list[str]) -> Iterator[list[int]]:
    """Yield the indices of the groups that each draw keeps back."""
    n_kept_back = max(1, math.floor(HELD_OUT * len(groups)))
    for draw in range(DRAWS):
        ranks = [hashlib.sha256(f"{dataset}/{draw}/{group}".encode()).digest() for group in groups]
        yield sorted(sorted(range(len(groups)), key=ranks.__getitem__)[:n_kept_back])
