"""The training itself: images a second by each way of stepping; with `--figures`, how good it gets in a given time.

    python -m tests.benchmarks.bench_training
    python -m tests.benchmarks.bench_training --figures

Both use a GPU where there is one, and then the fast step, larger images and wider networks. `--figures` trains for 360
seconds: of the processor's time on a CPU, so that other processes do not count, and of wall time on a GPU. Its data are
made phantoms and, where RADQUEUE_TEST_DATA or `../shared/data` has them, chest X-rays.
"""

import os
import statistics
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from services.ingest.arrays import shrink
from services.trainer.config import DEFAULT_CONFIG, TrainingConfig
from services.trainer.evaluation.evaluate import evaluate
from services.trainer.evaluation.features import RANDCONV
from services.trainer.gan import reference_step as reference
from services.trainer.gan.compiled_step import CUDA_GRAPHS, Step, fast_step
from services.trainer.gan.reference_step import PENALTY_EVERY, reference_step
from services.trainer.gan.training import generate_images, start, train_gan
from services.trainer.jsconfig import modify_config, read_config
from shared.documents.training import Value
from shared.phantom import volumes

ROOT = Path(__file__).parent.parent.parent
X_RAYS = Path(os.environ.get("RADQUEUE_TEST_DATA", ROOT.parent / "shared" / "data")) / "gan_mednist64" / "CXR.tar"
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SIZES = (32, 64, 128)
GAMMA = {32: 3.0, 64: 12.0, 128: 48.0}
"""Four times as much at twice the size, as config.js says."""
ON_GPU: dict[str, Value] = {"batchSize": 64, "width": 64, "latentDim": 128}
WARM_UP, TIMED = (12, 200) if CUDA else (4, 8)
"""Steps that are not timed, in which graphs are compiled and recorded, and that are; multiples of PENALTY_EVERY."""
TRAIN_S = 360.0
N_HELD_OUT = 400
WINDOW_HU = (-1000.0, 400.0)
SLICES = 24


