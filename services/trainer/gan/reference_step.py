"""One optimiser step of the training, written plainly, and its parts. `compiled_step.py` computes the same.

Theory of operation. The loss is relativistic (arXiv 1807.00734): the discriminator is asked how much more real a real
image is than a generated one, so the generator cannot win by serving one mode. The gradient penalties on real (R1)
and on generated images (R2) make the game converge locally; both are of R3GAN (arXiv 2501.05441, section 2). They
cost a second derivative, so they are taken at every fourth step, four times as strong (lazy regularisation, arXiv
1912.04958, 3.1). They are slopes at the images as the discriminator sees them, changed by the augmentation.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import get_ema_multi_avg_fn

from services.trainer.config import TrainingConfig
from services.trainer.distributed import average, share
from services.trainer.gan.augmentation import DRAWS, adapted, augment
from services.trainer.gan.networks import Gan

PENALTY_EVERY = 4
"""Discriminator steps from one gradient penalty to the next."""
EMA_RAMP = 0.1
"""The half-life of the average is at most this share of the images seen: the first weights are soon forgotten."""
FINAL_RATE, FINAL_GAMMA = 0.2, 0.1
"""Shares of learning rate and gamma that are left when both are annealed, as in arXiv 2501.05441 by a cosine."""
GOLDEN = 0x9E3779B97F4A7C15
"""2**64 / golden ratio: spreads neighbouring steps over the seeds of the generators (Knuth, TAOCP 3, section 6.4)."""


@dataclass(slots=True)
class Training:
    """A training between two steps: all that a checkpoint holds."""

    gan: Gan
    generator_optimiser: torch.optim.Adam
    discriminator_optimiser: torch.optim.Adam
    augmentation: Tensor
    """(), the probability of each change of the next step's images."""
    sums: Tensor
    """(4,), the sums since the last report of the numbers whose means `Progress` holds."""
    summed: int = 0
    """Number of steps since the last report."""
    step: int = 0
    """Number of steps done, over all rounds."""
    images_seen: int = 0


def relativistic_losses(real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses of discriminator and generator (R3GAN, arXiv 2501.05441, equation 2, f(t) = -softplus(-t)).

    L_D = E softplus(-(D(x) - D(G(z)))), L_G = E softplus(-(D(G(z)) - D(x))), over pairs of a real and a generated one.
    """
    margin = real_logits - fake_logits
    return functional.softplus(-margin).mean(), functional.softplus(margin).mean()


def squared_slopes(logits: Tensor, images: Tensor) -> Tensor:
    """Return |grad_x D(x)|^2 (N,) at `images`: R1 on real, R2 on generated ones (arXiv 2501.05441, equations 3 and 4).

    The mean and the factor gamma / 2 are the caller's. The result can be differentiated again.
    """
    (slopes,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return slopes.square().sum(dim=(1, 2, 3))


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move the average: a <- decay a + (1 - decay) x, for weights and floating-point buffers; counters are copied."""
    pairs = list(zip(average.state_dict().values(), network.state_dict().values(), strict=True))
    means, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
    get_ema_multi_avg_fn(decay)(means, values, None)  # type: ignore[no-untyped-call]
    for count, value in pairs:
        if not count.is_floating_point():
            count.copy_(value)


def decay_of(config: TrainingConfig, images_seen: int) -> float:
    """Return the average's decay per step: its half-life is `ema_images`, but less at the start of the training."""
    half_life = min(config.ema_images, EMA_RAMP * images_seen)
    return float(0.5 ** (config.batch_size / half_life)) if half_life > 0 else 0.0


def annealed(config: TrainingConfig, images_seen: int) -> tuple[float, float]:
    """Return learning rate and gamma: half a cosine from the config's values to shares of them, which then stay.

    They depend on the images seen over all rounds, so rounds may be of any number and length.
    """
    gone = min(1.0, images_seen / config.anneal_images) if config.anneal_images else 1.0
    left = (1 + math.cos(math.pi * gone)) / 2
    rate = config.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * left)
    return rate, config.gamma * (FINAL_GAMMA + (1 - FINAL_GAMMA) * left)


class Batch(NamedTuple):
    """The images, classes and draws that train one of the two networks in one step."""

    real: Tensor
    """(n, 1, size, size), real images."""
    classes: Tensor | None
    """(n,) int64, the classes of the real images and of those to be generated; None if there are no classes."""
    noise: Tensor
    """(n, latent_dim), the noise to generate images from."""
    changes: Tensor
    """(n, DRAWS), the draws for `augment`: a real image and its generated partner are changed alike."""


