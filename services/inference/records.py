"""What the worker stores in S3, and under which keys: the state of an inference is nothing else."""

import hashlib
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict

from shared.messages import CompletedInference, FailedInference, InferenceOutput, InferenceTask, OutputFile, SeriesRef

DIGEST_LENGTH = 32


class Frozen(BaseModel):
    """What all records have."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: Literal[1] = 1


class RoutedMap(Frozen):
    """A MAP that takes a revision."""

    map: str
    map_digest: str


class Routing(Frozen):
    """`routing.json`: the MAPs that a revision was given to; none is an answer, too."""

    maps: tuple[RoutedMap, ...]
    study_maps: tuple[str, ...] = ()
    """MAPs that are given the whole study with this revision, once it has settled."""
    modality: str | None
    time: AwareDatetime


class StudyRouting(Frozen):
    """`results/<StudyUID>/study/<digest>/routing.json`: what the MAPs were given of a study as it stood."""

    series: tuple[SeriesRef, ...]
    """The newest revision of each of its series."""
    tasks: tuple[InferenceTask, ...]
    time: AwareDatetime
    """When the newest of the revisions was made: of two records, the later one has more of the study."""


class Outputs(Frozen):
    """`outputs.json`: the attempt whose instances are the result, whoever else computes it, too."""

    attempt: str
    outputs: tuple[InferenceOutput, ...]
    files: tuple[OutputFile, ...] = ()
    duration_s: float
    device: str
    time: AwareDatetime


class Result(Frozen, CompletedInference):
    """`result.json`: the target has the instances, or no series matched."""

    attempt: str
    time: AwareDatetime


class Failure(Frozen, FailedInference):
    """`failure.json`: why a request brought no result, for as long as no other request of the same MAP is tried."""

    request_id: str
    """Id of the event that asked: its repeats end with this failure, another request tries again."""
    error_type: str = ""
    time: AwareDatetime


def routing_prefix(series: SeriesRef) -> str:
    """Return the prefix of all results of one revision."""
    return f"results/{series.study_uid}/{series.series_uid}/{series.digest}/"


def study_prefix(study_uid: str) -> str:
    """Return the prefix of what was decided for the study as a whole, and of its results."""
    return f"results/{study_uid}/study/"


def result_prefix(task: InferenceTask) -> str:
    """Return the prefix of one result; that of several series of a study lies under `study`."""
    first = task.inputs[0]
    if len(task.inputs) == 1:
        return f"{routing_prefix(first)}{task.map}@{task.map_digest}/"
    lines = sorted(f"{series.series_uid}:{series.digest}" for series in task.inputs)
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:DIGEST_LENGTH]
    return f"{study_prefix(first.study_uid)}{digest}/{task.map}@{task.map_digest}/"
