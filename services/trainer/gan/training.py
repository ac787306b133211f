"""The training of a generative adversarial network: its state, and the loop.

All randomness of an optimiser step is drawn on the CPU from a generator of its own, seeded by (seed, step), and all
that a step leaves behind is in `Training`. So step 700 does the same whether the training came there in one go or was
interrupted and resumed anywhere on the way. The step itself is in `services/trainer/gan/reference_step.py`, and once
more, for GPUs, in `services/trainer/gan/compiled_step.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from services.trainer.config import TrainingConfig
from services.trainer.distributed import average_gradients
from services.trainer.gan.compiled_step import CUDA_GRAPHS, fast_step
from services.trainer.gan.networks import build_gan_model
from services.trainer.gan.reference_step import Training, reference_step

HOPELESS_LOSS = 100.0
"""A mean loss above this means that one side tells all pairs apart with a certainty of 1 - exp(-100): no gradient leads
back from there."""


class Diverged(ArithmeticError):  # noqa: N818 - it states what became of the training
    """A loss is hopelessly large, or no longer a finite number."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A report of a training: means since the last report."""

    step: int
    generator_loss: float
    discriminator_loss: float
    margin: float
    """Mean of D(real) - D(generated): how far the discriminator tells them apart."""
    told_apart: float
    """Mean sign of D(real) - D(generated): 1 if the discriminator tells all pairs apart, 0 if it guesses."""
    augmentation: float
    """Probability of each change of an image, at the time of the report."""


def start(config: TrainingConfig, device: torch.device, *, n_classes: int = 0) -> Training:
    """Make a training at step 0; `n_classes` is 0 if the data has none."""
    gan = build_gan_model(config, n_classes)
    for network in (gan.generator, gan.discriminator, gan.average):
        network.to(device)
    return Training(
        gan,
        _adam(gan.generator, config),
        _adam(gan.discriminator, config),
        augmentation=torch.tensor(config.augmentation, device=device),
        sums=torch.zeros(4, device=device),
    )


def state_of(training: Training) -> dict[str, Any]:
    """Return everything of a training as tensors and numbers, which `torch.load(weights_only=True)` reads.

    The tensors are the training's own: the next step changes them.
    """
    return {
        "n_classes": training.gan.generator.n_classes,
        "generator": training.gan.generator.state_dict(),
        "discriminator": training.gan.discriminator.state_dict(),
        "average": training.gan.average.state_dict(),
        "generator_optimiser": training.generator_optimiser.state_dict(),
        "discriminator_optimiser": training.discriminator_optimiser.state_dict(),
        "augmentation": training.augmentation,
        "sums": training.sums,
        "summed": training.summed,
        "step": training.step,
        "images_seen": training.images_seen,
    }


def resume(config: TrainingConfig, state: dict[str, Any], device: torch.device) -> Training:
    """Make a training that goes on from `state`, under a config whose rates may have changed since."""
    training = start(config, device, n_classes=state["n_classes"])
    training.gan.generator.load_state_dict(state["generator"])
    training.gan.discriminator.load_state_dict(state["discriminator"])
    training.gan.average.load_state_dict(state["average"])
    for name in ("generator_optimiser", "discriminator_optimiser"):
        optimiser: torch.optim.Adam = getattr(training, name)
        # Rates are the config's, and how the optimiser computes is the device's: neither is the checkpoint's.
        groups = optimiser.state_dict()["param_groups"]
        optimiser.load_state_dict({"state": state[name]["state"], "param_groups": groups})
    training.augmentation.copy_(state["augmentation"])
    training.sums.copy_(state["sums"])
    training.summed, training.step, training.images_seen = state["summed"], state["step"], state["images_seen"]
    return training


def train_gan(
    training: Training,
    images: Tensor,
    config: TrainingConfig,
    report: Callable[[Progress], None] = lambda _: None,
    *,
    labels: Tensor | None = None,
    until: int | None = None,
    report_every: int = 50,
    after_step: Callable[[Training], None] = lambda _: None,
) -> list[Progress]:
    """Train, in place, until the step `until`.

    Args:
        training: the training to go on with.
        images: (N, 1, size, size) float32 in [-1, 1], on the networks' device.
        config: the parameters of this round.
        report: called with a report every `report_every` steps, and at the end.
        labels: (N,) int64, the images' classes, if the networks have any; on the same device.
        until: the step to stop at, counted over all rounds; None is `config.steps` from here. A round that is
            interrupted and resumed with the same `until` ends as if it had not been.
        report_every: number of steps from one report to the next.
        after_step: called after every step, where the caller may store `state_of(training)`.

    Returns:
        All reports.

    Raises:
        Diverged: a loss is out of range.
    """
    until = training.step + config.steps if until is None else until
    step = fast_step(CUDA_GRAPHS) if images.is_cuda else reference_step
    reports: list[Progress] = []
    while training.step < until:
        training.sums += step(training, images, config, labels)
        training.summed += 1
        if training.summed >= report_every or training.step == until:
            reports.append(_progress_of(training))
            report(reports[-1])
        after_step(training)
    return reports


def generate_images(
    generator: nn.Module,
    n_images: int,
    *,
    latent_dim: int,
    seed: int,
    device: torch.device,
    labels: Tensor | None = None,
) -> Tensor:
    """Return (n_images, 1, size, size) float32 in [-1, 1], on the CPU; the same seed gives the same noise.

    `labels`, (n_images,) int64, are the classes of the images, if the generator has any.
    """
    noise = torch.randn(n_images, latent_dim, generator=torch.Generator().manual_seed(seed))
    classes = [None] * n_images if labels is None else torch.split(labels.to(device), 256)
    with torch.no_grad():
        return torch.cat(
            [
                generator(part.to(device), of_part).float().cpu()
                for part, of_part in zip(torch.split(noise, 256), classes, strict=False)
            ]
        )


def _adam(network: nn.Module, config: TrainingConfig) -> torch.optim.Adam:
    # No first moment: in a game the gradient turns, and momentum drives it in circles (arXiv 1802.10551).
    adam = torch.optim.Adam(network.parameters(), lr=config.learning_rate, betas=(0.0, config.beta2), fused=True)
    adam.register_step_pre_hook(average_gradients)
    return adam


def _progress_of(training: Training) -> Progress:
    """Take the means since the last report, and begin anew. Raises `Diverged`."""
    generator_loss, discriminator_loss, margin, told_apart = (training.sums / training.summed).tolist()
    if not max(generator_loss, discriminator_loss) <= HOPELESS_LOSS:  # Written so that NaN is caught, too.
        raise Diverged("a loss is out of range")
    training.sums.zero_()
    training.summed = 0
    augmentation = training.augmentation.item()
    return Progress(training.step, generator_loss, discriminator_loss, margin, told_apart, augmentation)
