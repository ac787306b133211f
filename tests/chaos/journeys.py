"""The work that each service does in a scenario of the kill sweep, and what it leaves in AWS.

A journey's outcome is the same in every run, however often the service was killed: what is drawn at random, and what
an attempt that came to nothing left beside the result, is left out.
"""

import functools
import io
import json
import re
import zipfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import numpy as np
import pydicom

from shared import keys
from shared.aws import Aws
from shared.dicomweb import DicomWeb, base_url
from shared.documents.document import body_of
from shared.documents.revisions import Revision, StoredInstance, digest_of, sha_of
from shared.messages import (
    Event,
    ReadySeries,
    ReportRequest,
    ReportRequested,
    SeriesReady,
    TrainingRequest,
    TrainingRequested,
    TrainingRoundCompleted,
    decode,
)
from shared.objects import ObjectStore
from tests.inference.conftest import APP, make_series
from tests.reporter import month

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
MONTH = "2026-05"
MAPS = "maps: [{name: capture, source: capture, when: {Modality: CT, n_instances: {min: 2}}}]\n"
TINY = {"imageSize": 16, "width": 2, "latentDim": 4, "batchSize": 4, "steps": 3}
EPOCH = re.compile(r"\.[0-9]+\.(?=[a-z]+$)")
ATTEMPT = re.compile(r"attempts/.*")

Outcome = dict[str, list[str]]


@dataclass
class World:
    """The part of AWS that one scenario has for itself, and the folder of its service."""

    aws: Aws
    environ: dict[str, str]
    folder: Path
    heard: dict[str, list[Event]] = field(default_factory=dict)
    """What was announced, by queue."""

    @property
    def objects(self) -> ObjectStore:
        """The bucket."""
        return ObjectStore(self.aws.s3, self.environ["RADQUEUE_BUCKET"])

    async def url(self, role: str, suffix: str = "") -> str:
        """Return the URL of a queue, or with `-dlq` of its dead-letter queue."""
        name = self.environ[f"RADQUEUE_{role.upper()}_QUEUE"] + suffix
        return (await self.aws.sqs.get_queue_url(QueueName=name))["QueueUrl"]

    async def send(self, role: str, *events: Event) -> None:
        """Send events to the service."""
        for event in events:
            await self.aws.sqs.send_message(QueueUrl=await self.url(role), MessageBody=event.body())

    async def waiting(self, role: str, suffix: str = "") -> int:
        """Count the messages of a queue, whether visible, in flight or delayed."""
        asked = await self.aws.sqs.get_queue_attributes(QueueUrl=await self.url(role, suffix), AttributeNames=["All"])
        names = ("", "NotVisible", "Delayed")
        return sum(int(asked["Attributes"][f"ApproximateNumberOfMessages{name}"]) for name in names)

    async def listen(self, role: str) -> list[str]:
        """Take what was announced out of a queue; tells what names an object that is not there."""
        url, wrong = await self.url(role), []
        while messages := (await self.aws.sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10)).get("Messages"):
            for message in messages:
                event = decode(message["Body"])
                self.heard.setdefault(role, []).append(event)
                wrong += [
                    f"{event.type} was announced without its {key}"
                    for key in named_keys(json.loads(message["Body"]))
                    if not await self.objects.exists(key)
                ]
                await self.aws.sqs.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
        return wrong

    def announced(self, role: str) -> list[Event]:
        """Return what was announced, each event once."""
        return list({event.id: event for event in self.heard.get(role, [])}.values())

    async def stored(self, *prefixes: str) -> dict[str, str]:
        """Return the ETags of what is stored, by key."""
        return {item.key: item.etag for prefix in prefixes for item in [one async for one in self.objects.list(prefix)]}

    async def document(self, key: str) -> Any:
        """Return what is stored as JSON."""
        return json.loads(await self.objects.get(key))


def named_keys(told: Any) -> Iterator[str]:
    """Yield the object keys that an event names, wherever it does."""
    if isinstance(told, dict):
        for name, value in told.items():
            if isinstance(value, str) and (name == "key" or name.endswith("_key")):
                yield value
            else:
                yield from named_keys(value)
    elif isinstance(told, list):
        for value in told:
            yield from named_keys(value)


