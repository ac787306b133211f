"""The messages between the service and the process that computes: `run.Run` asks, `worker` answers.

Files are passed by path. The field `do` tells the requests apart, and each request names its type of reply.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Discriminator, TypeAdapter

from shared.child import Json, Message, Request
from shared.documents.arrays import Units
from shared.messages import Evaluation


@dataclass(frozen=True, slots=True)
class Images(Message):
    """Arrays, `.npy` files of (n, H, W) float32 in [-1, 1], and the class of each array if there are classes."""

    train: Sequence[str]
    """Paths of the arrays to train on."""
    held_out: Sequence[str]
    """Paths of the arrays to evaluate with, of other patients."""
    classes: Sequence[str] = ()
    """Names of the classes; empty if there are none."""
    train_labels: Sequence[int] | None = None
    """The class of each array of `train`, as its place in `classes`."""
    held_out_labels: Sequence[int] | None = None
    """The class of each array of `held_out`, as its place in `classes`."""


# Train.


@dataclass(frozen=True, slots=True)
class Losses(Message):
    """A report of a training: means since the last one, see `services.trainer.gan.training.Progress`."""

    step: int
    generator_loss: float
    discriminator_loss: float
    margin: float
    told_apart: float
    augmentation: float
    kind: Literal["losses"] = "losses"


@dataclass(frozen=True, slots=True)
class Saved(Message):
    """A checkpoint was saved in the middle of a round."""

    checkpoint: str
    """The path of the checkpoint."""
    step: int
    kind: Literal["saved"] = "saved"


News = Losses | Saved
"""The messages that a training sends on its way."""


@dataclass(frozen=True, slots=True)
class Trained(Message):
    """The round is trained, and `checkpoint.pt` is written."""

    step: int
    margin: float
    losses: Sequence[Mapping[str, float]]
    """All reports of the round."""
    trained_s: float
    device: str
    outcome: Literal["trained"] = "trained"


@dataclass(frozen=True, slots=True)
class Paused(Message):
    """The training was asked to stop, and is saved."""

    outcome: Literal["paused"] = "paused"


@dataclass(frozen=True, slots=True)
class Diverged(Message):
    """A loss is hopelessly large, or no longer a finite number."""

    outcome: Literal["diverged"] = "diverged"


Outcome = Annotated[Trained | Paused | Diverged, Discriminator("outcome")]
OUTCOMES: TypeAdapter[Outcome] = TypeAdapter(Outcome)


@dataclass(frozen=True, slots=True)
class Job:
    """The names of a round that SageMaker jobs train."""

    folder: str
    """The training's folder in the bucket, `models/<request id>`."""
    name: str
    """The round and the try, `<round>-<try>`."""


@dataclass(frozen=True, slots=True)
class Train(Request[Outcome]):
    """Train one round, from its start or from the middle.

    Refused with `batch_not_divisible` if several processes cannot have equal shares of a batch.
    """

    images: Images
    config: str
    """Path of config.js."""
    checkpoint: str | None
    """Path of the checkpoint to go on from: the end of another round, or the middle of this one; None starts anew."""
    until: int
    """The step at which the round ends, counted from the model's first."""
    out: str
    """The folder that receives `checkpoint.pt`, and `partial.<step>.pt` in the middle."""
    checkpoint_s: float
    """Seconds of work from one checkpoint in the middle to the next."""
    stop: str
    """A path; once a file is there, the training is saved and ends."""
    device: str
    """auto, cpu or cuda."""
    threads: int
    """Threads that torch computes with; 0 leaves the number to torch."""
    job: Job | None = None
    """The names for SageMaker jobs; None trains on this machine."""
    do: Literal["train"] = "train"
    news = Annotated[News, Discriminator("kind")]


# Evaluate.


@dataclass(frozen=True, slots=True)
class Extractor(Message):
    """A network to compare images by."""

    path: str
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Evaluated(Message):
    """The evaluation of a round."""

    evaluation: Evaluation | None
    """The numbers; None if generated images hold values that are not finite."""
    n_features: int
    """Dimensions of the space where distances were taken."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Evaluate(Request[Evaluated]):
    """Judge what a round has trained, and write `images.png`."""

    images: Images
    config: str
    """Path of config.js."""
    checkpoint: str
    """Path of the checkpoint of the round's end."""
    out: str
    """The folder that receives `images.png`."""
    device: str
    threads: int
    extractor: Extractor | None = None
    """The network to compare images by; None takes `randconv-v1`."""
    do: Literal["evaluate"] = "evaluate"


# Generate.


@dataclass(frozen=True, slots=True)
class Generated(Message):
    """Some images are generated."""

    generated: int
    """How many images there are so far."""


@dataclass(frozen=True, slots=True)
class Products(Message):
    """What was made of a finished model."""

    files: Sequence[str]
    sha256: str
    """The hash of `generator.pt`, the weights."""
    images_seen: int
    seed: int


@dataclass(frozen=True, slots=True)
class Generate(Request[Products]):
    """Write the products of a training into a folder, as `services.trainer.products.generation.generate` says."""

    config: str
    checkpoint: str
    n_images: int
    out: str
    rounds: str | None
    units: Units
    classes: Sequence[str]
    device: str
    threads: int
    do: Literal["generate"] = "generate"
    news = Generated


AnyRequest = Annotated[Train | Evaluate | Generate, Discriminator("do")]
_REQUESTS: TypeAdapter[AnyRequest] = TypeAdapter(AnyRequest)


def read(told: Json) -> AnyRequest:
    """Return the request that came as JSON."""
    return _REQUESTS.validate_python(told)
