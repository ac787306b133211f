"""SageMaker's training jobs on one machine: the same calls, and jobs that really run, as processes.

Each job gets a folder instead of /opt/ml. As SageMaker does, its input is copied there from S3, its checkpoints are
copied to S3 while it runs, and what it returns when it has ended.
"""

import asyncio
import io
import json
import os
import re
import signal
import sys
import tarfile
from collections.abc import Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import botocore.session
from aiohttp import web

from shared.objects import ObjectStore
from tests.trainer.trainers import WITHIN_S

COPY_EVERY_S = 0.02
MODEL = botocore.session.get_session().get_service_model("sagemaker")


@dataclass
class Job:
    described: dict
    root: Path
    status: str = "InProgress"
    secondary: str = "Training"
    failure: str = ""
    processes: list[asyncio.subprocess.Process] = field(default_factory=list)
    """One per machine, the first machine's first."""
    copied: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Modification time and size of what was copied to S3."""
    began_with: list[str] = field(default_factory=list)
    """The checkpoints of jobs before it."""


class Refused(Exception):  # noqa: N818 - it states what became of the call
    """What a call is answered with: an error's code, and its message."""


class FakeSageMaker:
    """`url` is its endpoint; `jobs` are all that were created, by name."""

    def __init__(self, objects: ObjectStore, folder: Path, environ: dict[str, str]) -> None:
        self.objects, self.folder, self.environ = objects, folder, environ
        self.jobs: dict[str, Job] = {}
        self.answers: list[str] = []
        """Errors to answer the next calls with."""
        self.url = ""
        self._tasks: list[asyncio.Task] = []

    @asynccontextmanager
    async def serving(self):
        """Answer calls while the block runs; jobs that are left are killed at its end."""
        app = web.Application()
        app.router.add_post("/", self._answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            for job in self.jobs.values():
                for process in job.processes:
                    if process.returncode is None:
                        process.kill()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        action = request.headers["X-Amz-Target"].removeprefix("SageMaker.")
        asked = await request.json()
        try:
            if self.answers:
                raise Refused(self.answers.pop(0))
            wrong = list(_wrong(MODEL.operation_model(action).input_shape, asked))
            if wrong:
                raise Refused("ValidationException", ", ".join(wrong))
            body = await getattr(self, action)(asked["TrainingJobName"], asked)
        except Refused as refused:
            code, message = (*refused.args, "")[:2]
            return _response(400, {"__type": code, "message": message})
        return _response(200, body)

    async def CreateTrainingJob(self, name: str, asked: dict) -> dict:  # noqa: N802 - AWS calls it so
        if name in self.jobs:
            raise Refused("ResourceInUse")
        job = self.jobs[name] = Job(asked, self.folder / name)
        self._tasks.append(asyncio.create_task(self._run(job)))
        return {"TrainingJobArn": f"arn:aws:sagemaker:eu-central-1:000000000000:training-job/{name}"}

    async def DescribeTrainingJob(self, name: str, _: dict) -> dict:  # noqa: N802
        if name not in self.jobs:
            raise Refused("ValidationException", "Requested resource not found.")
        job = self.jobs[name]
        told = {"TrainingJobName": name, "TrainingJobStatus": job.status}
        return told | {"SecondaryStatus": job.secondary, "FailureReason": job.failure}

    def stop(self, name: str) -> None:
        """Stop a job as somebody does in the console."""
        self.jobs[name].status = "Stopping"
        for process in self.jobs[name].processes:
            process.send_signal(signal.SIGTERM)
        self.signal_worker(name, signal.SIGCONT)

    async def held(self, number: int) -> str:
        """Hold the training of a job where it has just saved something; returns the job's name."""
        async with asyncio.timeout(WITHIN_S):
            while len(self.jobs) <= number or not self.saved(number):
                await asyncio.sleep(0.005)
        name = list(self.jobs)[number]
        self.signal_worker(name, signal.SIGSTOP)
        return name

    def saved(self, number: int) -> list[int]:
        """Return the steps of the checkpoints that a job saved."""
        job = list(self.jobs.values())[number]
        return sorted(_steps(job.copied.keys() - set(job.began_with)))

    def began_at(self, number: int) -> int:
        """Return the step of the last checkpoint of the jobs before one."""
        return max(_steps(list(self.jobs.values())[number].began_with), default=0)

    def signal_worker(self, name: str, number: int) -> None:
        """Signal the process that a job's entry started."""
        pid = self.jobs[name].processes[0].pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(children[0]), number)

    async def _run(self, job: Job) -> None:
        try:
            await self._copy_in(job)
            argv = job.described["AlgorithmSpecification"]["ContainerEntrypoint"]
            assert argv[0] == "python"
            for number in range(job.described["ResourceConfig"]["InstanceCount"]):
                environ = {"RADQUEUE_ML_ROOT": str(_root(job, number)), "OMP_NUM_THREADS": "1"}
                process = await asyncio.create_subprocess_exec(sys.executable, *argv[1:], env=self.environ | environ)
                job.processes.append(process)
            ending = asyncio.gather(*(process.wait() for process in job.processes))
            while not ending.done():
                await self._copy_checkpoints(job)
                await asyncio.wait([ending], timeout=COPY_EVERY_S)
            await self._copy_out(job, max(ending.result(), key=abs))
        except BaseException as error:
            job.failure, job.status = f"InternalServerError: {error!r}", "Failed"
            raise

    async def _copy_in(self, job: Job) -> None:
        for channel in job.described["InputDataConfig"]:
            uri = channel["DataSource"]["S3DataSource"]["S3Uri"]
            await self._copy(uri, job.root / "input/data" / channel["ChannelName"])
        await self._copy(job.described["CheckpointConfig"]["S3Uri"] + "/", job.root / "checkpoints")
        job.began_with = [path.name for path in (job.root / "checkpoints").iterdir()]
        hosts = [f"127.0.0.{number + 1}" for number in range(job.described["ResourceConfig"]["InstanceCount"])]
        for number, host in enumerate(hosts):
            config = _root(job, number) / "input/config"
            config.mkdir(parents=True)
            (config / "hyperparameters.json").write_text(json.dumps(job.described["HyperParameters"]))
            (config / "resourceconfig.json").write_text(json.dumps({"current_host": host, "hosts": hosts}))
        for made in ("model", "output"):
            (job.root / made).mkdir()

    async def _copy(self, uri: str, folder: Path) -> None:
        folder.mkdir(parents=True)
        prefix = self._key(uri)
        async for item in self.objects.list(prefix):
            await self.objects.download(item.key, folder / item.key.removeprefix(prefix))

    async def _copy_checkpoints(self, job: Job) -> None:
        prefix = self._key(job.described["CheckpointConfig"]["S3Uri"])
        for path in (job.root / "checkpoints").iterdir():
            try:
                about = path.stat()
                body = path.read_bytes()
            except FileNotFoundError:  # it is written, renamed and deleted meanwhile
                continue
            if job.copied.get(path.name) != (about.st_mtime_ns, about.st_size):
                await self.objects.put(f"{prefix}/{path.name}", body)
                job.copied[path.name] = about.st_mtime_ns, about.st_size

    async def _copy_out(self, job: Job, returncode: int) -> None:
        await self._copy_checkpoints(job)
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            archive.add(job.root / "model", arcname=".")
        prefix = self._key(job.described["OutputDataConfig"]["S3OutputPath"])
        await self.objects.put(f"{prefix}/{job.root.name}/output/model.tar.gz", buffer.getvalue())
        if job.status == "Stopping":
            job.status = job.secondary = "Stopped"
        elif returncode == 0:
            job.status = job.secondary = "Completed"
        else:
            failure = job.root / "output/failure"
            text = failure.read_text() if failure.exists() else ""
            job.failure = f"AlgorithmError: {text}, exit code: {returncode}"
            job.status = job.secondary = "Failed"

    def _key(self, uri: str) -> str:
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        assert bucket == self.objects.bucket
        return key


