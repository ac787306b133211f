"""What ingest costs: images to arrays against a bare pydicom loop, its S3 calls, its wall, its growth and its memory.

The bare loop is what an engineer would write: read, rescale, window, resize, in one process.
`python -m tests.benchmarks.bench_ingest` runs all; with words after it only those parts: `arrays`, `client`, `wall`,
`growth`, `memory`.
"""

import asyncio
import contextlib
import copy
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import boto3
import imagecodecs
import numpy as np
from botocore.config import Config
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.encaps import encapsulate
from pydicom.filewriter import dcmwrite
from pydicom.uid import JPEG2000Lossless, generate_uid

from services.ingest.decoder import Decoder
from services.ingest.protocol import ArrayConfig, Assemble, Describe
from services.ingest.settings import IngestSettings
from shared.aws import connect
from shared.objects import ObjectStore
from shared.phantom import write_ct_series
from tests.conftest import ROOT, start_local_aws

SIZE = 64
"""Of the arrays."""
WINDOW = (-1000, 1000)
SLICES, ROUNDS = 20, 7
"""Of the images that become arrays; the first round warms up, and is not counted."""
CALLS, CALL_BYTES = 200, 512 * 1024
LATENCY_S = 0.02
WALL_SLICES = 100
GROWTH = (100, 1_000, 10_000)
"""Instances of one series; the images are of 32 x 32 pixels."""
ZIP_SLICES, ZIP_SIZE = 1_024, 1_024
"""Of the large zip: 2 MiB each, 2 GiB together."""
SAMPLE_S = 0.05
REAL_J2K = Path(os.environ.get("RADQUEUE_TEST_DATA", ROOT.parent / "shared" / "data")) / "ct_body_j2k_nosop20"
BUCKET = "radqueue-bench"


def rows() -> list[dict[str, Any]]:
    """Run all, or what the command line names."""
    parts: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
        "arrays": _arrays,
        "client": lambda folder: asyncio.run(_client(folder)),
        "wall": _wall,
        "growth": _growth,
        "memory": _memory,
    }
    found = []
    for name in [name for name in sys.argv[1:] if name in parts] or list(parts):
        with tempfile.TemporaryDirectory() as folder:
            found += parts[name](Path(folder))
    return found


def _row(what: str, value: float, unit: str, n: int) -> dict[str, Any]:
    return {"bench": "ingest", "what": what, "value": value, "unit": unit, "n": n}


# Images to arrays.


def _arrays(folder: Path) -> list[dict[str, Any]]:
    """Make arrays of the same files in the children and in the bare loop, in turn; ratios are medians of rounds."""
    plain = sorted(write_ct_series(folder / "plain", slices=SLICES, size=512).iterdir())
    real = sorted(REAL_J2K.glob("CT*"))
    compressed = _with_uids(real, folder / "j2k") if real else _as_jpeg_2000(plain, folder / "j2k")
    return [
        *asyncio.run(_compared("512 x 512, uncompressed", plain, folder)),
        *asyncio.run(_compared("512 x 512, JPEG 2000", compressed, folder)),
    ]


