"""The contract: every message that crosses a queue, as CloudEvents 1.0 in JSON, and the S3 notifications we receive.

Each event class is frozen and told apart by its `type`, which ends in a version. Unknown additional fields are
accepted, an unknown type is not. An event's id is a uuid5 of its type, subject and data: what is announced twice is the
same event, and a consumer discards the repeat by its id.
"""

import hashlib
import json
import re
import uuid
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal, Self, get_args
from urllib.parse import unquote_plus

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from shared.errors import Unprocessable

EVENT_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "events.radqueue.org")

Uid = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)*$", max_length=64)]
"""A DICOM UID (PS3.5 section 9.1), which may become a part of a key."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")]
"""A dataset, request or MAP name: a part of a key that a person chose."""
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{16,64}$")]
Month = Annotated[str, Field(pattern=r"^[0-9]{4}-(0[1-9]|1[0-2])$")]
EventId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:/-]{0,127}$")]
Traceparent = Annotated[str | None, BeforeValidator(lambda given: given if _is_traceparent(given) else None)]
"""W3C trace context; one that is malformed is left out, as the standard wants."""
Time = Annotated[AwareDatetime, Field(ge=datetime(1970, 1, 1, tzinfo=UTC), lt=datetime(9998, 1, 1, tzinfo=UTC))]
"""A time that can be reckoned with in every time zone."""
Queue = Literal["ingest", "inference", "training", "reporting"]
Verdict = Literal[
    "localizer", "single", "mixed", "unknown", "4d", "repeated", "gaps", "uneven", "tilted", "regular", "irregular"
]
"""The verdicts on the geometry of a series."""


def _is_traceparent(given: object) -> bool:
    return (
        isinstance(given, str) and re.fullmatch(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", given) is not None
    )


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


# The data of the events.


class SeriesRef(_Frozen):
    """One revision of one series."""

    study_uid: Uid
    series_uid: Uid
    digest: Digest
    """Hash of the sorted (SOPInstanceUID, sha) of the series."""
    revision_key: str
    """Key of the document that describes the revision."""


class Geometry(_Frozen):
    """How the slices of a series lie in space; lengths in mm, in the patient coordinate system of PS3.3 C.7.6.2.

    If a series has several stacks (slices of one size and direction), the numbers are those of the largest.
    """

    verdict: Annotated[Verdict, BeforeValidator(lambda given: "regular" if given == "volume" else given)]
    """The first verdict that is true, see docs/ingest.md; the first version said `volume` and `irregular`."""
    n_slices: int
    """Slices of all stacks."""
    n_positions: int
    """Distinct positions along the normal; smaller than n_slices if slices repeat."""
    n_stacks: int = 1
    n_in_stack: int | None = None
    """Slices of the largest stack."""
    n_sets: int = 1
    """The largest number of slices at one position; in a 4-D series every position has as many."""
    normal: tuple[float, float, float] | None = None
    """Unit normal of the slices: row direction x column direction."""
    spacing_mm: float | None = None
    """Median distance of neighbouring slices along the normal."""
    spacing_min_mm: float | None = None
    spacing_max_mm: float | None = None
    n_gaps: int = 0
    """Steps of at least 1.5 times the median spacing."""
    tilt_deg: float | None = None
    """Gantry tilt found from the vectors, with the sign of GantryDetectorTilt (0018,1120)."""
    tilt_tag_deg: float | None = None
    """Gantry tilt as GantryDetectorTilt (0018,1120) has it."""


class SettlingSeries(_Frozen):
    """A series that receives instances; it is looked at when this message becomes visible."""

    dataset: Name
    """The dataset that the instances were uploaded into."""
    study_uid: Uid
    series_uid: Uid
    bucket: str
    """The time bucket whose marker guards this message."""
    first_seen: Time
    """When the first message of the bucket was sent."""


class ReadySeries(SeriesRef):
    """A stable series: no more instances are expected."""

    dataset: Name
    """The dataset that the series was uploaded into."""
    n_instances: int
    modality: str | None = None
    """The Modality of the series, such as `CT`."""
    warnings: tuple[str, ...] = ()
    """Codes of what was noticed, as docs/ingest.md lists them."""
    array_key: str | None = None
    """Key of the training array; left out if there is none, or if it must not be linked with the series."""
    supersedes: Digest | None = None
    """Digest of the revision that this one replaces."""
    geometry: Geometry | None = None
    """The position of the slices in space; left out for a series without images."""
    deidentified: bool = False
    """True if the instances were de-identified before they were stored: their results are not pushed to any target."""


class RejectedUpload(_Frozen):
    """An uploaded object, or a member of a zip, that was refused."""

    dataset: Name
    """The dataset that it was uploaded into."""
    upload_key_sha256: str
    """Hash of the upload's key, which itself may hold a name."""
    object_sha256: str
    """Hash of the uploaded bytes."""
    reason_code: str
    """One of the codes of docs/ingest.md."""
    quarantine_key: str
    """Key of the document that gives the reason."""


