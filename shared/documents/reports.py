"""The report of a month, as it is stored."""

from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from shared.documents.document import Stored
from shared.messages import Evaluation

TrainingStatus = Literal["approved", "rounds_used_up", "failed", "running"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class Round(_Frozen):
    """One round of a training."""

    round: int
    time: AwareDatetime
    steps: int
    duration_s: float
    evaluation: Evaluation
    approved: bool
    why_not: str = ""
    """The reason, in words, why the model is not approved; empty if it is."""
    config: dict[str, int | float | str | bool]


class Training(_Frozen):
    """One training request, as far as its events fell into the month."""

    request_id: str
    dataset: str
    status: TrainingStatus
    """`running`: no event of the month ended it."""
    reason_code: str | None = None
    """The code of why the training failed; None unless it did."""
    rounds: tuple[Round, ...] = ()
    rounds_used: int | None = None
    """All rounds of the training, when it ended; more than `rounds` holds if it began in an earlier month."""
    evaluation: Evaluation | None = None
    """The evaluation of the model that was kept, or of the last round while the training runs."""
    why_not: str = ""
    """The reason, in words, why that model is not approved; empty if it is."""
    config: dict[str, int | float | str | bool] = {}
    """The parameters of that model."""
    generator_key: str | None = None
    images_key: str | None = None
    images_array_key: str | None = None


class Durations(_Frozen):
    """Wall seconds of the runs of a MAP that completed, on one kind of device."""

    device: str
    n: int
    p50_s: float
    p95_s: float
    longest_s: float


class MapStatistics(_Frozen):
    """One version of one MAP."""

    map: str
    map_digest: str
    outcomes: dict[str, int]
    """Number of runs by outcome: `completed`, `no_matching_series`, `failed`."""
    failures_by_reason: dict[str, int] = {}
    durations: tuple[Durations, ...] = ()
    n_outputs: int = 0
    """Number of DICOM instances that the runs made."""


class SeriesStatistics(_Frozen):
    """Series that settled; a late instance makes a new revision of the same series."""

    n_series: int = 0
    n_revisions: int = 0
    n_instances: int = 0
    """Number of instances in the latest revision of each series."""
    n_with_warnings: int = 0
    by_modality: dict[str, int] = {}
    """Number of series by Modality; `other` is a value outside DICOM's defined terms, `none` a missing one."""


class Report(Stored):
    """A month: what is stored as `reports/<YYYY-MM>.json`."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    month: str
    generated_at: AwareDatetime
    month_is_over: bool
    """False if more events of this month may come."""
    n_events: int
    """Number of different events."""
    n_repeats: int
    """Number of repeated deliveries of an event, which are not counted above."""
    n_unreadable: int
    """Number of lines of the event log that no known event could be read from, which are not counted above either."""
    training: tuple[Training, ...]
    inference: tuple[MapStatistics, ...]
    skipped_by_modality: dict[str, int] = Field(default={})
    """Number of revisions that no MAP takes, by the Modality of the series."""
    series: SeriesStatistics
    rejections_by_reason: dict[str, int]
    failures_by_reason: dict[Literal["inference", "training"], dict[str, int]]
