"""What serving a MAP costs: warm, in a container, in a process per study, against the bare application in a loop.

The bare loop is what an engineer would write: one process, one import, a new `Application` per study. All ways take
turns on the same series, so that a busy machine slows them alike. `python -m tests.benchmarks.bench_inference` runs
all; with words after it (`ways`, `memory`, `busy`, `push`) only those.
"""

import asyncio
import contextlib
import importlib
import io
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pydicom
import yaml
from botocore.config import Config

from services.inference.package.engine import Engine, EngineFailed
from services.inference.package.maps import load
from services.inference.serving.maphost import cuda_runtime
from services.inference.serving.runner import MapRunner, Run, Serving, Study
from services.inference.settings import InferenceSettings
from services.inference.targets.configured import open_targets
from services.inference.targets.target import Instance
from shared import config
from shared.aws import connect
from shared.dicom import Revision, StoredInstance, digest_of, instance_key, sha_of
from shared.messages import ReadySeries, SeriesReady
from shared.objects import ObjectStore
from shared.phantom import write_ct_series
from tests.conftest import ROOT, start_local_aws
from tests.inference.conftest import APP, CONTAINER_BASE, RUN_AS, make_series

MAP = "ct_tissues"
SLICES, SIZE = 8, 128
ROUNDS, FRESH = 15, 3
LEAST_S = 0.01
"""An overhead below this, or below none, counts as this much: less cannot be told apart."""
MEMORY_STUDIES = 1_000
BACKLOG, SLEEP_S = 50, 2.0
PUSHED = 200
NOW = datetime(2026, 11, 2, tzinfo=UTC)


def rows() -> list[dict[str, Any]]:
    """Run all, or what the command line names."""
    parts: dict[str, Callable[[Path], Awaitable[list[dict[str, Any]]]]] = {
        "ways": _ways,
        "memory": _memory,
        "busy": _busy,
        "push": _push,
    }
    wanted = [name for name in sys.argv[1:] if name in parts] or list(parts)
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for name in wanted:
            place = Path(folder, name)
            place.mkdir()
            found += asyncio.run(parts[name](place))  # type: ignore[arg-type]
        return found


# Ways to run one study.


async def _ways(folder: Path) -> list[dict[str, Any]]:
    """Run the MAP that ships in each way, in turn; a ratio is the median of the rounds' ratios."""
    source = write_ct_series(folder / "series", slices=SLICES, size=SIZE)
    found = load(MAP, ROOT / "maps" / MAP)
    studies = iter(range(10_000))

    def lay() -> Study:
        laid = Study.make(folder / str(next(studies)))
        for path in source.iterdir():
            (laid.input / path.name).write_bytes(path.read_bytes())
        return laid

    warm, fresh = MapRunner([found]), MapRunner([found], serving={MAP: Serving(isolation="process")})
    contained = _in_container(folder)
    runners = {"warm": warm} | ({"container, warm": contained} if contained else {})
    walls: dict[str, list[float]] = {name: [] for name in ("bare loop", *runners, "process per study")}
    beside: dict[str, list[float]] = {name: [] for name in runners}
    cpus: dict[str, list[float]] = {name: [] for name in ("bare loop", "warm", "process per study")}
    try:
        with _bare(found.application) as bare:
            bare(lay())
            for runner in runners.values():
                await _ran(runner, lay())
            pid = warm.pid(MAP)
            for index in range(ROUNDS):
                wall, cpu = bare(lay())
                walls["bare loop"].append(wall)
                cpus["bare loop"].append(cpu)
                for name, runner in runners.items():
                    used, study, started = _cpu_of(pid), lay(), time.perf_counter()
                    run = await _ran(runner, study)
                    walls[name].append(time.perf_counter() - started)
                    beside[name].append(walls[name][-1] - run.duration_s)
                    if name == "warm":
                        cpus[name].append(_cpu_of(pid) - used)
                if index < FRESH:
                    study, used, started = lay(), _cpu_of_ended(), time.perf_counter()
                    await _ran(fresh, study)
                    walls["process per study"].append(time.perf_counter() - started)
                    cpus["process per study"].append(_cpu_of_ended() - used)
    finally:
        await asyncio.gather(*(runner.stop() for runner in (*runners.values(), fresh)))

    return _compared(walls, beside, cpus)


