"""Rounds that are trained by SageMaker training jobs instead of a process on this machine.

Theory of operation. `SageMaker` takes the place of the training process. A call of `train` becomes a job: its input is
stored beside the model, the job is created, and followed until it ends; its reports and checkpoints are passed on as
the process would send them. All other calls are done by the process here. The job runs
services/trainer/sagemaker_entry.py.

    models/<request id>/sagemaker/data/<array>               the arrays, once for all rounds
    models/<request id>/sagemaker/<round>-<try>/<job>/       input: images.json, config.js, start.pt
    models/<request id>/sagemaker/<round>-<try>/checkpoints/ what SageMaker copies from the job while it runs
    models/<request id>/sagemaker/<round>-<try>/output/      model.tar.gz, what the job returns

The names of a try's jobs follow from the request and end in a number that counts them. So a worker finds the job that
another one began, and goes on following it; and a worker that stops leaves the job running: a training need not pause
because the service is updated. A job that failed or was stopped is followed by the job with the next number, which goes
on from the checkpoints of all before it. A job that no worker follows any more ends by itself, at
RADQUEUE_ROUND_DEADLINE_S at the latest.

The container has no network (EnableNetworkIsolation): SageMaker copies its files.

Settings: RADQUEUE_SAGEMAKER_*, RADQUEUE_ROUND_DEADLINE_S.
IAM of the trainer: sagemaker:CreateTrainingJob, sagemaker:DescribeTrainingJob, iam:PassRole on the job's role.
IAM of the job's role: s3:GetObject, s3:PutObject and s3:ListBucket on models/, ecr:BatchGetImage,
ecr:GetDownloadUrlForLayer, ecr:BatchCheckLayerAvailability and ecr:GetAuthorizationToken, logs:CreateLogGroup,
logs:CreateLogStream and logs:PutLogEvents.
"""

import asyncio
import contextlib
import hashlib
import itertools
import json
import re
import tarfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from services.trainer.protocol import OUTCOMES, Job, Losses, Outcome, Paused, Saved, Train
from services.trainer.settings import TrainerSettings
from shared.aws_errors import AWS_ERRORS, answering, code_of, is_answer
from shared.child import Child, ChildFailed, Json, Progress, Request
from shared.concurrency import all_of
from shared.errors import Unavailable, Unprocessable
from shared.keys import JobKeys
from shared.log import get_logger
from shared.objects import ObjectStore

POLL_S = 30.0
"""Seconds from one look at a job to the next; DescribeTrainingJob is throttled per account."""
STOP_POLL_S = 1.0
UPLOADS = 8
"""Number of arrays that are stored at the same time."""
ENTRY = ["python", "-m", "services.trainer.sagemaker_entry"]
HYPERPARAMETERS = ("until", "checkpoint_s", "device", "threads")
"""The fields of the call that are hyperparameters. All others are in files: a value has 2,500 characters at most."""
UNKNOWN = {"ValidationException", "ResourceNotFound"}
"""The error codes of DescribeTrainingJob for a job that does not exist."""
TAKEN = "ResourceInUse"
ENDED = {"Completed", "Failed", "Stopped"}
PARTIAL = re.compile(r"partial\.([0-9]+)\.pt")
FAILURE = re.compile(r"radqueue: (out_of_memory|crashed|raised)(?: (\w+))?(?: (\S+:\d+))?")
"""The failure that services/trainer/sagemaker_entry.py writes: reason, type of the exception, and its place."""
RETURNED = ("reply.json", "checkpoint.pt")
Reply = TypeVar("Reply")

log = get_logger()


class Client(Protocol):
    """The part of an aiobotocore client of SageMaker that is used here."""

    async def create_training_job(self, **job: Any) -> Any:
        """Start a job."""

    async def describe_training_job(self, *, TrainingJobName: str) -> Any:  # noqa: N803 - AWS calls it so
        """Return the state of a job."""


