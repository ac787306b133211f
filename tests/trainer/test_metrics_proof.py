"""The proof that the metrics behave, on real slices: worse images, worse numbers. docs/metrics.md shows its table."""

import itertools
import os
import tarfile
from pathlib import Path

import numpy as np
import pydicom.data
import pytest
import torch
from PIL import Image
from pydicom import dcmread
from torch import Tensor
from torch.nn import functional

from services.trainer.evaluation.features import RANDCONV, embed
from services.trainer.evaluation.frechet import Distance, distance_in
from services.trainer.evaluation.quality import Quality, assess

ROOT = Path(__file__).parent.parent.parent
X_RAYS = Path(os.environ.get("RADQUEUE_TEST_DATA", ROOT.parent / "shared" / "data")) / "gan_mednist64" / "CXR.tar"
N = 400
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def bundled() -> Tensor:
    """Parts of 64 x 64 pixels of the CT and the MR slice that come with pydicom, in one window per slice."""
    folder = Path(pydicom.data.__file__).parent / "test_files"
    rng = np.random.default_rng(0)
    parts = []
    for name, share in (("CT_small.dcm", 3), ("examples_overlay.dcm", 1)):
        pixels = dcmread(folder / name).pixel_array.astype(np.float32)
        low, high = np.percentile(pixels, (1, 99))
        pixels = np.clip((pixels - low) / (high - low), 0, 1) * 2 - 1
        for _ in range(3 * N * (4 - share) // 4):
            top, left = rng.integers(0, pixels.shape[0] - 63), rng.integers(0, pixels.shape[1] - 63)
            parts.append(pixels[top : top + 64, left : left + 64])
    return torch.from_numpy(np.stack(parts)[rng.permutation(3 * N)])[:, None].float()


def x_rays() -> Tensor:
    """Chest X-rays of 64 x 64 pixels."""
    if not X_RAYS.exists():
        pytest.skip("no X-rays on this machine (RADQUEUE_TEST_DATA)")
    with tarfile.open(X_RAYS) as tar:
        names = sorted(member.name for member in tar if member.isfile() and member.name.endswith(".jpeg"))
        chosen = np.random.default_rng(0).permutation(names)[: 3 * N]
        images = [np.asarray(Image.open(tar.extractfile(name)).convert("L"), np.float32) for name in chosen]
    return torch.from_numpy(np.stack(images) / 127.5 - 1)[:, None]


def blurred(images: Tensor, sigma: float) -> Tensor:
    radius = round(3 * sigma + 1)
    kernel = torch.exp(-((torch.arange(-radius, radius + 1) / sigma) ** 2) / 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    images = functional.conv2d(functional.pad(images, (radius, radius, 0, 0), mode="replicate"), kernel)
    return functional.conv2d(functional.pad(images, (0, 0, radius, radius), mode="replicate"), kernel.mT)


def noisy(images: Tensor, much: float) -> Tensor:
    return (images + much * torch.randn(images.shape, generator=torch.Generator().manual_seed(3))).clamp(-1, 1)


def chequered(images: Tensor, much: float) -> Tensor:
    eighths = torch.arange(64) // 8
    return (images + much * ((eighths[:, None] + eighths) % 2 * 2 - 1)).clamp(-1, 1)


def fewer_modes(images: Tensor, different: int) -> Tensor:
    return images[:different].repeat(N // different, 1, 1, 1)


WORSE = {
    "blur (sigma, pixels)": (blurred, (0.5, 1, 2, 4)),
    "noise (sigma, of a range of 2)": (noisy, (0.05, 0.1, 0.2, 0.4)),
    "checkerboard (amplitude)": (chequered, (0.05, 0.1, 0.2, 0.4)),
    "different images of 400": (fewer_modes, (100, 50, 25, 5)),
}


@pytest.mark.parametrize("source", [x_rays, bundled])
def test_worse_images_have_worse_numbers(source):
    """The distances rise strictly with each fault, coverage falls; at no fault, they are those of real images."""
    real, other, made = source().split(N)

    def judged(images: Tensor) -> tuple[Distance, Quality, Quality]:
        embedded = embed(RANDCONV, real, images, other)
        return distance_in(embedded), *assess(embedded)

    faultless, quality, reachable = judged(made)
    table = [
        f"| {source.__name__} | | relative FD | KID | precision | recall | density | coverage | SW |",
        f"| other real images | | 1.00 | {_told(reachable)} |",
        f"| no fault | | {faultless.relative_fd:.2f} | {_told(quality)} |",
    ]
    found = {}
    for fault, (worsened, amounts) in WORSE.items():
        found[fault] = [(faultless, quality)]
        for amount in amounts:
            distance, worse, _ = judged(worsened(made, amount))
            found[fault].append((distance, worse))
            table.append(f"| {fault} | {amount} | {distance.relative_fd:.2f} | {_told(worse)} |")
    print("\n".join(table))  # noqa: T201 - the table of docs/metrics.md

    assert faultless.n == N
    assert faultless.relative_fd == pytest.approx(1, abs=0.2)
    assert quality.coverage == pytest.approx(reachable.coverage, abs=0.03)
    for fault, levels in found.items():
        assert _rises([distance.relative_fd for distance, _ in levels]), fault
        assert _rises([quality.kid for _, quality in levels]), fault
        assert _rises([quality.sliced_wasserstein for _, quality in levels]), fault
        assert levels[-1][1].coverage < 0.8 * reachable.coverage, fault
    # Missing modes are a fault of recall and none of precision.
    few = found["different images of 400"][-1][1]
    assert few.recall < 0.1
    assert few.precision > 0.9


def _told(quality) -> str:
    shares = (quality.precision, quality.recall, quality.density, quality.coverage)
    spread = f"{quality.kid:.3f} ± {quality.kid_spread:.3f}"
    return " | ".join((spread, *(f"{share:.2f}" for share in shares), f"{quality.sliced_wasserstein:.2f}"))


def _rises(values: list[float]) -> bool:
    return all(before < after for before, after in itertools.pairwise(values))