Times = dict[str, list[float]]
"""Seconds of each study, by the way that it was run."""


def _compared(walls: Times, beside: Times, cpus: Times) -> list[dict[str, Any]]:
    """Return the medians, and what the ways cost over the bare loop; `beside` is wall without `Application.run`."""
    what = f"{MAP}, {SLICES} slices of {SIZE} x {SIZE}"
    found = [_row(f"{what}: wall, {name}", statistics.median(one), "s", len(one)) for name, one in walls.items()]
    found += [_row(f"{what}: CPU, {name}", statistics.median(one), "s", len(one)) for name, one in cpus.items()]
    for name in beside:
        ratios = [ours / bare for ours, bare in zip(walls[name], walls["bare loop"], strict=True)]
        aim = " (aim: <= 1.10)" if name == "warm" else ""
        found.append(_row(f"{what}: wall, {name} / bare loop{aim}", statistics.median(ratios), "x", len(ratios)))
    over = {name: statistics.median(one) - statistics.median(walls["bare loop"]) for name, one in walls.items()}
    for name in ("warm", "process per study"):
        found.append(_row(f"{what}: overhead, {name} - bare loop", over[name], "s", len(walls[name])))
    for name, one in beside.items():
        found.append(_row(f"{what}: overhead, {name} - its Application.run", statistics.median(one), "s", len(one)))
    # Warm keeps its models, which the bare loop loads again: what it saves can be more than what it adds.
    least = {
        "warm - bare loop": max(over["warm"], LEAST_S),
        "warm - its Application.run": statistics.median(beside["warm"]),
    }
    for how, overhead in least.items():
        formula = f"(process per study - bare loop) / ({how}) (aim: >= 50)"
        found.append(_row(f"{what}: {formula}", over["process per study"] / overhead, "x", FRESH))
    ratio = statistics.median(cpus["warm"]) / statistics.median(cpus["bare loop"])
    return [*found, _row(f"{what}: CPU, warm / bare loop", ratio, "x", ROUNDS)]


async def _ran(runner: MapRunner, study: Study) -> Run:
    run = await runner.run(MAP, study)
    if run.outcome != "ran":
        raise RuntimeError(f"the MAP ended as {run.outcome}: {run.error_type} {run.where}")
    return run


@contextlib.contextmanager
def _bare(application: str) -> Iterator[Callable[[Study], tuple[float, float]]]:
    """Give a function that runs a study in the bare loop, and returns its seconds of wall and of processor."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_inference", "bare", application]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:

        def run(study: Study) -> tuple[float, float]:
            process.stdin.write(f"{study.folder}\n")
            process.stdin.flush()
            wall, cpu = map(float, process.stdout.readline().split())
            return wall, cpu

        yield run
        process.stdin.close()


def _bare_loop(application: str) -> None:
    """Run the studies that standard input names, each by a new object of the application."""
    import ctypes  # noqa: PLC0415 - of this process alone

    ctypes.CDLL(str(cuda_runtime()), mode=ctypes.RTLD_GLOBAL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.argv, studies = ["app"], sys.stdin
    sys.path.insert(0, application)
    os.environ["HOLOSCAN_MODEL_PATH"] = f"{application}/models"
    made: Any = importlib.import_module("app").CTTissuesApp
    for line in studies:
        os.environ["HOLOSCAN_INPUT_PATH"] = f"{line.strip()}/input"
        os.environ["HOLOSCAN_OUTPUT_PATH"] = f"{line.strip()}/output"
        cpu, wall = time.process_time(), time.perf_counter()
        made().run()
        answers.write(f"{time.perf_counter() - wall} {time.process_time() - cpu}\n")
        answers.flush()


def _in_container(folder: Path) -> MapRunner | None:
    """Return a runner of the same MAP as an image, under this interpreter's packages; None where podman cannot."""
    with contextlib.suppress(EngineFailed, subprocess.CalledProcessError):
        engine = Engine.find("podman", RUN_AS[os.geteuid() == 0])
        if engine.inspect(CONTAINER_BASE) is None or sys.version_info[:2] != (3, 11):
            return None
        app, context = {"command": '["python3", "/opt/holoscan/app"]'}, folder / "image"
        context.mkdir()
        (context / "app.json").write_text(json.dumps(app))
        (context / "pkg.json").write_text(json.dumps({"resources": {"memory": "4Gi"}}))
        subprocess.run(["/bin/cp", "--recursive", str(ROOT / "maps" / MAP), str(context / "app")], check=True)
        lines = [f"FROM {CONTAINER_BASE}", "COPY app /opt/holoscan/app", "COPY app/models /opt/holoscan/models"]
        (context / "Dockerfile").write_text("\n".join([*lines, "COPY app.json pkg.json /etc/holoscan/"]))
        tag = "radqueue-bench:1"
        subprocess.run(
            [engine.program, "build", "--quiet", "--tag", tag, str(context)], check=True, capture_output=True
        )
        sdk = ("--volume", f"{sysconfig.get_paths()['purelib']}:/sdk:ro", "--env", "PYTHONPATH=/sdk")
        return MapRunner([load(MAP, tag, engine=replace(engine, arguments=(*engine.arguments, *sdk)))])
    return None