def draw(config: TrainingConfig, step: int, images: Tensor, labels: Tensor | None) -> tuple[Batch, Batch]:
    """Draw the batches of the discriminator and the generator for step number `step`.

    Numbers are drawn on the CPU, whatever the device and the type of the images. If several processes train, each
    takes its share of what all of them draw.
    """
    random = torch.Generator().manual_seed((config.seed + (step + 1) * GOLDEN) % 2**63)
    n = config.batch_size
    drawn: tuple[Tensor, ...] = (
        torch.randint(len(images), (2, n), generator=random),
        torch.rand(2, n, 1, 1, 1, generator=random) < 0.5,  # noqa: PLR2004 - every other image is mirrored
        torch.randn(2, n, config.latent_dim, generator=random),
        torch.rand(2, n, DRAWS, generator=random),
    )
    drawn = tuple(share(part) for part in drawn)
    if images.is_cuda:  # From pinned memory the copy does not wait for the step before.
        drawn = tuple(part.pin_memory() for part in drawn)
    chosen, mirrored, noise, changes = (part.to(images.device, non_blocking=True) for part in drawn)
    real = images[chosen]
    if config.symmetric:
        real = torch.where(mirrored, real.flip(-1), real)
    classes = (None, None) if labels is None else labels[chosen]
    noise, changes = noise.to(images.dtype), changes.to(images.dtype)
    return Batch(real[0], classes[0], noise[0], changes[0]), Batch(real[1], classes[1], noise[1], changes[1])


def reference_step(training: Training, images: Tensor, config: TrainingConfig, labels: Tensor | None) -> Tensor:
    """Update both networks once; returns (4,): both losses, mean and mean sign of the margin, detached."""
    gan = training.gan
    for_discriminator, for_generator = draw(config, training.step, images, labels)
    rate, gamma = annealed(config, training.images_seen)

    # The discriminator.
    real, classes, noise, changes = for_discriminator
    both = None if classes is None else classes.repeat(2)
    fake = gan.generator(noise, classes).detach()
    seen = augment(torch.cat((real, fake)), changes.repeat(2, 1), training.augmentation)
    gan.discriminator.requires_grad_(requires_grad=True)
    penalised = training.step % PENALTY_EVERY == 0
    logits = gan.discriminator(seen.requires_grad_(penalised), both)
    real_logits, fake_logits = logits.chunk(2)
    discriminator_loss, _ = relativistic_losses(real_logits, fake_logits)
    loss = discriminator_loss
    if penalised:
        r1, r2 = squared_slopes(logits, seen).chunk(2)
        loss = loss + PENALTY_EVERY * gamma / 2 * (r1.mean() + r2.mean())
    _descend(training.discriminator_optimiser, loss, rate)

    # The generator, against other real images than the discriminator has just seen.
    real, classes, noise, changes = for_generator
    fake = gan.generator(noise, classes)
    gan.discriminator.requires_grad_(requires_grad=False)
    with torch.no_grad():
        real_logits_again = gan.discriminator(augment(real, changes, training.augmentation), classes)
    fake_logits_again = gan.discriminator(augment(fake, changes, training.augmentation), classes)
    _, generator_loss = relativistic_losses(real_logits_again, fake_logits_again)
    _descend(training.generator_optimiser, generator_loss, rate)

    return finish(training, config, generator_loss.detach(), discriminator_loss.detach(), real_logits - fake_logits)


@torch.no_grad()
def finish(
    training: Training, config: TrainingConfig, generator_loss: Tensor, discriminator_loss: Tensor, margins: Tensor
) -> Tensor:
    """Count the step, move the average and adapt the augmentation; returns the numbers that a step returns."""
    numbers = torch.stack((generator_loss, discriminator_loss, margins.mean(), margins.sign().mean()))
    running_statistics = [buffer for buffer in training.gan.generator.buffers() if buffer.is_floating_point()]
    average([numbers, *running_statistics])
    training.step += 1
    training.images_seen += config.batch_size
    update_average(training.gan.average, training.gan.generator, decay_of(config, training.images_seen))
    training.augmentation.copy_(adapted(training.augmentation, numbers[3], config.batch_size, config.augmentation))
    return numbers


def _descend(optimiser: torch.optim.Adam, loss: Tensor, rate: float) -> None:
    optimiser.param_groups[0]["lr"] = rate
    optimiser.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    optimiser.step()
