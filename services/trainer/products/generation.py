"""The products of a trained generator: weights, images in three formats, a walk through the latent space.

The images depend on the checkpoint and the seed alone, so making them twice makes the same files.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from services.trainer.config import TrainingConfig
from services.trainer.gan.networks import Generator
from services.trainer.gan.training import generate_images
from services.trainer.jsconfig import read_config
from services.trainer.products import tensorboard
from services.trainer.products.secondary_capture import Origin, instance
from shared.child import Json
from shared.documents.arrays import Units
from shared.documents.training import Value

GRID_IMAGES = 64
WALKS, STEPS = 8, 10
"""Rows of the interpolation, each from one generated image to another, and images in a row."""
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The date of every member of a zip, so that the same members make the same zip."""
Grey = npt.NDArray[np.uint8]


class WrongModel(ValueError):  # noqa: N818 - it states a fact about the files
    """A model cannot be used; the text says why, for people."""


def generate(
    *,
    config: str,
    checkpoint: str,
    n_images: int,
    out: str,
    rounds: str | None,
    units: Json,
    classes: list[str],
    device: torch.device,
    tell: Callable[[int], None],
) -> Json:
    """Write the products of a training into a folder.

    Args:
        config: path of config.js.
        checkpoint: path of the checkpoint whose averaged generator makes the images.
        n_images: how many images to generate.
        out: path of the folder.
        rounds: path of a JSON list of the stored rounds, for a TensorBoard log; None writes no log.
        units: the fields of `Units`.
        classes: names of the classes, by label; empty if there are none.
        device: the device to compute on.
        tell: receives the number of images once they are generated.

    Returns:
        `files`, the names of what was written, `sha256` of the weights, `images_seen` and `seed`.
    """
    # Load.
    folder = Path(out)
    parameters = TrainingConfig.of(read_config(Path(config).read_text(encoding="utf-8")))
    state: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    generator = generator_of(parameters, state["average"])

    # Write the weights.
    torch.save(generator.state_dict(), folder / "generator.pt")
    sha256 = hashlib.sha256((folder / "generator.pt").read_bytes()).hexdigest()

    # Generate and write the images.
    generator.to(device)
    labels = labels_of(generator, n_images)
    images = draw(generator, n_images, labels, seed=parameters.seed, device=device)
    tell(n_images)
    (folder / "images.npy").write_bytes(npy(images))
    save_grid(images[:GRID_IMAGES], folder / "images.png")
    titles = titles_of(labels, n_images, classes)
    save_zip(folder / "images.png.zip", zip(names_of(titles, ".png"), pngs(images), strict=True))
    made = captures(images, titles, Units.model_validate(units), Origin(sha256, parameters.seed))
    save_zip(folder / "images.dicom.zip", zip(names_of(titles, ".dcm"), made, strict=True))
    save_grid(interpolation(generator, seed=parameters.seed, device=device), folder / "interpolation.png", across=STEPS)
    files = ["generator.pt", "images.npy", "images.png", "images.png.zip", "images.dicom.zip", "interpolation.png"]
    if rounds is not None:
        files.append(tensorboard.write(json.loads(Path(rounds).read_text(encoding="utf-8")), folder))
    return {
        "files": files,
        "sha256": sha256,
        "images_seen": state["images_seen"],
        "seed": parameters.seed,
    }


