"""Has a generator memorised images it was trained on? A nearest-neighbour test, calibrated on held-out real images.

Theory of operation. A generated image that is nearer to a training image than images of other patients ever are may be
memorised. How near that is depends on the data; so the same distance is taken from the held-out real images to the
training images, and its 1 % quantile is the limit. Two distances have to be below their limits at the same time:

- the distance to the nearest training image, root mean square over the pixels where the two overlap, the least over
  shifts of up to an eighth of the image and over its mirror image: a shifted copy is a copy;
- that distance as a share of the image's median distance to all training images. A blurred image is near to everything
  and a copy is near to one, so without this share a poor generator would seem to have memorised. The share has to be
  clearly below its limit: among noise all distances are nearly equal, and a trifle would make the difference.

All pairs are compared at 16 pixels; the nearest few of each image are compared once more at 64 pixels at most.

The generator is flagged if chance does not explain how many images are below the limits: if generated images were
exchangeable with held-out ones, the number below the k-th smallest of the held-out distances would have a negative
hypergeometric distribution, whatever the distances are. It is flagged, too, if at least one in a hundred is nearer
than half of the nearest held-out distance: with few held-out images chance explains a lot, but not that.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

COARSE, FINE = 16, 64
"""Pixels at which all pairs, and the nearest ones, are compared."""
COARSE_SHIFT = 2
"""The largest shift in pixels of the 16: an eighth of the image."""
CANDIDATES = 8
"""Training images per image that are compared at full size."""
MAX_JUDGED = 1000
"""Images of each set that are judged: the cost is their number times the training images."""
QUANTILE = 0.01
CLEARLY = 0.8
"""The share of the limit of the relative distance below which an image is clearly memorised. Copies with noise of a
twentieth of the range are at a half of the limit."""
UNLIKELY = 1e-3
"""Probability below which chance does not explain a result."""
FAR_NEARER = 0.5
"""The share of the nearest held-out distance below which no image of another patient is expected."""
FAR_NEARER_SHARE = 0.01
BATCH = 128


@dataclass(frozen=True, slots=True)
class Memorisation:
    """What the test found."""

    n: int
    """Generated images judged."""
    n_held_out: int
    """Real images that the limits come from."""
    copied_share: float
    """Share of the generated images below both limits; of held-out ones at most about 1 % are."""
    far_nearer_share: float
    """Share of the generated images that are nearer than half of the nearest held-out distance."""
    flagged: bool
    """Whether the test finds that the generator memorised training images."""


def find_copies(train: Tensor, held_out: Tensor, generated: Tensor) -> Memorisation:
    """Compare generated images with those trained on.

    Args:
        train: (T, 1, size, size) float32, all that the generator saw.
        held_out: (H, 1, size, size), real images of other patients.
        generated: (M, 1, size, size).
    """
    held_out, generated = held_out[:MAX_JUDGED], generated[:MAX_JUDGED]
    limit_rank = max(1, int(QUANTILE * len(held_out)))
    judged, calibrating = nearest(generated, train), nearest(held_out, train)
    limits = calibrating.kthvalue(limit_rank, dim=0).values * torch.tensor([1, CLEARLY], device=calibrating.device)
    n_copied = int((judged < limits).all(dim=1).sum())
    far_nearer = float((judged < FAR_NEARER * calibrating.min(dim=0).values).all(dim=1).double().mean())
    unlikely = chance_of(n_copied, len(generated), len(held_out), limit_rank) < UNLIKELY
    share = n_copied / len(generated)
    return Memorisation(len(generated), len(held_out), share, far_nearer, unlikely or far_nearer >= FAR_NEARER_SHARE)


def nearest(images: Tensor, train: Tensor) -> Tensor:
    """Return (N, 2): each image's distance to the nearest training image, and its share of the median distance."""
    mirrored = images.flip(3)
    coarse_train, fine_train = _shrunk(train, COARSE), _shrunk(train, FINE)
    found = []
    for start in range(0, len(images), BATCH):
        both = [part[start : start + BATCH] for part in (images, mirrored)]
        coarse = torch.stack([_coarse_distances(_shrunk(part, COARSE), coarse_train) for part in both])
        of_pair = coarse.amin(dim=0)
        candidates = of_pair.topk(min(CANDIDATES, len(train)), dim=1, largest=False).indices
        fine = torch.stack([_fine_distances(_shrunk(part, FINE), fine_train[candidates]) for part in both])
        distance = fine.amin(dim=(0, 2))
        found.append(torch.stack((distance, distance / of_pair.median(dim=1).values.clamp_min(1e-6)), dim=1))
    return torch.cat(found)


def chance_of(n_below: int, n: int, n_held_out: int, rank: int) -> float:
    """Return the probability that `n_below` or more of n values are below the rank-th smallest of n_held_out others.

    That is so when of the smallest n_below + rank - 1 of all values at most rank - 1 are held-out ones, and in an
    exchangeable order any so many of all are the smallest.
    """
    smallest = n_below + rank - 1
    ways = sum(math.comb(n_held_out, j) * math.comb(n, smallest - j) for j in range(min(rank, smallest + 1)))
    return ways / math.comb(n_held_out + n, smallest)


def _shrunk(images: Tensor, size: int) -> Tensor:
    """Return (N, h, w) with sides of at most `size` pixels."""
    if images.shape[-1] > size:
        images = functional.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return images[:, 0].float()


def _coarse_distances(images: Tensor, train: Tensor) -> Tensor:
    """Return (N, T) root mean square differences over the overlap, the least over shifts; both (…, h, w)."""
    side = images.shape[-1]
    least = torch.full((len(images), len(train)), torch.inf, device=images.device)
    for down in range(-COARSE_SHIFT, COARSE_SHIFT + 1):
        for right in range(-COARSE_SHIFT, COARSE_SHIFT + 1):
            here = images[:, max(down, 0) : side + min(down, 0), max(right, 0) : side + min(right, 0)].flatten(1)
            there = train[:, max(-down, 0) : side + min(-down, 0), max(-right, 0) : side + min(-right, 0)].flatten(1)
            torch.minimum(least, torch.cdist(here, there) / here.shape[1] ** 0.5, out=least)
    return least


def _fine_distances(images: Tensor, candidates: Tensor) -> Tensor:
    """Return (N, C) as above for images (N, h, w) and the candidates of each (N, C, h, w).

    The sum over the overlap of (g - t)^2 is that of g^2 plus that of t^2 less twice that of g t, and each of the three
    is a correlation, of g^2 with 1, of 1 with t^2, of g with t; so one inverse transform gives it for all shifts.
    """
    side = images.shape[-1]
    most = side * COARSE_SHIFT // COARSE
    padded = (side + most, side + most)
    # In float64: the difference of a copy is what is left of large numbers.
    images, candidates = images[:, None].double(), candidates.double()
    ones = torch.ones(1, 1, side, side, dtype=torch.float64, device=images.device)
    g, g2, t, t2, one = (
        torch.fft.rfft2(part, s=padded) for part in (images, images.square(), candidates, candidates.square(), ones)
    )
    sums = torch.fft.irfft2(g2.conj() * one + one.conj() * t2 - 2 * g.conj() * t, s=padded)
    counts = torch.fft.irfft2(one.conj() * one, s=padded)
    shifts = torch.arange(-most, most + 1, device=images.device)
    means = (sums / counts)[..., shifts[:, None], shifts]
    least: Tensor = means.amin(dim=(-2, -1)).clamp_min(0).sqrt().float()
    return least
