"""The queue runtime, for services of your own: everything that `docs/queue.md` speaks of is imported from here.

A service reads `ServiceSettings`, and is given clients (`Aws`) and `Metrics` by `run`; it has `consume` call a handler
with each message of its queue; a handler says what becomes of its message by returning, or by raising `Unprocessable`,
`Unavailable` or `Continue`. It sends with a `Publisher`, keeps state in an `ObjectStore`, and does with `once` what
must not be done twice; a `Document` says where a record lies, and which kind of `Stored` it is. Needs none of
radqueue's extras.

These names are stable: what changes or removes one of them is told in CHANGELOG.md, and changes the second number of
the version at least. Anything that is not named here or in `radqueue.pipeline` may change at any time.
"""

from shared.aws import Aws
from shared.config import Misconfigured, ServiceSettings
from shared.documents.document import Document, Stored
from shared.documents.leases import Lease
from shared.errors import Continue, Leased, Unavailable, Unprocessable
from shared.idempotency import once, store, store_once, stored
from shared.messages import (
    CreatedObject,
    Event,
    InferenceCompleted,
    InferenceFailed,
    InferenceRequested,
    InferenceSkipped,
    InferenceTask,
    MapRejected,
    MapUpdated,
    ObjectsCreated,
    ReportRequest,
    ReportRequested,
    SeriesReady,
    TrainingCompleted,
    TrainingFailed,
    TrainingRequest,
    TrainingRequested,
    TrainingRoundCompleted,
    UploadRejected,
)
from shared.metrics import Metrics
from shared.objects import ObjectMissing, ObjectStore, ObjectSummary
from shared.queue import Fate, Handler, Publish, Publisher, consume, receive_count, remaining_s
from shared.service import run

__all__ = [
    "Aws",
    "Continue",
    "CreatedObject",
    "Document",
    "Event",
    "Fate",
    "Handler",
    "InferenceCompleted",
    "InferenceFailed",
    "InferenceRequested",
    "InferenceSkipped",
    "InferenceTask",
    "Lease",
    "Leased",
    "MapRejected",
    "MapUpdated",
    "Metrics",
    "Misconfigured",
    "ObjectMissing",
    "ObjectStore",
    "ObjectSummary",
    "ObjectsCreated",
    "Publish",
    "Publisher",
    "ReportRequest",
    "ReportRequested",
    "SeriesReady",
    "ServiceSettings",
    "Stored",
    "TrainingCompleted",
    "TrainingFailed",
    "TrainingRequest",
    "TrainingRequested",
    "TrainingRoundCompleted",
    "Unavailable",
    "Unprocessable",
    "UploadRejected",
    "consume",
    "once",
    "receive_count",
    "remaining_s",
    "run",
    "store",
    "store_once",
    "stored",
]
