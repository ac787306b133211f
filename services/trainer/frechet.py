"""The Fréchet distance between real and generated images, in a named feature space, beside its floor.

Theory of operation. FD is biased upwards when few images are compared, the more so the more features there are, so a
bare number means nothing. Here it always comes with its floor: the distance between two disjoint sets of real images,
of the same n, in the same space, to the same reference. `relative_fd = distance / floor` is 1 when the generated
images are as near to unseen real ones as other real images are, and the bias of both sides is the same one.

Which real images make the floor matters: slices of one patient resemble each other, so two halves of the same
patients' slices are nearer than any new patient can be. With `other_real` (other patients than `real`: the training
part) the floor is the distance from those to `real`; without it, between two halves of `real`.

The space `randconv-v1` needs no download: features of a fixed-seed, multi-scale random convolutional network, which
see blur, noise and missing modes (arXiv 2208.09218 compares random and trained ones). They are z-scored by all real
images given and, so that the covariance can be estimated, projected at random to d <= n / 2. Distances in different
spaces, or at another n, cannot be compared; the name tells d. The metric is called FD: FID is FD of Inception features.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

FEATURES_SEED = 20220818
CHANNELS = 16
"""Random filters per layer of each scale."""
SCALES = 3
"""Full resolution, half, quarter."""
MAX_D = 128
MIN_D = 4
VARIANCE_FLOOR = 1e-2
"""Added to a feature's variance, as a share of the mean variance: a feature that is constant over the reference (a
corner that is always air) would otherwise turn rounding into infinite distance."""
DRAWS = 8
"""Sets drawn for each of distance and floor; their mean is given."""


@dataclass(frozen=True, slots=True)
class Distance:
    """How far generated images are from real ones."""

    metric: str
    space: str
    n: int
    """Images on each side."""
    d: int
    """Features."""
    distance: float
    floor: float
    relative_fd: float
    warnings: tuple[str, ...] = ()
    """`few_images`: even the smallest d is above n / 2."""


def calculate_fid(real: Tensor, generated: Tensor, other_real: Tensor | None = None, *, seed: int = 0) -> Distance:
    """Compare generated images with held-out real ones.

    Args:
        real: (N, 1, H, W) float32 in [-1, 1], the reference, kept out of the training.
        generated: (M, 1, H, W), prepared as `real` was; more than n images make the mean steadier.
        other_real: (K, 1, H, W), real images of other patients, for the floor; None takes halves of `real`.
        seed: of the draws.

    Returns:
        The distance, labelled FD (never FID: these are no Inception features).

    Raises:
        ValueError: fewer than four real images, or fewer than two of the others.
    """
    n = (
        min(len(real), len(generated), len(other_real))
        if other_real is not None
        else min(len(real) // 2, len(generated))
    )
    if n < 2:  # noqa: PLR2004 - a covariance needs two
        raise ValueError("too few images to compare")
    d = MAX_D
    while d > max(n // 2, MIN_D):
        d //= 2
    project = _zscored_projection(real if other_real is None else torch.cat((real, other_real)), d)
    features, features_generated = project(real), project(generated)
    features_other = project(other_real) if other_real is not None else None

    rng = np.random.default_rng(seed)
    distances, floors = [], []
    for _ in range(DRAWS):
        order = rng.permutation(len(features))
        reference = features[order[:n]]
        others = (
            features_other[rng.permutation(len(features_other))] if features_other is not None else features[order[n:]]
        )
        distances.append(frechet_distance(reference, features_generated[rng.permutation(len(features_generated))[:n]]))
        floors.append(frechet_distance(reference, others[:n]))
    distance, floor = float(np.mean(distances)), float(np.mean(floors))
    few = ("few_images",) if d > n / 2 else ()
    return Distance("FD", f"randconv-v1/d{d}", n, d, distance, floor, distance / max(floor, 1e-12), few)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) for features (N, d) and (M, d), in float64.

    With the centred features X = Q R (QR decomposition), C = R^T R / (N - 1), and the trace of (C_a C_b)^(1/2) is the
    sum of the singular values of R_a R_b^T: exact for any n and d, and no nearly singular matrix has its root taken.
    """
    a, b = a.double(), b.double()
    mean_a, mean_b = a.mean(0), b.mean(0)
    root_a = torch.linalg.qr(a - mean_a, mode="r").R / (len(a) - 1) ** 0.5
    root_b = torch.linalg.qr(b - mean_b, mode="r").R / (len(b) - 1) ** 0.5
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    # A distance of zero may come out as a tiny negative number.
    return max(0.0, float((mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross))


def randconv_features(images: Tensor) -> Tensor:
    """Return (N, F) float64 features of `images` (N, 1, H, W), F the same for any size from 16 pixels.

    Per scale: the means of the image over a 4x4 grid; and of two random 3x3 convolutions with ReLU the mean and the
    standard deviation over the image, and the means over a 2x2 grid, which tell where things are.
    """
    return torch.cat([_features_of(part.float().cpu()) for part in torch.split(images, 256)])


def _features_of(images: Tensor) -> Tensor:
    parts = []
    for scale, (first, second) in enumerate(_filters()):
        scaled = functional.avg_pool2d(images, 2**scale) if scale else images
        parts.append(functional.adaptive_avg_pool2d(scaled, 4).flatten(1))
        hidden = functional.relu(functional.conv2d(scaled, first, padding=1))
        for maps in (hidden, functional.relu(functional.conv2d(hidden, second, padding=1))):
            parts += [maps.mean(dim=(2, 3)), maps.std(dim=(2, 3)), functional.adaptive_avg_pool2d(maps, 2).flatten(1)]
    return torch.cat(parts, dim=1).double()


@functools.cache
def _filters() -> tuple[tuple[Tensor, Tensor], ...]:
    random = torch.Generator().manual_seed(FEATURES_SEED)

    def layer(inputs: int) -> Tensor:
        # He initialisation (arXiv 1502.01852): the variance of the features neither grows nor shrinks with depth.
        weights = torch.randn(CHANNELS, inputs, 3, 3, generator=random)
        return weights.mul(math.sqrt(2 / (9 * inputs)))

    return tuple((layer(1), layer(CHANNELS)) for _ in range(SCALES))


def _zscored_projection(reference: Tensor, d: int) -> Callable[[Tensor], Tensor]:
    """Make the map from images to d features, z-scored by `reference`."""
    features = randconv_features(reference)
    mean, variance = features.mean(0), features.var(0)
    scale = (variance + VARIANCE_FLOOR * variance.mean()).rsqrt()
    random = torch.Generator().manual_seed(FEATURES_SEED + d)
    # Orthonormal columns: each projected feature is a unit direction, and none is counted twice.
    directions = torch.linalg.qr(torch.randn(features.shape[1], d, generator=random, dtype=torch.float64)).Q

    def project(images: Tensor) -> Tensor:
        projected: Tensor = ((randconv_features(images) - mean) * scale) @ directions
        return projected

    return project
