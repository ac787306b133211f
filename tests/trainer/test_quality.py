import numpy as np
import ot
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torchmetrics.image.kid import KernelInceptionDistance

from services.trainer.evaluation.features import Embedded
from services.trainer.evaluation.frechet import distance_in
from services.trainer.evaluation.quality import (
    Quality,
    assess,
    directions,
    kernel_distance,
    neighbourhoods,
    second_opinion,
    sliced_wasserstein,
)

pytestmark = pytest.mark.usefixtures("one_thread")

REAL = Quality(0.0, 0.02, 0.9, 0.9, 1.0, 0.9, 0.1)


def points(n: int, seed: int, d: int = 8, *, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=random, dtype=torch.float64) * scale + shift


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save:UserWarning")
def test_kernel_distance_is_that_of_torchmetrics():
    """Over all points, KID is what an independent implementation makes of the same features."""
    a, b = points(60, 1), points(60, 2, shift=0.5)
    metric = KernelInceptionDistance(feature=nn.Identity(), subsets=1, subset_size=60)
    metric.real_features, metric.fake_features = [a], [b]
    metric._update_count = 1
    expected, _ = metric.compute()
    found, spread = kernel_distance(a, b, subsets=1, subset_size=60)

    assert found == pytest.approx(float(expected), rel=1e-9)
    assert spread == 0


def test_kernel_distance_has_no_bias():
    """Of sets of one distribution the mean is zero within its error, at any n, where the plain estimate is positive."""
    found = [
        kernel_distance(points(n, seed), points(n, seed + 50), subsets=2)[0] for n in (20, 80) for seed in range(50)
    ]

    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found))
    assert min(found) < 0 < max(found)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.5, 0.0), (1.5, 0.3), (1.0, 2.0)])
def test_neighbourhoods_are_those_of_scikit_learn(scale, shift):
    """Precision, recall, density and coverage as their papers print them, with another library's neighbours."""
    real, generated = points(70, 1), points(50, 2, scale=scale, shift=shift)
    k = 5
    found = neighbourhoods(real, generated, k)

    def balls(of: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        radius = NearestNeighbors(n_neighbors=k).fit(of.numpy()).kneighbors()[0][:, -1]
        return of.numpy(), radius

    def inside(point: torch.Tensor, balls: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        return np.linalg.norm(balls[0] - point.numpy(), axis=1) <= balls[1]

    in_real = np.array([inside(point, balls(real)) for point in generated])
    in_generated = np.array([inside(point, balls(generated)) for point in real])

    assert found.precision == pytest.approx(in_real.any(axis=1).mean())
    assert found.recall == pytest.approx(in_generated.any(axis=1).mean())
    assert found.density == pytest.approx(in_real.sum(axis=1).mean() / k)
    assert found.coverage == pytest.approx(in_real.any(axis=0).mean())


def test_sliced_wasserstein_is_that_of_pot():
    """Along the same directions the distance is what an independent implementation finds."""
    a, b, along = points(60, 1), points(60, 2, scale=1.3, shift=0.5), directions(8)
    expected = ot.sliced_wasserstein_distance(a.numpy(), b.numpy(), projections=along.numpy(), p=2)

    assert sliced_wasserstein(a, b, along) == pytest.approx(expected, rel=1e-9)
    assert sliced_wasserstein(a, a.flip(0), along) == 0


@pytest.mark.parametrize("with_others", [True, False])
def test_other_real_points_are_what_can_be_reached(with_others):
    """Generated points of the real distribution are assessed as other real ones are; those of half of it cover less."""
    real, others, alike = points(400, 1, d=2), points(200, 2, d=2), points(400, 3, d=2)
    half = alike[alike[:, 0] > 0].repeat(2, 1)[:300]
    found = []
    for generated in (alike, half):
        space = embedded_in(real, generated, others if with_others else None)
        found.append(assess(space))
    (of_alike, reachable), (of_half, _) = found

    assert of_alike.coverage == pytest.approx(reachable.coverage, abs=0.06)
    assert of_alike.precision == pytest.approx(reachable.precision, abs=0.06)
    assert abs(of_alike.kid - reachable.kid) < 3 * reachable.kid_spread
    assert of_half.coverage < 0.75 * reachable.coverage
    assert of_half.sliced_wasserstein > 1.5 * reachable.sliced_wasserstein


def embedded_in(real, generated, others) -> Embedded:
    n = len(real) // 2 if others is None else min(len(real), len(others))
    return Embedded("FD", "points", min(n, len(generated)), real, generated, others)


def test_second_opinion_where_the_distance_is_blind():
    """Points that have the real ones' mean and covariance, and lie elsewhere, deceive the distance, not the others."""
    signs = torch.randint(0, 2, (400, 2), generator=torch.Generator().manual_seed(4)).double() * 2 - 1
    space = embedded_in(points(400, 1, d=2), signs, points(400, 2, d=2))
    distance = distance_in(space)
    doubts = second_opinion(distance.relative_fd, *assess(space))

    assert distance.relative_fd < 2
    assert "coverage_disagrees" in doubts


def test_no_second_opinion_of_real_points():
    """Points of the real distribution raise no doubt."""
    space = embedded_in(points(400, 1), points(400, 3), points(400, 2))

    assert second_opinion(distance_in(space).relative_fd, *assess(space)) == ()


@pytest.mark.parametrize(
    ("relative_fd", "changes", "warnings"),
    [
        (1.5, {}, ()),
        (1.5, {"coverage": 0.6}, ("coverage_disagrees",)),
        (1.5, {"precision": 0.6}, ("precision_disagrees",)),
        (1.5, {"kid": 0.09}, ("kid_disagrees",)),
        (1.5, {"kid": 0.09, "kid_spread": 0.03}, ()),
        (3.0, {"coverage": 0.6}, ()),
        (3.0, {}, ()),
        (5.0, {}, ("distance_disagrees",)),
        (5.0, {"coverage": 0.8}, ()),
        (5.0, {"precision": 0.8}, ()),
        (5.0, {"kid": 0.09}, ()),
    ],
)
def test_each_rule_of_the_second_opinion(relative_fd, changes, warnings):
    """Each row: what the distance says, what differs from other real images, and which warning that makes."""
    values = {name: getattr(REAL, name) for name in Quality.__slots__} | changes

    assert second_opinion(relative_fd, Quality(**values), REAL) == warnings
