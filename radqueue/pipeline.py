"""The steps of a small GAN study as plain functions, for a notebook or a script of one's own.

They are the functions of the services, called in one process and without queues: read DICOM as ingest does, train and
measure as the trainer does, report as the reporter does. `docs/examples/gan_pipeline.py` calls them in order. A
`config.js` describes a model; `DEFAULT_CONFIG` is one to begin with, and `read_config` returns what its text says.

The names of `__all__` are as stable as those of `radqueue.queue`. Needs `radqueue[all]`.
"""

import io
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import boto3
import numpy as np
import numpy.typing as npt
import torch
from pydicom import dcmread

from cli.study.uploads import files
from services.ingest.arrays import centred, is_grey, is_picture, percentile_window, shrink
from services.ingest.pixels import modality_values
from services.ingest.protocol import Caps
from services.ingest.reading import normalise, text_of
from services.ingest.series import numbers_of
from services.reporter.aggregate import Tally, month_of
from services.reporter.page import page
from services.trainer.config import DEFAULT_CONFIG
from services.trainer.evaluation import frechet
from services.trainer.evaluation.frechet import Distance
from services.trainer.gan import training
from services.trainer.gan.reference_step import Training
from services.trainer.gan.training import Progress
from services.trainer.jsconfig import checked_config, modify_config_file, read_config
from services.trainer.products.generation import save_grid
from shared.errors import Unprocessable
from shared.messages import (
    CompletedTraining,
    Evaluation,
    TrainingCompleted,
    TrainingRound,
    TrainingRoundCompleted,
)
from shared.pydicom_silence import silence

__all__ = [
    "DEFAULT_CONFIG",
    "Distance",
    "Picture",
    "Round",
    "build_gan_model",
    "calculate_fid",
    "generate_images",
    "generate_report",
    "load_dicom_images",
    "modify_config_file",
    "preprocess_images",
    "read_config",
    "train_gan",
    "upload_to_s3",
]

Images = npt.NDArray[np.float32]
PERCENTILES = (0.5, 99.5)
CAPS = Caps(inflated=2**30, pixels=2**30)


@dataclass(frozen=True, slots=True)
class Picture:
    """One grey frame of a DICOM file."""

    values: Images
    """The pixels, (rows, columns), in modality units, HU in CT."""
    modality: str
    pixel_spacing_mm: tuple[float, ...] | None
    """The distances between rows and between columns."""
    inverted: bool
    """True if low values are bright (MONOCHROME1)."""
    patient: str
    """A hash that stands for the patient, or for the study if the patient is unknown."""


@dataclass(frozen=True, slots=True)
class Round:
    """One round of training, as a report shows it."""

    distance: Distance
    config: Path
    """The config.js as it was in that round."""
    duration_s: float


def load_dicom_images(folder: Path | str) -> list[Picture]:
    """Read every grey image in a folder and below; what ingest would refuse is left out, with a warning.

    Raises:
        ValueError: there is no image.
    """
    silence()
    pictures: list[Picture] = []
    refused: Counter[str] = Counter()
    for path in files(Path(folder)):
        try:
            _, body = normalise(path.read_bytes(), CAPS)
        except Unprocessable as error:
            refused[error.reason_code] += 1
            continue
        dataset = dcmread(io.BytesIO(body))
        if not is_picture(dataset) or not is_grey(dataset):
            refused["no grey picture"] += 1
            continue
        whose = text_of(dataset, "PatientID") or text_of(dataset, "StudyInstanceUID")
        for values in modality_values(dataset):
            spacing = numbers_of(dataset, "PixelSpacing", 2)
            inverted = text_of(dataset, "PhotometricInterpretation") == "MONOCHROME1"
            pictures.append(
                Picture(values, text_of(dataset, "Modality"), spacing, inverted, sha256(whose.encode()).hexdigest())
            )
    if refused:
        told = ", ".join(f"{count} {code}" for code, count in refused.most_common())
        warnings.warn(f"files left out: {told}", stacklevel=2)
    if not pictures:
        raise ValueError("there is no DICOM image in this folder")
    return pictures


def preprocess_images(images: Sequence[Picture], size: int = 64, window: tuple[float, float] | None = None) -> Images:
    """Return (N, size, size) float32 in [-1, 1], each in its physical aspect.

    Args:
        images: what `load_dicom_images` returned.
        size: rows and columns; a power of two, for the networks.
        window: modality values that become -1 and 1; None takes percentiles of all images together.

    Raises:
        ValueError: all values are the same.
    """
    if window is None:
        frames = [image.values for image in images]
        window = percentile_window(frames, sum(frame.size for frame in frames), PERCENTILES)
    if window is None:
        raise ValueError("all values are the same")
    return np.stack(
        [
            centred(shrink(image.values, window, size, image.pixel_spacing_mm, inverted=image.inverted), size)
            for image in images
        ]
    )


