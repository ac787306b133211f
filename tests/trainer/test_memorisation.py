import numpy as np
import pytest
import torch
from scipy.stats import nhypergeom
from torch.nn import functional

from services.trainer.evaluation.memorisation import chance_of, find_copies, nearest

pytestmark = pytest.mark.usefixtures("one_thread")


def bodies(n: int, seed: int, size: int = 32) -> torch.Tensor:
    """Made slices, (n, 1, size, size) in [-1, 1]: an ellipse with smooth texture in air, none like another."""
    rng = np.random.default_rng(seed)
    texture = torch.from_numpy(rng.normal(size=(n, 1, 8, 8)).astype(np.float32))
    texture = functional.interpolate(texture, (size, size), mode="bicubic", align_corners=False)
    rows, columns = np.mgrid[:size, :size] / size
    centre, radius = rng.uniform(0.42, 0.58, (2, n, 1, 1)), rng.uniform(0.25, 0.38, (2, n, 1, 1))
    inside = ((rows - centre[0]) / radius[0]) ** 2 + ((columns - centre[1]) / radius[1]) ** 2 < 1
    return torch.where(torch.from_numpy(inside)[:, None], 0.2 + 0.4 * texture, torch.tensor(-1.0)).clamp(-1, 1)


TRAIN, HELD_OUT, FRESH = bodies(300, 1), bodies(100, 2), bodies(200, 3)
COPIES = {
    "exact": lambda x: x,
    "shifted": lambda x: torch.roll(x, (3, -4), (2, 3)),
    "shifted_by_one": lambda x: torch.roll(x, (0, 1), (2, 3)),
    "mirrored": lambda x: x.flip(3),
    "mirrored_and_shifted": lambda x: torch.roll(x.flip(3), (-2, 3), (2, 3)),
    "noisy": lambda x: x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_one_copy_in_ten_is_found(copied):
    """Of 200 images 20 are copies of training images, exact or a little changed: they are found, and no others."""
    planted = torch.cat((copied(TRAIN[:20]), FRESH[20:]))
    found = find_copies(TRAIN, HELD_OUT, planted)

    assert found.flagged
    assert found.copied_share == pytest.approx(0.1, abs=0.015)


@pytest.mark.parametrize(
    "made",
    [lambda x: x, lambda x: functional.avg_pool2d(x, 7, 1, 3), lambda x: x.mean(0, keepdim=True).repeat(200, 1, 1, 1)],
    ids=["other_patients", "blurred", "all_the_mean"],
)
def test_no_copies_are_not_flagged(made):
    """Images of other patients are no copies, nor are poor images that are near to everything."""
    found = find_copies(TRAIN, HELD_OUT, made(FRESH))

    assert not found.flagged
    assert found.copied_share < 0.05


def test_faint_images_among_noise_are_not_flagged():
    """Where all real images are equally far from each other, one that is a trifle nearer to all is no copy."""
    train, held_out, faint = (
        torch.randn(n, 1, 16, 16, generator=torch.Generator().manual_seed(n)) for n in (32, 8, 33)
    )

    assert not find_copies(train, held_out, 0.05 * faint).flagged


def test_few_held_out_images_do_not_hide_copies():
    """Where so few images calibrate that chance explains one in ten, exact copies are found all the same."""
    planted = torch.cat((TRAIN[:10], FRESH[10:100]))
    found = find_copies(TRAIN, HELD_OUT[:16], planted)

    assert found.flagged
    assert not find_copies(TRAIN, HELD_OUT[:16], FRESH[:100]).flagged


def test_distance_is_the_least_over_shifts_and_mirror_images():
    """The fast path is what comparing each overlap of each pair gives, at the full size."""
    images, train = bodies(3, 7, size=16), bodies(5, 8, size=16)

    def plain(image: torch.Tensor, other: torch.Tensor) -> float:
        return min(
            float((a - b).square().mean().sqrt())
            for down in range(-2, 3)
            for right in range(-2, 3)
            for a in [image[max(down, 0) : 16 + min(down, 0), max(right, 0) : 16 + min(right, 0)]]
            for b in [other[max(-down, 0) : 16 + min(-down, 0), max(-right, 0) : 16 + min(-right, 0)]]
        )

    pairs = [[min(plain(i[0], t[0]), plain(i[0].flip(1), t[0])) for t in train] for i in images]
    expected = torch.tensor([[min(row), min(row) / float(np.median(row))] for row in pairs])

    assert torch.allclose(nearest(images, train), expected, atol=1e-5)


@pytest.mark.parametrize(("n_below", "n", "n_held_out", "rank"), [(1, 10, 5, 1), (7, 100, 50, 2), (30, 200, 300, 3)])
def test_chance_is_the_negative_hypergeometric_one(n_below, n, n_held_out, rank):
    """The probability of so many images below the limit is that of drawing so many before the rank-th held-out one."""
    expected = nhypergeom(n + n_held_out, n, rank)

    # SciPy counts the draws of the one kind before the rank-th of the other.
    assert chance_of(n_below, n, n_held_out, rank) == pytest.approx(float(expected.sf(n_below - 1)), rel=1e-6)
    assert chance_of(0, n, n_held_out, rank) == pytest.approx(1)