def load_generator(weights: Path, sha256: str, config: dict[str, Value]) -> Generator:
    """Read a generator that `generate` wrote, tensors only, and make sure that it is the one described.

    Args:
        weights: `generator.pt`.
        sha256: the hash of the file that `generator.json` names.
        config: the parameters that `generator.json` names.

    Raises:
        WrongModel: the file is another one than described, or does not fit this version.
    """
    body = weights.read_bytes()
    if hashlib.sha256(body).hexdigest() != sha256:
        raise WrongModel(f"{weights.name} is not the file that generator.json describes: its sha256 differs")
    try:
        parameters = TrainingConfig.of(config)
        return generator_of(parameters, torch.load(io.BytesIO(body), map_location="cpu", weights_only=True))
    except (EOFError, UnpicklingError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WrongModel(f"generator.json does not fit this version of radqueue ({type(error).__name__})") from None


def draw(
    generator: Generator,
    n_images: int,
    labels: Tensor | None,
    *,
    seed: int,
    device: torch.device,
    told: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Return (n_images, 1, size, size) float32 in [-1, 1] on the CPU; `told` receives the size of each batch."""
    hook = generator.register_forward_hook(lambda _, __, images: told(len(images)))
    try:
        return generate_images(
            generator, n_images, latent_dim=generator.latent_dim, seed=seed, device=device, labels=labels
        )
    finally:
        hook.remove()


def labels_of(generator: Generator, n_images: int, label: int | None = None) -> Tensor | None:
    """Return the classes of `n_images`, (n_images,) int64: one, or all in turn; None if there are none."""
    if not generator.n_classes:
        return None
    if label is not None:
        return torch.full((n_images,), label)
    return torch.arange(n_images) % generator.n_classes


def interpolation(generator: Generator, *, seed: int, device: torch.device) -> Tensor:
    """Return (WALKS * STEPS, 1, size, size): walks between pairs of images, row by row.

    Along the great circle, since nearly all of N(0, I) lies near a sphere: a straight line would leave it
    (arXiv 1609.04468).
    """
    random = torch.Generator().manual_seed(seed)
    start, end = torch.randn(2, WALKS, 1, generator.latent_dim, generator=random)
    cosine = torch.nn.functional.cosine_similarity(start, end, dim=-1).clamp(-0.9999, 0.9999)
    angle = cosine.acos()[..., None]
    share = torch.linspace(0, 1, STEPS)[None, :, None]
    walk = (((1 - share) * angle).sin() * start + (share * angle).sin() * end) / angle.sin()
    labels = labels_of(generator, WALKS)
    with torch.no_grad():
        rows = None if labels is None else labels.repeat_interleave(STEPS).to(device)
        images: Tensor = generator(walk.flatten(0, 1).to(device), rows)
    return images.float().cpu()


def grey(images: Tensor) -> Grey:
    """Return (N, 1, H, W) in [-1, 1] as (N, H, W) bytes."""
    return ((images[:, 0].clamp(-1, 1) + 1) * 127.5).round().byte().numpy()


def titles_of(labels: Tensor | None, n_images: int, classes: Sequence[str]) -> list[str]:
    """Return the name of each image's class; empty names if there are no classes."""
    return [""] * n_images if labels is None else [classes[label] for label in labels.tolist()]


def names_of(titles: Iterable[str], suffix: str) -> list[str]:
    """Return a file name for each image: its number, from 00001, after its class if it has one."""
    return [f"{title}-{number:05}{suffix}".lstrip("-") for number, title in enumerate(titles, 1)]


def npy(images: Tensor) -> bytes:
    """Return (N, 1, H, W) as a NumPy file of (N, H, W)."""
    buffer = io.BytesIO()
    np.save(buffer, images[:, 0].numpy(), allow_pickle=False)
    return buffer.getvalue()


def pngs(images: Tensor) -> Iterator[bytes]:
    """Yield a PNG file for each image."""
    for picture in grey(images):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        yield buffer.getvalue()


def captures(images: Tensor, titles: Iterable[str], units: Units, origin: Origin) -> Iterator[bytes]:
    """Yield a DICOM file for each image; the images of a class are a series."""
    for index, (image, title) in enumerate(zip(images[:, 0].numpy(), titles, strict=True)):
        yield instance(image, index, units, replace(origin, title=title))


def image_grid(images: Tensor, across: int | None = None) -> Grey:
    """Lay (N, 1, H, W) images in [-1, 1] out in rows of a near-square grid, one pixel of black between them."""
    n, _, rows, columns = images.shape
    across = across or int(np.ceil(np.sqrt(n)))
    down = -(-n // across)
    grid = np.zeros((down * (rows + 1) - 1, across * (columns + 1) - 1), np.uint8)
    for index, image in enumerate(grey(images)):
        top, left = index // across * (rows + 1), index % across * (columns + 1)
        grid[top : top + rows, left : left + columns] = image
    return grid


def save_grid(images: Tensor, path: Path, across: int | None = None) -> None:
    """Write `image_grid` as a PNG."""
    Image.fromarray(image_grid(images, across)).save(path)


def save_zip(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write a zip whose bytes depend on its members alone."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, body in members:
            archive.writestr(zipfile.ZipInfo(name, EPOCH), body, zipfile.ZIP_DEFLATED)


def generator_of(parameters: TrainingConfig, weights: dict[str, Tensor]) -> Generator:
    """Build the network of some weights, which show its number of classes; it is not to be trained."""
    n_classes = len(weights["classes.weight"]) if "classes.weight" in weights else 0
    generator = Generator(parameters, n_classes)
    generator.load_state_dict(weights)
    return generator.eval().requires_grad_(requires_grad=False)
