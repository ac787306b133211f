"""The Fréchet distance between real and generated images, in a named feature space, beside its floor.

Theory of operation. FD is biased upwards when few images are compared, the more so the more features there are, so a
bare number means nothing. Here it always comes with its floor: the distance between two disjoint sets of real images,
of the same n, in the same space, to the same reference. `relative_fd = distance / floor` is 1 when the generated
images are as near to unseen real ones as other real images are, and the bias of both sides is the same one.

Which real images make the floor matters: slices of one patient resemble each other, so two halves of the same
patients' slices are nearer than any new patient can be. With `other_real` (other patients than `real`: the training
part) the floor is the distance from those to `real`; without it, between two halves of `real`.
"""

import contextlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from services.trainer.evaluation.features import RANDCONV, Embedded, Space, embed

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Distance:
    """How far generated images are from real ones."""

    metric: str
    space: str
    n: int
    """Images on each side of the comparison."""
    d: int
    """Number of features."""
    distance: float
    floor: float
    relative_fd: float
    warnings: tuple[str, ...] = ()
    """Doubts about the numbers; `few_images` if there are more features than n / 2."""


def calculate_fid(
    real: Tensor, generated: Tensor, other_real: Tensor | None = None, *, seed: int = 0, space: Space = RANDCONV
) -> Distance:
    """Compare generated images with held-out real ones.

    Args:
        real: (N, 1, H, W) float32 in [-1, 1], the reference, kept out of the training.
        generated: (M, 1, H, W), prepared as `real` was; more than n images make the mean steadier.
        other_real: (K, 1, H, W), real images of other patients, for the floor; None takes halves of `real`.
        seed: seed of the draws.
        space: the feature space; the result names it, and is an FID in that of Inception alone.

    Returns:
        The distance beside its floor.

    Raises:
        ValueError: as `embed`.
    """
    return distance_in(embed(space, real, generated, other_real), seed=seed)


def distance_in(embedded: Embedded, *, seed: int = 0) -> Distance:
    """Compare images that are points of a space already."""
    distances, floors = [], []
    for reference, generated, others in embedded.draws(seed):
        distances.append(frechet_distance(reference, generated))
        floors.append(frechet_distance(reference, others))
    distance, floor = float(np.mean(distances)), float(np.mean(floors))
    few = ("few_images",) if embedded.d > embedded.n / 2 else ()
    relative = distance / max(floor, 1e-12)
    return Distance(embedded.metric, embedded.space, embedded.n, embedded.d, distance, floor, relative, few)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) for features (N, d) and (M, d), in float64."""
    x, y = a.double().numpy(), b.double().numpy()
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    root_x, root_y = x - mean_x, y - mean_y
    root_x /= (len(x) - 1) ** 0.5
    root_y /= (len(y) - 1) ** 0.5
    traces = np.vdot(root_x, root_x) + np.vdot(root_y, root_y)
    distance = np.square(mean_x - mean_y).sum() + traces - 2 * _trace_of_root(root_x, root_y)
    # A distance of zero may come out as a tiny negative number.
    return max(0.0, float(distance))


def _trace_of_root(a: Matrix, b: Matrix) -> float:
    """Return tr (C_a C_b)^(1/2) of C_a = a^T a and C_b = b^T b, a (N, d) and b (M, d).

    The trace is the sum of the square roots of the eigenvalues of C_a C_b. Those that are not zero belong to other
    matrices as well: to (a b^T)(a b^T)^T, so that they are the squares of the singular values of a b^T; and to
    L^T C_b L, symmetric, where C_a = L L^T. The first is small where there are fewer images than features, the second
    is the cheapest elsewhere; neither needs the root of a matrix. NumPy, because it computes a^T a as what it is,
    symmetric.
    """
    if min(len(a), len(b)) >= a.shape[1]:
        with contextlib.suppress(np.linalg.LinAlgError):
            return trace_by_cholesky(a.T @ a, b.T @ b)
        # The triangles of QR decompositions are roots of the covariances, too, and lose no digits if one is singular.
        a, b = (np.asarray(np.linalg.qr(part, mode="r")) for part in (a, b))
    return float(np.linalg.svd(a @ b.T, compute_uv=False).sum())


def trace_by_cholesky(covariance_a: Matrix, covariance_b: Matrix) -> float:
    """Return tr (C_a C_b)^(1/2) of two (d, d) covariances.

    Raises:
        numpy.linalg.LinAlgError: the first is not positive definite.
    """
    lower = np.linalg.cholesky(covariance_a)
    eigenvalues = np.linalg.eigvalsh(lower.T @ covariance_b @ lower)
    return float(np.sqrt(eigenvalues.clip(0)).sum())
