"""Train the tissue network on made-up images and write it as TorchScript: `python -m maps.ct_tissues.train`.

No scan of a person is used. Half of a batch comes from thorax phantoms, half from random blobs, shapes and gradients of
any density; both are stretched, shifted, blurred and made noisy beyond what a scanner does, so that the network relies
on the density of a voxel and its neighbours, not on how a thorax looks. The label of a voxel is its tissue by
Hounsfield units.
"""

# ruff: noqa: PLR2004 - the chances and sizes of a random image mean nothing apart from the line that they stand in.

from __future__ import annotations

import argparse
import io
import logging
import time
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses

from shared.phantom import thorax

AIR, SOFT_TISSUE, BONE = 1, 2, 3
SOFT_TISSUE_FROM_HU, BONE_FROM_HU = -300.0, 200.0
WINDOWS_HU = ((-1100.0, 1900.0), (-400.0, -200.0), (100.0, 300.0))
"""(low, high) of each input channel; a network cannot see both 20 HU and 4000 HU on one scale."""
MODEL_PATH = Path(__file__).parent / "models" / "ct_tissues" / "model.ts"
PATCH = 64

logger = logging.getLogger("ct_tissues.train")

Image = npt.NDArray[np.float32]


class TissueNet(nn.Module):
    """A small U-Net: CT slices `(N, 1, H, W) float32`, HU, to scores `(N, 3, H, W)` of air, soft tissue and bone.

    H and W may be anything; windowing and padding are part of the network, so that every user of it does the same.
    """

    def __init__(self, widths: tuple[int, int, int] = (8, 16, 32)) -> None:
        """Build it with random weights; `widths` are the channels at full, half and quarter resolution."""
        super().__init__()
        low = torch.tensor([window[0] for window in WINDOWS_HU]).view(1, -1, 1, 1)
        high = torch.tensor([window[1] for window in WINDOWS_HU]).view(1, -1, 1, 1)
        self.low: Tensor
        self.scale: Tensor
        self.register_buffer("low", low)
        self.register_buffer("scale", 2 / (high - low))
        fine, middle, coarse = widths
        self.down_fine = _convolutions(len(WINDOWS_HU), fine, 2)
        self.down_middle = _convolutions(fine, middle, 2)
        self.bottom = _convolutions(middle, coarse, 2)
        self.up_middle = _convolutions(coarse + middle, middle, 1)
        self.up_fine = _convolutions(middle + fine, fine, 1)
        self.score = nn.Conv2d(fine, 3, 1)

    def forward(self, hu: Tensor) -> Tensor:
        """Score each voxel."""
        height, width = hu.shape[-2:]
        windowed = ((hu - self.low) * self.scale - 1).clamp(-1, 1)
        padded = F.pad(windowed, [0, -width % 4, 0, -height % 4], mode="replicate")
        fine = self.down_fine(padded)
        middle = self.down_middle(F.max_pool2d(fine, 2))
        coarse = self.bottom(F.max_pool2d(middle, 2))
        middle = self.up_middle(torch.cat([F.interpolate(coarse, scale_factor=2.0), middle], dim=1))
        fine = self.up_fine(torch.cat([F.interpolate(middle, scale_factor=2.0), fine], dim=1))
        scores: Tensor = self.score(fine)
        return scores[..., :height, :width]


