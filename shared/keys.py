"""Every key of the bucket, and the model of what lies there: LAYOUT is the table, the functions below it make the keys.

A key that holds one of our JSON documents is a `Document`, which has the model as well. Keys follow from what they are
of, so doing a thing twice writes the same key. UIDs, names and digests become parts of keys, and are checked before:
the models of `shared/messages.py` do so, and `is_uid`.
"""

import hashlib
import re
from dataclasses import dataclass

from shared.documents.arrays import DatasetWindow, StoredSidecar
from shared.documents.document import Document, Stored
from shared.documents.inference import Failure, Outputs, Result, Routing, StudyRouting
from shared.documents.leases import Lease
from shared.documents.maps import Rejection, Served
from shared.documents.reports import Report
from shared.documents.revisions import DIGEST_LENGTH, Revision, StoredInstance
from shared.documents.training import (
    Manifest,
    StoredCompletion,
    StoredDescription,
    StoredFailure,
    StoredOptions,
    StoredPartial,
    StoredPlan,
    StoredProgress,
    StoredRound,
    StoredState,
    StoredStep,
    StoredTrained,
)
from shared.documents.uploads import StoredRefusal, StoredRelease
from shared.messages import InferenceTask, SeriesRef


@dataclass(frozen=True, slots=True)
class Place:
    """One kind of object in the bucket."""

    pattern: str
    """The pattern of its keys: what is in angle brackets changes from one to the next, and `<…>` may hold slashes."""
    holds: str
    writer: str
    """The service, or the person, that writes it."""
    model: type[Stored] | None = None
    """The model of what lies there, for JSON documents of ours."""


UPLOADS = "incoming/<dataset>"
SERIES = "studies/<StudyUID>/<SeriesUID>"
ARRAY = "datasets/<dataset>/<series>.<digest>.<config hash>"
REVISION_RESULTS = "results/<StudyUID>/<SeriesUID>/<digest>"
STUDY_RESULTS = "results/<StudyUID>/study/<digest>"
RESULT = "results/<StudyUID>/<SeriesUID or study>/<digest>/<map>@<map digest>"
MODEL = "models/<request id>"
ROUND = f"{MODEL}/rounds/<round>"
JOBS = f"{MODEL}/sagemaker"
MAP = "maps/<map>"
QUARANTINED = "quarantine/<sha256>"