def _with_uids(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Give the real set its UIDs back, which were removed."""
    folder.mkdir()
    study_uid, series_uid = generate_uid(), generate_uid()
    for path in paths:
        dataset = dcmread(path)
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study_uid, series_uid
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID
        dataset.save_as(folder / path.name)
    return sorted(folder.iterdir())


def _as_jpeg_2000(paths: Sequence[Path], folder: Path) -> list[Path]:
    folder.mkdir()
    for path in paths:
        dataset = dcmread(path)
        dataset.PixelData = encapsulate(
            [bytes(imagecodecs.jpeg2k_encode(dataset.pixel_array, reversible=True, level=0))]
        )
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
        dataset.save_as(folder / path.name)
    return sorted(folder.iterdir())


async def _compared(what: str, paths: Sequence[Path], folder: Path) -> list[dict[str, Any]]:
    decoder = Decoder(IngestSettings(decoders=1))
    bare: list[float] = []
    files: list[float] = []
    series: list[float] = []
    try:
        with _bare(paths) as run:
            for _ in range(ROUNDS):
                bare.append(run())
                before = _cpu_of_children(decoder)
                await _made(decoder, paths, folder)
                after = _cpu_of_children(decoder)
                files.append(after[0] - before[0])
                series.append(after[1] - before[1])
    finally:
        await decoder.stop()
    n, counted = len(paths) * (ROUNDS - 1), slice(1, None)
    whole = [a + b for a, b in zip(files, series, strict=True)]

    def faster(spent: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(bare[counted], spent[counted], strict=True))

    def per_image(spent: list[float]) -> float:
        return statistics.median(spent[counted]) * 1_000 / len(paths)

    return [
        _row(f"{what}: CPU per image, bare loop", per_image(bare), "ms", n),
        _row(f"{what}: CPU per image, to the stored instance", per_image(files), "ms", n),
        _row(f"{what}: CPU per image, from there to the array", per_image(series), "ms", n),
        _row(f"{what}: images per CPU second, stored instances to arrays / bare loop", faster(series), "x", n),
        _row(f"{what}: images per CPU second, uploads to arrays / bare loop", faster(whole), "x", n),
    ]


async def _made(decoder: Decoder, paths: Sequence[Path], folder: Path) -> None:
    """Do what the service has its children do with a series."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        stored = [Path(made, f"{number}.dcm") for number in range(len(paths))]
        for path, out in zip(paths, stored, strict=True):
            await decoder.normalise(path, out)
        config, names = ArrayConfig(SIZE, WINDOW, (0.5, 99.5), ("blank", "localizer")), list(map(str, stored))
        await decoder.series_call(Describe(names))
        told = await decoder.series_call(Assemble(names, f"{made}/array.npy", config, [], "bench"))
    if told.shape != [len(paths), SIZE, SIZE]:
        raise RuntimeError(f"the array has another shape: {told.shape}")


def _cpu_of_children(decoder: Decoder) -> tuple[float, float]:
    """Return the seconds of the child that reads files and of the one that reads series."""
    pids = [children.all[0].pid for children in (decoder._files, decoder._series)]
    files_s, series_s = (_precise_cpu_of(pid) if pid else 0.0 for pid in pids)
    return files_s, series_s


def _precise_cpu_of(pid: int) -> float:
    """Return the seconds that the threads of a process ran, to the nanosecond (sched-stats of the kernel)."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


@contextlib.contextmanager
def _bare(paths: Sequence[Path]) -> Iterator[Callable[[], float]]:
    """Give a function that makes the arrays in the bare loop, and returns its processor seconds."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_ingest", "bare", *map(str, paths)]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        orders, answers = process.stdin, process.stdout
        assert orders
        assert answers

        def run() -> float:
            orders.write("\n")
            orders.flush()
            return float(answers.readline())

        yield run
        orders.close()


def _bare_loop(paths: Sequence[str]) -> None:
    """Make arrays of the files for each line on standard input."""
    for _ in sys.stdin:
        before = time.process_time()
        np.save(io.BytesIO(), np.stack([_picture(dcmread(path)) for path in paths]))
        print(time.process_time() - before, flush=True)  # noqa: T201 - told to the parent


