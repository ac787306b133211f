import math

import pytest
import torch

from services.trainer.config import MAX_AUGMENTATION
from services.trainer.gan.augmentation import ANGLE, DRAWS, SHIFT, TARGET, adapted, augment

pytestmark = pytest.mark.usefixtures("one_thread")
ALWAYS, NEVER = torch.tensor(1.0), torch.tensor(0.0)
STILL = 0.5
"""The draw of an amount at which a change changes nothing."""


def images(n: int = 4, size: int = 16) -> torch.Tensor:
    return torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


def draws(n: int = 4, **amounts: float) -> torch.Tensor:
    """Draws that choose every change, all amounts at rest but those given, from 0 to 1."""
    names = ["right", "down", "angle", "octaves", "brightness", "contrast"]
    return torch.tensor([[0.0] * 4 + [amounts.get(name, STILL) for name in names]] * n, dtype=torch.float64)


def anything(n: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.rand(n, DRAWS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_no_probability_is_no_change(size):
    """At strength zero the images are what they were, bit for bit."""
    batch = images(size=size).float()

    assert torch.equal(augment(batch, anything().float(), NEVER), batch)


def test_each_image_is_changed_by_its_own_draws_alone():
    """A real and a generated image with the same draws are changed alike, whatever else is in the batch."""
    changed = augment(images(), anything(), ALWAYS)

    torch.testing.assert_close(augment(images()[2:3], anything()[2:3], ALWAYS), changed[2:3])
    assert not torch.equal(augment(images()[2:3], anything()[1:2], ALWAYS), changed[2:3])


@pytest.mark.parametrize(("name", "axis"), [("right", 3), ("down", 2)])
@pytest.mark.parametrize(("amount", "moved"), [(1.0, round(SHIFT * 16)), (0.8, 1)])
def test_a_shift_moves_whole_pixels(name, axis, amount, moved):
    """The largest shift takes the content an eighth of the side further, a smaller one less; no pixel is blurred."""
    changed = augment(images(), draws(**{name: amount}), ALWAYS)

    torch.testing.assert_close(changed.narrow(axis, 0, 16 - moved), images().narrow(axis, moved, 16 - moved))


def test_a_turn_turns_about_the_middle():
    """A bright spot off the middle ends where a turn by ten degrees takes it."""
    size = 64
    rows, columns = torch.meshgrid(*[torch.arange(size, dtype=torch.float64) - (size - 1) / 2] * 2, indexing="ij")
    spot = torch.exp(-((columns - 16) ** 2 + rows**2) / 8)[None, None]
    turned = augment(spot, draws(1, angle=1.0), ALWAYS)
    weight = turned.sum()

    assert (turned * columns).sum() / weight == pytest.approx(16 * math.cos(ANGLE), abs=0.1)
    assert abs((turned * rows).sum() / weight) == pytest.approx(16 * math.sin(ANGLE), abs=0.1)


def test_brightness_and_contrast_are_linear():
    """Brightness adds the same everywhere; contrast moves each value away from the image's mean."""
    brighter = augment(images(), draws(brightness=1.0), ALWAYS)
    stronger = augment(images(), draws(contrast=1.0), ALWAYS)
    mean = images().mean(dim=(1, 2, 3), keepdim=True)

    torch.testing.assert_close(brighter - images(), torch.full_like(brighter, 0.2))
    torch.testing.assert_close(stronger - mean, 2**0.5 * (images() - mean))


def test_gradients_reach_the_images():
    """The gradient by the images is that of finite differences: the generator learns through every change."""
    assert torch.autograd.gradcheck(
        lambda batch: augment(batch, anything(2), ALWAYS), images(2, 8).requires_grad_(), atol=1e-6
    )


def test_each_change_is_made_as_often_as_asked():
    """Of many images the share that is changed at all is 1 - (1 - p)^4, since four changes are drawn for."""
    many = torch.rand(4000, DRAWS, generator=torch.Generator().manual_seed(2))
    batch = images(1, 8).float().expand(4000, -1, -1, -1)
    changed = (augment(batch, many, torch.tensor(0.2)) != batch).flatten(1).any(dim=1)

    assert changed.float().mean() == pytest.approx(1 - 0.8**4, abs=0.04)


def test_overfitting_strengthens_and_doubt_weakens():
    """The probability rises where pairs are told apart too well, falls else, and keeps within its bounds."""
    told, doubtful = torch.tensor(1.0), torch.tensor(0.0)
    probability = torch.tensor(0.3)

    assert adapted(probability, told, 16, 0.1) > probability
    assert adapted(probability, doubtful, 16, 0.1) < probability
    assert adapted(probability, torch.tensor(TARGET), 16, 0.1) == pytest.approx(0.3)
    for _ in range(20_000):
        probability = adapted(probability, told, 16, 0.1)
    assert probability == pytest.approx(MAX_AUGMENTATION)
    for _ in range(20_000):
        probability = adapted(probability, doubtful, 16, 0.1)
    assert probability == pytest.approx(0.1)
