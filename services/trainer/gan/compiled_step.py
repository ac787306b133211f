"""One optimiser step of the training, made fast for GPUs. It computes what `reference_step` does, from the same draws.

Two compiled functions give the gradients of the two networks; on CUDA each is one graph, replayed without a launch per
operation. `torch.func.grad` takes the slopes of the penalties inside of them, because the derivative of a compiled
function cannot be differentiated again. The optimiser and the average stay outside: they are one launch each.

Forward and backward run in bfloat16 in steps without a penalty; the logits, the losses, the augmentation and all steps
with a penalty are in float32, whose range and digits the squared slopes need.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from services.trainer.config import TrainingConfig
from services.trainer.gan.augmentation import augment
from services.trainer.gan.networks import Discriminator, Gan
from services.trainer.gan.reference_step import (
    PENALTY_EVERY,
    Batch,
    Training,
    annealed,
    draw,
    finish,
    relativistic_losses,
)

Named = dict[str, Tensor]
Step = Callable[[Training, Tensor, TrainingConfig, Tensor | None], Tensor]
CUDA_GRAPHS: Mapping[str, Any] = {"mode": "reduce-overhead"}


def fast_step(options: Mapping[str, Any]) -> Step:
    """Return the step; `options` are those of `torch.compile`, which compiles when the first steps are taken."""
    discriminate = torch.compile(discriminator_gradients, **options)
    generate = torch.compile(generator_gradients, **options)

    @torch.no_grad()
    def step(training: Training, images: Tensor, config: TrainingConfig, labels: Tensor | None) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        gan, strength = training.gan, training.augmentation
        for_discriminator, for_generator = draw(config, training.step, images, labels)
        rate, gamma = annealed(config, training.images_seen)

        # The discriminator. A tensor for the weight: a number that changes would be compiled anew.
        weight = None
        if training.step % PENALTY_EVERY == 0:
            weight = torch.full((), PENALTY_EVERY * gamma / 2, dtype=images.dtype, device=images.device)
        gradients, discriminator_loss, margins = discriminate(gan, for_discriminator, strength, weight)
        # What a graph returns is overwritten when the next one is replayed.
        discriminator_loss, margins = discriminator_loss.clone(), margins.clone()
        _descend(training.discriminator_optimiser, gan.discriminator, gradients, rate)

        # The generator.
        gradients, generator_loss = generate(gan, for_generator, strength)
        generator_loss = generator_loss.clone()
        _descend(training.generator_optimiser, gan.generator, gradients, rate)

        return finish(training, config, generator_loss, discriminator_loss, margins)

    return step


def discriminator_gradients(
    gan: Gan, batch: Batch, strength: Tensor, weight: Tensor | None
) -> tuple[Named, Tensor, Tensor]:
    """Return the discriminator's gradients, its loss without the penalty, and the margins (n,).

    `weight` is PENALTY_EVERY * gamma / 2 if the penalty is taken, else None.
    """
    real, classes, noise, changes = batch
    both = None if classes is None else classes.repeat(2)
    with _bfloat16(real.device, enabled=weight is None):
        fake = gan.generator(noise, classes)
    seen = augment(torch.cat((real, fake)), changes.repeat(2, 1), strength)

    def loss_of(parameters: Named) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        penalty = torch.zeros_like(strength)
        if weight is None:
            with _bfloat16(real.device, enabled=True):
                _, logits = _judge(gan.discriminator, parameters, seen, both)
        else:

            def judge(images: Tensor) -> tuple[Tensor, Tensor]:
                return _judge(gan.discriminator, parameters, images, both)

            slopes, logits = grad(judge, has_aux=True)(seen)
            penalty = weight * slopes.square().sum() / len(real)
        real_logits, fake_logits = torch.split(logits, len(real))
        loss, _ = relativistic_losses(real_logits, fake_logits)
        return loss + penalty, (loss, real_logits - fake_logits)

    gradients, (loss, margins) = grad(loss_of, has_aux=True)(dict(gan.discriminator.named_parameters()))
    return gradients, loss, margins


def generator_gradients(gan: Gan, batch: Batch, strength: Tensor) -> tuple[Named, Tensor]:
    """Return the generator's gradients and its loss; the statistics of its BatchNorms are updated."""
    real, classes, noise, changes = batch
    judging: Named = dict(gan.discriminator.named_parameters())

    def loss_of(parameters: Named, statistics: Named) -> tuple[Tensor, Tensor]:
        with _bfloat16(real.device, enabled=True):
            fake = functional_call(gan.generator, (parameters, statistics), (noise, classes))
            _, real_logits = _judge(gan.discriminator, judging, augment(real, changes, strength), classes)
            _, fake_logits = _judge(gan.discriminator, judging, augment(fake, changes, strength), classes)
        _, loss = relativistic_losses(real_logits, fake_logits)
        return loss, loss

    statistics = dict(gan.generator.named_buffers())
    gradients, loss = grad(loss_of, has_aux=True)(dict(gan.generator.named_parameters()), statistics)
    return gradients, loss


def _judge(
    discriminator: Discriminator, parameters: Named, images: Tensor, classes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the sum of the logits, whose gradient by the images holds the slope at each, and the logits."""
    logits: Tensor = functional_call(discriminator, parameters, (images, classes))
    return logits.sum(), logits


def _bfloat16(device: torch.device, *, enabled: bool) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled and device.type == "cuda")


def _descend(optimiser: torch.optim.Adam, network: nn.Module, gradients: Named, rate: float) -> None:
    optimiser.param_groups[0]["lr"] = rate
    for name, parameter in network.named_parameters():
        gradient = gradients[name]
        # The fused optimiser goes through memory, so both have to lie there in the same order.
        alike = gradient.stride() == parameter.stride()
        parameter.grad = gradient if alike else torch.empty_like(parameter).copy_(gradient)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
