"""The child process that computes: `python -m services.trainer.worker`. Files come and go by path.

Three calls: `train` trains a round, `evaluate` judges it, `generate` makes the products of the finished model.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.trainer import distributed
from services.trainer.config import TrainingConfig
from services.trainer.data.images import load_images
from services.trainer.evaluation.evaluate import evaluate
from services.trainer.evaluation.features import RANDCONV, load_extractor
from services.trainer.gan.networks import Generator
from services.trainer.gan.reference_step import Training
from services.trainer.gan.training import Diverged, Progress, generate_images, resume, start, state_of, train_gan
from services.trainer.jsconfig import read_config
from services.trainer.products import generation
from shared.child import Json
from shared.child import Progress as Tell
from shared.errors import Unprocessable

EVALUATED_PER_HELD_OUT = 4
"""Images generated for the evaluation, per held-out one: sets of equal size are drawn from them."""
EVALUATION_SEED, SAMPLE_SEED = 1, 2
"""Of the noise of the images that are judged, and of those that are shown."""
REPORT_EVERY = 25
"""Steps."""
TELL_EVERY_S = 5.0


def main() -> None:
    """Answer calls until standard input closes."""
    calls: dict[str, Callable[..., Json]] = {"train": train_round, "evaluate": evaluate_round, "generate": generate}
    distributed.serve(lambda request, tell: calls[request.pop("do")](**request, tell=tell))


def train_round(
    *,
    images: Json,
    config: str,
    checkpoint: str | None,
    until: int,
    out: str,
    checkpoint_s: float,
    stop: str,
    device: str,
    threads: int,
    tell: Tell,
    job: Json | None = None,
) -> Json:
    """Train one round, from its start or from the middle.

    A round that was interrupted anywhere ends, on a CPU, with the same numbers as one that was not.

    Args:
        images: what `loading.loaded` yields. `train` are `.npy` files of (n, H, W) float32 in [-1, 1] to learn from.
        config: path of config.js.
        checkpoint: where to go on: the end of another round, or the middle of this one; None starts anew.
        until: the step at which the round ends, counted from the model's first.
        out: the folder that receives `checkpoint.pt`, and `partial.<step>.pt` in the middle.
        checkpoint_s: seconds of work from one of those to the next.
        stop: a path; when there is a file, the training is saved and given up.
        device: auto, cpu or cuda.
        threads: of torch; 0 for its own choice.
        tell: receives the losses, every few seconds, and `checkpoint`, the path of each partial one, with its `step`.
        job: what the round is called where jobs train it; of no use here.

    Returns:
        `outcome`: `trained`, `paused` or `diverged`; if trained: `step`, `margin`, `losses`, `trained_s`, `device`.

    Raises:
        Unprocessable: `batch_not_divisible`, several processes cannot have equal shares of it.
    """
    del job
    where = _device(device, threads)
    parameters = TrainingConfig.of(read_config(Path(config).read_text(encoding="utf-8")))
    if parameters.batch_size % distributed.n_processes():
        raise Unprocessable("batch_not_divisible")
    real, labels = load_images(images["train"], parameters.image_size, images.get("train_labels"))
    state: Json = {}
    if checkpoint is None:
        training = start(parameters, where, n_classes=len(images.get("classes", ())))
    else:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        training = resume(parameters, state, where)
    keeper = _Keeper(Path(out), Path(stop), checkpoint_s, tell, state.get("losses", []), state.get("trained_s", 0.0))
    try:
        train_gan(
            training,
            real.to(where),
            parameters,
            keeper.report,
            labels=None if labels is None else labels.to(where),
            until=until,
            report_every=REPORT_EVERY,
            after_step=keeper.after_step,
        )
    except Diverged:
        return {"outcome": "diverged"}
    except _Paused:
        return {"outcome": "paused"}
    if distributed.is_first():
        torch.save(state_of(training), Path(out) / "checkpoint.pt")
    return {
        "outcome": "trained",
        "step": training.step,
        "margin": keeper.losses[-1]["margin"],
        "losses": keeper.losses,
        "trained_s": round(keeper.trained_s, 3),
        "device": where.type,
    }


class _Paused(Exception):  # noqa: N818 - it states what became of the training
    """The training was asked to stop, and is saved."""


@dataclass(slots=True)
class _Keeper:
    """Saves a training now and then, and tells of it."""

    folder: Path
    stop: Path
    checkpoint_s: float
    tell: Tell
    losses: list[dict[str, float]]
    """All reports of the round."""
    before_s: float
    """Seconds of work before this process."""
    began_at: float = field(default_factory=time.monotonic)
    saved_at: float = field(default_factory=time.monotonic)
    told_at: float = field(default_factory=time.monotonic)

    @property
    def trained_s(self) -> float:
        return self.before_s + time.monotonic() - self.began_at

    def report(self, progress: Progress) -> None:
        """Keep a report, and pass it on where the last one is some seconds old."""
        self.losses.append(asdict(progress))
        if time.monotonic() - self.told_at >= TELL_EVERY_S:
            self.tell(self.losses[-1])
            self.told_at = time.monotonic()

    def after_step(self, training: Training) -> None:
        """Save where it is time to, or where the training is to stop; then it raises `_Paused`."""
        stopped = distributed.agreed(wanted=self.stop.exists())
        if distributed.is_first() and (stopped or time.monotonic() - self.saved_at >= self.checkpoint_s):
            path = self.folder / f"partial.{training.step}.pt"
            state = state_of(training) | {"losses": self.losses, "trained_s": self.trained_s}
            torch.save(state, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
            self.tell({"checkpoint": str(path), "step": training.step})
            self.saved_at = time.monotonic()
        if stopped:
            raise _Paused


def evaluate_round(
    *,
    images: Json,
    config: str,
    checkpoint: str,
    out: str,
    device: str,
    threads: int,
    tell: Tell,
    extractor: Json | None = None,
) -> Json:
    """Judge what a round has trained.

    Args:
        images: as for `train_round`; `held_out` are of other patients, to be judged by.
        config: path of config.js.
        checkpoint: of the round's end.
        out: the folder that receives `images.png`.
        device: auto, cpu or cuda.
        threads: of torch; 0 for its own choice.
        tell: hears nothing.
        extractor: `path`, `sha256` and `size` of the network to compare images by; None takes `randconv-v1`.

    Returns:
        `evaluation`; None where the generated images are no finite numbers. `seconds` that it took.
    """
    del tell
    began_at = time.monotonic()
    where = _device(device, threads)
    parameters = TrainingConfig.of(read_config(Path(config).read_text(encoding="utf-8")))
    real, _ = load_images(images["train"], parameters.image_size)
    unseen, labels = load_images(images["held_out"], parameters.image_size, images.get("held_out_labels"))
    space = RANDCONV
    if extractor is not None:
        space = load_extractor(Path(extractor["path"]), extractor["sha256"], size=extractor["size"], device=where)
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    average = generation.generator_of(parameters, state["average"]).to(where)

    # As many of each class as the real images have that they are compared with.
    judged = _generate(average, EVALUATED_PER_HELD_OUT * len(unseen), EVALUATION_SEED, where, labels)
    evaluation = None
    if judged.isfinite().all():
        evaluation = evaluate(unseen, judged, real, space, where)
        shown = _generate(
            average, generation.GRID_IMAGES, SAMPLE_SEED, where, generation.labels_of(average, generation.GRID_IMAGES)
        )
        generation.save_grid(shown, Path(out) / "images.png")
    return {"evaluation": evaluation, "seconds": round(time.monotonic() - began_at, 3)}


def generate(*, device: str, threads: int, **asked: Any) -> Json:
    """Write the products of a training: what `generation.generate` takes, and where to compute."""
    return generation.generate(device=_device(device, threads), **asked)


def _generate(average: Generator, n_images: int, seed: int, device: torch.device, labels: Tensor | None) -> Tensor:
    """Generate images; `labels`, where the generator has classes, are repeated until there are enough."""
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