def _steps(names: Iterable[str]) -> list[int]:
    return [int(name.split(".")[1]) for name in names if name.endswith(".pt")]


def _root(job: Job, number: int) -> Path:
    """Return a machine's folder. Only the first one's holds files: one path must be right on all, as /opt/ml is."""
    return job.root / f"machine-{number}" if number else job.root


def _wrong(shape, value, place=""):
    """Yield the places that SageMaker would refuse, by what AWS publishes of each member."""
    about = shape.metadata
    if shape.type_name == "structure":
        for name, member in value.items():
            yield from _wrong(shape.members[name], member, f"{place}.{name}") if name in shape.members else [place]
        yield from (f"{place}.{name}" for name in shape.required_members if name not in value)
    elif shape.type_name == "list":
        for member in value:
            yield from _wrong(shape.member, member, f"{place}[]")
    elif shape.type_name == "map":
        for key, member in value.items():
            yield from [*_wrong(shape.key, key, place), *_wrong(shape.value, member, place)]
    elif shape.type_name == "string":
        within = about.get("min", 0) <= len(value) <= about.get("max", len(value))
        if (
            not within
            or not re.fullmatch(about.get("pattern", "(?s).*"), value)
            or value not in (shape.enum or [value])
        ):
            yield place
    elif shape.type_name == "integer" and not about.get("min", value) <= value <= about.get("max", value):
        yield place


def _response(status: int, body: dict) -> web.Response:
    return web.Response(status=status, text=json.dumps(body), content_type="application/x-amz-json-1.1")