LAYOUT = (
    Place(f"{UPLOADS}/<…>/_COMPLETE", "says of its folder: nothing more comes", "a sender"),
    Place(f"{UPLOADS}/<…>", "an upload: a DICOM file, or an archive of them", "a sender"),
    Place(f"{SERIES}/<SOPUID>.<sha>.dcm", "a normalised instance, which a MAP reads", "ingest"),
    Place(f"{SERIES}/revisions/<digest>.json", "a series as it stood when it settled", "ingest", Revision),
    Place("settling/<dataset>/<StudyUID>/<SeriesUID>/<second>", "a marker: a message looks at the series", "ingest"),
    Place("settling/_studies/<StudyUID>/<second>", "a marker: a message looks at the study", "inference"),
    Place("settling/_claims/<StudyUID>/<SeriesUID>.json", "who settles the series", "ingest", Lease),
    Place("datasets/<dataset>/window.<modality>.<config hash>.json", "the dataset's window", "ingest", DatasetWindow),
    Place(f"{ARRAY}.npy", "slices, (N, H, W) float32 in [-1, 1]", "ingest"),
    Place(f"{ARRAY}.json", "what the array is of, and how it was made", "ingest", StoredSidecar),
    Place(f"{REVISION_RESULTS}/routing.json", "the MAPs that the revision was given to", "inference", Routing),
    Place(f"{STUDY_RESULTS}/routing.json", "what the MAPs were given of the study", "inference", StudyRouting),
    Place(f"{RESULT}/claim.json", "who computes it", "inference", Lease),
    Place(f"{RESULT}/attempts/<attempt>/<SOPUID>.dcm", "an instance that a MAP made", "inference"),
    Place(f"{RESULT}/attempts/<attempt>/files/<number>/<name>", "another file that a MAP made", "inference"),
    Place(f"{RESULT}/attempts/<attempt>/log.txt", "what the MAP printed", "inference"),
    Place(f"{RESULT}/outputs.json", "the attempt whose instances are the result", "inference", Outputs),
    Place(f"{RESULT}/result.json", "what is in the archive now", "inference", Result),
    Place(f"{RESULT}/failure.json", "why there is no result", "inference", Failure),
    Place("imports/<hash of the instances>/<…>", "what an import job of HealthImaging reads and writes", "inference"),
    Place(f"{MAP}/serving.json", "the version that serves", "inference", Served),
    Place(f"{MAP}/rejected/<digest>.json", "a version that is not tried again", "inference", Rejection),
    Place(f"{MODEL}/options.json", "what was asked for", "trainer", StoredOptions),
    Place(f"{MODEL}/lease.json", "who trains", "trainer", Lease),
    Place(f"{MODEL}/manifest.json", "the arrays and their split", "trainer", Manifest),
    Place(f"{MODEL}/config.js", "the parameters of the round that runs, or to start with", "trainer, a person"),
    Place(f"{MODEL}/first_config.js", "the parameters of the start", "trainer"),
    Place(f"{ROUND}/plan.<try>.json", "what the round is to do", "trainer", StoredPlan),
    Place(f"{ROUND}/partial.<try>.json", "names the newest checkpoint", "trainer", StoredPartial),
    Place(f"{ROUND}/partial.<try>.<epoch>.<step>.pt", "a checkpoint of a round that runs", "trainer"),
    Place(f"{ROUND}/trained.<try>.json", "the round is trained", "trainer", StoredTrained),
    Place(f"{ROUND}/checkpoint.<epoch>.pt", "its last checkpoint", "trainer"),
    Place(f"{ROUND}/evaluation.json", "the round is completed", "trainer", StoredRound),
    Place(f"{ROUND}/images.<epoch>.png", "images of it", "trainer"),
    Place(f"{ROUND}/config.<epoch>.js", "its parameters", "trainer"),
    Place(f"{MODEL}/state.json", "how often the round that runs was tried", "trainer", StoredState),
    Place(f"{MODEL}/progress.json", "how far the round that runs is, for people", "trainer", StoredProgress),
    Place(f"{MODEL}/step.json", "the reply of the last step, for workflows", "trainer", StoredStep),
    Place(f"{JOBS}/data/<name>", "an array that training jobs read", "trainer"),
    Place(f"{JOBS}/<round>-<try>/checkpoints/<name>", "what a job saves while it runs", "SageMaker"),
    Place(f"{JOBS}/<round>-<try>/output/<job>/output/model.tar.gz", "what a job returns", "SageMaker"),
    Place(f"{JOBS}/<round>-<try>/<job>/<name>", "what a job reads besides", "trainer"),
    Place(f"{MODEL}/generator.pt", "the weights of the best round", "trainer"),
    Place(f"{MODEL}/generator.json", "what generator.pt is", "trainer", StoredDescription),
    Place(f"{MODEL}/images.npy", "generated images, (N, H, W) float32 in [-1, 1]", "trainer"),
    Place(f"{MODEL}/images.png", "the first of them", "trainer"),
    Place(f"{MODEL}/completed.json", "the end of the training", "trainer", StoredCompletion),
    Place(f"{MODEL}/failure.json", "why it cannot work", "trainer", StoredFailure),
    Place(f"{MODEL}/<…>", "the other products: services/trainer/completion.py lists them", "trainer"),
    Place("events/date=<YYYY-MM-DD>/<uuid>.jsonl", "events, one per line, as they were sent", "reporter"),
    Place("reports/<YYYY-MM>.json", "the report of a month", "reporter", Report),
    Place("reports/<YYYY-MM>.html", "its page", "reporter"),
    Place(f"{QUARANTINED}/object", "what was refused; too large, it stays in incoming/", "ingest"),
    Place(f"{QUARANTINED}/reason.json", "why it was refused", "ingest", StoredRefusal),
    Place(f"{QUARANTINED}/released.json", "the refusal that was answered", "the command line", StoredRelease),
)
"""All that is in the bucket. If a key meets several patterns, the first one is its own."""


# Uploads, and what was refused of them.

INCOMING = "incoming/"
COMPLETE = "_COMPLETE"
"""Name of the object that says of its folder below `incoming/`: nothing more comes."""
QUARANTINE = "quarantine/"


