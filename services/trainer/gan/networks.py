"""The generator and the discriminator: plain convolutions, 16 to 256 pixels, by doubling, with classes or without.

BatchNorm in the generator buys the speed that a residual network without norm lacks on small budgets; the discriminator
has no norm, because R1 and R2 are gradients with respect to each image, and a norm over the batch would mix them.

With classes the generator is given an embedding of the class beside the noise, and the discriminator a projection on
one (Miyato and Koyama, arXiv 1802.05637, equation 3).
"""

import copy
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from services.trainer.config import TrainingConfig

COARSEST = 4
"""Pixels of the smallest feature map."""
MAX_WIDENING = 4
"""The widest layers have this many times `width` channels."""
LEAK = 0.2
"""Slope of LeakyReLU below zero, as in DCGAN (arXiv 1511.06434)."""


class Generator(nn.Module):
    """z (N, latent_dim) ~ N(0, I) and labels (N,) int64 -> images (N, 1, size, size) in [-1, 1]."""

    def __init__(self, config: TrainingConfig, n_classes: int = 0) -> None:
        """Make 4x4 -> [upsample, conv, BatchNorm, ReLU] per doubling -> conv -> tanh."""
        super().__init__()
        widths = _widths(config)[::-1]
        self.latent_dim, self.n_classes = config.latent_dim, n_classes
        # The embedding is drawn from N(0, I), as z is. Without classes there is none, and no column beside z.
        self.classes = nn.Embedding(n_classes, config.latent_dim) if n_classes else None
        inputs = 2 * config.latent_dim if n_classes else config.latent_dim
        self.start = nn.Sequential(
            nn.Linear(inputs, widths[0] * COARSEST**2, bias=False),
            nn.Unflatten(1, (widths[0], COARSEST, COARSEST)),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Upsample(scale_factor=2, mode="nearest"),
                    nn.Conv2d(wider, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                )
                for wider, width in itertools.pairwise(widths)
            )
        )
        self.end = nn.Sequential(nn.Conv2d(widths[-1], 1, 3, padding=1), nn.Tanh())

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return one image per row of `z`, of the classes that `labels` gives if there are any."""
        if self.classes is not None:
            z = torch.cat((z, self.classes(labels)), dim=1)
        images: Tensor = self.end(self.blocks(self.start(z)))
        return images.to(z.dtype)


class Discriminator(nn.Module):
    """images (N, 1, size, size) in [-1, 1] and labels (N,) int64 -> logits (N,); higher is more real."""

    def __init__(self, config: TrainingConfig, n_classes: int = 0) -> None:
        """Make the generator's mirror, with stride 2."""
        super().__init__()
        widths = _widths(config)
        features = widths[-1] * COARSEST**2
        self.start = nn.Sequential(nn.Conv2d(1, widths[0], 3, padding=1), nn.LeakyReLU(LEAK))
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(width, wider, 4, stride=2, padding=1), nn.LeakyReLU(LEAK))
                for width, wider in itertools.pairwise(widths)
            ),
            nn.Flatten(),
        )
        self.end = nn.Linear(features, 1)
        self.classes = nn.Embedding(n_classes, features) if n_classes else None
        if self.classes is not None:  # Classes are told apart when the images are: the projection starts at nothing.
            nn.init.zeros_(self.classes.weight)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return one logit per image: psi(phi(x)) + <embedding of the class, phi(x)>."""
        features = self.blocks(self.start(images))
        with torch.autocast(images.device.type, enabled=False):  # A difference of logits needs all their digits.
            features = features.to(self.end.weight.dtype)
            logits: Tensor = self.end(features).squeeze(1)
            if self.classes is not None:
                logits = logits + (self.classes(labels) * features).sum(dim=1)
        return logits


@dataclass(frozen=True, slots=True)
class Gan:
    """The networks of one training; `average` is the exponential moving average of `generator`, and what is used."""

    generator: Generator
    discriminator: Discriminator
    average: Generator


def build_gan_model(config: TrainingConfig, n_classes: int = 0) -> Gan:
    """Make the networks with weights drawn from the config's seed; torch's global random state is left as it was.

    Args:
        config: size and width.
        n_classes: number of classes of the data; 0 if it has none.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        generator, discriminator = Generator(config, n_classes), Discriminator(config, n_classes)
    for parameter in (*generator.parameters(), *discriminator.parameters()):
        if parameter.dim() == 4:  # noqa: PLR2004 - of a convolution
            parameter.data = _channels_last(parameter.data)
    average = copy.deepcopy(generator).eval().requires_grad_(requires_grad=False)
    return Gan(generator, discriminator, average)


def _channels_last(weight: Tensor) -> Tensor:
    """Return (K, C, H, W) weights with the channels last in memory: convolutions keep to it, and are faster.

    The strides are given one by one: weights of one channel are in both orders at once, and torch takes the other.
    """
    _, channels, rows, columns = weight.shape
    weight = weight.contiguous(memory_format=torch.channels_last)
    return weight.as_strided(weight.shape, (channels * rows * columns, 1, channels * columns, channels))


def _widths(config: TrainingConfig) -> list[int]:
    """Return the number of channels at each resolution, from the finest to 4x4."""
    halvings = (config.image_size // COARSEST).bit_length() - 1
    return [config.width * min(2**level, MAX_WIDENING) for level in range(halvings + 1)]