def upload_to_s3(path: Path | str, bucket: str, key: str) -> str:
    """Upload a file with the credentials of the environment, and return its address."""
    boto3.client("s3").upload_file(str(path), bucket, key)
    return f"s3://{bucket}/{key}"


def build_gan_model(config: Path | str) -> Training:
    """Make the networks and their optimisers, as config.js has them. Raises `InvalidConfig` with the place."""
    return training.start(checked_config(Path(config).read_text("utf-8")), _device())


def train_gan(model: Training, images: Images, config: Path | str) -> list[Progress]:
    """Train for the `steps` of config.js, in place, and return the losses on the way.

    Args:
        model: what `build_gan_model` made; a model that was trained before goes on.
        images: (N, size, size) float32 in [-1, 1].
        config: config.js; sizes and widths must be those that the model was built with.

    Raises:
        ValueError: there is no image.
        Diverged: a loss is out of range.
    """
    if not len(images):
        raise ValueError("there is no image to train on")
    parameters = checked_config(Path(config).read_text("utf-8"))
    return training.train_gan(model, _tensor(images).to(_device()), parameters)


def generate_images(model: Training, n_images: int, seed: int = 0) -> Images:
    """Return (n_images, size, size) float32 in [-1, 1] of the averaged generator."""
    average = model.gan.average
    made = training.generate_images(average, n_images, latent_dim=average.latent_dim, seed=seed, device=_device())
    images: Images = made[:, 0].numpy()
    return images


def calculate_fid(real: Images, generated: Images, other_real: Images | None = None) -> Distance:
    """Return the Fréchet distance of generated images to real ones that were not trained on, beside its floor.

    Args:
        real: (N, size, size), held out.
        generated: (M, size, size).
        other_real: (K, size, size), those trained on, for the floor; None takes halves of `real`.

    Raises:
        ValueError: too few images, of other sizes, outside [-1, 1] or all the same.
    """
    others = None if other_real is None else _tensor(other_real)
    return frechet.calculate_fid(_tensor(real), _tensor(generated), others)


def generate_report(rounds: Sequence[Round], images: Images, out: Path | str, *, threshold: float = 2.0) -> Path:
    """Write a page about a training: its rounds, the best one's parameters, generated images.

    Args:
        rounds: all of them, oldest first.
        images: (N, size, size), generated by the best.
        out: the folder; receives `report.html`, `report.json` and `images.png`.
        threshold: the relative distance at which a model is good enough.

    Returns:
        The path of the page.
    """
    folder, now = Path(out), datetime.now(UTC)
    folder.mkdir(parents=True, exist_ok=True)
    save_grid(_tensor(images[:64]), folder / "images.png")
    completed = [_completed(number, done, threshold) for number, done in enumerate(rounds, 1)]
    best = min(completed, key=lambda each: each.evaluation.relative_fd)
    end = CompletedTraining(
        request_id=best.request_id,
        dataset=best.dataset,
        approved=best.approved,
        rounds=len(completed),
        evaluation=best.evaluation,
        config=best.config,
        generator_key="",
        images_key="images.png",
        images_array_key="",
    )
    tally = Tally(month_of(now))
    for each in completed:
        tally.add(TrainingRoundCompleted.of(each.request_id, each, time=now))
    tally.add(TrainingCompleted.of(end.request_id, end, time=now))
    report = tally.report(generated_at=now)
    (folder / "report.json").write_text(report.model_dump_json(indent=1), "utf-8")
    (folder / "report.html").write_bytes(page(report, {end.request_id: (folder / "images.png").read_bytes()}))
    return folder / "report.html"


def _completed(number: int, done: Round, threshold: float) -> TrainingRound:
    config = read_config(done.config.read_text("utf-8"))
    evaluation = Evaluation.model_validate(asdict(done.distance))
    return TrainingRound(
        request_id="notebook",
        dataset="notebook",
        round=number,
        steps=int(config["steps"]),
        evaluation=evaluation,
        approved=evaluation.relative_fd <= threshold,
        config=config,
        config_key=done.config.name,
        duration_s=done.duration_s,
    )


def _tensor(images: Images) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images, np.float32))[:, None]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