def upload(dataset: str, name: str) -> str:
    """Return the key of an upload into a dataset."""
    return f"{INCOMING}{dataset}/{name}"


def dataset_of(upload_key: str) -> str:
    """Return the dataset in the key of an upload."""
    return upload_key.removeprefix(INCOMING).partition("/")[0]


def released(dataset: str, sha256: str) -> str:
    """Return the key of a refused object that is given to ingest once more."""
    return upload(dataset, f"released/{sha256}")


@dataclass(frozen=True)
class Quarantined:
    """The keys of one object in quarantine."""

    sha256: str
    """The sha256 of the object, in hex."""

    @property
    def object(self) -> str:
        """The object itself."""
        return f"{QUARANTINE}{self.sha256}/object"

    @property
    def reason(self) -> Document[StoredRefusal]:
        """The record of why the object was refused."""
        return Document(f"{QUARANTINE}{self.sha256}/reason.json", StoredRefusal)

    @property
    def released(self) -> Document[StoredRelease]:
        """The refusal that was answered by a release."""
        return Document(f"{QUARANTINE}{self.sha256}/released.json", StoredRelease)


# Series.

MAX_UID_LENGTH = 64
"""The most characters of a UID, by PS3.5 section 9.1."""
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_INSTANCE = re.compile(
    r"studies/(?P<study_uid>[0-9.]+)/(?P<series_uid>[0-9.]+)/(?P<sop_instance_uid>[0-9.]+)\.(?P<sha>[0-9a-f]{16})\.dcm"
)


def is_uid(text: str) -> bool:
    """Tell whether `text` may become a part of a key: digits and dots as PS3.5 section 9.1 has them."""
    return len(text) <= MAX_UID_LENGTH and _UID.fullmatch(text) is not None


def study_prefix(study_uid: str) -> str:
    """Return the prefix of all series of a study."""
    return f"studies/{study_uid}/"


def series_prefix(study_uid: str, series_uid: str) -> str:
    """Return the prefix of everything stored of a series."""
    return f"{study_prefix(study_uid)}{series_uid}/"


def instance(study_uid: str, series_uid: str, sop_instance_uid: str, sha: str) -> str:
    """Return the key of a normalised instance."""
    return f"{series_prefix(study_uid, series_uid)}{sop_instance_uid}.{sha}.dcm"


def stored_instance(key: str) -> StoredInstance | None:
    """Read a key of a listing; None if it is not that of an instance."""
    match = _INSTANCE.fullmatch(key)
    if match is None:
        return None
    return StoredInstance(sop_instance_uid=match["sop_instance_uid"], sha=match["sha"], key=key)


def revisions_prefix(study_uid: str, series_uid: str) -> str:
    """Return the prefix of the revisions of a series."""
    return f"{series_prefix(study_uid, series_uid)}revisions/"


def revision(study_uid: str, series_uid: str, digest: str) -> Document[Revision]:
    """Return a revision of a series."""
    return Document(f"{revisions_prefix(study_uid, series_uid)}{digest}.json", Revision)


def document_of(revision: Revision) -> Document[Revision]:
    """Return where a revision lies."""
    return Document(f"{revisions_prefix(revision.study_uid, revision.series_uid)}{revision.digest}.json", Revision)


def revision_of(series: SeriesRef) -> Document[Revision]:
    """Return the revision that a message names."""
    return Document(series.revision_key, Revision)


def stored_revision(key: str) -> Document[Revision] | None:
    """Read a key of a listing; None if it is not that of a revision."""
    return Document(key, Revision) if "/revisions/" in key and key.endswith(".json") else None


# What waits for a series or a study to settle.


def series_markers(dataset: str, study_uid: str, series_uid: str) -> str:
    """Return the prefix of a series' markers; what follows is a bucket's first second, so they sort by time."""
    return f"settling/{dataset}/{study_uid}/{series_uid}/"


def study_markers(study_uid: str) -> str:
    """Return the prefix of a study's markers, which no dataset's can be: the name of one begins with a letter."""
    return f"settling/_studies/{study_uid}/"


def series_lease(study_uid: str, series_uid: str) -> Document[Lease]:
    """Return the lease of the worker that settles a series."""
    return Document(f"settling/_claims/{study_uid}/{series_uid}.json", Lease)