def _picture(dataset: Dataset) -> np.ndarray:
    """Return the slice (SIZE, SIZE) in [-1, 1]."""
    low, high = WINDOW
    values = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    unit = ((np.clip(values, low, high) - low) * (2 / (high - low)) - 1).astype(np.float32)
    return np.asarray(Image.fromarray(unit).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


# The S3 client.


async def _client(folder: Path) -> list[dict[str, Any]]:
    """Send and fetch one object after the other; the server is another process."""
    path, found = folder / "object", []
    path.write_bytes(os.urandom(CALL_BYTES))
    with _stub(folder, latency_s=0) as url, contextlib.ExitStack() as stack:
        environ = {"AWS_ENDPOINT_URL": url, "AWS_REGION": "us-east-1"}
        environ |= _credentials("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        stack.enter_context(mock.patch.dict(os.environ, environ))
        async with connect(os.environ) as aws:
            store = ObjectStore(aws.s3, BUCKET)
            calls = {"PUT": lambda: store.upload(path, "key"), "GET": lambda: store.download("key", path)}
            for name, call in calls.items():
                for _ in range(10):
                    await call()
                before = time.process_time()
                for _ in range(CALLS):
                    await call()
                spent_ms = (time.process_time() - before) * 1_000 / CALLS
                found.append(_row(f"S3 client: CPU of one {name} of 512 KiB", spent_ms, "ms", CALLS))
    return found


# The service, beside a stub of S3.


class _Service:
    """`python -m services.ingest` over the stub, and a local AWS for its queues."""

    def __init__(self, process: "subprocess.Popen[bytes]", s3: Any, sqs: Any, bucket: str) -> None:
        self.process, self.s3, self._sqs, self._bucket = process, s3, sqs, bucket
        self._queues = {
            role: sqs.get_queue_url(QueueName=f"radqueue-{role}")["QueueUrl"] for role in ("ingest", "inference")
        }

    def upload(self, body: Any, key: str) -> None:
        self.s3.put_object(Bucket=self._bucket, Key=key, Body=body)

    def take(self, key: str, n_instances: int) -> float:
        """Tell the service of an object, wait until its series is ready, and return the seconds."""
        record = {
            "eventSource": "aws:s3",
            "eventVersion": "2.1",
            "eventName": "ObjectCreated:Put",
            "eventTime": "2026-11-02T00:00:00.000Z",
            "s3": {"bucket": {"name": self._bucket}, "object": {"key": key}},
        }
        started = time.perf_counter()
        self._sqs.send_message(QueueUrl=self._queues["ingest"], MessageBody=json.dumps({"Records": [record]}))
        while self.process.poll() is None:
            queue = {"QueueUrl": self._queues["inference"]}
            for message in self._sqs.receive_message(**queue, WaitTimeSeconds=1).get("Messages", []):
                self._sqs.delete_message(**queue, ReceiptHandle=message["ReceiptHandle"])
                ready = json.loads(message["Body"])["data"]
                if ready["n_instances"] != n_instances or ready["array_key"] is None:
                    raise RuntimeError(f"{ready['n_instances']} instances were taken, warnings {ready['warnings']}")
                return time.perf_counter() - started
        raise RuntimeError("the service ended")


@contextlib.contextmanager
def _service(folder: Path, *, latency_s: float = 0) -> Iterator[_Service]:
    (folder / "tmp").mkdir()
    with _stub(folder, latency_s=latency_s) as url:
        aws = start_local_aws(folder / "aws")
        try:
            more = {"AWS_ENDPOINT_URL_S3": url, "TMPDIR": str(folder / "tmp"), "RADQUEUE_POLL_S": "1"}
            with (
                (folder / "log").open("wb") as log,
                subprocess.Popen(
                    [sys.executable, "-m", "services.ingest"], cwd=ROOT, env=aws.process_environ | more, stderr=log
                ) as process,
                contextlib.closing(_boto("s3", url)) as s3,
                contextlib.closing(_boto("sqs", aws.endpoint_url)) as sqs,
            ):
                try:
                    yield _Service(process, s3, sqs, aws.bucket)
                finally:
                    process.terminate()
        finally:
            aws.stop()


@contextlib.contextmanager
def _stub(folder: Path, *, latency_s: float) -> Iterator[str]:
    objects = folder / "objects"
    objects.mkdir()
    command = [sys.executable, "-m", "tests.benchmarks.stub_s3", str(objects), str(latency_s)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            word, _, url = process.stdout.readline().strip().partition(" ")
            if word != "ready":
                raise RuntimeError("the stub did not start")
            yield url
        finally:
            process.terminate()


def _credentials(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "local")


def _boto(service: str, url: str) -> Any:
    config = Config(s3={"addressing_style": "path"}, retries={"max_attempts": 0}, read_timeout=600)
    keys = _credentials("aws_access_key_id", "aws_secret_access_key")
    return boto3.client(service, endpoint_url=url, region_name="us-east-1", config=config, **keys)


# Wall.


def _wall(folder: Path) -> list[dict[str, Any]]:
    """Take a folder of files and a zip of them, and do the same in a loop that makes one call after the other."""
    paths = sorted(write_ct_series(folder / "ct", slices=WALL_SLICES, size=512).iterdir())
    with _service(folder, latency_s=LATENCY_S) as service:
        _warm_up(service)
        for number, path in enumerate(paths):
            service.upload(path.read_bytes(), f"incoming/bench/folder/{number}.dcm")
        service.upload(b"", "incoming/bench/folder/_COMPLETE")
        loop_s = _loop(service)
        by_folder_s = service.take("incoming/bench/folder/_COMPLETE", WALL_SLICES)
        service.upload(_zip(_copies(dcmread(paths[0]), WALL_SLICES)).getvalue(), "incoming/bench/study.zip")
        by_zip_s = service.take("incoming/bench/study.zip", WALL_SLICES)
    what = f"{WALL_SLICES} slices of 512 x 512, {LATENCY_S * 1_000:g} ms per S3 call: wall"
    return [
        _row(f"{what}, loop: read all, preprocess, upload one by one", loop_s, "s", WALL_SLICES),
        _row(f"{what}, service, a folder of files", by_folder_s, "s", WALL_SLICES),
        _row(f"{what}, service, a zip", by_zip_s, "s", WALL_SLICES),
        _row(f"{what}, loop / service, a folder of files", loop_s / by_folder_s, "x", WALL_SLICES),
        _row(f"{what}, loop / service, a zip", loop_s / by_zip_s, "x", WALL_SLICES),
    ]


def _loop(service: _Service) -> float:
    """Read all files, make a picture of each, upload them one by one; return the seconds."""
    started, where = time.perf_counter(), {"Bucket": service._bucket}
    listed = service.s3.list_objects_v2(**where, Prefix="incoming/bench/folder/")["Contents"]
    keys = [item["Key"] for item in listed if item["Size"]]
    datasets = [dcmread(io.BytesIO(service.s3.get_object(**where, Key=key)["Body"].read())) for key in keys]
    for number, picture in enumerate([_picture(dataset) for dataset in datasets]):
        file = io.BytesIO()
        np.save(file, picture)
        service.s3.put_object(**where, Key=f"loop/{number}.npy", Body=file.getvalue())
    return time.perf_counter() - started


def _warm_up(service: _Service) -> None:
    """Have the children started."""
    service.upload(_zip(_copies(_small(), 2)).getvalue(), "incoming/bench/warm.zip")
    service.take("incoming/bench/warm.zip", 2)


# Growth.


def _growth(folder: Path) -> list[dict[str, Any]]:
    """Take series of more and more instances; the CPU is that of the service and its children."""
    found = []
    with _service(folder) as service:
        _warm_up(service)
        for n in GROWTH:
            service.upload(_zip(_copies(_small(), n)).getvalue(), f"incoming/bench/{n}.zip")
            before = _cpu_of_tree(service.process.pid)
            service.take(f"incoming/bench/{n}.zip", n)
            spent_ms = (_cpu_of_tree(service.process.pid) - before) * 1_000 / n
            found.append(_row(f"service and children: CPU per instance, {n:,} instances", spent_ms, "ms", n))
    ratio = found[-1]["value"] / found[0]["value"]
    return [*found, _row(f"the same, {GROWTH[-1]:,} / {GROWTH[0]:,} instances", ratio, "x", GROWTH[-1])]


def _cpu_of_tree(pid: int) -> float:
    """Return the seconds of a process, of its children, and of those that ended (proc_pid_stat(5), fields 14 to 17)."""
    ticks = 0
    for each in _tree(pid):
        after_name = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, after_name[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _tree(pid: int) -> list[int]:
    children = [int(one) for path in Path(f"/proc/{pid}/task").glob("*/children") for one in path.read_text().split()]
    return [pid, *(below for child in children for below in _tree(child))]


# Memory.


def _memory(folder: Path) -> list[dict[str, Any]]:
    """Take a zip of 2 GiB, and look at the memory of the service and its children all the time."""
    archive = folder / "large.zip"
    _zip(_copies(dcmread(next(write_ct_series(folder / "ct", slices=1, size=ZIP_SIZE).iterdir())), ZIP_SLICES), archive)
    peak, stop = [0, 0], threading.Event()

    def look(pid: int) -> None:
        while not stop.wait(SAMPLE_S):
            with contextlib.suppress(OSError):  # a child that ends meanwhile
                held = [_resident_bytes(each) for each in _tree(pid)]
                peak[:] = max(peak[0], held[0]), max(peak[1], sum(held))

    with _service(folder) as service:
        _warm_up(service)
        with archive.open("rb") as file:
            service.upload(file, "incoming/bench/large.zip")
        size = archive.stat().st_size
        archive.unlink()
        looking = threading.Thread(target=look, args=[service.process.pid])
        looking.start()
        try:
            spent_s = service.take("incoming/bench/large.zip", ZIP_SLICES)
        finally:
            stop.set()
            looking.join()
    what = f"a zip of {size / 2**30:.2g} GiB, {ZIP_SLICES:,} slices"
    return [
        _row(f"{what}: peak memory of the service's process", peak[0] / 2**20, "MiB", 1),
        _row(f"{what}: peak memory of the service and its children", peak[1] / 2**20, "MiB", 1),
        _row(f"{what}: wall", spent_s, "s", 1),
    ]


def _resident_bytes(pid: int) -> int:
    """Return the proportional set: what processes share counts once (proc_pid_smaps(5))."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


# What is uploaded.


def _small() -> Dataset:
    with tempfile.TemporaryDirectory() as folder:
        return dcmread(next(write_ct_series(Path(folder, "ct"), slices=1, size=32).iterdir()))


def _copies(slice_: Dataset, n: int) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a series whose slices differ in their UIDs and positions alone."""
    dataset = copy.deepcopy(slice_)
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID = generate_uid(), generate_uid()
    for number in range(n):
        dataset.SOPInstanceUID = f"{dataset.SeriesInstanceUID[:50]}.{number}"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.InstanceNumber, dataset.ImagePositionPatient = number, [0, 0, number]
        file = io.BytesIO()
        dcmwrite(file, dataset)
        yield f"{number}.dcm", file.getvalue()


def _zip(members: Iterator[tuple[str, bytes]], to: Path | None = None) -> io.BytesIO:
    """Pack without compressing, into `to` or into memory."""
    made = io.BytesIO()
    with zipfile.ZipFile(to or made, "w") as archive:
        for name, body in members:
            archive.writestr(name, body)
    return made


if __name__ == "__main__":
    if sys.argv[1:2] == ["bare"]:
        _bare_loop(sys.argv[2:])
    else:
        for row in rows():
            print(f"{row['what']:100} {row['value']:9.3f} {row['unit']:4} n={row['n']}")  # noqa: T201 - a program's output
