"""The child process that computes: `python -m services.trainer.worker`. Files are passed by path.

Three calls: `train` trains a round, `evaluate` judges it, `generate` makes the products of the finished model.
"""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from services.trainer import distributed
from services.trainer.config import TrainingConfig
from services.trainer.data.images import load_images
from services.trainer.evaluation.evaluate import evaluate
from services.trainer.evaluation.features import RANDCONV, load_extractor
from services.trainer.gan.networks import Generator
from services.trainer.gan.reference_step import Training
from services.trainer.gan.training import Diverged as TrainingDiverged
from services.trainer.gan.training import Progress, generate_images, resume, start, state_of, train_gan
from services.trainer.jsconfig import read_config
from services.trainer.products import generation
from services.trainer.protocol import (
    AnyRequest,
    Diverged,
    Evaluate,
    Evaluated,
    Generate,
    Generated,
    Losses,
    Outcome,
    Paused,
    Products,
    Saved,
    Train,
    Trained,
    read,
)
from shared.child import Json, Message
from shared.child import Progress as Tell
from shared.errors import Unprocessable
from shared.messages import Evaluation

EVALUATED_PER_HELD_OUT = 4
"""Images generated for the evaluation, per held-out image: sets of equal size are drawn from them."""
EVALUATION_SEED, SAMPLE_SEED = 1, 2
"""Seeds of the noise of the images that are judged, and of those that are shown."""
REPORT_EVERY = 25
"""Optimiser steps from one report to the next."""
TELL_EVERY_S = 5.0


def main() -> None:
    """Answer calls until standard input closes."""
    distributed.serve(answer, read, together=Train)


def answer(asked: AnyRequest, tell: Tell) -> Message:
    """Carry out a request, and return its reply."""
    match asked:
        case Train():
            return train_round(asked, tell)
        case Evaluate():
            return evaluate_round(asked)
        case Generate():
            return generate(asked, tell)


def train_round(asked: Train, tell: Tell) -> Outcome:
    """Train one round, from its start or from the middle.

    A round that was interrupted anywhere ends, on a CPU, with the same numbers as one that was not. `tell` receives the
    losses, every few seconds, and the checkpoints in the middle of the round.

    Raises:
        Unprocessable: `batch_not_divisible`, several processes cannot have equal shares of a batch.
    """
    # Load.
    images, where = asked.images, _device(asked.device, asked.threads)
    parameters = _parameters(asked.config)
    if parameters.batch_size % distributed.n_processes():
        raise Unprocessable("batch_not_divisible")
    real, labels = load_images(images.train, parameters.image_size, images.train_labels)
    state: Json = {}
    if asked.checkpoint is None:
        training = start(parameters, where, n_classes=len(images.classes))
    else:
        state = torch.load(asked.checkpoint, map_location="cpu", weights_only=True)
        training = resume(parameters, state, where)
    losses, before_s = state.get("losses", []), state.get("trained_s", 0.0)

    # Train.
    keeper = _Keeper(Path(asked.out), Path(asked.stop), asked.checkpoint_s, tell, losses, before_s)
    try:
        train_gan(
            training,
            real.to(where),
            parameters,
            keeper.report,
            labels=None if labels is None else labels.to(where),
            until=asked.until,
            report_every=REPORT_EVERY,
            after_step=keeper.after_step,
        )
    except TrainingDiverged:
        return Diverged()
    except _Stopped:
        return Paused()

    # Save.
    if distributed.is_first():
        torch.save(state_of(training), Path(asked.out) / "checkpoint.pt")
    return Trained(
        step=training.step,
        margin=keeper.losses[-1]["margin"],
        losses=keeper.losses,
        trained_s=round(keeper.trained_s, 3),
        device=where.type,
    )


class _Stopped(Exception):  # noqa: N818 - it states what became of the training
    """The training was asked to stop, and is saved."""


