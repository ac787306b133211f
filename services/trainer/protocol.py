"""What the service and the process that computes say to each other: `run.Run` asks, `worker` answers.

Files come and go by path. Each request is told by its `do`, and names its reply.
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
    """Arrays, `.npy` files of (n, H, W) float32 in [-1, 1], and where there are classes the one of each array."""

    train: Sequence[str]
    """To learn from."""
    held_out: Sequence[str]
    """Of other patients, to be judged by."""
    classes: Sequence[str] = ()
    """Their names."""
    train_labels: Sequence[int] | None = None
    """Places in `classes`."""
    held_out_labels: Sequence[int] | None = None


# Train.


@dataclass(frozen=True, slots=True)
class Losses(Message):
    """How the training goes: means since the last report, see `services.trainer.gan.training.Progress`."""

    step: int
    generator_loss: float
    discriminator_loss: float
    margin: float
    told_apart: float
    augmentation: float
    kind: Literal["losses"] = "losses"


@dataclass(frozen=True, slots=True)
class Saved(Message):
    """There is a checkpoint of the middle of a round."""

    checkpoint: str
    """Its path."""
    step: int
    kind: Literal["saved"] = "saved"


News = Losses | Saved
"""What a training tells on its way."""


@dataclass(frozen=True, slots=True)
class Trained(Message):
    """The round is trained, and `checkpoint.pt` there."""

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
    """The losses are no numbers any more, or hopeless."""

    outcome: Literal["diverged"] = "diverged"


Outcome = Annotated[Trained | Paused | Diverged, Discriminator("outcome")]
OUTCOMES: TypeAdapter[Outcome] = TypeAdapter(Outcome)


@dataclass(frozen=True, slots=True)
class Job:
    """What a round is called where jobs train it."""

    folder: str
    """`models/<request id>`."""
    name: str


@dataclass(frozen=True, slots=True)
class Train(Request[Outcome]):
    """Train one round, from its start or from the middle.

    Refused with `batch_not_divisible` where several processes cannot have equal shares of a batch.
    """

    images: Images
    config: str
    """Path of config.js."""
    checkpoint: str | None
    """Where to go on: the end of another round, or the middle of this one; None starts anew."""
    until: int
    """The step at which the round ends, counted from the model's first."""
    out: str
    """The folder that receives `checkpoint.pt`, and `partial.<step>.pt` in the middle."""
    checkpoint_s: float
    """Seconds of work from one of those to the next."""
    stop: str
    """A path; when there is a file, the training is saved and given up."""
    device: str
    """auto, cpu or cuda."""
    threads: int
    """Of torch; 0 for its own choice."""
    job: Job | None = None
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
    """A round's evaluation; None where the generated images are no finite numbers."""

    evaluation: Evaluation | None
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
    """Of the round's end."""
    out: str
    """The folder that receives `images.png`."""
    device: str
    threads: int
    extractor: Extractor | None = None
    """None takes `randconv-v1`."""
    do: Literal["evaluate"] = "evaluate"


# Generate.


@dataclass(frozen=True, slots=True)
class Generated(Message):
    """So many images are there."""

    generated: int


@dataclass(frozen=True, slots=True)
class Products(Message):
    """What was made of a finished model."""

    files: Sequence[str]
    sha256: str
    """Of the weights."""
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
