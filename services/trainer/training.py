"""The training of a generative adversarial network: losses, penalties, average, and the loop.

Theory of operation. The loss is relativistic (arXiv 1807.00734): the discriminator is asked how much more real a real
image is than a generated one, so the generator cannot win by serving one mode. The gradient penalties on real (R1)
and on generated images (R2) make the game converge locally; both are of R3GAN (arXiv 2501.05441, section 2). They
cost a second derivative, so they are taken at every fourth step, four times as strong (lazy regularisation, arXiv
1912.04958, 3.1).

Randomness is drawn from one generator per step, seeded by (seed, step): step 700 draws the same noise and the same
images whether the training came there in one go or was resumed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from services.trainer.config import TrainingConfig
from services.trainer.networks import Discriminator, Gan, build_gan_model

PENALTY_EVERY = 4
"""Discriminator steps from one gradient penalty to the next."""
EMA_RAMP = 0.1
"""The half-life of the average is at most this share of the images seen: the first weights are soon forgotten."""
GOLDEN = 0x9E3779B97F4A7C15
"""2**64 / golden ratio: spreads neighbouring steps over the seeds of the generators (Knuth, TAOCP 3, section 6.4)."""


HOPELESS_LOSS = 100.0
"""A mean loss above this means that one side tells all pairs apart with a certainty of 1 - exp(-100): no gradient leads
back from there."""


class Diverged(ArithmeticError):  # noqa: N818 - it states what became of the training
    """A loss is hopelessly large, or no longer a finite number."""


@dataclass(slots=True)
class Training:
    """A training between two steps: all that a checkpoint holds."""

    gan: Gan
    generator_optimiser: torch.optim.Adam
    discriminator_optimiser: torch.optim.Adam
    step: int = 0
    """Steps done, over all rounds."""
    images_seen: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """Means since the last report."""

    step: int
    generator_loss: float
    discriminator_loss: float
    margin: float
    """Mean of D(real) - D(generated): how far the discriminator tells them apart."""


def start(config: TrainingConfig, device: torch.device) -> Training:
    """Make a training at step 0."""
    gan = build_gan_model(config)
    for network in (gan.generator, gan.discriminator, gan.average):
        network.to(device)
    return Training(gan, _adam(gan.generator, config), _adam(gan.discriminator, config))


def state_of(training: Training) -> dict[str, Any]:
    """Return everything of a training as tensors and numbers, which `torch.load(weights_only=True)` reads."""
    return {
        "generator": training.gan.generator.state_dict(),
        "discriminator": training.gan.discriminator.state_dict(),
        "average": training.gan.average.state_dict(),
        "generator_optimiser": training.generator_optimiser.state_dict(),
        "discriminator_optimiser": training.discriminator_optimiser.state_dict(),
        "step": training.step,
        "images_seen": training.images_seen,
    }


def resume(config: TrainingConfig, state: dict[str, Any], device: torch.device) -> Training:
    """Make a training that goes on from `state`, under a config whose rates may have changed since."""
    training = start(config, device)
    training.gan.generator.load_state_dict(state["generator"])
    training.gan.discriminator.load_state_dict(state["discriminator"])
    training.gan.average.load_state_dict(state["average"])
    for name in ("generator_optimiser", "discriminator_optimiser"):
        optimiser: torch.optim.Adam = getattr(training, name)
        optimiser.load_state_dict(state[name])
        for group in optimiser.param_groups:  # The state brought the old rates along.
            group.update(lr=config.learning_rate, betas=(0.0, config.beta2))
    training.step, training.images_seen = state["step"], state["images_seen"]
    return training


def train_gan(
    training: Training,
    images: Tensor,
    config: TrainingConfig,
    report: Callable[[Progress], None] = lambda _: None,
    *,
    report_every: int = 50,
) -> list[Progress]:
    """Train for `config.steps` steps, in place.

    Args:
        training: where to go on.
        images: (N, 1, size, size) float32 in [-1, 1], on the networks' device.
        config: the parameters of this round.
        report: told at every `report_every` steps and at the end.
        report_every: steps.

    Returns:
        All that was reported.

    Raises:
        Diverged: a loss is out of range.
    """
    reports: list[Progress] = []
    sums = torch.zeros(3, device=images.device)
    summed = 0
    for done in range(1, config.steps + 1):
        sums += _step(training, images, config)
        summed += 1
        if summed == report_every or done == config.steps:
            generator_loss, discriminator_loss, margin = (sums / summed).tolist()
            if not max(generator_loss, discriminator_loss) <= HOPELESS_LOSS:  # Written so that NaN is caught, too.
                raise Diverged("a loss is out of range")
            reports.append(Progress(training.step, generator_loss, discriminator_loss, margin))
            report(reports[-1])
            sums.zero_()
            summed = 0
    return reports


def generate_images(generator: nn.Module, n_images: int, *, latent_dim: int, seed: int, device: torch.device) -> Tensor:
    """Return (n_images, 1, size, size) float32 in [-1, 1], on the CPU; the same seed gives the same noise."""
    noise = torch.randn(n_images, latent_dim, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return torch.cat([generator(part.to(device)).float().cpu() for part in torch.split(noise, 256)])


def relativistic_losses(real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses of discriminator and generator (R3GAN, arXiv 2501.05441, equation 2, f(t) = -softplus(-t)).

    L_D = E softplus(-(D(x) - D(G(z)))), L_G = E softplus(-(D(G(z)) - D(x))), over pairs of a real and a generated one.
    """
    margin = real_logits - fake_logits
    return functional.softplus(-margin).mean(), functional.softplus(margin).mean()