def _cpu_of_ended() -> float:
    used = os.times()
    return used.children_user + used.children_system


def _cpu_of(pid: int | None) -> float:
    """Return the user and system seconds of a process that still runs (proc_pid_stat(5), fields 14 and 15)."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


# Memory.


async def _memory(folder: Path) -> list[dict[str, Any]]:
    """Run many small studies in one process; the slope is that of a line through its resident memory after each."""
    (folder / "app").mkdir()
    (folder / "app" / "app.py").write_text(APP)
    runner = MapRunner([load(MAP, folder / "app")])
    files, held = make_series(), []
    try:
        for index in range(MEMORY_STUDIES):
            study = Study.make(folder / str(index))
            for number, content in enumerate(files):
                (study.input / f"{number}.dcm").write_bytes(content)
            held.append((await _ran(runner, study)).rss_bytes)
            if index == 0:
                pid = runner.pid(MAP)
        if runner.pid(MAP) not in {pid, None}:
            raise RuntimeError("the process was replaced")
    finally:
        await runner.stop()
    settled = held[MEMORY_STUDIES // 10 :]
    slope = float(np.polyfit(np.arange(len(settled)), settled, 1)[0])
    return [
        _row("warm process, resident memory per study, slope", slope / 1024, "KiB", len(settled)),
        _row("warm process, resident memory after the first study", held[0] / 2**20, "MiB", 1),
        _row("warm process, resident memory at the end", held[-1] / 2**20, "MiB", MEMORY_STUDIES),
    ]


# A worker with a backlog.


async def _busy(folder: Path) -> list[dict[str, Any]]:
    """Give a worker a backlog of studies for a MAP that sleeps; its share of the time is that of the MAP running."""
    (folder / "capture").mkdir()
    (folder / "capture" / "app.py").write_text(APP)
    route = {"name": "capture", "source": "capture", "when": {"Modality": "CT"}}
    (folder / "maps.yaml").write_text(yaml.safe_dump({"maps": [route]}))
    aws = start_local_aws(folder / "aws")
    try:
        environ = aws.process_environ | {"RADQUEUE_MAPS_FILE": str(folder / "maps.yaml")}
        clients = {name: _client(aws.environ, name) for name in ("s3", "sqs")}
        url = clients["sqs"].get_queue_url(QueueName="radqueue-inference")["QueueUrl"]
        for _ in range(BACKLOG):
            clients["sqs"].send_message(QueueUrl=url, MessageBody=_stored(clients["s3"], aws.bucket).body())
        lines = []
        with subprocess.Popen(
            [sys.executable, "-m", "services.inference"], cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True
        ) as worker:
            for line in worker.stderr:
                said = json.loads(line)
                lines.append((time.perf_counter(), said))
                if sum(one["event"] == "inference.done" for _, one in lines) == BACKLOG:
                    break
            worker.terminate()
            worker.communicate()
    finally:
        aws.stop()
    ran = [(when, said["duration_s"]) for when, said in lines if said["event"] == "inference.ran"]
    began = next(when for when, said in lines if said["event"] == "map.running")
    window = ran[-1][0] - began
    busy = sum(duration_s for _, duration_s in ran) / window
    what = f"worker, {BACKLOG} studies of a MAP that takes {SLEEP_S:g} s"
    return [
        _row(f"{what}: share of the time in which the MAP runs", busy, "", BACKLOG),
        _row(f"{what}: wall per study", window / BACKLOG, "s", BACKLOG),
    ]


def _stored(s3: Any, bucket: str) -> SeriesReady:
    """Store a series as ingest does, and return its announcement."""
    instances = []
    for content in make_series(SeriesDescription="sleep"):
        header = pydicom.dcmread(io.BytesIO(content))
        uids = (str(header.StudyInstanceUID), str(header.SeriesInstanceUID), str(header.SOPInstanceUID))
        sha = sha_of(content)
        key = instance_key(*uids, sha)
        s3.put_object(Bucket=bucket, Key=key, Body=content)
        instances.append(StoredInstance(sop_instance_uid=uids[2], sha=sha, key=key))
    revision = Revision(
        dataset="bench",
        study_uid=uids[0],
        series_uid=uids[1],
        digest=digest_of(instances),
        created=NOW,
        instances=tuple(instances),
        attributes={"Modality": "CT"},
    )
    s3.put_object(Bucket=bucket, Key=revision.key, Body=revision.body())
    told = ReadySeries(
        study_uid=uids[0],
        series_uid=uids[1],
        digest=revision.digest,
        revision_key=revision.key,
        dataset="bench",
        n_instances=len(instances),
    )
    return SeriesReady.of(revision.key, told, time=NOW)


# Pushing.


async def _push(folder: Path) -> list[dict[str, Any]]:
    """Push series of one study each way, and see that each instance is there; the target is on this machine, too."""
    aws = start_local_aws(folder / "aws")
    found_rows = []
    try:
        with _environment(aws.environ):
            role = "arn:aws:iam::123456789012:role/radqueue-import"
            settings = config.load(InferenceSettings, os.environ | {"RADQUEUE_IMPORT_ROLE_ARN": role})
            async with connect(os.environ) as clients:
                objects = ObjectStore(clients.s3, settings.bucket)
                async with open_targets(settings, clients, objects) as targets:
                    for target in ("healthimaging", "healthimaging-import"):
                        instances = _instances(folder / target)
                        started = time.perf_counter()
                        await targets.by_name[target].push(instances)
                        took = (time.perf_counter() - started) / len(instances)
                        what = f"push to the local HealthImaging and confirm, per instance, {target}"
                        found_rows.append(_row(what, took, "s", len(instances)))
    finally:
        aws.stop()
    return found_rows


def _instances(folder: Path) -> list[Instance]:
    folder.mkdir()
    made = []
    for content in make_series(PUSHED):
        header = pydicom.dcmread(io.BytesIO(content))
        path = folder / f"{header.SOPInstanceUID}.dcm"
        path.write_bytes(content)
        uids = (str(header.StudyInstanceUID), str(header.SeriesInstanceUID), str(header.SOPInstanceUID))
        made.append(Instance(path, *uids))
    return made


@contextlib.contextmanager
def _environment(environ: dict[str, str]) -> Iterator[None]:
    kept = dict(os.environ)
    os.environ.update(environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def _client(environ: dict[str, str], service: str) -> Any:
    return boto3.client(
        service,
        endpoint_url=environ["AWS_ENDPOINT_URL"],
        region_name=environ["AWS_REGION"],
        aws_access_key_id=environ["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environ["AWS_SECRET_ACCESS_KEY"],
        config=Config(s3={"addressing_style": "path"}),
    )


def _row(what: str, value: float, unit: str, n: int) -> dict[str, Any]:
    return {"bench": "inference", "what": what, "value": value, "unit": unit, "n": n}


if __name__ == "__main__":
    if sys.argv[1:2] == ["bare"]:
        _bare_loop(sys.argv[2])
    else:
        for row in rows():
            print(f"{row['what']:96} {row['value']:9.4f} {row['unit']:3} n={row['n']}")  # noqa: T201 - a program's output
