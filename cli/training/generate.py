"""Images of a finished model, made on this machine: the model lies in a folder, or in the bucket under its request."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from cli.client import Client
from cli.names import name
from shared.operations.refused import Refused, WrongUsage

if TYPE_CHECKING:
    from services.trainer.records import StoredDescription

DESCRIPTION, WEIGHTS = "generator.json", "generator.pt"
Told = Callable[[int], None]


class Format(StrEnum):
    """What images are written as."""

    PNG = "png"
    NPY = "npy"
    DICOM = "dicom"


@contextmanager
def opened(model: str, environ: Mapping[str, str]) -> Iterator[Path]:
    """Give the block a folder that holds the model: the one named, or what is in the bucket under a request's id.

    Raises:
        Refused: there is no such model.
    """
    if Path(model).is_dir():
        if missing := [file for file in (DESCRIPTION, WEIGHTS) if not (Path(model) / file).is_file()]:
            raise Refused(f"{model} has no {' and no '.join(missing)}: a folder that `radqueue train --out` wrote has")
        yield Path(model)
        return
    key = f"models/{name(model)}"
    client = Client(environ)
    with tempfile.TemporaryDirectory(prefix="radqueue-model-") as folder:
        for file in (DESCRIPTION, WEIGHTS):
            if not client.exists(f"{key}/{file}"):
                raise Refused(f"there is no folder {model}, and no finished model {client.url(key)}")
            client.download(f"{key}/{file}", Path(folder) / file)
        yield Path(folder)


def generate(
    model: Path, out: Path, *, n: int, seed: int | None, form: Format, class_name: str | None, told: Told
) -> dict[str, Any]:
    """Write images into a folder.

    Args:
        model: the folder of the model.
        out: where to write; made if it is not there.
        n: how many.
        seed: of the noise; None takes the one of the images that were made when the training ended.
        form: a file per image, or one array (n, H, W) float32 in [-1, 1].
        class_name: which class; None takes all of them in turn.
        told: receives how many more images were generated, and then how many more were written.

    Returns:
        What was made, and the paths.

    Raises:
        Refused: torch is missing; the description is damaged; the weights are not those that were described.
        WrongUsage: there is no such class.
    """
    try:
        import torch  # noqa: PLC0415 - the command line does without

        from services.trainer.products import generation  # noqa: PLC0415
        from services.trainer.products.secondary_capture import Origin  # noqa: PLC0415
    except ModuleNotFoundError as missing:
        raise Refused(f"generating images needs {missing.name}: install radqueue with its extra `trainer`") from None

    described = _described(model / DESCRIPTION)
    try:
        generator = generation.load_generator(model / WEIGHTS, described.sha256, described.config)
    except generation.WrongModel as wrong:
        raise Refused(str(wrong)) from None
    classes, chosen_seed = described.classes, described.seed if seed is None else seed
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    labels = generation.labels_of(generator, n, _label(class_name, classes))
    images = generation.draw(generator.to(device), n, labels, seed=chosen_seed, device=device, told=told)

    titles = generation.titles_of(labels, n, classes)
    out.mkdir(parents=True, exist_ok=True)
    if form is Format.NPY:
        (out / "images.npy").write_bytes(generation.npy(images))
        told(n)
        paths = [out / "images.npy"]
    elif form is Format.PNG:
        paths = _written(out, generation.names_of(titles, ".png"), generation.pngs(images), told)
    else:
        made = generation.captures(images, titles, described.units, Origin(described.sha256, chosen_seed))
        paths = _written(out, generation.names_of(titles, ".dcm"), made, told)
    return {
        "model": described.request_id,
        "sha256": described.sha256,
        "approved": described.approved,
        "n": n,
        "seed": chosen_seed,
        "class": class_name,
        "device": device.type,
        "paths": [str(path) for path in paths],
    }


def _described(path: Path) -> "StoredDescription":
    from services.trainer.records import StoredDescription  # noqa: PLC0415

    try:
        return StoredDescription.model_validate_json(path.read_bytes())
    except ValidationError as error:
        places = {".".join(map(str, detail["loc"])) or "it is no JSON object" for detail in error.errors()}
        raise Refused(f"{path} is damaged ({', '.join(sorted(places))}); fetch the model again") from None


def _label(class_name: str | None, classes: tuple[str, ...]) -> int | None:
    if class_name is None:
        return None
    if class_name not in classes:
        known = f"it knows {', '.join(classes)}" if classes else "it has no classes"
        raise WrongUsage(f"the model does not know the class {class_name}: {known}")
    return classes.index(class_name)


def _written(out: Path, names: Iterable[str], bodies: Iterable[bytes], told: Told) -> list[Path]:
    paths = []
    for file, body in zip(names, bodies, strict=True):
        paths.append(out / file)
        paths[-1].write_bytes(body)
        told(1)
    return paths