def rows() -> list[dict[str, Any]]:
    """Measure the steps at each size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for size in SIZES for row in _speeds(size)]
    finally:
        torch.set_num_threads(threads)


def _speeds(size: int) -> Iterator[dict[str, Any]]:
    config = _config(size)
    images = torch.rand(256, 1, size, size, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 2 - 1
    ways = {
        "reference step": _images_per_s(reference_step, config, images),
        "R3GAN's step, penalties each time": _penalised_each_time(config, images),
    }
    if CUDA:
        ways["fast step"] = _images_per_s(fast_step(CUDA_GRAPHS), config, images)
    where = torch.cuda.get_device_name() if CUDA else "CPU, one thread"
    what = f"training, {size} x {size}, {where}"
    ours = "fast step" if CUDA else "reference step"
    for way, speed in ways.items():
        yield _row(f"{what}: {way}", speed, "images/s", TIMED)
        if way != ours:
            yield _row(f"{what}: {ours} against {way}", ways[ours] / speed, "x", TIMED)


def _penalised_each_time(config: TrainingConfig, images: Tensor) -> float:
    """Time the step as R3GAN has it (arXiv 2501.05441): both penalties at every step, on the same networks."""
    with patch.object(reference, "PENALTY_EVERY", 1):
        return _images_per_s(reference_step, config, images)


def _images_per_s(step: Step, config: TrainingConfig, images: Tensor) -> float:
    training = start(config, DEVICE)
    for _ in range(WARM_UP):
        step(training, images, config, None)
    spent = []
    for _ in range(TIMED // PENALTY_EVERY):
        began = _now()
        for _ in range(PENALTY_EVERY):
            step(training, images, config, None)
        spent.append(_now() - began)
    return PENALTY_EVERY * config.batch_size / statistics.median(spent)


def _now() -> float:
    if CUDA:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


# How good it gets.


def figures(n_images: int, size: int, source: str, **changes: Value) -> list[dict[str, Any]]:
    """Train for TRAIN_S, evaluate, and tell."""
    torch.manual_seed(0)
    train, unseen = {"phantoms": phantoms, "X-rays": x_rays}[source](n_images, size)
    config = _config(size, **changes)
    training = start(config, DEVICE)
    images = train.to(DEVICE)

    # How many steps there is time for decides how long rate and gamma are annealed.
    began = _now()
    train_gan(training, images, config, until=WARM_UP)
    began_again = _now()
    train_gan(training, images, config, until=WARM_UP + TIMED)
    steps = int((TRAIN_S - (began_again - began)) / (_now() - began_again) * TIMED)
    config = config.model_copy(update={"anneal_images": float(steps * config.batch_size), "steps": steps})

    training, began = start(config, DEVICE), _now()
    told = train_gan(training, images, config, report_every=100)
    spent_s = _now() - began
    average = training.gan.average
    judged = generate_images(average, 4 * len(unseen), latent_dim=config.latent_dim, seed=1, device=DEVICE)
    found = evaluate(unseen, judged, train, RANDCONV, DEVICE)
    what = f"{n_images} {source}, {size} x {size}"
    numbers = {
        "seconds": spent_s,
        "images seen": training.images_seen,
        "relative_fd": found["relative_fd"],
        "coverage": found["quality"]["coverage"],
        "recall": found["quality"]["recall"],
        "precision": found["quality"]["precision"],
        "coverage of other real images": found["real_quality"]["coverage"],
        "copies flagged": float(found["memorisation"]["flagged"]),
        "pairs told apart, mean sign": told[-1].told_apart,
        "augmentation": told[-1].augmentation,
    }
    return [_row(f"{what}: {name}", value, "", found["n"]) for name, value in numbers.items()]


def phantoms(n_images: int, size: int) -> tuple[Tensor, Tensor]:
    """Return images to train on, and held-out ones of other patients, (N, 1, size, size)."""
    patients = -(-n_images // SLICES) + -(-N_HELD_OUT // SLICES)
    slices = np.concatenate(
        [
            np.stack([shrink(hu, WINDOW_HU, size, None, inverted=False) for hu in volume.hu])
            for volume in volumes(patients, slices=SLICES, size=max(128, 2 * size), seed=1)
        ]
    )
    images = torch.from_numpy(slices)[:, None].float()
    return images[:n_images], images[-N_HELD_OUT:]


def x_rays(n_images: int, size: int) -> tuple[Tensor, Tensor]:
    """Return chest X-rays to train on, and others; each is another patient's."""
    with tarfile.open(X_RAYS) as tar:
        names = sorted(member.name for member in tar if member.isfile() and member.name.endswith(".jpeg"))
        chosen = np.random.default_rng(0).permutation(names)[: n_images + N_HELD_OUT]
        pictures = [np.asarray(Image.open(_opened(tar, name)).convert("L"), np.float32) for name in chosen]
    images = torch.from_numpy(np.stack(pictures) / 127.5 - 1)[:, None]
    if size != images.shape[-1]:
        images = functional.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return images[:n_images], images[n_images:]


def _opened(tar: tarfile.TarFile, name: str) -> Any:
    return tar.extractfile(name)


def _config(size: int, **changes: Value) -> TrainingConfig:
    text = DEFAULT_CONFIG.read_text(encoding="utf-8")
    changed = {"imageSize": size, "gamma": GAMMA[size]} | (ON_GPU if CUDA else {}) | changes
    return TrainingConfig.of(read_config(modify_config(text, changed)))


def _row(what: str, value: float, unit: str, n: int) -> dict[str, Any]:
    return {"bench": "training", "what": what, "value": value, "unit": unit, "n": n}


def _cases() -> Iterator[tuple[int, int, str]]:
    for size in (64, 128) if CUDA else (32,):
        for source in ("phantoms", "X-rays"):
            if source == "phantoms" or (X_RAYS.exists() and size <= 64):
                yield 1000, size, source
                yield 150, size, source


if __name__ == "__main__":
    chosen = (figures(*case) for case in _cases()) if "--figures" in sys.argv else (rows(),)
    for part in chosen:
        for row in part:
            print(f"{row['what']:80} {row['value']:10.3g} {row['unit']:8} n={row['n']}", flush=True)  # noqa: T201 - a program's output