def _convolutions(channels_in: int, channels_out: int, count: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(count):
        layers += [nn.Conv2d(channels_in if index == 0 else channels_out, channels_out, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


def tissue_by_hu(hu: npt.NDArray[np.number]) -> npt.NDArray[np.uint8]:
    """The tissue of each voxel, by its density alone: what the network learns and is measured against."""
    labels = np.full(hu.shape, SOFT_TISSUE, np.uint8)
    labels[hu < SOFT_TISSUE_FROM_HU] = AIR
    labels[hu >= BONE_FROM_HU] = BONE
    return labels


def dice(labels: npt.NDArray[np.uint8], reference: npt.NDArray[np.uint8], label: int) -> float:
    """Overlap of one label in two label maps of the same shape, 0 to 1; 1 where neither has it."""
    ours, theirs = labels == label, reference == label
    total = int(ours.sum()) + int(theirs.sum())
    return 2 * int((ours & theirs).sum()) / total if total else 1.0


class Patches:
    """An endless supply of training patches, each `(PATCH, PATCH) float32` in whole Hounsfield units."""

    def __init__(self, seed: int, phantoms: int) -> None:
        """Draw the phantoms that the patches are cut from."""
        self._rng = np.random.default_rng([seed, 7])
        # Seeds far away from those of a demo cohort: a phantom that is tested on must not have been seen.
        made = (thorax(900_000 + seed * 1000 + i, slices=10, size=(160, 256, 384)[i % 3]) for i in range(phantoms))
        self._slices = [image for volume in made for image in volume.hu]

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Patches `(count, 1, PATCH, PATCH)` and their labels `(count, PATCH, PATCH)`, 0 for air."""
        hu = np.stack([self._patch(index) for index in range(count)])
        labels = tissue_by_hu(hu).astype(np.int64) - AIR
        return torch.from_numpy(hu[:, None]), torch.from_numpy(labels)

    def _patch(self, index: int) -> Image:
        rng = self._rng
        hu = self._from_phantom() if index % 2 else self._from_nothing()
        if rng.random() < 0.5:
            hu = _blurred(hu)
        if rng.random() < 0.3:
            self._add_extremes(hu)
        noise = rng.standard_normal(hu.shape, np.float32)
        if rng.random() < 0.5:
            noise = _blurred(noise) * 2
        hu = hu + noise * np.float32(rng.choice([0.0, 10.0, 30.0, 90.0]))
        # Scanners store whole numbers.
        return np.rint(hu, dtype=np.float32)

    def _from_phantom(self) -> Image:
        rng = self._rng
        image = self._slices[rng.integers(len(self._slices))]
        row, column = (rng.integers(length - PATCH + 1) for length in image.shape)
        patch = np.rot90(image[row : row + PATCH, column : column + PATCH], int(rng.integers(4)))
        stretch, shift = (rng.uniform(0.8, 1.3), rng.uniform(-250, 250)) if rng.random() < 0.3 else (1.0, 0.0)
        changed: Image = (patch * stretch + shift).astype(np.float32)
        return changed

    def _from_nothing(self) -> Image:
        """Blobs, edges and gradients of any density, with many values close to where the tissues meet."""
        rng = self._rng
        cells = int(rng.integers(3, PATCH // 3))
        noise = torch.from_numpy(rng.standard_normal((1, 1, cells, cells), np.float32))
        mode = "bicubic" if rng.random() < 0.7 else "nearest"
        field = F.interpolate(noise, size=(PATCH, PATCH), mode=mode)[0, 0].numpy()
        centre = rng.choice([-1000.0, -700.0, SOFT_TISSUE_FROM_HU, -60.0, 60.0, BONE_FROM_HU, 700.0, 1300.0])
        hu = field * np.float32(rng.choice([20.0, 80.0, 250.0, 700.0])) + np.float32(centre)
        y, x = np.mgrid[:PATCH, :PATCH].astype(np.float32)
        for _ in range(rng.integers(0, 6)):
            angle, length, breadth = rng.uniform(0, np.pi), rng.uniform(2, 40), rng.uniform(1, 20)
            dx, dy = x - np.float32(rng.uniform(0, PATCH)), y - np.float32(rng.uniform(0, PATCH))
            along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
            hu[(along / length) ** 2 + (across / breadth) ** 2 < 1] = rng.uniform(-1050, 1800)
        return hu.astype(np.float32)

    def _add_extremes(self, hu: Image) -> None:
        """Metal, and the padding outside of the scanned circle."""
        rng = self._rng
        row, column = rng.integers(0, PATCH, 2)
        if rng.random() < 0.5:
            hu[row : row + rng.integers(2, 20), column : column + rng.integers(2, 20)] = rng.uniform(1500, 8000)
        else:
            hu[:row, :column] = rng.choice([-1024.0, -2000.0, -3024.0])


def _blurred(image: Image) -> Image:
    kernel = np.array([0.25, 0.5, 0.25], np.float32)
    for axis in (0, 1):
        before, after = (np.roll(image, shift, axis) for shift in (1, -1))
        image = kernel[0] * before + kernel[1] * image + kernel[2] * after
    return image


def _loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, plus one minus the mean Dice so that scarce bone counts as much as plentiful air."""
    probabilities = scores.softmax(1)
    truth = F.one_hot(labels, 3).movedim(-1, 1).to(probabilities.dtype)
    overlap = 2 * (probabilities * truth).sum((0, 2, 3)) / (probabilities + truth).sum((0, 2, 3)).clamp_min(1)
    return F.cross_entropy(scores, labels) + (1 - overlap).mean()


def train(*, seed: int, steps: int, batch_size: int, phantoms: int) -> TissueNet:
    """Train from random weights; the same arguments on the same machine give the same network."""
    torch.manual_seed(seed)
    patches = Patches(seed, phantoms)
    net = TissueNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    started = time.monotonic()
    for step in range(1, steps + 1):
        hu, labels = patches.batch(batch_size)
        loss = _loss(net(hu), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            logger.info("step %d/%d loss %.4f after %.0f s", step, steps, loss.item(), time.monotonic() - started)
    return net.eval()


def evaluate(net: nn.Module, seed: int) -> list[float]:
    """Dice of air, soft tissue and bone on a phantom that the training did not see."""
    volume = thorax(800_000 + seed, slices=12, size=256)
    stored = np.rint(volume.hu)
    with torch.inference_mode():
        labels = net(torch.from_numpy(stored[:, None])).argmax(1).numpy().astype(np.uint8) + AIR
    return [dice(labels, tissue_by_hu(stored), label) for label in (AIR, SOFT_TISSUE, BONE)]


def save(net: nn.Module, path: Path) -> None:
    """Write the network as TorchScript, without the debug records: they name paths of the machine that made it."""
    everything = io.BytesIO()
    torch.jit.save(torch.jit.script(net), everything)
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(everything) as archive, zipfile.ZipFile(path, "w") as lean:
        for name in archive.namelist():
            if not name.endswith(".debug_pkl"):
                lean.writestr(zipfile.ZipInfo(name), archive.read(name))


def main() -> None:
    """Train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=MODEL_PATH)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--phantoms", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)

    net = train(seed=options.seed, steps=options.steps, batch_size=options.batch_size, phantoms=options.phantoms)
    scores = evaluate(net, options.seed)
    logger.info("Dice on an unseen phantom: air %.4f, soft tissue %.4f, bone %.4f", *scores)
    save(net, options.out)
    logger.info("%s: %d bytes", options.out, options.out.stat().st_size)


if __name__ == "__main__":
    main()
