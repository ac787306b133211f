"""The program of a SageMaker training job: `python -m services.trainer.sagemaker_entry`.

SageMaker puts the input into files and copies the output from files (AWS, "How Amazon SageMaker provides training
information" and "… processes training output"):

    /opt/ml/input/config/hyperparameters.json, resourceconfig.json
    /opt/ml/input/data/job/     images.json, config.js; start.pt if there is one
    /opt/ml/input/data/arrays/  the arrays
    /opt/ml/checkpoints/        copied to S3 while the job runs, and back before one that goes on begins
    /opt/ml/model/              reply.json, checkpoint.pt: returned as model.tar.gz
    /opt/ml/output/failure      why it failed, for DescribeTrainingJob

If the machine has several GPUs, or the job several machines, torchrun starts the same worker. SIGTERM, which is sent
when a job is stopped or a spot machine is taken back, saves a checkpoint within the two minutes that SageMaker leaves.
"""

import asyncio
import json
import math
import os
import shutil
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path

from services.trainer.__main__ import TOGETHER, WORKER, WORKER_ENVIRONMENT
from services.trainer.protocol import Images, News, Saved, Train
from services.trainer.sagemaker import HYPERPARAMETERS, PARTIAL
from shared.child import Child, ChildFailed
from shared.errors import Unprocessable

LONGEST_END_S = 60.0
"""Seconds that the processes of all machines have to end in, once the training has ended."""


async def train(root: Path) -> int:
    """Train as the files below `root` say; returns the exit code."""
    # Find out which machine this is.
    hosts = json.loads((root / "input/config/resourceconfig.json").read_bytes())
    number = hosts["hosts"].index(hosts["current_host"])
    argv = _argv(hosts["hosts"], number)
    if number:  # it hears the call from the first machine's process
        helper = await asyncio.create_subprocess_exec(*argv, env={**os.environ, **WORKER_ENVIRONMENT})
        return await helper.wait()

    checkpoints, model, stop = root / "checkpoints", root / "model", root / "stop"
    for folder in (checkpoints, model):
        folder.mkdir(parents=True, exist_ok=True)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.touch)

    def tell(news: News) -> None:
        if isinstance(news, Saved):
            for step, path in _partials(checkpoints).items():
                if step < news.step:
                    path.unlink()
        else:
            part = checkpoints / "progress.part"
            part.write_text(json.dumps(asdict(news)), encoding="utf-8")
            part.replace(checkpoints / "progress.json")

    # Train.
    worker = Child(argv, env=WORKER_ENVIRONMENT)
    try:
        outcome = await worker.call(_call(root, checkpoints, stop), deadline_s=math.inf, on_progress=tell)
        reply = asdict(outcome)
    except Unprocessable as refused:
        reply = {"unprocessable": refused.reason_code}
    except ChildFailed as failed:
        (root / "output").mkdir(exist_ok=True)
        (root / "output/failure").write_text(f"radqueue: {failed}", encoding="utf-8")
        return 1
    finally:
        await worker.stop(grace_s=LONGEST_END_S)

    # Return.
    if reply.get("outcome") == "trained":
        shutil.move(checkpoints / "checkpoint.pt", model / "checkpoint.pt")
    (model / "reply.json").write_text(json.dumps(reply), encoding="utf-8")
    return 0


def _argv(hosts: list[str], number: int) -> tuple[str, ...]:
    if len(hosts) > 1:
        return (*TOGETHER, "0", str(len(hosts)), str(number), hosts[0])
    return (*TOGETHER, "0") if len(list(Path("/dev").glob("nvidia[0-9]*"))) > 1 else WORKER


def _call(root: Path, checkpoints: Path, stop: Path) -> Train:
    given = json.loads((root / "input/config/hyperparameters.json").read_bytes())
    inputs, arrays = root / "input/data/job", root / "input/data/arrays"
    images = Images(**json.loads((inputs / "images.json").read_bytes()))
    return Train(
        images=replace(images, train=[str(arrays / name) for name in images.train]),
        config=str(inputs / "config.js"),
        checkpoint=_newest(inputs / "start.pt", checkpoints),
        out=str(checkpoints),
        stop=str(stop),
        **{name: json.loads(given[name]) for name in HYPERPARAMETERS},
    )


def _newest(start: Path, checkpoints: Path) -> str | None:
    """Return the checkpoint to go on from: the last of an earlier job, or of this one before an interruption."""
    found = _partials(checkpoints)
    if found:
        return str(found[max(found)])
    return str(start) if start.exists() else None


def _partials(folder: Path) -> dict[int, Path]:
    return {int(name[1]): path for path in folder.iterdir() if (name := PARTIAL.fullmatch(path.name))}


if __name__ == "__main__":
    sys.exit(asyncio.run(train(Path(os.environ.get("RADQUEUE_ML_ROOT", "/opt/ml")))))
