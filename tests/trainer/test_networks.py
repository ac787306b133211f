from pathlib import Path

import pytest
import torch

from services.trainer.config import TrainingConfig
from services.trainer.gan.networks import build_gan_model
from services.trainer.jsconfig import modify_config, read_config

pytestmark = pytest.mark.usefixtures("one_thread")
SHIPPED = Path("services/trainer/config.js").read_text(encoding="utf-8")


def tiny(**changes) -> TrainingConfig:
    return TrainingConfig.of(
        read_config(modify_config(SHIPPED, {"imageSize": 16, "width": 2, "latentDim": 4} | changes))
    )


@pytest.mark.parametrize("n_classes", [0, 3])
@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
def test_networks_fit_every_size(size, n_classes):
    """Noise becomes images of the configured size within [-1, 1], and images a logit each, with classes and without."""
    gan = build_gan_model(tiny(imageSize=size), n_classes)
    labels = torch.tensor([0, 2, 1]) if n_classes else None
    made = gan.generator(torch.randn(3, 4), labels)

    assert made.shape == (3, 1, size, size)
    assert made.abs().max() <= 1
    assert gan.discriminator(made, labels).shape == (3,)


def test_discriminator_judges_each_image_alone():
    """A logit does not depend on the other images of the batch, which R1 and R2 rely on."""
    discriminator = build_gan_model(tiny(), 2).discriminator
    batch, labels = torch.rand(6, 1, 16, 16), torch.tensor([0, 1] * 3)

    torch.testing.assert_close(discriminator(batch, labels)[2:3], discriminator(batch[2:3], labels[2:3]))


def test_the_class_is_joined_to_the_noise():
    """The same noise gives other images for another class, and the same ones for the same."""
    generator = build_gan_model(tiny(), 2).average
    z = torch.randn(5, 4)
    zeros, ones = torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.int64)

    assert torch.equal(generator(z, zeros), generator(z, zeros))
    assert (generator(z, zeros) - generator(z, ones)).abs().max() > 1e-3


def test_the_discriminator_projects_on_the_class():
    """Logits are psi(phi(x)) + <class, phi(x)> (arXiv 1802.05637, equation 3): a class adds what is linear in phi."""
    discriminator = build_gan_model(tiny(), 2).discriminator
    batch = torch.rand(3, 1, 16, 16)
    labels = torch.tensor([0, 1, 1])
    features = discriminator.blocks(discriminator.start(batch))
    with torch.no_grad():
        discriminator.classes.weight.normal_(generator=torch.Generator().manual_seed(0))
    projected = torch.stack([features[i] @ discriminator.classes.weight[label] for i, label in enumerate(labels)])

    torch.testing.assert_close(discriminator(batch, labels), discriminator.end(features).squeeze(1) + projected)


def test_the_seed_makes_the_weights_and_nothing_else_is_drawn():
    """One seed gives one pair of networks, another gives another, and torch's own random state stays."""
    before = torch.random.get_rng_state()
    first, again, other = (build_gan_model(tiny(seed=seed), 2) for seed in (0, 0, 1))

    assert torch.equal(torch.random.get_rng_state(), before)
    for one, two, three in zip(*(gan.generator.parameters() for gan in (first, again, other)), strict=True):
        assert torch.equal(one, two)
        assert one.dim() == 1 or not torch.equal(one, three)


def test_convolutions_keep_the_channels_last():
    """The first convolution of one channel leaves its maps in the order that the next one wants: nothing is copied."""
    discriminator = build_gan_model(tiny(width=8)).discriminator
    maps = discriminator.start(torch.rand(2, 1, 16, 16))

    assert maps.stride(1) == 1
