"""A small but real MAP on the SDK's operators, series to run it on, and a worker's collaborators on the local AWS."""

import io
import os
import shutil
import subprocess
import tarfile
import textwrap
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

import aiohttp
import pydicom
import pytest
import pytest_asyncio
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from services.inference.package.engine import Engine
from services.inference.package.maps import Map, load
from services.inference.routing import Route
from services.inference.serving.runner import Bounds, MapRunner, Study
from services.inference.serving.versions import InstalledMap
from services.inference.stable_studies import Quiet
from services.inference.targets.healthimaging import HealthImaging
from services.inference.targets.s3_only import S3Only
from services.inference.targets.target import Target, Targets
from shared.aws import Aws, connect
from shared.dicom import Revision, StoredInstance, digest_of, instance_key, sha_of
from shared.dicomweb import DicomWeb, SigV4, base_url
from shared.messages import Event, InferenceRequested, InferenceTask, ReadySeries, SeriesReady, SeriesRef
from shared.objects import ObjectStore

DEADLINE_S = 15
NOW = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)

# What it does to a series is said by the series' description, so that one process can serve many tests.
APP = textwrap.dedent(
    '''
    """Writes a secondary capture of a CT series, or misbehaves as the series' description asks for."""

    import ctypes
    import json
    import os
    import signal
    import sys
    import tempfile
    import time
    from pathlib import Path

    import numpy as np
    import torch
    from monai.deploy.conditions import CountCondition
    from monai.deploy.core import Application, Operator
    from monai.deploy.operators.dicom_data_loader_operator import DICOMDataLoaderOperator
    from monai.deploy.operators.dicom_series_selector_operator import DICOMSeriesSelectorOperator
    from monai.deploy.operators.dicom_series_to_volume_operator import DICOMSeriesToVolumeOperator
    from pydicom import dcmread
    from pydicom.uid import SecondaryCaptureImageStorage, generate_uid

    RULES = '{"selections": [{"name": "ct", "conditions": {"Modality": "^CT$"}}]}'
    LEAKED = []
    SERVED = []
    HOME = Path.cwd()


    class Capture(Operator):
        def __init__(self, fragment, *args, input_folder, output_folder, **kwargs):
            self.input_folder, self.output_folder = input_folder, output_folder
            super().__init__(fragment, *args, **kwargs)

        def setup(self, spec):
            spec.input("image")

        def compute(self, op_input, op_output, context):
            volume = op_input.receive("image").asnumpy()
            source = dcmread(sorted(self.input_folder.iterdir())[0])
            wish = source.SeriesDescription
            print("printed by the MAP about", source.PatientName)
            if wish == "raise":
                raise KeyError(str(source.PatientName))
            if wish == "wrapped":
                try:
                    raise MemoryError(str(source.PatientName))
                except MemoryError as error:
                    raise RuntimeError("applying transform") from error
            if wish == "hang":
                while True:
                    time.sleep(3600)
            if wish == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if wish == "segfault":
                ctypes.string_at(0)
            if wish == "sleep":
                time.sleep(2)
            if wish == "leak":
                LEAKED.append(bytearray(os.urandom(1) * 100_000_000))
            if wish == "chatter":
                for _ in range(4):
                    os.write(1, b"x" * 1_000_000 + str(source.PatientName).encode() + os.linesep.encode())
            if wish == "gpu lost":
                raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
            if wish == "crash when warm" and SERVED:
                os.abort()
            SERVED.append(source.SOPInstanceUID)
            if wish == "look around":
                listed = [*os.listdir(), *os.listdir(tempfile.gettempdir()), *os.listdir(HOME)]
                found = [os.environ.get("LEFT_BY"), *listed]
                (self.output_folder / "found.json").write_text(json.dumps([SERVED, found]))
                os.environ["LEFT_BY"] = str(source.PatientName)
                Path("left behind").touch()
                Path(tempfile.gettempdir(), "left as well").touch()
                (HOME / "left at home").mkdir()
            if wish == "exit":
                sys.exit(str(source.PatientName))
            if wish == "silent":
                return
            if wish == "report":
                (self.output_folder / "report.txt").write_text("no DICOM")
                return
            self.write(volume, source, wish)

        def write(self, volume, source, wish):
            made = source.copy()
            made.SOPClassUID = made.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
            made.SOPInstanceUID = made.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            made.SeriesInstanceUID = generate_uid()
            made.Modality, made.SeriesDescription = "OT", "mean"
            made.PixelData = np.clip(volume.mean(axis=0), 0, 4095).astype(np.uint16).tobytes()
            if wish == "other patient":
                made.PatientID = "somebody else"
            made.save_as(self.output_folder / "capture.dcm")


    class CaptureApp(Application):
        def compose(self):
            context = Application.init_app_context(self.argv)
            source = Path(context.input_path)
            loader = DICOMDataLoaderOperator(self, CountCondition(self, 1), input_folder=source, name="loader")
            selector = DICOMSeriesSelectorOperator(self, rules=RULES, name="selector")
            volume = DICOMSeriesToVolumeOperator(self, name="volume")
            capture = Capture(
                self, input_folder=source, output_folder=Path(context.output_path), name="capture"
            )
            self.add_flow(loader, selector, {("dicom_study_list", "dicom_study_list")})
            self.add_flow(selector, volume, {("study_selected_series_list", "study_selected_series_list")})
            self.add_flow(volume, capture, {("image", "image")})


    if __name__ == "__main__":
        CaptureApp().run()
    '''
)


