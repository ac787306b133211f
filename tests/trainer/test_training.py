import copy
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from services.trainer.config import TrainingConfig
from services.trainer.gan.compiled_step import fast_step
from services.trainer.gan.networks import build_gan_model
from services.trainer.gan.reference_step import (
    Training,
    annealed,
    decay_of,
    draw,
    reference_step,
    relativistic_losses,
    squared_slopes,
    update_average,
)
from services.trainer.gan.training import Diverged, generate_images, resume, start, state_of, train_gan
from services.trainer.jsconfig import modify_config, read_config

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

    logits = discriminator(batch.requires_grad_())
    penalty = squared_slopes(logits, batch).mean()
    batch = batch.detach()
    weight = discriminator.end.weight
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


def assert_equal(one: object, other: object) -> None:
    """Demand that two states are the same, bit for bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_equal(one[name], other[name])
    elif isinstance(one, list):
        for left, right in zip(one, other, strict=True):
            assert_equal(left, right)
    else:
        assert one == other


@pytest.mark.parametrize("n_classes", [0, 2])
def test_a_training_interrupted_anywhere_ends_as_one_in_one_go(tmp_path, n_classes):
    """Stopped after any step, between reports and penalties too, and resumed from a file of tensors: the same bits."""
    config = tiny(symmetric=True, annealImages=30.0, augmentation=0.3)
    labels = torch.arange(12) % n_classes if n_classes else None
    in_one_go = start(config, CPU, n_classes=n_classes)
    in_one_go.augmentation.fill_(0.5)  # as if it had risen

    def save(training: Training) -> None:
        torch.save(state_of(training), tmp_path / f"{training.step}.pt")

    told = train_gan(in_one_go, images(), config, labels=labels, until=9, report_every=4, after_step=save)
    assert [progress.step for progress in told] == [4, 8, 9]

    for step in range(1, 9):
        torch.rand(7)
        resumed = resume(config, torch.load(tmp_path / f"{step}.pt", weights_only=True), CPU)
        told_after = train_gan(resumed, images(), config, labels=labels, until=9, report_every=4)

        assert told_after == [progress for progress in told if progress.step > step]
        assert_equal(state_of(resumed), state_of(in_one_go))


def test_a_finished_round_is_not_trained_on():
    """Asked to train until a step that is done, nothing happens, and nothing is reported."""
    training = start(tiny(), CPU)
    train_gan(training, images(), tiny(), until=2)

    assert train_gan(training, images(), tiny(), until=2) == []
    assert training.step == 2


# torch's own compiler uses what torch calls deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize(("backend", "n_classes"), [("eager", 0), ("aot_eager", 2)])
def test_the_fast_step_is_the_reference_step(backend, n_classes):
    """In float64, ten steps of each leave weights that differ by less than 1e-9, and the same sums and strengths."""
    config = tiny(symmetric=True, augmentation=0.5)
    real = images().double()
    labels = torch.arange(12) % n_classes if n_classes else None
    plain, fast = (start(config, CPU, n_classes=n_classes) for _ in range(2))
    for training in (plain, fast):
        for network in (training.gan.generator, training.gan.discriminator, training.gan.average):
            network.double()
    step = fast_step({"backend": backend, "fullgraph": True})
    told = [(reference_step(plain, real, config, labels), step(fast, real, config, labels)) for _ in range(10)]

    for by_reference, by_fast in told:
        torch.testing.assert_close(by_fast, by_reference, rtol=0, atol=1e-9)
    torch.testing.assert_close(fast.augmentation, plain.augmentation)
    for network in ("generator", "discriminator", "average"):
        pairs = zip(*(getattr(training.gan, network).state_dict().values() for training in (plain, fast)), strict=True)
        for expected, found in pairs:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_classes_are_learnt():
    """Trained on dark and on light images, the generator makes the kind that it is asked for."""
    config = tiny(steps=80, width=4, learningRate=3e-3, emaImages=100.0, augmentation=0.0)
    labels = torch.arange(64) % 2
    real = images(64) * 0.1 - 0.7 + 1.4 * labels[:, None, None, None]
    training = start(config, CPU, n_classes=2)
    train_gan(training, real, config, labels=labels)
    dark, light = (
        generate_images(training.gan.average, 32, latent_dim=4, seed=0, device=CPU, labels=torch.full((32,), label))
        for label in (0, 1)
    )

    assert light.mean() - dark.mean() > 0.7


def test_rate_and_gamma_are_annealed_over_the_images_seen():
    """Half a cosine: from the config's values to a fifth and a tenth of them, which stay."""
    config = tiny(learningRate=1e-3, gamma=8.0, annealImages=1000.0)

    assert annealed(config, 0) == pytest.approx((1e-3, 8.0))
    assert annealed(config, 500) == pytest.approx((0.6e-3, 4.4))
    assert annealed(config, 1000) == annealed(config, 10**6) == pytest.approx((2e-4, 0.8))


