"""What the trainer stores in S3 beside the models: the state of a training is nothing else."""

from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from services.trainer.policy import Observation
from shared.messages import CompletedTraining, FailedTraining, TrainingRequest, TrainingRound


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class StoredOptions(_Stored):
    """What was asked for, and of which worker, as options.json holds it."""

    request: TrainingRequest
    settings: dict[str, Any]


class StoredRound(_Stored):
    """A completed round, as evaluation.json holds it."""

    told: TrainingRound
    time: AwareDatetime
    checkpoint_key: str
    images_key: str
    margin: float
    rule: str
    """Why the round's parameters are what they are."""
    continued_from: int
    device: str
    n_features: int
    warnings: tuple[str, ...]
    losses: tuple[dict[str, float], ...]

    def observation(self) -> Observation:
        """Return what the policy looks at."""
        evaluation = self.told.evaluation
        return Observation(evaluation.relative_fd, self.margin, self.told.config, evaluation.copies)


class StoredState(_Stored):
    """How often the round that runs was tried, as state.json holds it."""

    round: int = 1
    attempts: int = 0
    """Processes that failed."""
    divergences: int = 0
    failed_of: str = ""
    """The last failure's reason."""


class StoredCompletion(_Stored):
    """The end of a training, as completed.json holds it."""

    told: CompletedTraining
    time: AwareDatetime
    best_round: int


class StoredFailure(_Stored):
    """Why a training cannot work, as failure.json holds it until the request is tried again."""

    told: FailedTraining
    time: AwareDatetime
    numbers: dict[str, int]
    """Of `too_little_data`: `n_training` and `n_held_out` images were found, `min_images` are needed of each."""


class Sidecar(_Stored):
    """What is read of the JSON document that ingest stores beside an array."""

    series_uid: str | None = None
    patient_key: str | None = None
    n: int = Field(ge=0)