class SageMaker:
    """Trains in SageMaker jobs, and does everything else in a process on this machine."""

    def __init__(
        self, settings: TrainerSettings, *, client: Client, objects: ObjectStore, local: Child, poll_s: float = POLL_S
    ) -> None:
        """Take an open client, and the process that does all calls but `train`."""
        self._client, self._objects, self._local, self._settings = client, objects, local, settings
        self._poll_s = poll_s

    async def call(self, request: Request[Reply], *, deadline_s: float, on_progress: Progress | None = None) -> Reply:
        """Do what `Child.call` does. `deadline_s` is the job's own, so that time in its queue does not count.

        Raises:
            ChildFailed: the job failed, or was stopped.
            Unprocessable: the job refuses the call.
            Unavailable: SageMaker or S3 does not answer, or refuses the job; to be tried again.
        """
        if not isinstance(request, Train) or request.job is None:
            return await self._local.call(request, deadline_s=deadline_s, on_progress=on_progress)
        trained = await self._train(request, request.job, deadline_s, on_progress or (lambda _: None))
        return cast("Reply", trained)  # it is what Train names

    async def _train(self, request: Train, named: Job, deadline_s: float, tell: Progress) -> Outcome:
        # Two deployments may have one account, and job names are the account's.
        whose = hashlib.sha256(f"{self._objects.bucket}/{named.folder}".encode()).hexdigest()[:16]
        keys = JobKeys(named.folder, named.name)
        following = _Following(self._objects, keys, request, tell)
        reply: Outcome | None = None
        numbers = itertools.count()
        while reply is None:
            job = f"radqueue-{whose}-{named.name}-{next(numbers)}"
            created = False
            if await self._described(job) is None:
                created = await self._create(job, request, keys, deadline_s)
            reply = await self._follow(job, following, created=created)
        return reply

    async def _follow(self, job: str, following: "_Following", *, created: bool) -> Outcome | None:
        """Return the job's reply; None if the job had ended without one before this worker looked."""
        seen_running = created
        while True:
            described = await self._described(job)
            if described is None:
                raise Unavailable("SageMaker: the job is gone")
            await following.pass_on()
            status = described["TrainingJobStatus"]
            if status == "Completed" and (reply := await following.returned(job)) is not None:
                return reply
            if status in ENDED:
                if not seen_running:
                    return None
                raise _failure_of(described)
            seen_running = True
            if await self._stopped_meanwhile(following.stop):
                log.info("training.job_left_running", job=job)
                return Paused()

    async def _stopped_meanwhile(self, stop: Path) -> bool:
        """Wait until the next look is due, or the file `stop` is made; returns whether it is there."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._poll_s):
                while not stop.exists():  # noqa: ASYNC110 - a file has no event
                    await asyncio.sleep(min(STOP_POLL_S, self._poll_s))
        return stop.exists()

    async def _described(self, job: str) -> Json | None:
        with answering("SageMaker"):
            try:
                described: Json = await self._client.describe_training_job(TrainingJobName=job)
            except AWS_ERRORS as error:
                if code_of(error) in UNKNOWN:
                    return None
                raise
        return described

    async def _create(self, job: str, request: Train, keys: JobKeys, deadline_s: float) -> bool:
        """Create the job; returns False if another worker was faster."""
        await self._store_input(request, keys, keys.input(job))
        with answering("SageMaker"):
            try:
                await self._client.create_training_job(**self._described_as(job, request, keys, deadline_s))
            except AWS_ERRORS as error:
                if code_of(error) == TAKEN:
                    return False
                if is_answer(error):  # what it says is about our settings
                    log.warning("training.job_refused", job=job, error=str(error))
                raise
        log.info("training.job_created", job=job)
        return True

    async def _store_input(self, request: Train, keys: JobKeys, prefix: str) -> None:
        async def store_array(path: Path) -> None:
            key = f"{keys.data}{path.name}"
            if not await self._objects.exists(key):
                await self._objects.upload(path, key)

        arrays = [Path(path) for path in request.images.train]
        await all_of([partial(store_array, path) for path in arrays], at_once=UPLOADS)
        images = replace(request.images, train=[path.name for path in arrays], held_out=[])
        await self._objects.put(f"{prefix}images.json", json.dumps(asdict(images)).encode())
        await self._objects.upload(Path(request.config), f"{prefix}config.js")
        if request.checkpoint:
            await self._objects.upload(Path(request.checkpoint), f"{prefix}start.pt")

    def _described_as(self, job: str, request: Train, keys: JobKeys, deadline_s: float) -> Json:
        settings, base = self._settings, f"s3://{self._objects.bucket}"
        longest_s = max(1, int(deadline_s))
        stopping = {"MaxRuntimeInSeconds": longest_s}
        if settings.sagemaker_spot:
            stopping["MaxWaitTimeInSeconds"] = 2 * longest_s  # the waits for spare machines are part of it
        return {
            "TrainingJobName": job,
            "AlgorithmSpecification": {
                "TrainingImage": settings.sagemaker_image,
                "TrainingInputMode": "File",
                "ContainerEntrypoint": ENTRY,
            },
            "RoleArn": settings.sagemaker_role,
            "HyperParameters": {name: json.dumps(getattr(request, name)) for name in HYPERPARAMETERS},
            "InputDataConfig": [
                _channel("arrays", f"{base}/{keys.data}"),
                _channel("job", f"{base}/{keys.input(job)}"),
            ],
            "CheckpointConfig": {"S3Uri": f"{base}/{keys.checkpoints}"},
            "OutputDataConfig": {"S3OutputPath": f"{base}/{keys.output}"},
            "ResourceConfig": {
                "InstanceType": settings.sagemaker_instance,
                "InstanceCount": settings.sagemaker_instances,
                "VolumeSizeInGB": settings.sagemaker_volume_gb,
            },
            "StoppingCondition": stopping,
            "EnableManagedSpotTraining": settings.sagemaker_spot,
            "EnableNetworkIsolation": True,
            "EnableInterContainerTrafficEncryption": settings.sagemaker_instances > 1,
        }


@dataclass(slots=True)
class _Following:
    """The reports and checkpoints of a try's jobs in S3, and how far they were passed on."""

    objects: ObjectStore
    keys: JobKeys
    request: Train
    tell: Progress
    step: int | None = None
    """The step of the newest checkpoint; None before the first look."""
    progress: str = ""
    """The version of progress.json that was passed on last."""

    @property
    def stop(self) -> Path:
        return Path(self.request.stop)

    async def pass_on(self) -> None:
        """Pass on new reports, and checkpoints that are new since the first look; delete old checkpoints."""
        partials: dict[int, str] = {}
        async for item in self.objects.list(f"{self.keys.checkpoints}/"):
            name = item.key.rpartition("/")[2]
            if name == "progress.json" and item.etag != self.progress:
                self.tell(Losses(**json.loads(await self.objects.get(item.key))))
                self.progress = item.etag
            elif found := PARTIAL.fullmatch(name):
                partials[int(found[1])] = item.key
        newest = max(partials, default=0)
        if self.step is not None and newest > self.step:
            path = Path(self.request.out) / f"partial.{newest}.pt"
            await self.objects.download(partials[newest], path)
            self.tell(Saved(str(path), newest))
        self.step = newest
        for step in partials.keys() - {newest}:
            await self.objects.delete(partials[step])

    async def returned(self, job: str) -> Outcome | None:
        """Return the reply of a job that ended well, and put its checkpoint in place; None if it had paused.

        Raises:
            Unprocessable: the job refused the call.
        """
        out = Path(self.request.out)
        await self.objects.download(self.keys.returned(job), out / "model.tar.gz")
        await asyncio.to_thread(_unpack, out / "model.tar.gz", out)
        reply: Json = json.loads((out / "reply.json").read_bytes())
        if "unprocessable" in reply:
            raise Unprocessable(reply["unprocessable"])
        outcome = OUTCOMES.validate_python(reply)
        return None if isinstance(outcome, Paused) else outcome


def _channel(name: str, uri: str) -> Json:
    source = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}}


def _unpack(archive: Path, out: Path) -> None:
    """Write the files that are expected, and nothing else."""
    with tarfile.open(archive) as members:
        for member in members:
            name = member.name.removeprefix("./")
            if name in RETURNED and (content := members.extractfile(member)) is not None:
                with content, (out / name).open("wb") as file:
                    while block := content.read(1024 * 1024):
                        file.write(block)
    archive.unlink()


def _failure_of(told: Json) -> ChildFailed:
    if told.get("SecondaryStatus") in {"MaxRuntimeExceeded", "MaxWaitTimeExceeded"}:
        return ChildFailed("deadline")
    if found := FAILURE.search(told.get("FailureReason", "")):
        return ChildFailed(found[1], found[2] or "", found[3] or "")
    return ChildFailed("crashed", told["TrainingJobStatus"])