class InferenceTask(_Frozen):
    """One MAP to run over one or more series of a study."""

    map: Name
    """Name of the MAP in the routing table."""
    map_digest: Digest
    """Digest of its version."""
    inputs: tuple[SeriesRef, ...] = Field(min_length=1)
    """The revisions that it is given."""


class SettlingStudy(_Frozen):
    """A study with stable series; it is looked at as a whole when this message becomes visible."""

    study_uid: Uid
    bucket: str
    """The time bucket whose marker guards this message."""
    first_seen: Time
    """When the first message of the bucket was sent."""


class SkippedInference(SeriesRef):
    """A revision that no MAP runs on."""

    modality: str | None = None
    """The Modality of the series, such as `CT`."""
    reason_code: str
    """`no_route`: the revision's attributes meet no MAP's conditions."""


class InferenceOutput(_Frozen):
    """One DICOM instance that a MAP made and the target took."""

    sop_class_uid: Uid
    sop_instance_uid: Uid
    series_uid: Uid
    key: str
    """Where it is in the bucket."""
    image_set_id: str | None = None
    """The image set that holds the instance, if the target is HealthImaging."""


class OutputFile(_Frozen):
    """A file that a MAP made and that is not DICOM: it stays in S3."""

    key: str
    """Where it is in the bucket."""
    media_type: str
    n_bytes: int


class CompletedInference(InferenceTask):
    """A MAP that did its work. `no_matching_series` is not a failure: the MAP found nothing to work on."""

    outcome: Literal["completed", "no_matching_series"]
    result_key: str
    """Key of the document that has the whole result."""
    outputs: tuple[InferenceOutput, ...] = ()
    """The first outputs: a message holds 1 MiB. All are in the object under `result_key`."""
    n_outputs: int = 0
    """Number of all outputs."""
    files: tuple[OutputFile, ...] = ()
    """The first outputs that are not DICOM; all are under `result_key`."""
    pushed_to: str | None = None
    """The target: `healthimaging`, `healthimaging-import` or `dicomweb`; `s3` if the outputs were to stay there."""
    duration_s: float
    """Wall seconds that the MAP ran."""
    device: str = "cpu"
    """The kind of device that the MAP ran on."""


class FailedInference(InferenceTask):
    """A MAP that could not do its work."""

    attempt: str
    """Name of the run that failed."""
    reason_code: str
    """One of the codes of services/inference/reasons.py."""
    failure_key: str
    """Key of the document that tells more."""
    where: str = ""
    """File and line of an exception, or the keywords of DICOM attributes; never a value."""


class UpdatedMap(_Frozen):
    """A new version of a MAP, which serves from now on."""

    map: Name
    """Name of the MAP in the routing table."""
    map_digest: Digest
    """Digest of the new version."""
    source: str
    """Where the version came from: a folder, or an image with its digest."""
    previous_digest: Digest | None = None
    """The version that served before; left out for a MAP that is new."""
    since: AwareDatetime | None = None
    """The time at which it took over, from the record of what serves: a version that comes back is another event."""


class RejectedMap(_Frozen):
    """A new version of a MAP that failed its trial; the one that served before goes on."""

    map: Name
    """Name of the MAP in the routing table."""
    map_digest: Digest
    """Digest of the new version."""
    source: str
    """Where the version came from: a folder, or an image with its digest."""
    reason_code: str
    """One of the codes of services/inference/reasons.py."""
    serving_digest: Digest | None = None
    """The version that serves; left out if there was none before."""
    since: AwareDatetime | None = None
    """The time of the rejection, from its record."""