# Training arrays.

DATASETS = "datasets/"
ARRAY_SUFFIX = ".npy"
SIDECAR_SUFFIX = ".json"


def dataset_prefix(dataset: str) -> str:
    """Return the prefix of everything stored of a dataset."""
    return f"{DATASETS}{dataset}/"


def array(dataset: str, series_uid: str, digest: str, config_hash: str) -> str:
    """Return the key of the array of a revision, made in one way."""
    return f"{dataset_prefix(dataset)}{series_uid}.{digest}.{config_hash}{ARRAY_SUFFIX}"


def sidecar(array_key: str) -> Document[StoredSidecar]:
    """Return the document beside an array."""
    return Document(f"{array_key.removesuffix(ARRAY_SUFFIX)}{SIDECAR_SUFFIX}", StoredSidecar)


def window(dataset: str, modality: str, config_hash: str) -> Document[DatasetWindow]:
    """Return the window of a Modality in a dataset, for arrays of one configuration."""
    return Document(f"{dataset_prefix(dataset)}window.{modality}.{config_hash}.json", DatasetWindow)


# Results.

_RESULT = re.compile(r"(?P<prefix>results/[^/]+/(?P<series>[^/]+)/[^/]+/[^/@]+@[^/]+/)(?:outputs|result|failure)\.json")


def results_prefix(study_uid: str) -> str:
    """Return the prefix of all results of a study."""
    return f"results/{study_uid}/"


def revision_results_prefix(series: SeriesRef) -> str:
    """Return the prefix of all results of one revision."""
    return f"{results_prefix(series.study_uid)}{series.series_uid}/{series.digest}/"


def study_results_prefix(study_uid: str) -> str:
    """Return the prefix of what was decided for the study as a whole, and of its results."""
    return f"{results_prefix(study_uid)}study/"


def routing(series: SeriesRef) -> Document[Routing]:
    """Return what a revision was given to."""
    return Document(f"{revision_results_prefix(series)}routing.json", Routing)


def study_routing(study_uid: str, digest: str) -> Document[StudyRouting]:
    """Return what the MAPs were given of a study, whose digest is what `digest_of_series` returns."""
    return Document(f"{study_results_prefix(study_uid)}{digest}/routing.json", StudyRouting)


def stored_study_routing(key: str) -> Document[StudyRouting] | None:
    """Read a key of a listing of `study_results_prefix`; None if it is not that of such a document."""
    return Document(key, StudyRouting) if key.endswith("/routing.json") else None


def map_results_prefix(prefix: str, name: str) -> str:
    """Return what the keys of a MAP's results begin with, of all its versions; `prefix` is that of what it read."""
    return f"{prefix}{name}@"


def digest_of_series(series: tuple[SeriesRef, ...]) -> str:
    """Return the digest that stands for several series; it depends on their order."""
    lines = "\n".join(f"{ref.series_uid}:{ref.digest}" for ref in series)
    return hashlib.sha256(lines.encode()).hexdigest()[:DIGEST_LENGTH]


@dataclass(frozen=True)
class ResultKeys:
    """The keys of one result: of one version of a MAP on a revision, or on several series of a study."""

    prefix: str

    @classmethod
    def of(cls, task: InferenceTask) -> "ResultKeys":
        """Return the keys of a request's result; that of several series of a study lies under `study`."""
        first = task.inputs[0]
        prefix = revision_results_prefix(first)
        if len(task.inputs) > 1:
            in_order = tuple(sorted(task.inputs, key=lambda ref: f"{ref.series_uid}:{ref.digest}"))
            prefix = f"{study_results_prefix(first.study_uid)}{digest_of_series(in_order)}/"
        return cls(f"{map_results_prefix(prefix, task.map)}{task.map_digest}/")

    @property
    def of_any_version(self) -> str:
        """What the keys of the results of all versions of the MAP begin with."""
        return self.prefix.rpartition("@")[0] + "@"

    @property
    def lease(self) -> Document[Lease]:
        """The lease of the worker that computes the result."""
        return Document(f"{self.prefix}claim.json", Lease)

    @property
    def outputs(self) -> Document[Outputs]:
        """The attempt whose instances are the result."""
        return Document(f"{self.prefix}outputs.json", Outputs)

    @property
    def result(self) -> Document[Result]:
        """The record of what is in the archive."""
        return Document(f"{self.prefix}result.json", Result)

    @property
    def failure(self) -> Document[Failure]:
        """The record of why there is no result."""
        return Document(f"{self.prefix}failure.json", Failure)

    def made_instance(self, attempt: str, sop_instance_uid: str) -> str:
        """Return the key of an instance that a MAP made."""
        return f"{self._attempt(attempt)}{sop_instance_uid}.dcm"

    def made_file(self, attempt: str, number: int, name: str) -> str:
        """Return the key of another file that a MAP made."""
        return f"{self._attempt(attempt)}files/{number}/{name}"

    def log(self, attempt: str) -> str:
        """Return the key of what the MAP printed."""
        return f"{self._attempt(attempt)}log.txt"

    def _attempt(self, attempt: str) -> str:
        return f"{self.prefix}attempts/{attempt}/"