@dataclass
class Journey:
    """What one service is given, and what must come of it."""

    world: World
    service: ClassVar[str]
    queue: ClassVar[str]
    """The queue that it consumes."""
    hears: ClassVar[tuple[str, ...]] = ("reporting",)
    """The queues that it announces to."""
    settings: ClassVar[dict[str, str]] = {}
    sizes: ClassVar[dict[str, int]]
    """How many of each the outcome must have."""

    @property
    def environ(self) -> dict[str, str]:
        """The settings of the service."""
        return {f"RADQUEUE_{name}": value for name, value in self.settings.items()}

    async def prepare(self) -> None:
        """Put there what the service needs."""

    def steps(self) -> list[Callable[[], Awaitable[None]]]:
        """Return what gives the service work; each begins when the work of the one before is done."""
        raise NotImplementedError

    async def outcome(self) -> Outcome:
        """Read what the service left."""
        raise NotImplementedError


@functools.cache
def series(**attributes: str) -> list[bytes]:
    """Return the files of a series, the same in each scenario."""
    return make_series(**attributes)


class Ingest(Journey):
    """A zip of a series, two single files of other series, and a file that is none."""

    service, queue, hears = "ingest", "ingest", ("inference", "reporting")
    settings: ClassVar = {"QUIET_S": "1", "DECODERS": "1"}
    sizes: ClassVar = {"stored": 5 + 3 + 2 * 3 + 2, "ready for inference": 3, "told to the reporter": 4}

    def steps(self) -> list[Callable[[], Awaitable[None]]]:
        return [self.upload]

    async def upload(self) -> None:
        zipped = io.BytesIO()
        with zipfile.ZipFile(zipped, "w") as file:
            for number, body in enumerate(series(SeriesDescription="zipped")):
                file.writestr(f"{number}.dcm", body)
        single = [series(n=1, SeriesDescription=name)[0] for name in ("one", "two")]
        for number, body in enumerate([zipped.getvalue(), *single, b"\0" * 128 + b"DICM" + b"no data set"]):
            await self.world.objects.put(f"incoming/chest/{number}", body)

    async def outcome(self) -> Outcome:
        stored = await self.world.stored("studies/", "datasets/", "quarantine/")
        return {
            # What says when it was written is not the same in each run.
            "stored": [key if key.endswith(".json") else f"{key} {etag}" for key, etag in stored.items()],
            "ready for inference": sorted(event.id for event in self.world.announced("inference")),
            "told to the reporter": sorted(event.id for event in self.world.announced("reporting")),
        }


class Inference(Journey):
    """A series for the application, and one that no application takes."""

    service, queue = "inference", "inference"
    sizes: ClassVar = {"results": 1, "archived": 1, "image sets": 1, "told": 2}

    @property
    def environ(self) -> dict[str, str]:
        return {"RADQUEUE_MAPS_FILE": str(self.world.folder / "maps.yaml")}

    async def prepare(self) -> None:
        (self.world.folder / "capture").mkdir()
        (self.world.folder / "capture" / "app.py").write_text(APP)
        (self.world.folder / "maps.yaml").write_text(MAPS)

    def steps(self) -> list[Callable[[], Awaitable[None]]]:
        return [self.settle]

    async def settle(self) -> None:
        for modality in ("CT", "MR"):
            instances = [_instance(body) for body in series(Modality=modality)]
            for instance, body in zip(instances, series(Modality=modality), strict=True):
                await self.world.objects.put(instance.key, body)
            _, study_uid, series_uid, _ = instances[0].key.split("/")
            uids = {"study_uid": study_uid, "series_uid": series_uid, "digest": digest_of(instances)}
            about = {"created": NOON, "dataset": "chest", "attributes": {"Modality": modality}}
            revision = Revision(instances=tuple(instances), **uids, **about)
            await self.world.objects.put(keys.document_of(revision).key, body_of(revision))
            told = ReadySeries(
                revision_key=keys.document_of(revision).key,
                dataset="chest",
                n_instances=len(instances),
                modality=modality,
                **uids,
            )
            await self.world.send("inference", SeriesReady.of(series_uid, told, time=NOON))

    async def outcome(self) -> Outcome:
        world = self.world
        stored = list(await world.stored("results/"))
        result_keys = [key for key in stored if key.endswith("/result.json")]
        results = [await world.document(key) for key in result_keys]
        outputs = [output for result in results for output in result["outputs"]]
        datastore_id = world.environ["RADQUEUE_DATASTORE_ID"]
        url = base_url(endpoint_url=world.aws.endpoint_url, datastore_id=datastore_id)
        async with aiohttp.ClientSession() as session:
            instances = await DicomWeb(url, session=session).search_instances()
        found = await world.aws.medical_imaging.search_image_sets(datastoreId=datastore_id)
        return {
            "stored": [
                ATTEMPT.sub("output", key)
                for key in stored
                if not ATTEMPT.search(key) or key in [output["key"] for output in outputs]
            ],
            "results": result_keys,
            "archived": [
                _whose(one["00080018"]["Value"][0], [output["sop_instance_uid"] for output in outputs])
                for one in instances
            ],
            "image sets": [
                _whose(one["imageSetId"], [output["image_set_id"] for output in outputs])
                for one in found["imageSetsMetadataSummaries"]
            ],
            "told": sorted(event.type for event in world.announced("reporting")),
        }