class TrainingRequest(_Frozen):
    """What a researcher asks for."""

    request_id: Name
    """Name of this training: all of it lies under `models/<request id>/`, and two requests cannot share it."""
    dataset: Name
    """The dataset to train on."""
    data_uri: str | None = Field(default=None, max_length=1024, pattern=r"^[a-z][a-z0-9]*://[^\s?#]+$")
    """Address of the arrays and their sidecars, if not `datasets/` in the bucket: `gs://bucket/folder`, `s3://…`."""
    classes: dict[Name, Name] = Field(default={}, max_length=100)
    """The dataset of each class's images, by the name of the class; with `data_uri`, the folder there."""
    overrides: dict[str, int | float | str | bool] = {}
    """Parameters of config.js to start with."""
    threshold: float = Field(default=2.0, gt=0)
    """A model is approved when the metric is at or below this threshold."""
    metric: Literal["relative_fd", "distance", "kid"] = "relative_fd"
    """The number that is compared; `distance` is the FID if the trainer compares by the Inception network."""
    min_coverage: float = Field(default=0.5, ge=0, le=1)
    """Share of the coverage of other real images below which a model is not approved."""
    strategy: Literal["rules", "optuna"] = "rules"
    """The way a further round gets its parameters: by rules, or by Optuna's search if the trainer has it."""
    max_rounds: int = Field(default=5, ge=1, le=100)
    """Rounds after which the training ends without an approved model."""
    n_images: int = Field(default=16, ge=1, le=10_000)
    """Number of images that the model generates at the end."""


class Quality(_Frozen):
    """How one set of images compares with the held-out real ones; docs/metrics.md says what each number means."""

    kid: float
    """Kernel distance (KID), unbiased; around zero for images of the same distribution."""
    kid_spread: float
    """Standard deviation of the KID over subsets."""
    precision: float
    recall: float
    density: float
    coverage: float
    sliced_wasserstein: float


class Memorisation(_Frozen):
    """Whether generated images are copies of training images: a nearest-neighbour test against held-out real ones."""

    n: int
    """Number of generated images that were judged."""
    n_held_out: int
    """Number of held-out images that the limits come from."""
    copied_share: float
    """Share of images that are nearer to a training image than 99 % of the held-out ones are."""
    far_nearer_share: float
    """Share of images that are nearer than half of the nearest held-out one's distance."""
    flagged: bool
    """True if more images are near than chance explains: the model is not approved then."""


class Evaluation(_Frozen):
    """How far generated images are from held-out real ones."""

    metric: str
    """`FD` in a named feature space; `FID` only with Inception features."""
    space: str
    """Name of the feature space, see docs/metrics.md."""
    n: int
    """Images on each side of the comparison."""
    distance: float
    """Distance of the generated images from the held-out real ones."""
    floor: float
    """Distance between two disjoint sets of real images, of the same n."""
    relative_fd: float
    """The distance divided by the floor."""
    quality: Quality | None = None
    """Quality of the generated images."""
    real_quality: Quality | None = None
    """Quality of other real images by the same reference: what can be reached."""
    memorisation: Memorisation | None = None
    """The test for copies of training images."""
    warnings: tuple[str, ...] = ()
    """`few_images`; `…_disagrees`, a number that contradicts the distance; `copies`."""

    @property
    def copies(self) -> bool:
        """Whether the model copies images it was trained on."""
        return self.memorisation is not None and self.memorisation.flagged


class TrainingRound(_Frozen):
    """One round of train and evaluate."""

    request_id: Name
    dataset: Name
    round: int
    """Number of the round, from 1."""
    steps: int
    """Steps that the round trained."""
    rule: str = ""
    """The rule that chose the parameters, see services/trainer/strategy/policy.py."""
    evaluation: Evaluation
    approved: bool
    why_not: str = ""
    """The reason, in words, why the model is not approved; empty if it is."""
    config: dict[str, int | float | str | bool]
    """The parameters of config.js that the round used."""
    config_key: str
    """Key of the round's config.js."""
    duration_s: float
    """Seconds of training and evaluation."""


class CompletedTraining(_Frozen):
    """A training that ended: approved, or out of rounds."""

    request_id: Name
    dataset: Name
    approved: bool
    why_not: str = ""
    """The reason, in words, why the best model is not approved; empty if it is."""
    rounds: int
    """Number of rounds that were completed."""
    evaluation: Evaluation
    """The evaluation of the best round."""
    config: dict[str, int | float | str | bool]
    """The parameters of config.js of the best round."""
    generator_key: str
    """Key of the generator's weights."""
    images_key: str
    """Key of a PNG grid of generated images."""
    images_array_key: str
    """Key of the generated images as an array."""


class FailedTraining(_Frozen):
    """A training that cannot work as asked: there is too little data, for instance."""

    request_id: Name
    dataset: Name
    reason_code: str
    """One of the codes of services/trainer/reasons.py."""
    numbers: dict[str, int] = {}
    """Numbers that explain the reason, such as `n_training`, `n_held_out` and `min_images` of `too_little_data`."""