def gradient_penalty(discriminator: Discriminator, images: Tensor) -> Tensor:
    """Return E |grad_x D(x)|^2 at `images`: R1 on real, R2 on generated ones (arXiv 2501.05441, equations 3 and 4).

    The factor gamma / 2 is the caller's. The result can be differentiated again.
    """
    images = images.detach().requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
    return slope.square().sum(dim=(1, 2, 3)).mean()


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move the average: a <- decay a + (1 - decay) x, for weights and floating-point buffers; counters are copied."""
    for mean, value in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)


def decay_of(config: TrainingConfig, images_seen: int) -> float:
    """Return the average's decay per step: its half-life is `ema_images`, but less at the start of the training."""
    half_life = min(config.ema_images, EMA_RAMP * images_seen)
    return float(0.5 ** (config.batch_size / half_life)) if half_life > 0 else 0.0


def _adam(network: nn.Module, config: TrainingConfig) -> torch.optim.Adam:
    # No first moment: in a game the gradient turns, and momentum drives it in circles (arXiv 1802.10551).
    return torch.optim.Adam(network.parameters(), lr=config.learning_rate, betas=(0.0, config.beta2), foreach=True)


def _step(training: Training, images: Tensor, config: TrainingConfig) -> Tensor:
    """Update both networks once; returns (generator loss, discriminator loss, margin), detached."""
    gan, n = training.gan, config.batch_size
    seed = (config.seed + (training.step + 1) * GOLDEN) % 2**63
    random = torch.Generator().manual_seed(seed)
    device = images.device

    # The discriminator.
    real = images[torch.randint(len(images), (n,), generator=random).to(device)]
    noise = torch.randn(2, n, config.latent_dim, generator=random).to(device)
    fake = gan.generator(noise[0]).detach()
    gan.discriminator.requires_grad_(requires_grad=True)
    real_logits, fake_logits = gan.discriminator(torch.cat((real, fake))).split(n)
    discriminator_loss, _ = relativistic_losses(real_logits, fake_logits)
    penalised = discriminator_loss
    if training.step % PENALTY_EVERY == 0:
        r1_and_r2 = gradient_penalty(gan.discriminator, real) + gradient_penalty(gan.discriminator, fake)
        penalised = discriminator_loss + PENALTY_EVERY * config.gamma / 2 * r1_and_r2
    _descend(training.discriminator_optimiser, penalised)

    # The generator, against other real images than the discriminator has just seen.
    real = images[torch.randint(len(images), (n,), generator=random).to(device)]
    gan.discriminator.requires_grad_(requires_grad=False)
    fake = gan.generator(noise[1])
    with torch.no_grad():
        real_logits_again = gan.discriminator(real)
    _, generator_loss = relativistic_losses(real_logits_again, gan.discriminator(fake))
    _descend(training.generator_optimiser, generator_loss)

    # The average.
    training.step += 1
    training.images_seen += n
    update_average(gan.average, gan.generator, decay_of(config, training.images_seen))
    return torch.stack((generator_loss, discriminator_loss, (real_logits - fake_logits).mean())).detach()


def _descend(optimiser: torch.optim.Adam, loss: Tensor) -> None:
    optimiser.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    optimiser.step()
