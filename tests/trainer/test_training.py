import copy
import math
from pathlib import Path

import pytest
import torch

from services.trainer.config import TrainingConfig
from services.trainer.jsconfig import modify_config, read_config
from services.trainer.networks import build_gan_model
from services.trainer.training import (
    Diverged,
    decay_of,
    generate_images,
    gradient_penalty,
    relativistic_losses,
    resume,
    start,
    state_of,
    train_gan,
    update_average,
)

CPU = torch.device("cpu")
SHIPPED = Path("services/trainer/config.js").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(**changes) -> TrainingConfig:
    small = {"imageSize": 16, "width": 2, "latentDim": 4, "batchSize": 4, "steps": 3}
    return TrainingConfig.of(read_config(modify_config(SHIPPED, small | changes)))


def images(n: int = 12, size: int = 16) -> torch.Tensor:
    return torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_networks_fit_every_size(size):
    """Noise becomes images of the configured size within [-1, 1], and images become one logit each."""
    gan = build_gan_model(tiny(imageSize=size))
    made = gan.generator(torch.randn(3, 4))

    assert made.shape == (3, 1, size, size)
    assert made.abs().max() <= 1
    assert gan.discriminator(made).shape == (3,)


def test_discriminator_judges_each_image_alone():
    """A logit does not depend on the other images of the batch, which R1 and R2 rely on."""
    discriminator = build_gan_model(tiny()).discriminator
    batch = images(6)

    torch.testing.assert_close(discriminator(batch)[2:3], discriminator(batch[2:3]))


def test_losses_are_their_printed_formula():
    """L_D = mean log(1 + exp(-(D(x) - D(G(z))))), and L_G is the same with the pair swapped."""
    real, fake = [0.3, -2.0, 5.0], [1.0, 0.5, -4.0]
    expected_d = sum(math.log1p(math.exp(-(r - f))) for r, f in zip(real, fake, strict=True)) / 3
    expected_g = sum(math.log1p(math.exp(-(f - r))) for r, f in zip(real, fake, strict=True)) / 3
    generator_last = relativistic_losses(torch.tensor(real), torch.tensor(fake))

    assert [loss.item() for loss in generator_last] == pytest.approx([expected_d, expected_g], rel=1e-6)


def test_gradient_penalty_is_the_slope_by_finite_differences():
    """The penalty equals the squared slope measured by moving each pixel, and so does its own gradient by a weight."""
    discriminator = build_gan_model(tiny()).discriminator.double()
    batch = images(2).double()

    def by_differences() -> float:
        slopes = torch.zeros_like(batch)
        for index in range(batch[0].numel()):
            step = torch.zeros(batch[0].numel(), dtype=torch.float64)
            step[index] = 1e-5
            step = step.view(batch[0].shape)
            with torch.no_grad():
                slopes.view(2, -1)[:, index] = (discriminator(batch + step) - discriminator(batch - step)) / 2e-5
        return float(slopes.square().sum(dim=(1, 2, 3)).mean())

    penalty = gradient_penalty(discriminator, batch)
    weight = discriminator.end[1].weight
    (slope,) = torch.autograd.grad(penalty, weight)
    with torch.no_grad():
        weight[0, 5] += 1e-4
        above = by_differences()
        weight[0, 5] -= 2e-4
        below = by_differences()
        weight[0, 5] += 1e-4

    assert penalty.item() == pytest.approx(by_differences(), rel=1e-5)
    assert float(slope[0, 5]) == pytest.approx((above - below) / 2e-4, rel=1e-3)


def test_average_follows_weights_and_buffers():
    """The average is decay a + (1 - decay) x, for BatchNorm's statistics too, and counters are copied."""
    gan = build_gan_model(tiny())
    before = copy.deepcopy(gan.average.state_dict())
    gan.generator.train()
    gan.generator(torch.randn(8, 4))
    with torch.no_grad():
        gan.generator.end[0].weight.add_(1)
    update_average(gan.average, gan.generator, 0.9)

    for name, value in gan.average.state_dict().items():
        now = gan.generator.state_dict()[name]
        torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * now if now.is_floating_point() else now)
    assert int(gan.average.state_dict()["start.2.num_batches_tracked"]) == 1


def test_average_forgets_faster_at_the_start():
    """After as many images as the half-life a weight counts half; at the start the half-life is shorter."""
    config = tiny(emaImages=400.0, batchSize=4)

    assert decay_of(config, 10**6) ** 100 == pytest.approx(0.5)
    assert decay_of(config, 0) == 0
    assert decay_of(config, 1000) < decay_of(config, 4000)


def test_resumed_training_equals_one_in_one_go(tmp_path):
    """Six steps, and three steps, a checkpoint of tensors only, and three more give the same weights, bit for bit."""
    config, longer = tiny(), tiny(steps=6)
    in_one_go = start(longer, CPU)
    train_gan(in_one_go, images(), longer)
    first = start(config, CPU)
    train_gan(first, images(), config)
    torch.save(state_of(first), tmp_path / "checkpoint.pt")
    torch.rand(7)
    second = resume(config, torch.load(tmp_path / "checkpoint.pt", weights_only=True), CPU)
    train_gan(second, images(), config)

    assert (second.step, second.images_seen) == (6, 24)
    for network in ("generator", "discriminator", "average"):
        expected, found = (getattr(training.gan, network).state_dict() for training in (in_one_go, second))
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_changed_rates_hold_after_resuming():
    """A round's learning rate is that of its config, not that of the checkpoint."""
    training = resume(tiny(learningRate=1e-5), state_of(start(tiny(), CPU)), CPU)

    assert training.generator_optimiser.param_groups[0]["lr"] == 1e-5
    assert training.discriminator_optimiser.param_groups[0]["lr"] == 1e-5


def test_training_learns_the_images():
    """Forty steps bring the mean of the generated images close to that of the real ones."""
    config = tiny(steps=60, width=4, learningRate=3e-3, emaImages=100.0)
    real = (images(64) * 0.1 - 0.8).clamp(-1, 1)
    training = start(config, CPU)
    before = generate_images(training.gan.average, 32, latent_dim=4, seed=0, device=CPU).mean()
    reports = train_gan(training, real, config, report_every=25)
    after = generate_images(training.gan.average, 32, latent_dim=4, seed=0, device=CPU).mean()

    assert abs(after - real.mean()) < 0.35 * abs(before - real.mean())
    assert [report.step for report in reports] == [25, 50, 60]


def test_divergence_is_told():
    """Losses that are no numbers end the training, instead of storing a broken model."""
    with pytest.raises(Diverged):
        train_gan(start(tiny(), CPU), images() * float("nan"), tiny())
