"""The trainer's evaluation: the Fréchet distance against scipy's and torchmetrics', and the extraction of features."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from services.trainer.evaluation.features import randconv_features
from services.trainer.evaluation.frechet import frechet_distance, trace_by_cholesky

D = 2048
REPEATS = 5
IMAGES = 512


def rows() -> list[dict[str, Any]]:
    """Measure each way with one thread; the compared ways take so long that one run of theirs has to do."""
    with threadpool_limits(1):
        found = [*_distances(1_000), *_distances(10_000), *_trace_term(10_000)]
        return [*found, *(_extraction(size) for size in (32, 64, 128))]


def _distances(n: int) -> list[dict[str, Any]]:
    a, b = _features(n, 1), _features(n, 2)
    return _compared(
        f"Fréchet distance, n={n}, d={D}",
        lambda: frechet_distance(a, b),
        {"scipy sqrtm": lambda: _by_scipy(a, b), "torchmetrics": lambda: _by_torchmetrics(a, b)},
    )


def _trace_term(n: int) -> list[dict[str, Any]]:
    covariances = [np.cov(_features(n, seed).numpy(), rowvar=False) for seed in (1, 2)]
    return _compared(
        f"trace term, n={n}, d={D}",
        lambda: trace_by_cholesky(*covariances),
        {"scipy sqrtm": lambda: float(np.trace(scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real))},
    )


def _compared(what: str, ours: Callable[[], float], others: dict[str, Callable[[], float]]) -> list[dict[str, Any]]:
    runs = [_timed(ours) for _ in range(REPEATS)]
    ours_s, value = statistics.median(spent_s for spent_s, _ in runs), runs[0][1]
    found = [_row(what, ours_s, "s", REPEATS)]
    for name, way in others.items():
        spent_s, its_value = _timed(way)
        found += [
            _row(f"{what}, {name}", spent_s, "s", 1),
            _row(f"{what}, {name}: time ratio", spent_s / ours_s, "x", 1),
            _row(f"{what}, {name}: relative difference", abs(its_value / value - 1), "", 1),
        ]
    return found


def _features(n: int, seed: int) -> Tensor:
    """Return (n, D) float64 features that are correlated and not negative, as those of a network are."""
    mix = torch.randn(D, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / D**0.5
    drawn = torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.relu(drawn @ mix + 0.1 * seed)


def _by_scipy(a: Tensor, b: Tensor) -> float:
    x, y = a.numpy(), b.numpy()
    covariance_x, covariance_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(covariance_x @ covariance_y).real
    shift = np.square(x.mean(axis=0) - y.mean(axis=0)).sum()
    return float(shift + np.trace(covariance_x + covariance_y - 2 * root))


def _by_torchmetrics(a: Tensor, b: Tensor) -> float:
    size: Any = (D,)  # torchmetrics declares the size of a picture, but takes that of whatever its network is given
    metric = FrechetInceptionDistance(feature=nn.Identity(), input_img_size=size).set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)
    return float(metric.compute())


def _extraction(size: int) -> dict[str, Any]:
    images = torch.rand(IMAGES, 1, size, size) * 2 - 1
    spent_s = statistics.median(_timed(lambda: randconv_features(images))[0] for _ in range(REPEATS))
    return _row(f"randconv-v1 features, {size} x {size}", IMAGES / spent_s, "images/s", REPEATS)


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    done = work()
    return time.perf_counter() - began, done


def _row(what: str, value: float, unit: str, n: int) -> dict[str, Any]:
    return {"bench": "trainer", "what": what, "value": value, "unit": unit, "n": n}


if __name__ == "__main__":
    for row in rows():
        print(f"{row['what']:70} {row['value']:10.3g} {row['unit']:8} n={row['n']}")  # noqa: T201 - a program's output
