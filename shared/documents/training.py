"""What the trainer stores beside the models: the state of a training is nothing else."""

from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from shared.documents.arrays import Units
from shared.documents.document import Stored
from shared.messages import CompletedTraining, FailedTraining, Name, TrainingRequest, TrainingRound

Value = int | float | str | bool
"""The value of a parameter of config.js."""


class Array(BaseModel):
    """One array of slices, (n, H, W) float32 in [-1, 1], as it stood when the training began."""

    model_config = ConfigDict(frozen=True)

    key: str
    """The key of the array, or its path at the address that the request names."""
    etag: str
    """The ETag, by which the store tells versions apart."""
    sha256: str = ""
    """The sha256 of the file, in hex; empty in manifests of the first version."""
    series_uid: str
    group: str
    """The patient's key, or the series if the patient is unknown. A group is never split."""
    n: int = 0
    """Number of slices, which is known once the array is fetched."""
    held_out: bool = False
    class_name: str | None = None
    modality: str | None = None
    window: tuple[float, float] | None = None
    """Modality values that became -1 and 1."""


class Manifest(Stored):
    """The data of a training; stored beside the model."""

    dataset: str
    arrays: tuple[Array, ...]
    classes: tuple[str, ...] = ()
    """Names of the classes; the label of a class is its place here. Empty if there are fewer than two."""
    source: str | None = None
    """The address that the request named; None if the arrays lie in the bucket."""
    listing_hash: str = ""
    """Hash of what was found at the first start; copies of the arrays are kept under it."""

    def labels(self, *, held_out: bool) -> list[int]:
        """Return the labels of the arrays of one side; an empty list if there are no classes."""
        return [
            self.classes.index(array.class_name)
            for array in self.arrays
            if array.class_name in self.classes and array.held_out == held_out
        ]

    def n_images(self, *, held_out: bool) -> int:
        """Count the images of one side of the split."""
        return sum(array.n for array in self.arrays if array.held_out == held_out)


class StoredOptions(Stored):
    """What was asked for, and of which worker, as options.json holds it."""

    request: TrainingRequest
    settings: dict[str, Any]
    time: AwareDatetime | None = None
    """The time of the request."""


class StoredPlan(Stored):
    """What a round is to do, as plan.<try>.json holds it: a worker that goes on with it decides nothing anew."""

    round: int
    number: int
    """The number of the try, from 0: how often the round diverged before."""
    rule: str
    """The rule that chose the parameters."""
    changes: dict[str, Value]
    continue_from: int
    """The round whose model is trained on; 0 is a new one."""
    until: int
    """The step, counted from the model's first, at which the round ends."""
    config: str
    """The content of config.js."""


class StoredPartial(Stored):
    """A round's newest checkpoint, as partial.<try>.json names it."""

    epoch: int
    """The epoch of the lease under which this was written."""
    step: int
    key: str
    sha256: str


class StoredTrained(Stored):
    """A round that is trained and not evaluated, as trained.<try>.json holds it."""

    checkpoint_key: str
    step: int = 0
    """The last step, counted from the model's first."""
    margin: float
    device: str
    losses: tuple[dict[str, float], ...]
    trained_s: float = 0
    """Seconds of training, without those that were lost with a process."""


class StoredRound(StoredTrained):
    """A completed round, as evaluation.json holds it."""

    told: TrainingRound
    time: AwareDatetime
    images_key: str
    continued_from: int
    n_features: int


class StoredState(Stored):
    """How often the round that runs was tried, as state.json holds it."""

    round: int = 1
    attempts: int = 0
    """Number of processes that failed, one after the other, without coming further."""
    reached: int = 0
    """The step of the last checkpoint when the last process failed."""
    divergences: int = 0
    failed_of: str = ""
    """The reason code of the last failure."""


class StoredProgress(Stored):
    """How far the round that runs is, as progress.json holds it."""

    round: int
    step: int
    """The number of the step, from the start of the round."""
    of_steps: int
    images_seen: int
    """Number of images seen since the model was new."""
    generator_loss: float
    discriminator_loss: float
    time: AwareDatetime


class StoredStep(Stored):
    """The reply of the step that was run last, as step.json holds it; each step has more to tell of its own."""

    model_config = ConfigDict(extra="allow")

    step: str
    next: str | None = None
    """The step to come; None after the last."""


class StoredCompletion(Stored):
    """The end of a training, as completed.json holds it."""

    told: CompletedTraining
    time: AwareDatetime
    best_round: int


class StoredFailure(Stored):
    """Why a training cannot work, as failure.json holds it until the request is tried again."""

    told: FailedTraining
    time: AwareDatetime


class StoredDescription(Stored):
    """What is read again of generator.json, which says what generator.pt is."""

    request_id: str | None = None
    approved: bool | None = None
    sha256: str
    seed: int = Field(default=0, ge=0, lt=2**63)
    """The seed of the images that were made when the training ended."""
    classes: tuple[Name, ...] = ()
    units: Units = Units()
    config: dict[str, Value]