def _instance(body: bytes) -> StoredInstance:
    header = pydicom.dcmread(io.BytesIO(body))
    uids = str(header.StudyInstanceUID), str(header.SeriesInstanceUID), str(header.SOPInstanceUID)
    return StoredInstance(sop_instance_uid=uids[2], sha=sha_of(body), key=keys.instance(*uids, sha_of(body)))


def _whose(found: str, results: list[str]) -> str:
    return "the result's" if found in results else "another attempt's"


class Trainer(Journey):
    """Two rounds over four patients."""

    service, queue = "trainer", "training"
    settings: ClassVar = {"THREADS": "1", "DEVICE": "cpu", "MIN_IMAGES": "8", "LEASE_S": "5", "CACHE_BYTES": "0"}
    sizes: ClassVar = {"rounds": 2, "told": 3}

    async def prepare(self) -> None:
        rng = np.random.default_rng(0)
        for number, patient in enumerate("abcd"):
            buffer = io.BytesIO()
            np.save(buffer, np.tanh(rng.normal(size=(8, 32, 32))).astype(np.float32))
            stem, uid = f"datasets/chest/1.2.{number}.{'01' * 8}.c0ffee", f"1.2.{number}"
            sidecar = {"series_uid": uid, "patient_key": patient, "digest": "01" * 8, "n": 8, "shape": [8, 32, 32]}
            await self.world.objects.put(f"{stem}.json", json.dumps(sidecar).encode())
            await self.world.objects.put(f"{stem}.npy", buffer.getvalue())

    def steps(self) -> list[Callable[[], Awaitable[None]]]:
        return [self.request]

    async def request(self) -> None:
        asked = TrainingRequest(
            request_id="r", dataset="chest", overrides=TINY, threshold=1e-9, max_rounds=2, n_images=5
        )
        await self.world.send("training", TrainingRequested.of("r", asked, time=NOON))

    async def outcome(self) -> Outcome:
        stored = await self.world.stored("models/")
        stored.pop("models/r/progress.json", None)  # of slow machines
        rounds = [await self.world.document(key) for key in stored if key.endswith("/evaluation.json")]
        return {
            "stored": sorted({EPOCH.sub(".epoch.", key) for key in stored}),
            "rounds": [json.dumps([one["told"]["evaluation"], one["told"]["config"]]) for one in rounds],
            "images": [stored["models/r/images.npy"]],
            "told": sorted(
                f"{event.type} {event.data.round if isinstance(event, TrainingRoundCompleted) else ''}"
                for event in self.world.announced("reporting")
            ),
        }


class Reporter(Journey):
    """An event of each kind, some of them twice, and then the month's report."""

    service, queue, hears = "reporter", "reporting", ()
    sizes: ClassVar = {"logged": 7, "reports": 1, "pages": 1}

    def steps(self) -> list[Callable[[], Awaitable[None]]]:
        return [self.tell, self.request]

    async def tell(self) -> None:
        events = [
            month.series_ready(1),
            month.upload_rejected(1, "not_dicom"),
            month.inference_completed(1, 2.0),
            month.inference_completed(2, 3.0),
            month.inference_failed(3, "crashed"),
            month.inference_skipped(4),
            month.training_round("r", 1, 2.5),
        ]
        await self.world.send("reporting", *events, *events[:3])

    async def request(self) -> None:
        asked = ReportRequested.of(f"reports/{MONTH}", ReportRequest(month=MONTH), time=NOON)
        await self.world.send("reporting", asked)

    async def outcome(self) -> Outcome:
        log = [await self.world.objects.get(key) for key in await self.world.stored("events/")]
        report = await self.world.document(f"reports/{MONTH}.json")
        report = {name: value for name, value in report.items() if name not in {"generated_at", "n_repeats"}}
        return {
            "logged": sorted({json.loads(line)["id"] for line in b"".join(log).splitlines()}),
            "reports": [json.dumps(report)],
            "pages": [key for key in await self.world.stored("reports/") if key.endswith(".html")],
        }


JOURNEYS: dict[str, type[Journey]] = {one.service: one for one in (Ingest, Inference, Trainer, Reporter)}
