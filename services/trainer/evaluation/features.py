"""The feature spaces in which images are compared, each with a name that stands beside every number.

`randconv-v1` needs no download: features of a fixed-seed, multi-scale random convolutional network, which see blur,
noise and missing modes (arXiv 2208.09218 compares random and trained ones). They are z-scored by all real images given
and, so that a covariance can be estimated, projected at random to d <= n / 2; the name includes d.

Any trained network can take its place, as a TorchScript or `torch.export` file that is known by its sha256. Its input
is that of the detectors of StyleGAN's metrics, (N, 3, size, size) uint8, which it normalises itself; it returns (N, d).
Its features are compared as they are. With `inception-2015-12-05.pt` the
distance is the FID of the literature and is called so; in any other space it is called FD.

Real and generated images go the same way: one fixed window ([-1, 1] of the dataset becomes 0 to 255), no normalisation
per image, and an antialiased resize, without which the distance depends on the library (arXiv 2104.11222).
Numbers of different spaces, or of another n, cannot be compared.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from shared.errors import Unprocessable

FEATURES_SEED = 20220818
CHANNELS = 16
"""Random filters per layer of each scale."""
SCALES = 3
"""The number of scales: full resolution, half, quarter."""
ANOTHER_SCALE = 10.0
"""A value this large means bytes or Hounsfield units; noise may lead a little out of [-1, 1]."""
MAX_D = 256
MIN_D = 4
VARIANCE_FLOOR = 1e-2
"""The share of the mean variance that is added to each feature's variance: otherwise a feature that is constant over
the reference (a corner that is always air) would turn rounding into infinite distance."""
DRAWS = 8
"""Sets drawn for each number, which is the mean over them."""
INCEPTION = "inception-2015-12-05.pt"
"""The TorchScript of Inception that StyleGAN's authors publish: FID is the distance in its features alone."""
INCEPTION_D = 2048
RANDOM_BATCH, EXTRACTOR_BATCH = 16, 32
"""Images at a time; if the random maps do not fit the processor's own cache, it takes twice as long."""


@dataclass(frozen=True, slots=True)
class Space:
    """A feature space in which images are compared."""

    name: str
    metric: str
    """`FD`, or `FID` in the features of Inception."""
    extract: Callable[[Tensor], Tensor]
    """The function from images (N, 1, H, W) in [-1, 1] to features (N, F) float64 on the CPU."""
    reduced: bool = False
    """Whether the features are z-scored and projected to d <= n / 2."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """Images as points of a space."""

    metric: str
    space: str
    """The name of the feature space, with its number of features d."""
    n: int
    """Images on each side of a comparison."""
    real: Tensor
    """(N, d) float64: the reference, held out of the training."""
    generated: Tensor
    other_real: Tensor | None
    """Real images of other patients; if None, the floor is taken between halves of `real`."""

    @property
    def d(self) -> int:
        """Return the number of features."""
        return self.real.shape[1]

    def draws(self, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield sets of n points: the reference, generated ones, and other real ones."""
        rng = np.random.default_rng(seed)
        for _ in range(DRAWS):
            order = rng.permutation(len(self.real))
            if self.other_real is None:
                others = self.real[order[self.n : 2 * self.n]]
            else:
                others = self.other_real[rng.permutation(len(self.other_real))[: self.n]]
            yield self.real[order[: self.n]], self.generated[rng.permutation(len(self.generated))[: self.n]], others