def test_penalties_come_every_fourth_step_and_four_times_as_strong():
    """A step with a penalty follows the gradient of loss + 4 gamma / 2 (R1 + R2), the three after it the loss's."""
    found, expected = [], []
    config = tiny(gamma=7.0, augmentation=0.0)
    training = start(config, CPU)
    training.augmentation.zero_()

    def by_hand() -> list[torch.Tensor]:
        gan = copy.deepcopy(training.gan)
        gan.discriminator.requires_grad_()
        batch, _ = draw(config, training.step, images(), None)
        fake = gan.generator(batch.noise).detach()
        loss = functional.softplus(gan.discriminator(fake) - gan.discriminator(batch.real)).mean()
        if training.step in (0, 4):
            _, gamma = annealed(config, training.images_seen)
            for side in (batch.real, fake):
                side.requires_grad_()
                slopes = torch.autograd.grad(gan.discriminator(side).sum(), side, create_graph=True)[0]
                loss = loss + 4 * gamma / 2 * slopes.square().sum() / len(side)
        return list(torch.autograd.grad(loss, list(gan.discriminator.parameters())))

    def keep(optimiser: torch.optim.Adam, *_: object) -> None:
        found.append([group.grad.clone() for group in optimiser.param_groups[0]["params"]])

    training.discriminator_optimiser.register_step_pre_hook(keep)
    for _ in range(6):
        expected.append(by_hand())
        reference_step(training, images(), config, None)
        training.augmentation.zero_()

    for gradients, by_formula in zip(found, expected, strict=True):
        torch.testing.assert_close(gradients, by_formula, rtol=1e-4, atol=1e-6)


def test_mirrored_images_are_learnt_only_where_the_anatomy_is_symmetric():
    """About half of the real images are mirrored where config.js allows it, and none elsewhere."""
    plain, _ = draw(tiny(batchSize=64), 0, images(64), None)
    seen, _ = draw(tiny(batchSize=64, symmetric=True), 0, images(64), None)
    mirrored = (seen.real != plain.real).flatten(1).any(dim=1)

    assert all((image == images(64)).flatten(1).all(dim=1).any() for image in plain.real)
    assert torch.equal(seen.real[mirrored], plain.real[mirrored].flip(3))
    assert 16 < mirrored.sum() < 48


def test_changed_rates_hold_after_resuming():
    """A round's learning rate is that of its config, not that of the checkpoint."""
    training = resume(tiny(learningRate=1e-5, beta2=0.5), state_of(start(tiny(), CPU)), CPU)
    train_gan(training, images(), tiny(learningRate=1e-5), until=1)

    assert training.generator_optimiser.param_groups[0]["lr"] == pytest.approx(1e-5)
    assert training.discriminator_optimiser.param_groups[0]["lr"] == pytest.approx(1e-5)
    assert training.generator_optimiser.param_groups[0]["betas"] == (0.0, 0.5)


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