def stored_result(key: str) -> tuple[str, ResultKeys] | None:
    """Read a key of a listing: the series' UID or `study`, and the result that the document tells of, if it is one."""
    match = _RESULT.fullmatch(key)
    return (match["series"], ResultKeys(match["prefix"])) if match else None


@dataclass(frozen=True)
class ImportKeys:
    """The keys of one import job of HealthImaging; `instances` is the hash of what it imports."""

    instances: str

    @property
    def prefix(self) -> str:
        """The prefix of all of these keys."""
        return f"imports/{self.instances}/"

    @property
    def token(self) -> str:
        """The client's token of the job."""
        return f"{self.prefix}token"

    @property
    def input(self) -> str:
        """The prefix of what the job reads."""
        return f"{self.prefix}input/"

    @property
    def output(self) -> str:
        """The prefix of what the job writes."""
        return f"{self.prefix}output/"


# Versions of MAPs.


def serving(name: str) -> Document[Served]:
    """Return the version of a MAP that serves."""
    return Document(f"maps/{name}/serving.json", Served)


def rejection(name: str, digest: str) -> Document[Rejection]:
    """Return why a version of a MAP was rejected."""
    return Document(f"maps/{name}/rejected/{digest}.json", Rejection)


# Trainings.


@dataclass(frozen=True)
class TrainingKeys:
    """The keys of one training."""

    request_id: str

    @property
    def folder(self) -> str:
        """The folder of all keys of the training, without the slash."""
        return f"models/{self.request_id}"

    @property
    def prefix(self) -> str:
        """The prefix of all keys of the training, with the slash."""
        return f"{self.folder}/"

    @property
    def options(self) -> Document[StoredOptions]:
        """The request and the settings of the worker that began it."""
        return Document(f"{self.prefix}options.json", StoredOptions)

    @property
    def lease(self) -> Document[Lease]:
        """The lease of the worker that trains."""
        return Document(f"{self.prefix}lease.json", Lease)

    @property
    def manifest(self) -> Document[Manifest]:
        """The arrays and their split."""
        return Document(f"{self.prefix}manifest.json", Manifest)

    @property
    def config(self) -> str:
        """The parameters of the round that runs, or to start with."""
        return f"{self.prefix}config.js"

    @property
    def first_config(self) -> str:
        """The parameters of the start."""
        return f"{self.prefix}first_config.js"

    @property
    def state(self) -> Document[StoredState]:
        """The record of how often the round that runs was tried."""
        return Document(f"{self.prefix}state.json", StoredState)

    @property
    def progress(self) -> Document[StoredProgress]:
        """The progress of the round that runs."""
        return Document(f"{self.prefix}progress.json", StoredProgress)

    @property
    def step(self) -> Document[StoredStep]:
        """The reply of the last step."""
        return Document(f"{self.prefix}step.json", StoredStep)

    @property
    def completed(self) -> Document[StoredCompletion]:
        """The end of the training."""
        return Document(f"{self.prefix}completed.json", StoredCompletion)

    @property
    def failure(self) -> Document[StoredFailure]:
        """The record of why the training cannot work."""
        return Document(f"{self.prefix}failure.json", StoredFailure)

    @property
    def description(self) -> Document[StoredDescription]:
        """The description of the generator's weights."""
        return Document(f"{self.prefix}generator.json", StoredDescription)

    @property
    def generator(self) -> str:
        """The weights of the best round."""
        return f"{self.prefix}generator.pt"

    @property
    def images(self) -> str:
        """A grid of generated images."""
        return f"{self.prefix}images.png"

    @property
    def images_array(self) -> str:
        """All generated images."""
        return f"{self.prefix}images.npy"

    def product(self, name: str) -> str:
        """Return the key of any product, by the name of its file."""
        return f"{self.prefix}{name}"

    def round(self, number: int) -> "RoundKeys":
        """Return the keys of a round, from 1."""
        return RoundKeys(f"{self.prefix}rounds/{number}")


