"""The child process that computes: `python -m services.trainer.worker`. Files come and go by path.

Two calls: `round` trains from a checkpoint and evaluates, `generate` makes the images of the finished model.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from services.trainer.config import TrainingConfig
from services.trainer.evaluation import evaluate
from services.trainer.features import RANDCONV, load_extractor
from services.trainer.jsconfig import read_config
from services.trainer.networks import Generator
from services.trainer.training import Diverged, Progress, generate_images, resume, start, state_of, train_gan
from shared.child import Json, serve
from shared.child import Progress as Tell
from shared.errors import Unprocessable

EVALUATED_PER_HELD_OUT = 4
"""Images generated for the evaluation, per held-out one: sets of equal size are drawn from them."""
EVALUATION_SEED, SAMPLE_SEED = 1, 2
"""Of the noise of the images that are judged, and of those that are shown."""
TELL_EVERY_S = 5.0
GRID_IMAGES = 64
AIR = -1.0
"""What a slice that is not square is padded with."""


def main() -> None:
    """Answer calls until standard input closes."""
    calls: dict[str, Callable[..., Json]] = {"round": train_round, "generate": generate}
    serve(lambda request, tell: calls[request.pop("do")](**request, tell=tell))


def train_round(
    *,
    train: list[str],
    held_out: list[str],
    config: str,
    checkpoint: str | None,
    out: str,
    device: str,
    threads: int,
    tell: Tell,
    extractor: Json | None = None,
) -> Json:
    """Train one round and evaluate it.

    Args:
        train: `.npy` files of (n, H, W) float32 in [-1, 1] to learn from.
        held_out: the same, of other patients, to be judged by.
        config: path of config.js.
        checkpoint: where to go on; None starts anew.
        out: the folder that receives `checkpoint.pt` and `images.png`.
        device: auto, cpu or cuda.
        threads: of torch; 0 for its own choice.
        tell: receives the losses, every few seconds.
        extractor: `path`, `sha256` and `size` of the network to compare images by; None takes `randconv-v1`.

    Returns:
        `diverged`, and if it did not: `steps` (of this round), `margin`, `evaluation`.
    """
    where = _device(device, threads)
    parameters = TrainingConfig.of(read_config(Path(config).read_text(encoding="utf-8")))
    real = load_images(train, parameters.image_size)
    unseen = load_images(held_out, parameters.image_size)

    space = RANDCONV
    if extractor is not None:
        space = load_extractor(Path(extractor["path"]), extractor["sha256"], size=extractor["size"], device=where)

    if checkpoint is None:
        training = start(parameters, where)
    else:
        training = resume(parameters, torch.load(checkpoint, map_location="cpu", weights_only=True), where)
    try:
        reports = train_gan(training, real.to(where), parameters, _every_few_seconds(tell), report_every=25)
    except Diverged:
        return {"diverged": True}

    average = training.gan.average
    n_judged = EVALUATED_PER_HELD_OUT * len(unseen)
    judged = _generate(average, n_judged, EVALUATION_SEED, where)
    if not judged.isfinite().all():
        return {"diverged": True}
    evaluation = evaluate(unseen, judged, real, space, where)
    folder = Path(out)
    torch.save(state_of(training), folder / "checkpoint.pt")
    _save_grid(_generate(average, GRID_IMAGES, SAMPLE_SEED, where), folder / "images.png")
    return {
        "diverged": False,
        "steps": parameters.steps,
        "margin": reports[-1].margin,
        "evaluation": evaluation,
        "losses": [asdict(report) for report in reports],
        "device": where.type,
    }


def generate(*, config: str, checkpoint: str, n_images: int, out: str, device: str, threads: int, tell: Tell) -> Json:
    """Write the products of a training into `out`: `generator.pt` (tensors only), `images.npy`, `images.png`."""
    where = _device(device, threads)
    parameters = TrainingConfig.of(read_config(Path(config).read_text(encoding="utf-8")))
    average = Generator(parameters).eval()
    state: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    average.load_state_dict(state["average"])
    images = _generate(average.to(where), n_images, parameters.seed, where)
    folder = Path(out)
    torch.save(average.cpu().state_dict(), folder / "generator.pt")
    np.save(folder / "images.npy", images[:, 0].numpy(), allow_pickle=False)
    _save_grid(images[:GRID_IMAGES], folder / "images.png")
    tell({"generated": n_images})
    return {"n_images": n_images, "images_seen": state["images_seen"]}


def load_images(paths: list[str], size: int) -> Tensor:
    """Read arrays (n, H, W) and return all their slices as (N, 1, size, size) float32 in [-1, 1].

    A slice that is not square is padded with air; a larger one is scaled down with antialiasing, without which the
    generator would learn the moiré, and the distance would measure it.

    Raises:
        Unprocessable: `images_too_small`, where a slice would have to be scaled up; `invalid_array`.
    """
    return torch.cat([_sized(np.load(path, allow_pickle=False), size) for path in paths])


def _sized(array: npt.NDArray[Any], size: int) -> Tensor:
    if array.ndim != 3 or not np.isfinite(array).all():  # noqa: PLR2004 - slices, rows, columns
        raise Unprocessable("invalid_array")
    images = torch.from_numpy(array.astype(np.float32))[:, None]
    rows, columns = images.shape[2:]
    side = max(rows, columns)
    if side < size:
        raise Unprocessable("images_too_small")
    right, below = side - columns, side - rows
    images = functional.pad(images, (right // 2, right - right // 2, below // 2, below - below // 2), value=AIR)
    if side != size:
        images = functional.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return images.clamp(-1, 1)


def image_grid(images: Tensor) -> npt.NDArray[np.uint8]:
    """Lay (N, 1, H, W) images in [-1, 1] out in rows of a near-square grid, one pixel of black between them."""
    n, _, rows, columns = images.shape
    across = int(np.ceil(np.sqrt(n)))
    down = -(-n // across)
    grid = np.zeros((down * (rows + 1) - 1, across * (columns + 1) - 1), np.uint8)
    grey = ((images[:, 0].clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    for index, image in enumerate(grey):
        top, left = index // across * (rows + 1), index % across * (columns + 1)
        grid[top : top + rows, left : left + columns] = image
    return grid


def _save_grid(images: Tensor, path: Path) -> None:
    Image.fromarray(image_grid(images)).save(path)


def _generate(average: Generator, n_images: int, seed: int, device: torch.device) -> Tensor:
    return generate_images(average, n_images, latent_dim=average.latent_dim, seed=seed, device=device)


def _device(device: str, threads: int) -> torch.device:
    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def _every_few_seconds(tell: Tell) -> Callable[[Progress], None]:
    """Pass a report on where the last one is some seconds old."""
    told_at = time.monotonic()

    def report(progress: Progress) -> None:
        nonlocal told_at
        if time.monotonic() - told_at >= TELL_EVERY_S:
            tell(asdict(progress))
            told_at = time.monotonic()

    return report


if __name__ == "__main__":
    main()