class ReportRequest(_Frozen):
    """What a person or a schedule asks for."""

    month: Month | None = None
    """The month to report, such as `2026-11`; without one, the month before the event's time."""


# The envelopes.


class Event(_Frozen):
    """A CloudEvent. `of` builds one; subclasses fix `type`, `source` and the class of `data`."""

    producer: ClassVar[str]
    queues: ClassVar[tuple[Queue, ...]]
    """The queues that the event is sent to."""

    specversion: Literal["1.0"] = "1.0"
    id: EventId
    source: str = Field(min_length=1)
    type: str
    time: Time
    subject: str | None = None
    datacontenttype: Literal["application/json"] = "application/json"
    traceparent: Traceparent = None
    data: Any

    @classmethod
    def of(cls, subject: str, data: BaseModel, *, time: datetime) -> Self:
        """Build the event that says `data` of `subject`; `time` is when that became true, not now."""
        type_ = cls.model_fields["type"].default
        event_data = json.dumps(data.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        identity = uuid.uuid5(EVENT_NAMESPACE, f"{type_}\n{subject}\n{event_data}")
        return cls(type=type_, id=str(identity), source=cls.producer, time=time, subject=subject, data=data)

    def body(self) -> str:
        """Return the message body."""
        return self.model_dump_json(exclude_none=True)


class SeriesSettling(Event):
    """A series receives instances: ingest tells itself, delayed, to look at it again."""

    producer = "radqueue/ingest"
    queues = ("ingest",)
    type: Literal["radqueue.series.settling.v1"] = "radqueue.series.settling.v1"
    data: SettlingSeries


class SeriesReady(Event):
    """A series is stable, and its revision is stored."""

    producer = "radqueue/ingest"
    queues = ("inference", "reporting")
    type: Literal["radqueue.series.ready.v1"] = "radqueue.series.ready.v1"
    data: ReadySeries


class UploadRejected(Event):
    """An upload was refused and put into quarantine."""

    producer = "radqueue/ingest"
    queues = ("reporting",)
    type: Literal["radqueue.upload.rejected.v1"] = "radqueue.upload.rejected.v1"
    data: RejectedUpload


class StudySettling(Event):
    """A study has stable series: the inference worker tells itself, delayed, to look at the whole study."""

    producer = "radqueue/inference"
    queues = ("inference",)
    type: Literal["radqueue.study.settling.v1"] = "radqueue.study.settling.v1"
    data: SettlingStudy


class InferenceRequested(Event):
    """One MAP is to run on one revision, or on several of one study: the inference worker asks itself."""

    producer = "radqueue/inference"
    queues = ("inference",)
    type: Literal["radqueue.inference.requested.v1"] = "radqueue.inference.requested.v1"
    data: InferenceTask


class InferenceSkipped(Event):
    """A revision meets no MAP's conditions, so nothing runs on it."""

    producer = "radqueue/inference"
    queues = ("reporting",)
    type: Literal["radqueue.inference.skipped.v1"] = "radqueue.inference.skipped.v1"
    data: SkippedInference


class InferenceCompleted(Event):
    """A MAP's result is stored and pushed to its target, or the MAP found no matching series."""

    producer = "radqueue/inference"
    queues = ("reporting",)
    type: Literal["radqueue.inference.completed.v1"] = "radqueue.inference.completed.v1"
    data: CompletedInference


class InferenceFailed(Event):
    """A MAP failed, or its target refused what it made."""

    producer = "radqueue/inference"
    queues = ("reporting",)
    type: Literal["radqueue.inference.failed.v1"] = "radqueue.inference.failed.v1"
    data: FailedInference


class MapUpdated(Event):
    """A new version of a MAP passed its trial, and serves from now on."""

    producer = "radqueue/inference"
    queues = ("reporting",)
    type: Literal["radqueue.map.updated.v1"] = "radqueue.map.updated.v1"
    data: UpdatedMap


class MapRejected(Event):
    """A new version of a MAP failed its trial, and the one before it goes on serving."""

    producer = "radqueue/inference"
    queues = ("reporting",)
    type: Literal["radqueue.map.rejected.v1"] = "radqueue.map.rejected.v1"
    data: RejectedMap


class TrainingRequested(Event):
    """A person, the command line or a schedule asks for a model."""

    producer = "radqueue/cli"
    queues = ("training",)
    type: Literal["radqueue.training.requested.v1"] = "radqueue.training.requested.v1"
    data: TrainingRequest


class TrainingRoundCompleted(Event):
    """A round of a training was trained and evaluated."""

    producer = "radqueue/trainer"
    queues = ("reporting",)
    type: Literal["radqueue.training.round_completed.v1"] = "radqueue.training.round_completed.v1"
    data: TrainingRound


class TrainingCompleted(Event):
    """A training ended, with a model and images: approved, or after its last round."""

    producer = "radqueue/trainer"
    queues = ("reporting",)
    type: Literal["radqueue.training.completed.v1"] = "radqueue.training.completed.v1"
    data: CompletedTraining


class TrainingFailed(Event):
    """A training cannot work as asked, and nothing is tried again until it is asked anew."""

    producer = "radqueue/trainer"
    queues = ("reporting",)
    type: Literal["radqueue.training.failed.v1"] = "radqueue.training.failed.v1"
    data: FailedTraining


class ReportRequested(Event):
    """A person, the command line or a schedule asks for a month's report."""

    producer = "radqueue/cli"
    queues = ("reporting",)
    type: Literal["radqueue.report.requested.v1"] = "radqueue.report.requested.v1"
    data: ReportRequest


AnyEvent = Annotated[
    SeriesSettling
    | SeriesReady
    | UploadRejected
    | StudySettling
    | InferenceRequested
    | InferenceSkipped
    | InferenceCompleted
    | InferenceFailed
    | MapUpdated
    | MapRejected
    | TrainingRequested
    | TrainingRoundCompleted
    | TrainingCompleted
    | TrainingFailed
    | ReportRequested,
    Field(discriminator="type"),
]
_EVENT: TypeAdapter[AnyEvent] = TypeAdapter(AnyEvent)
EVENT_TYPES: tuple[type[Event], ...] = get_args(get_args(AnyEvent)[0])


# Notifications of S3.


class CreatedObject(_Frozen):
    """One object that S3 says was created; its key is decoded."""

    bucket: str
    key: str
    time: Time


class ObjectsCreated(_Frozen):
    """The created objects of one notification, which may be none: `s3:TestEvent` and other events are acknowledged."""

    objects: tuple[CreatedObject, ...]
    traceparent: None = None


Message = Event | ObjectsCreated


def decode(body: str) -> Message:
    """Decode a message body: a CloudEvent, or an S3 notification, raw, wrapped by SNS, or from EventBridge.

    Raises:
        Unprocessable: `not_json`, `unknown_message`, `unknown_type` or `invalid_message`; the text names the fields,
            never values.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise Unprocessable("not_json") from None
    if not isinstance(document, dict) or ("\\u" in body and not _is_unicode(document)):
        raise Unprocessable("unknown_message")
    if document.get("Type") == "Notification" and isinstance(document.get("Message"), str):
        return decode(document["Message"])
    try:
        if "specversion" in document:
            return _EVENT.validate_python(document)
        if "Records" in document or "detail-type" in document or document.get("Event") == "s3:TestEvent":
            return _decode_s3(document)
    except ValidationError as error:
        raise _invalid(error) from None
    except (KeyError, TypeError, AttributeError):
        raise Unprocessable("invalid_message", "S3 notification") from None
    raise Unprocessable("unknown_message")


def _is_unicode(document: dict[str, Any]) -> bool:
    """Tell whether every text can be written again: JSON may escape half of a character (a lone surrogate)."""
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _invalid(error: ValidationError) -> Unprocessable:
    if any(detail["type"].startswith("union_tag") for detail in error.errors()):
        return Unprocessable("unknown_type")
    # No deeper than the fields of `data`: below them are names that the sender chose.
    places = sorted({".".join(str(part) for part in detail["loc"][1:3]) for detail in error.errors()})
    return Unprocessable("invalid_message", ", ".join(places))


def _decode_s3(document: dict[str, Any]) -> ObjectsCreated:
    """Decode a notification (its keys are form-encoded) or an EventBridge event (whose keys are not)."""
    created: list[CreatedObject] = []
    if document.get("detail-type") == "Object Created":
        detail = document["detail"]
        created.append(
            CreatedObject(bucket=detail["bucket"]["name"], key=detail["object"]["key"], time=document["time"])
        )
    for record in document.get("Records", []):
        if record["eventName"].startswith("ObjectCreated:"):
            s3 = record["s3"]
            key = unquote_plus(s3["object"]["key"])
            created.append(CreatedObject(bucket=s3["bucket"]["name"], key=key, time=record["eventTime"]))
    return ObjectsCreated(objects=tuple(created))


def sha256_of(text: str) -> str:
    """Return the hash that stands for a key or a body wherever people read it."""
    return hashlib.sha256(text.encode()).hexdigest()
