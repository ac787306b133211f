"""Random, differentiable changes of the images that the discriminator sees, real and generated alike.

With few images the discriminator learns them by heart, and its gradients tell the generator nothing any more. If
it never sees an image as it is, it cannot (arXiv 2006.10738, arXiv 2006.06676). Each change is made with a
probability below one, so that the generator finds out what the images look like without it; below about 0.8 the
changes were never seen to leak into generated images (arXiv 2006.06676, section 2.2 and figure 4).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from services.trainer.config import MAX_AUGMENTATION

SHIFT = 0.125
"""The largest shift in each direction, as a share of the image's side; in whole pixels, which keep the image sharp."""
ANGLE = math.radians(10)
OCTAVES = 0.2
"""The scale is at most 2 to this power, and at least 2 to minus this."""
BRIGHTNESS = 0.2
"""The largest value that is added to or taken from all pixels; the images' range is 2."""
CONTRAST = 0.5
"""The contrast is at most 2 to this power, and at least 2 to minus this."""
DRAWS = 10
"""Uniform numbers that one image needs: four to choose the changes by, six amounts."""
WARMED_UP_IMAGES = 50_000
"""Images over which the probability goes from 0 to 1 if every pair is told apart."""
TARGET = 0.6
"""The target of the pairs' mean sign, see `adapted`, as in arXiv 2006.06676, section 3."""


def augment(images: Tensor, draws: Tensor, probability: Tensor) -> Tensor:
    """Shift, turn and scale, lighten and contrast images, each with a probability.

    Args:
        images: (N, 1, H, W), H = W.
        draws: (N, DRAWS), uniform in [0, 1).
        probability: (), the probability of each of the four changes.

    Returns:
        (N, 1, H, W). It can be differentiated by the images, once.
    """
    shifted, turned, lightened, contrasted = (draws[:, :4] < probability).unbind(1)
    right, down, angle, octaves, brightness, contrast = (2 * draws[:, 4:] - 1).unbind(1)
    size = images.shape[-1]

    # Where a pixel of the result comes from, in coordinates from -1 to 1.
    still = torch.zeros_like(right)
    across, along = (torch.where(shifted, (SHIFT * size * much).round() * 2 / size, still) for much in (right, down))
    angle, scale = torch.where(turned, ANGLE * angle, still), torch.where(turned, OCTAVES * octaves, still).exp2()
    cos, sin = scale * angle.cos(), scale * angle.sin()
    places = torch.stack((cos, -sin, across, sin, cos, along), dim=1).view(-1, 2, 3)
    grid = functional.affine_grid(places, list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    # Resampling at the pixels themselves rounds, too.
    images = torch.where((shifted | turned)[:, None, None, None], moved, images)

    factor = torch.where(contrasted, CONTRAST * contrast, still).exp2()[:, None, None, None]
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = torch.where(contrasted[:, None, None, None], mean + factor * (images - mean), images)
    return images + torch.where(lightened, BRIGHTNESS * brightness, still)[:, None, None, None]


def adapted(probability: Tensor, told_apart: Tensor, n_pairs: int, least: float) -> Tensor:
    """Return the probability of the next step: it rises if the discriminator tells too many pairs apart.

    After r_t of arXiv 2006.06676, section 3. That is the mean sign of D(real), which means nothing with a relativistic
    loss, because it leaves the zero of D open; the sign of D(real) - D(generated) takes its place.

    Args:
        probability: (), the probability of this step.
        told_apart: (), mean sign of D(real) - D(generated) over this step's pairs.
        n_pairs: number of pairs of this step.
        least: the probability never falls below it.
    """
    gained = (told_apart - TARGET) / (1 - TARGET) * n_pairs / WARMED_UP_IMAGES
    return (probability + gained).clamp(least, MAX_AUGMENTATION)