@dataclass(frozen=True)
class RoundKeys:
    """The keys of one round of a training. A round that diverges is tried again: tries count from 0."""

    folder: str
    """The folder of the round, `models/<request id>/rounds/<round>`."""

    def plan(self, attempt: int) -> Document[StoredPlan]:
        """Return what a try is to do."""
        return Document(f"{self.folder}/plan.{attempt}.json", StoredPlan)

    @property
    def partials_prefix(self) -> str:
        """What the checkpoints of all tries, and the documents that name them, begin with."""
        return f"{self.folder}/partial."

    def partial(self, attempt: int) -> Document[StoredPartial]:
        """Return what names the newest checkpoint of a try."""
        return Document(f"{self.partials_prefix}{attempt}.json", StoredPartial)

    def partial_checkpoint(self, attempt: int, epoch: int, step: int) -> str:
        """Return the key of a checkpoint of a try, of the owner of the lease in that epoch."""
        return f"{self.partials_prefix}{attempt}.{epoch}.{step}.pt"

    def trained(self, attempt: int) -> Document[StoredTrained]:
        """Return what a try trained."""
        return Document(f"{self.folder}/trained.{attempt}.json", StoredTrained)

    def checkpoint(self, epoch: int) -> str:
        """Return the key of the last checkpoint."""
        return f"{self.folder}/checkpoint.{epoch}.pt"

    @property
    def evaluation(self) -> Document[StoredRound]:
        """The round as it was completed."""
        return Document(f"{self.folder}/evaluation.json", StoredRound)

    def images(self, epoch: int) -> str:
        """Return the key of the round's images."""
        return f"{self.folder}/images.{epoch}.png"

    def config(self, epoch: int) -> str:
        """Return the key of the round's parameters."""
        return f"{self.folder}/config.{epoch}.js"


@dataclass(frozen=True)
class JobKeys:
    """The keys of the SageMaker jobs of one try at a round; `name` is `<round>-<try>`."""

    training: str
    """The folder of the training, `models/<request id>`."""
    name: str

    @property
    def folder(self) -> str:
        """The folder of all keys of the try."""
        return f"{self.training}/sagemaker/{self.name}"

    @property
    def data(self) -> str:
        """The prefix of the arrays, once for all rounds."""
        return f"{self.training}/sagemaker/data/"

    @property
    def checkpoints(self) -> str:
        """The folder that SageMaker copies from the job while it runs."""
        return f"{self.folder}/checkpoints"

    @property
    def output(self) -> str:
        """The folder of what jobs return."""
        return f"{self.folder}/output"

    def returned(self, job: str) -> str:
        """Return the key of what a job returned."""
        return f"{self.output}/{job}/output/model.tar.gz"

    def input(self, job: str) -> str:
        """Return the prefix of what one job reads besides the arrays."""
        return f"{self.folder}/{job}/"


# Events and reports.


def events_of_month(month: str) -> str:
    """Return the prefix of a month of the event log; `month` is YYYY-MM."""
    return f"events/date={month}-"


def events_of_day(date: str) -> str:
    """Return the prefix of a day of the event log; `date` is YYYY-MM-DD."""
    return f"events/date={date}/"


def events(date: str, uuid: str) -> str:
    """Return the key of some of a day's events."""
    return f"{events_of_day(date)}{uuid}.jsonl"


def report(month: str) -> Document[Report]:
    """Return the report of a month, YYYY-MM."""
    return Document(f"reports/{month}.json", Report)


def report_page(month: str) -> str:
    """Return the key of the page of a month's report."""
    return f"reports/{month}.html"
