"""What the inference worker stores of its work: the state of an inference is nothing else."""

from pydantic import AwareDatetime

from shared.documents.document import Stored
from shared.messages import CompletedInference, FailedInference, InferenceOutput, InferenceTask, OutputFile, SeriesRef


class RoutedMap(Stored):
    """A MAP that takes a revision."""

    map: str
    map_digest: str


class Routing(Stored):
    """`routing.json`: the MAPs that a revision was given to, which may be none."""

    maps: tuple[RoutedMap, ...]
    study_maps: tuple[str, ...] = ()
    """MAPs that are given the whole study with this revision, once it has settled."""
    modality: str | None
    time: AwareDatetime


class StudyRouting(Stored):
    """`results/<StudyUID>/study/<digest>/routing.json`: what the MAPs were given of a study as it stood."""

    series: tuple[SeriesRef, ...]
    """The newest revision of each series of the study."""
    tasks: tuple[InferenceTask, ...]
    time: AwareDatetime
    """The time at which the newest of the revisions was made: of two records, the later one has more of the study."""


class Outputs(Stored):
    """`outputs.json`: the attempt whose instances are the result, even if other workers compute it, too."""

    attempt: str
    outputs: tuple[InferenceOutput, ...]
    files: tuple[OutputFile, ...] = ()
    duration_s: float
    device: str
    time: AwareDatetime


class Result(Stored, CompletedInference):
    """`result.json`: the target has the instances, or no series matched."""

    attempt: str
    time: AwareDatetime


class Failure(Stored, FailedInference):
    """`failure.json`: why a request brought no result, for as long as no other request of the same MAP is tried."""

    request_id: str
    """The id of the event that asked: its repeats end with this failure, another request tries again."""
    error_type: str = ""
    time: AwareDatetime