@dataclass
class Published:
    """A `Publish` that remembers."""

    events: list[Event] = field(default_factory=list)
    delays_s: list[int] = field(default_factory=list)

    async def __call__(self, event: Event, *, delay_s: int = 0) -> None:
        self.events.append(event)
        self.delays_s.append(delay_s)


def make_series(n: int = 3, **attributes: str) -> list[bytes]:
    """Make a CT series of `n` slices of 16 x 16 as Part 10 files."""
    study_uid, series_uid, frame_uid = generate_uid(), generate_uid(), generate_uid()
    files = []
    for index in range(n):
        dataset = Dataset()
        dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, generate_uid()
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study_uid, series_uid
        dataset.FrameOfReferenceUID = frame_uid
        dataset.Modality, dataset.PatientName, dataset.PatientID = "CT", "Secret^Name", "secret-id"
        dataset.PatientBirthDate, dataset.PatientSex = "19700101", "O"
        dataset.StudyDate, dataset.StudyTime, dataset.StudyID, dataset.AccessionNumber = "20260102", "1200", "S1", "A1"
        dataset.StudyDescription, dataset.SeriesDescription = "made", "capture"
        dataset.SeriesNumber, dataset.InstanceNumber = 1, index + 1
        dataset.PatientPosition = "HFS"
        dataset.ImagePositionPatient, dataset.ImageOrientationPatient = [0, 0, 2.5 * index], [1, 0, 0, 0, 1, 0]
        dataset.PixelSpacing, dataset.SliceThickness = [1, 1], 2.5
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1000
        dataset.Rows = dataset.Columns = 16
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
        dataset.PixelData = bytes(range(256)) * 2
        for keyword, value in attributes.items():
            setattr(dataset, keyword, value)
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        buffer = io.BytesIO()
        dataset.save_as(buffer, enforce_file_format=True)
        files.append(buffer.getvalue())
    return files


@pytest.fixture
def series_files() -> Callable[..., list[bytes]]:
    """Make the files of a CT series; keyword arguments set attributes by their DICOM keywords."""
    return make_series


@pytest.fixture
def study(tmp_path) -> Callable[..., Study]:
    """Lay a series into a study's folder."""

    def lay(**attributes: str) -> Study:
        made = Study.make(tmp_path / generate_uid())
        for index, content in enumerate(make_series(**attributes)):
            (made.input / f"{index}.dcm").write_bytes(content)
        return made

    return lay


@pytest.fixture(scope="session")
def capture_map(tmp_path_factory) -> Map:
    """The MAP above, in a folder."""
    folder = tmp_path_factory.mktemp("capture")
    (folder / "app.py").write_text(APP)
    return load("capture", folder)


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def runner(capture_map) -> AsyncIterator[MapRunner]:
    """One runner for all tests, because starting a MAP takes seconds of a processor."""
    made = MapRunner([capture_map], bounds=Bounds(deadline_s=DEADLINE_S))
    yield made
    await made.stop()


