import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torchmetrics.image.fid import FrechetInceptionDistance

from services.trainer.evaluation.features import randconv_features
from services.trainer.evaluation.frechet import calculate_fid, frechet_distance
from tests.examples import examples

pytestmark = pytest.mark.usefixtures("one_thread")


def textbook(a: np.ndarray, b: np.ndarray) -> float:
    """The formula as it is printed, with scipy's matrix square root."""
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(covariance_a @ covariance_b).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariance_a + covariance_b - 2 * root))


def discs(n: int, seed: int, *, radius: float = 5.0, size: int = 16) -> torch.Tensor:
    """Soft discs at random places, (n, 1, size, size) in [-1, 1]."""
    rng = np.random.default_rng(seed)
    centre = rng.uniform(5, size - 5, (2, n, 1, 1))
    away = np.hypot(np.arange(size)[:, None] - centre[0], np.arange(size) - centre[1])
    size_of = radius * rng.uniform(0.8, 1.2, (n, 1, 1))
    return torch.from_numpy(np.clip(size_of - away, -1, 1).astype(np.float32))[:, None]


@given(seed=st.integers(0, 2**32 - 1), d=st.integers(2, 12))
@settings(max_examples=examples(150), deadline=None)
def test_equals_the_textbook_formula(seed, d):
    """With more images than features, the distance is that of the printed formula."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(60, d)) @ rng.normal(size=(d, d))
    b = rng.normal(size=(45, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)

    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(textbook(a, b), rel=1e-6)


def test_fewer_images_than_features_is_exact():
    """Where the covariances are singular, adding empty dimensions changes nothing."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(20, 5)), rng.normal(size=(20, 5)) + 0.5
    turn = np.linalg.qr(rng.normal(size=(64, 64)))[0]
    wide = [torch.from_numpy(np.pad(x, ((0, 0), (0, 59))) @ turn) for x in (a, b)]

    assert frechet_distance(*wide) == pytest.approx(textbook(a, b), rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(60, 60), (60, 300), (300, 300)], ids=["few", "few_and_many", "many"])
def test_equals_torchmetrics(n, m):
    """Whether there are fewer images than features or more, an independent implementation finds the same distance."""
    d = 64
    a, b = (torch.from_numpy(np.random.default_rng(seed).normal(seed, seed, (k, d))) for seed, k in ((1, n), (2, m)))
    metric = FrechetInceptionDistance(feature=nn.Identity(), input_img_size=(d,)).set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)

    assert frechet_distance(a, b) == pytest.approx(float(metric.compute()), rel=1e-4)


@pytest.mark.parametrize("noise", [0, 1e-9, 1e-7])
def test_nearly_singular_covariances_lose_no_digits(noise):
    """With features that are copies of others up to rounding, the distance is that of the features without them."""
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(200, 6)), rng.normal(0.1, 1.1, size=(200, 6))
    repeated = [torch.from_numpy(np.concatenate((x, x + noise * rng.normal(size=x.shape)), axis=1)) for x in (a, b)]

    assert frechet_distance(*repeated) == pytest.approx(2 * textbook(a, b), rel=1e-6)


def test_of_shifted_and_scaled_gaussians_is_the_analytic_one():
    """For x and s x + t the distance is |mean shift|^2 + (1 - s)^2 tr C."""
    x = torch.randn(500, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shift = torch.arange(6, dtype=torch.float64)
    moved = 1.5 * x + shift
    expected = float((moved.mean(0) - x.mean(0)).square().sum() + 0.25 * torch.cov(x.T).trace())

    assert frechet_distance(x, moved) == pytest.approx(expected, rel=1e-9)


def test_of_identical_sets_is_zero_and_symmetric():
    """A set is at no distance from itself, and the distance does not depend on the order."""
    a, b = randconv_features(discs(40, 1)), randconv_features(discs(30, 2))

    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)


def test_real_against_real_is_at_the_floor():
    """Images of the same distribution have a relative distance near one, at the same n as the floor."""
    result = calculate_fid(discs(200, 1), discs(800, 2), discs(200, 3))

    assert result.relative_fd == pytest.approx(1, abs=0.35)
    assert (result.metric, result.n, result.space) == ("FD", 200, "randconv-v1/d64")


def test_without_other_real_images_the_floor_is_between_halves():
    """With only one set of real images, both numbers compare half as many."""
    result = calculate_fid(discs(200, 1), discs(400, 2))

    assert (result.n, result.d) == (100, 32)
    assert result.relative_fd == pytest.approx(1, abs=0.35)


@pytest.mark.parametrize(
    ("worsened", "amounts"),
    [
        (lambda x, much: x + much * torch.randn(x.shape, generator=torch.Generator().manual_seed(4)), (0, 0.3, 0.6, 1)),
        (lambda x, much: torch.lerp(x, functional.avg_pool2d(x, 5, 1, 2), much), (0, 0.3, 0.6, 1)),
        (lambda x, different: x[:different].repeat(240 // different, 1, 1, 1), (240, 24, 8, 2)),
    ],
    ids=["noise", "blur", "few_modes"],
)
def test_rises_as_images_get_worse(worsened, amounts):
    """More noise, more blur, or fewer different images mean a larger relative distance."""
    real, other, made = discs(120, 1), discs(120, 3), discs(240, 2)
    distances = [calculate_fid(real, worsened(made, much), other).relative_fd for much in amounts]

    assert distances == sorted(distances)
    assert distances[-1] > 2 * distances[0]


def test_is_deterministic_and_warns_of_few_images():
    """The same images give the same numbers; so few that no space is small enough are flagged."""
    arguments = discs(6, 1), discs(24, 2), discs(6, 3)
    result = calculate_fid(*arguments)

    assert result == calculate_fid(*arguments)
    assert result.warnings == ("few_images",)
    with pytest.raises(ValueError, match="too few"):
        calculate_fid(discs(3, 1), discs(1, 2))


def test_images_that_cannot_be_compared_are_told():
    """Another form, another size, values outside [-1, 1], no numbers and nothing but one image are refused in words."""
    images = torch.rand(8, 1, 16, 16) * 2 - 1
    wrong = {
        "are \\(N, 1, H, W\\), not \\(8, 16, 16\\)": images[:, 0],
        "\\(8, 8\\) and \\(16, 16\\) cannot be compared": images[:, :, :8, :8],
        "in \\[-1, 1\\]": images * 127,
        "all of them finite": images * torch.nan,
    }
    for why, generated in wrong.items():
        with pytest.raises(ValueError, match=why):
            calculate_fid(images, generated)
    with pytest.raises(ValueError, match="all the same"):
        calculate_fid(torch.zeros_like(images), images)
