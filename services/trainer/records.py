"""What the trainer stores in S3 beside the models: the state of a training is nothing else."""

import math
from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from services.trainer.config import Value
from services.trainer.data.units import Units
from services.trainer.strategy.policy import Goal, Observation
from shared.messages import CompletedTraining, FailedTraining, Name, TrainingRequest, TrainingRound


def goal_of(request: TrainingRequest) -> Goal:
    """Return what the policy is to reach."""
    return Goal(request.threshold, request.metric, request.min_coverage, request.max_rounds)


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class StoredOptions(_Stored):
    """What was asked for, and of which worker, as options.json holds it."""

    request: TrainingRequest
    settings: dict[str, Any]
    time: AwareDatetime | None = None
    """When it was asked for."""


class StoredPlan(_Stored):
    """What a round is to do, as plan.<try>.json holds it: a worker that goes on with it decides nothing anew."""

    round: int
    number: int
    """Of the try, from 0: how often the round diverged before."""
    rule: str
    """Why the parameters are what they are."""
    changes: dict[str, Value]
    continue_from: int
    """The round whose model is trained on; 0 is a new one."""
    until: int
    """The step, counted from the model's first, at which the round ends."""
    config: str
    """config.js."""


class StoredPartial(_Stored):
    """A round's newest checkpoint, as partial.<try>.json names it."""

    epoch: int
    """Of the lease of who wrote this."""
    step: int
    key: str
    sha256: str


class StoredTrained(_Stored):
    """A round that is trained and not evaluated, as trained.<try>.json holds it."""

    checkpoint_key: str
    step: int = 0
    """The last one, counted from the model's first."""
    margin: float
    device: str
    losses: tuple[dict[str, float], ...]
    trained_s: float = 0
    """Seconds of training, those that were lost with a process left out."""


class StoredRound(StoredTrained):
    """A completed round, as evaluation.json holds it."""

    told: TrainingRound
    time: AwareDatetime
    images_key: str
    continued_from: int
    n_features: int

    def observation(self) -> Observation:
        """Return what the policy looks at."""
        evaluation = self.told.evaluation
        made, real = evaluation.quality, evaluation.real_quality
        return Observation(
            self.told.config,
            relative_fd=evaluation.relative_fd,
            distance=evaluation.distance,
            kid=made.kid if made else math.inf,
            coverage=made.coverage / real.coverage if made and real and real.coverage else 1.0,
            precision=made.precision / real.precision if made and real and real.precision else 1.0,
            margin=self.margin,
            told_apart=self.losses[-1].get("told_apart", 0.0) if self.losses else 0.0,
            copies=evaluation.copies,
        )


class StoredState(_Stored):
    """How often the round that runs was tried, as state.json holds it."""

    round: int = 1
    attempts: int = 0
    """Processes that failed, one after the other, without coming further."""
    reached: int = 0
    """The step of the last checkpoint when the last one failed."""
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


class StoredDescription(_Stored):
    """What is read again of generator.json, which says what generator.pt is."""

    request_id: str | None = None
    approved: bool | None = None
    sha256: str
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the images that were made when the training ended."""
    classes: tuple[Name, ...] = ()
    units: Units = Units()
    config: dict[str, Value]