CONTAINER_BASE = "radqueue-test-base:1"
RUN_AS = ((), ("--runtime", "runc", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1000:1000"))
"""More arguments of podman, of which the first that work are taken: inside a container it may need the latter."""


@pytest.fixture(scope="session")
def container_base(tmp_path_factory) -> str:
    """An image with Debian and Python, made here, for nothing may be pulled; it stays for the next session."""
    podman, debootstrap = shutil.which("podman"), shutil.which("debootstrap")
    if podman is None or debootstrap is None or os.geteuid() != 0:
        pytest.skip("a base for containers is made by podman and debootstrap, as root")
    if subprocess.run([podman, "image", "exists", CONTAINER_BASE], check=False).returncode != 0:
        root = tmp_path_factory.mktemp("base") / "root"
        command = [debootstrap, "--variant=minbase", "--include=python3,libstdc++6", "bookworm", str(root)]
        if subprocess.run(command, check=False, capture_output=True).returncode != 0:
            pytest.skip("debootstrap does not reach Debian")
        with tarfile.open(root.with_suffix(".tar"), "w") as archive:
            archive.add(root, ".")
        subprocess.run([podman, "import", "--quiet", str(root.with_suffix(".tar")), CONTAINER_BASE], check=True)
        shutil.rmtree(root.parent)
    return CONTAINER_BASE


@pytest.fixture(scope="session")
def engine(container_base) -> Engine:
    """Podman, with what it needs to run a container on this machine."""
    for arguments in RUN_AS:
        found = Engine("podman", shutil.which("podman"), arguments)
        command = found.run_command(container_base, ["python3", "-c", ""], name=f"radqueue-{uuid.uuid4().hex}")
        done = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode == 0:
            return found
    return pytest.skip(f"podman runs no container here: {done.stderr.splitlines()[-1:]}")


@pytest.fixture(scope="session")
def _environ(local_aws) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in local_aws.environ.items():
            patch.setenv(name, value)
        yield


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def clients(_environ) -> AsyncIterator[Aws]:
    """Open clients of the local AWS, for the session's event loop."""
    async with connect(os.environ) as opened:
        yield opened


@dataclass
class Worker:
    """What the handlers of one worker are given, and shortcuts of the tests."""

    objects: ObjectStore
    web: DicomWeb
    targets: Targets
    maps: dict[str, InstalledMap]
    runner: MapRunner
    publish: Published = field(default_factory=Published)

    @property
    def for_route(self) -> dict:
        return self.common | {"quiet": Quiet(quiet_s=60, max_settle_s=600)}

    @property
    def common(self) -> dict:
        return {"objects": self.objects, "publish": self.publish, "maps": self.maps, "clock": lambda: NOW}

    @property
    def for_infer(self) -> dict:
        return self.common | {"runner": self.runner, "targets": self.targets, "lease_s": 60}

    async def store_series(self, *, supersedes: str | None = None, files=None, **attributes: str) -> Revision:
        """Store a series as ingest does, with its revision."""
        instances = []
        for content in files or make_series(**attributes):
            header = pydicom.dcmread(io.BytesIO(content))
            sha = sha_of(content)
            uids = (header.StudyInstanceUID, header.SeriesInstanceUID, header.SOPInstanceUID)
            key = instance_key(*uids, sha)
            await self.objects.put(key, content)
            instances.append(StoredInstance(sop_instance_uid=header.SOPInstanceUID, sha=sha, key=key))
        revision = Revision(
            dataset="tests",
            study_uid=header.StudyInstanceUID,
            series_uid=header.SeriesInstanceUID,
            digest=digest_of(instances),
            created=NOW,
            supersedes=supersedes,
            instances=tuple(instances),
            attributes={"Modality": header.Modality},
        )
        await self.objects.put(revision.key, revision.body())
        return revision

    def ready(self, revision: Revision) -> SeriesReady:
        """Announce the series as ingest does."""
        told = ReadySeries(
            **_ref(revision).model_dump(),
            dataset="tests",
            n_instances=len(revision.instances),
            modality=str(revision.attributes["Modality"]),
        )
        return SeriesReady.of(revision.key, told, time=NOW)

    def request(self, revision: Revision, **other: str) -> InferenceRequested:
        """Ask for the MAP on the series; keyword arguments replace the MAP's name or digest."""
        found = self.maps["capture"].map
        asked = {"map": found.name, "map_digest": found.digest} | other
        return InferenceRequested.of("test", InferenceTask(**asked, inputs=(_ref(revision),)), time=NOW)

    async def keys(self, prefix: str) -> list[str]:
        """Return what is stored under the prefix, without it."""
        return [found.key.removeprefix(prefix) async for found in self.objects.list(prefix)]


def _ref(revision: Revision) -> SeriesRef:
    return SeriesRef(
        study_uid=revision.study_uid,
        series_uid=revision.series_uid,
        digest=revision.digest,
        revision_key=revision.key,
    )


def targets_of(target: Target) -> Targets:
    """A worker that pushes to one target."""
    return Targets({target.name: target, "s3": S3Only()}, default=target.name)


@pytest_asyncio.fixture(loop_scope="session")
async def worker(clients, local_aws, capture_map, runner, tmp_path) -> AsyncIterator[Worker]:
    """A worker on the local AWS, with the MAP above for every CT series of at least two instances."""
    async with aiohttp.ClientSession() as session:
        url = base_url(endpoint_url=clients.endpoint_url, datastore_id=local_aws.datastore_id)
        web = DicomWeb(url, session=session, auth=SigV4(clients.credentials, clients.region))
        route = Route.model_validate(
            {"name": "capture", "source": "capture", "when": {"Modality": "CT", "n_instances": {"min": 2}}}
        )
        yield Worker(
            objects=ObjectStore(clients.s3, local_aws.bucket),
            web=web,
            targets=targets_of(HealthImaging(web, clients.medical_imaging, local_aws.datastore_id)),
            maps={"capture": InstalledMap(capture_map, route)},
            runner=runner,
        )
