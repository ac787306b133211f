"""The numbers beside the Fréchet distance, in the same space: one number alone can be right for the wrong reason.

The Fréchet distance looks at means and covariances alone, and mixes up two faults: images that are not like real ones,
and real ones that have no like. The kernel distance looks at more moments and has no bias; precision and density ask
whether generated images are like real ones, recall and coverage whether each real one has its like.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from services.trainer.evaluation.features import Embedded

NEIGHBOURS = 5
"""The k of the k-th nearest neighbour, as the authors of density and coverage choose it."""
MAX_N = 2000
"""The most points of a set that are paired: more add little, and memory grows with their square."""
DIRECTIONS = 256
SUBSETS = 64
SUBSET_SIZE = 1000
"""Points of a subset, or half of the smaller set if that is less: subsets of all points would be one and the same."""
DIRECTIONS_SEED = 20090417

NEAR, FAR = 2.0, 4.0
"""Relative Fréchet distances that say `as good as real images` and `far from them`."""
CLEARLY_BELOW, ABOUT_EQUAL = 0.7, 0.9
"""Shares of other real images' numbers at which a number counts as clearly below theirs, and as about equal."""
CLEARLY_ABOVE_SPREADS = 4.0
"""Spreads above the kernel distance of other real images at which a kernel distance counts as clearly above it."""


@dataclass(frozen=True, slots=True)
class Quality:
    """How one set of images compares with the held-out real ones."""

    kid: float
    kid_spread: float
    """Standard deviation of the kernel distance over subsets."""
    precision: float
    recall: float
    density: float
    coverage: float
    sliced_wasserstein: float


def assess(embedded: Embedded, *, seed: int = 0) -> tuple[Quality, Quality]:
    """Return the quality of the generated images, and that of other real ones, the best to be reached."""
    halves = torch.split(embedded.real, embedded.n)
    pairs = (
        (embedded.real, embedded.generated),
        halves[:2] if embedded.other_real is None else (embedded.real, embedded.other_real),
    )
    draws = [[part[:MAX_N] for part in drawn] for drawn in embedded.draws(seed)]
    found = []
    for of_drawn, (real, compared) in enumerate(pairs, start=1):
        kid, spread = kernel_distance(real[:MAX_N], compared[:MAX_N], seed=seed)
        shares = [asdict(neighbourhoods(drawn[0], drawn[of_drawn])) for drawn in draws]
        sliced = [sliced_wasserstein(drawn[0], drawn[of_drawn], directions(embedded.d)) for drawn in draws]
        means = {name: float(np.mean([share[name] for share in shares])) for name in shares[0]}
        found.append(Quality(kid=kid, kid_spread=spread, **means, sliced_wasserstein=float(np.mean(sliced))))
    return found[0], found[1]


def second_opinion(relative_fd: float, generated: Quality, real: Quality) -> tuple[str, ...]:
    """Name the numbers that contradict the Fréchet distance; empty if they agree.

    | the distance says | and | warning |
    |---|---|---|
    | near (relative_fd <= 2) | coverage below 0.7 of other real images' | `coverage_disagrees` |
    | near | precision below 0.7 of theirs | `precision_disagrees` |
    | near | KID more than 4 spreads above theirs | `kid_disagrees` |
    | far (relative_fd > 4) | coverage and precision above 0.9 of theirs, KID within 4 spreads | `distance_disagrees` |
    """
    excess = generated.kid - real.kid
    above = excess > CLEARLY_ABOVE_SPREADS * max(generated.kid_spread, real.kid_spread)
    if relative_fd <= NEAR:
        found = {
            "coverage_disagrees": generated.coverage < CLEARLY_BELOW * real.coverage,
            "precision_disagrees": generated.precision < CLEARLY_BELOW * real.precision,
            "kid_disagrees": above,
        }
    else:
        covers = generated.coverage >= ABOUT_EQUAL * real.coverage
        precise = generated.precision >= ABOUT_EQUAL * real.precision
        found = {"distance_disagrees": relative_fd > FAR and covers and precise and not above}
    return tuple(name for name, disagrees in found.items() if disagrees)


def kernel_distance(
    a: Tensor, b: Tensor, *, subsets: int = SUBSETS, subset_size: int | None = None, seed: int = 0
) -> tuple[float, float]:
    """Return KID of features (N, d) and (M, d), the mean of the unbiased MMD^2 over subsets, and its deviation.

    The kernel is (x y / d + 1)^3, and MMD^2 = E k(a, a') + E k(b, b') - 2 E k(a, b) over pairs of different points
    (arXiv 1801.01401, equation 4). It may be negative: the mean over all sets of one distribution is zero.
    """
    size = subset_size or max(2, min(SUBSET_SIZE, min(len(a), len(b)) // 2))
    both = torch.cat((a, b)).double()
    kernel = (both @ both.T / both.shape[1] + 1) ** 3
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(subsets):
        i = torch.from_numpy(rng.permutation(len(a))[:size])
        j = torch.from_numpy(rng.permutation(len(b))[:size] + len(a))
        within = sum(kernel[one][:, one].sum() - kernel[one, one].sum() for one in (i, j)) / (size * (size - 1))
        found.append(float(within - 2 * kernel[i][:, j].mean()))
    return float(np.mean(found)), float(np.std(found))


@dataclass(frozen=True, slots=True)
class Neighbourhoods:
    """Shares of points that lie in the balls around points of the other set."""

    precision: float
    recall: float
    density: float
    coverage: float


def neighbourhoods(real: Tensor, generated: Tensor, k: int = NEIGHBOURS) -> Neighbourhoods:
    """Compare two sets by balls that reach to each point's k-th nearest neighbour in its own set.

    Precision: generated points in a ball of a real one; recall: real points in a ball of a generated one (arXiv
    1904.06991, equation 1). Density: balls of real points around a generated one, over k, so that one outlier with a
    large ball counts for little, and it may exceed 1; coverage: balls of real points that hold a generated one (arXiv
    2002.09797, equations 5 and 6).
    """
    k = min(k, len(real) - 1, len(generated) - 1)
    between = torch.cdist(real.double(), generated.double())
    in_real = between <= _radii(real, k)[:, None]
    in_generated = between <= _radii(generated, k)[None]
    return Neighbourhoods(
        precision=float(in_real.any(0).double().mean()),
        recall=float(in_generated.any(1).double().mean()),
        density=float(in_real.sum(0).double().mean() / k),
        coverage=float(in_real.any(1).double().mean()),
    )


def _radii(points: Tensor, k: int) -> Tensor:
    """Return each point's distance to its k-th nearest neighbour; the nearest of all is the point itself."""
    return torch.cdist(points.double(), points.double()).kthvalue(k + 1, dim=1).values


def directions(d: int) -> Tensor:
    """Return (d, DIRECTIONS) random unit vectors, the same for the same d."""
    drawn = torch.randn(d, DIRECTIONS, generator=torch.Generator().manual_seed(DIRECTIONS_SEED), dtype=torch.float64)
    unit: Tensor = drawn / drawn.norm(dim=0)
    return unit


def sliced_wasserstein(a: Tensor, b: Tensor, along: Tensor) -> float:
    """Return the root of the mean W_2^2 of features (N, d) and (N, d), over the directions `along` (d, L).

    In one dimension the best transport pairs the sorted values (Bonneel et al. 2015, section 2).
    """
    sorted_a, sorted_b = (a.double() @ along).sort(dim=0).values, (b.double() @ along).sort(dim=0).values
    return float((sorted_a - sorted_b).square().mean().sqrt())