@dataclass(slots=True)
class _Keeper:
    """Saves a training now and then, and reports its losses."""

    folder: Path
    stop: Path
    checkpoint_s: float
    tell: Tell
    losses: list[dict[str, float]]
    """All reports of the round."""
    before_s: float
    """Seconds that the round was trained for before this process."""
    began_at: float = field(default_factory=time.monotonic)
    saved_at: float = field(default_factory=time.monotonic)
    told_at: float = field(default_factory=time.monotonic)

    @property
    def trained_s(self) -> float:
        return self.before_s + time.monotonic() - self.began_at

    def report(self, progress: Progress) -> None:
        """Keep a report, and pass it on if the last one that was passed on is some seconds old."""
        self.losses.append(asdict(progress))
        if time.monotonic() - self.told_at >= TELL_EVERY_S:
            self.tell(Losses(**asdict(progress)))
            self.told_at = time.monotonic()

    def after_step(self, training: Training) -> None:
        """Save the training when it is time to. If it is to stop, save it and raise `_Stopped`."""
        stopped = distributed.agreed(wanted=self.stop.exists())
        if distributed.is_first() and (stopped or time.monotonic() - self.saved_at >= self.checkpoint_s):
            path = self.folder / f"partial.{training.step}.pt"
            state = state_of(training) | {"losses": self.losses, "trained_s": self.trained_s}
            torch.save(state, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
            self.tell(Saved(str(path), training.step))
            self.saved_at = time.monotonic()
        if stopped:
            raise _Stopped


def evaluate_round(asked: Evaluate) -> Evaluated:
    """Judge what a round has trained."""
    began_at = time.monotonic()
    images, where = asked.images, _device(asked.device, asked.threads)
    parameters = _parameters(asked.config)
    real, _ = load_images(images.train, parameters.image_size)
    unseen, labels = load_images(images.held_out, parameters.image_size, images.held_out_labels)
    space = RANDCONV
    if asked.extractor is not None:
        space = load_extractor(
            Path(asked.extractor.path), asked.extractor.sha256, size=asked.extractor.size, device=where
        )
    state = torch.load(asked.checkpoint, map_location="cpu", weights_only=True)
    average = generation.generator_of(parameters, state["average"]).to(where)

    # The generated images have the classes of the real images that they are compared with, in equal shares.
    judged = _generate(average, EVALUATED_PER_HELD_OUT * len(unseen), EVALUATION_SEED, where, labels)
    evaluation, n_features = None, 0
    if judged.isfinite().all():
        numbers = evaluate(unseen, judged, real, space, where)
        evaluation, n_features = Evaluation.model_validate(numbers), numbers["d"]
        shown = _generate(
            average, generation.GRID_IMAGES, SAMPLE_SEED, where, generation.labels_of(average, generation.GRID_IMAGES)
        )
        generation.save_grid(shown, Path(asked.out) / "images.png")
    return Evaluated(evaluation, n_features, round(time.monotonic() - began_at, 3))


def generate(asked: Generate, tell: Tell) -> Products:
    """Write the products of a training."""
    made = generation.generate(
        config=asked.config,
        checkpoint=asked.checkpoint,
        n_images=asked.n_images,
        out=asked.out,
        rounds=asked.rounds,
        units=asked.units.model_dump(),
        classes=list(asked.classes),
        device=_device(asked.device, asked.threads),
        tell=lambda n_images: tell(Generated(n_images)),
    )
    return Products(**made)


def _parameters(config: str) -> TrainingConfig:
    return TrainingConfig.of(read_config(Path(config).read_text(encoding="utf-8")))


def _generate(average: Generator, n_images: int, seed: int, device: torch.device, labels: Tensor | None) -> Tensor:
    """Generate images; if the generator has classes, `labels` are repeated until there are enough."""
    if labels is not None:
        labels = labels.repeat(-(-n_images // len(labels)))[:n_images]
    return generate_images(average, n_images, latent_dim=average.latent_dim, seed=seed, device=device, labels=labels)


def _device(device: str, threads: int) -> torch.device:
    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


if __name__ == "__main__":
    main()
