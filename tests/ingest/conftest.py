"""Made DICOM files, and the ports of ingest over the local AWS."""

import io
import os
import uuid
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from services.ingest.datasets import read
from services.ingest.decoder import Decoder
from services.ingest.ports import Ports
from services.ingest.settings import IngestSettings
from shared.messages import CreatedObject, Event, ObjectsCreated
from shared.objects import ObjectStore
from shared.pydicom_silence import silence

PATIENT_NAME = "Secretperson^Jane"
SECRET = "a secret of this test"
DATASETS = """
default: {array: {size: 16}}
datasets:
  KEYED: {deidentify: {options: [retain_modified_dates], blank: [{when: {Rows: 20}, regions: [[0, 0, 20, 4]]}]}}
  RESEARCH: {deidentify: {studies: true, blank: [{when: {Rows: 20}, regions: [[0, 0, 20, 4]]}]}}
"""


@pytest.fixture(autouse=True)
def _silenced():
    silence()


@dataclass
class Maker:
    """Makes the instances of one series."""

    study_uid: str = field(default_factory=generate_uid)
    series_uid: str = field(default_factory=generate_uid)

    def ct(self, number: int = 0, **overrides) -> Dataset:
        """One CT slice of 16 by 16, 2 mm above the one before."""
        rng = np.random.default_rng(number)
        dataset = Dataset()
        dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        dataset.SOPInstanceUID = f"{self.series_uid[:50]}.{number}"
        dataset.StudyInstanceUID = self.study_uid
        dataset.SeriesInstanceUID = self.series_uid
        dataset.Modality = "CT"
        dataset.PatientName = PATIENT_NAME
        dataset.PatientID = "MRN-4711"
        dataset.InstanceNumber = number + 1
        dataset.ImagePositionPatient = [0, 0, 2 * number]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.PixelSpacing = [1, 1]
        dataset.GantryDetectorTilt = 0
        dataset.Rows, dataset.Columns = 16, 16
        dataset.SamplesPerPixel = 1
        dataset.PhotometricInterpretation = "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
        dataset.PixelRepresentation = 0
        dataset.RescaleIntercept, dataset.RescaleSlope = -1024, 1
        dataset.PixelData = rng.integers(0, 4096, (16, 16)).astype("<u2").tobytes()
        dataset["PixelData"].VR = "OW"
        for keyword, value in overrides.items():
            if value is None:
                delattr(dataset, keyword)
            else:
                setattr(dataset, keyword, value)
        return dataset


def part_10(dataset: Dataset, transfer_syntax_uid: str = ExplicitVRLittleEndian) -> bytes:
    """A file of it; what is missing in the data set is missing in the file meta group."""
    meta = FileMetaDataset()
    if "SOPClassUID" in dataset:
        meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    if "SOPInstanceUID" in dataset:
        meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = transfer_syntax_uid
    dataset.file_meta = meta
    dataset.preamble = b"\0" * 128
    file = io.BytesIO()
    dcmwrite(file, dataset)
    return file.getvalue()


def zip_of(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in members.items():
            archive.writestr(name, body)
    return file.getvalue()


@pytest.fixture
def maker() -> Maker:
    return Maker()


@pytest.fixture
def make_part_10() -> Callable[..., bytes]:
    return part_10


@pytest.fixture
def make_zip() -> Callable[..., bytes]:
    return zip_of


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real test data, which a user's machine does not have."""
    default = Path(__file__).parents[3] / "shared" / "data"
    folder = Path(os.environ.get("RADQUEUE_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data: RADQUEUE_TEST_DATA or {default.parent.name}/{default.name} beside the repository")
    return folder


@dataclass
class Clock:
    """Real time, shifted by the test."""

    shift_s: float = 0

    def __call__(self) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=self.shift_s)


@dataclass
class Published:
    """Remembers what was published."""

    events: list[Event] = field(default_factory=list)
    delays_s: list[int] = field(default_factory=list)

    async def __call__(self, event: Event, *, delay_s: int = 0) -> None:
        self.events.append(event)
        self.delays_s.append(delay_s)

    def of(self, kind: type[Event]) -> list:
        return [event for event in self.events if isinstance(event, kind)]


@dataclass
class Bench:
    """Ingest over the local AWS, with a clock and a publisher of the test."""

    ports: Ports
    clock: Clock
    published: Published
    keyed: str
    """Name of a dataset of the test's own that is de-identified in `datasets/`."""
    research: str
    """Name of one that is de-identified in `studies/` too."""

    @property
    def objects(self) -> ObjectStore:
        return self.ports.objects

    async def upload(self, key: str, body: bytes) -> ObjectsCreated:
        """Put an object and return the notification that S3 would send."""
        await self.objects.put(key, body)
        return self.notification(key)

    def notification(self, *keys: str) -> ObjectsCreated:
        time = datetime(2026, 5, 1, tzinfo=UTC)
        return ObjectsCreated(
            objects=tuple(CreatedObject(bucket=self.objects.bucket, key=key, time=time) for key in keys)
        )

    async def keys(self, prefix: str) -> list[str]:
        return [item.key async for item in self.objects.list(prefix)]


@pytest.fixture
async def bench(aws, local_aws):
    settings = IngestSettings(bucket=local_aws.bucket, decoders=1, quiet_s=60, patient_secret=SECRET)
    keyed, research = (f"{kind}-{uuid.uuid4().hex[:8]}" for kind in ("keyed", "research"))
    datasets = read(DATASETS.replace("KEYED", keyed).replace("RESEARCH", research), SECRET)
    clock, published = Clock(), Published()
    decoder = Decoder(settings)
    store = ObjectStore(aws.s3, local_aws.bucket)
    yield Bench(Ports(store, published, decoder, settings, clock, datasets), clock, published, keyed, research)
    await decoder.stop()
