"""What the worker stores in S3, and under which keys: the state of an inference is nothing else."""

import hashlib
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict

from shared.messages import CompletedInference, FailedInference, InferenceOutput, InferenceTask, SeriesRef

DIGEST_LENGTH = 32


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: Literal[1] = 1


class RoutedMap(_Frozen):
    """A MAP that takes a revision."""

    map: str
    map_digest: str


class Routing(_Frozen):
    """`routing.json`: the MAPs that a revision was given to; none is an answer, too."""

    maps: tuple[RoutedMap, ...]
    modality: str | None
    time: AwareDatetime


class Outputs(_Frozen):
    """`outputs.json`: the attempt whose instances are the result, whoever else computes it, too."""

    attempt: str
    outputs: tuple[InferenceOutput, ...]
    duration_s: float
    device: str
    time: AwareDatetime


class Result(_Frozen, CompletedInference):
    """`result.json`: the archive has the instances, or no series matched."""

    attempt: str
    time: AwareDatetime


class Failure(_Frozen, FailedInference):
    """`failure.json`: why a request brought no result, for as long as no other request of the same MAP is tried."""

    request_id: str
    """Id of the event that asked: its repeats end with this failure, another request tries again."""
    error_type: str = ""
    where: str = ""
    """File and line of the exception, or the keywords of DICOM attributes; never a value."""
    time: AwareDatetime


def routing_prefix(series: SeriesRef) -> str:
    """Return the prefix of all results of one revision."""
    return f"results/{series.study_uid}/{series.series_uid}/{series.digest}/"


def result_prefix(task: InferenceTask) -> str:
    """Return the prefix of one result; that of several series of a study lies under `study`."""
    first = task.inputs[0]
    if len(task.inputs) == 1:
        return f"{routing_prefix(first)}{task.map}@{task.map_digest}/"
    lines = sorted(f"{series.series_uid}:{series.digest}" for series in task.inputs)
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:DIGEST_LENGTH]
    return f"results/{first.study_uid}/study/{digest}/{task.map}@{task.map_digest}/"