def embed(space: Space, real: Tensor, generated: Tensor, other_real: Tensor | None = None) -> Embedded:
    """Take images (N, 1, H, W) float32 in [-1, 1] into a space.

    Raises:
        ValueError: fewer than four real images, or fewer than two of the others; images that are not of that form, or
            differ in size; real ones that are all the same.
    """
    for images in (real, generated, real if other_real is None else other_real):
        _require_images(images, like=real)
    n = min(len(real) // 2 if other_real is None else min(len(real), len(other_real)), len(generated))
    if n < 2:  # noqa: PLR2004 - a covariance needs two
        raise ValueError("too few images to compare")
    of_real, of_generated = space.extract(real), space.extract(generated)
    of_other = None if other_real is None else space.extract(other_real)
    if space.reduced:
        d = MAX_D
        while d > max(n // 2, MIN_D):
            d //= 2
        project = _zscored_projection(of_real if of_other is None else torch.cat((of_real, of_other)), d)
        of_real, of_generated = project(of_real), project(of_generated)
        of_other = None if of_other is None else project(of_other)
    return Embedded(space.metric, f"{space.name}/d{of_real.shape[1]}", n, of_real, of_generated, of_other)


def _require_images(images: Tensor, *, like: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 1:  # noqa: PLR2004 - N, 1, H, W
        raise ValueError(f"images are (N, 1, H, W), not {tuple(images.shape)}")
    if images.shape[2:] != like.shape[2:]:
        raise ValueError(f"images of {tuple(images.shape[2:])} and {tuple(like.shape[2:])} cannot be compared")
    if not (images.abs() < ANOTHER_SCALE).all():  # NaN is not, either
        raise ValueError("images are in [-1, 1], all of them finite")


def _zscored_projection(reference: Tensor, d: int) -> Callable[[Tensor], Tensor]:
    """Make the map from features to d of them, z-scored by `reference`."""
    mean, variance = reference.mean(0), reference.var(0)
    if not variance.any():
        raise ValueError("the real images are all the same: there is nothing to compare with")
    scale = (variance + VARIANCE_FLOOR * variance.mean()).rsqrt()
    random = torch.Generator().manual_seed(FEATURES_SEED + d)
    # Orthonormal columns: each projected feature is a unit direction, and none is counted twice.
    directions = torch.linalg.qr(torch.randn(reference.shape[1], d, generator=random, dtype=torch.float64)).Q

    def project(features: Tensor) -> Tensor:
        projected: Tensor = ((features - mean) * scale) @ directions
        return projected

    return project


# Random convolutions.


def randconv_features(images: Tensor) -> Tensor:
    """Return (N, F) float64 features of `images` (N, 1, H, W), F the same for any size from 16 pixels.

    Per scale: the means of the image over a 4x4 grid; and of two random 3x3 convolutions with ReLU the mean and the
    standard deviation over the image, and the means over a 2x2 grid, which tell where things are.
    """
    return torch.cat([_features_of(part.float().cpu()) for part in torch.split(images, RANDOM_BATCH)])


def _features_of(images: Tensor) -> Tensor:
    parts = []
    for scale, (first, second) in enumerate(_filters()):
        scaled = functional.avg_pool2d(images, 2**scale) if scale else images
        parts.append(functional.adaptive_avg_pool2d(scaled, 4).flatten(1))
        hidden = functional.relu(functional.conv2d(scaled, first, padding=1))
        for maps in (hidden, functional.relu(functional.conv2d(hidden, second, padding=1))):
            quarters = functional.adaptive_avg_pool2d(maps, 2).flatten(1)
            mean = maps.mean(dim=(2, 3))
            # By the mean of the squares: Tensor.std takes twice as long as both convolutions.
            deviation = (maps.square().mean(dim=(2, 3)) - mean.square()).clamp_min(0).sqrt()
            parts += [mean, deviation, quarters]
    return torch.cat(parts, dim=1).double()


@functools.cache
def _filters() -> tuple[tuple[Tensor, Tensor], ...]:
    random = torch.Generator().manual_seed(FEATURES_SEED)

    def layer(inputs: int) -> Tensor:
        # He initialisation (arXiv 1502.01852): the variance of the features neither grows nor shrinks with depth.
        weights = torch.randn(CHANNELS, inputs, 3, 3, generator=random)
        return weights.mul(math.sqrt(2 / (9 * inputs)))

    return tuple((layer(1), layer(CHANNELS)) for _ in range(SCALES))


RANDCONV = Space("randconv-v1", "FD", randconv_features, reduced=True)


# A trained network.


def load_extractor(path: Path, sha256: str, *, size: int, device: torch.device) -> Space:
    """Make the space of a trained network: TorchScript, or `torch.export` if the file's name ends in `.pt2`.

    The hash is checked before the file is opened as a program, because loading it may run code in it.

    Raises:
        Unprocessable: `extractor_changed`, the file has another hash; `invalid_extractor`, it cannot be loaded.
    """
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise Unprocessable("extractor_changed")
    try:
        if path.suffix == ".pt2":
            network: Callable[..., Tensor] = torch.export.load(path).module().to(device)
        else:
            network = torch.jit.load(path, map_location=device).eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, OSError):
        raise Unprocessable("invalid_extractor") from None
    is_inception = path.name == INCEPTION
    if is_inception:  # Without the flag it returns the classes of ImageNet.
        network = functools.partial(network, return_features=True)

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        parts = [
            network(_as_bytes(part, size).to(device)).flatten(1).double().cpu()
            for part in torch.split(images, EXTRACTOR_BATCH)
        ]
        features = torch.cat(parts)
        if not features.isfinite().all() or (is_inception and features.shape[1] != INCEPTION_D):
            raise Unprocessable("invalid_extractor")
        return features

    if is_inception:
        return Space(path.stem, "FID", extract)
    return Space(f"{path.stem}@{sha256[:12]}", "FD", extract)


def _as_bytes(images: Tensor, size: int) -> Tensor:
    """Return (N, 3, size, size) uint8 of (N, 1, H, W) in [-1, 1]: bicubic with antialiasing, as Pillow resizes."""
    if images.shape[2:] != (size, size):
        images = functional.interpolate(
            images.float(), (size, size), mode="bicubic", antialias=True, align_corners=False
        )
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)
