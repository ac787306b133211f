import asyncio
import signal

import pytest
import torch

from services.trainer.sagemaker import SageMaker
from services.trainer.settings import TrainerSettings
from shared.config import Misconfigured, load
from shared.errors import Continue, Unavailable
from tests.conftest import clean_environ
from tests.trainer.fake_sagemaker import FakeSageMaker
from tests.trainer.trainers import TINY, WITHIN_S, document, requested

STEPS = 150
JOBS = {
    "RADQUEUE_ENGINE": "sagemaker",
    "RADQUEUE_SAGEMAKER_IMAGE": "000000000000.dkr.ecr.eu-central-1.amazonaws.com/radqueue:1",
    "RADQUEUE_SAGEMAKER_ROLE": "arn:aws:iam::000000000000:role/training",
    "RADQUEUE_SAGEMAKER_INSTANCE": "ml.g5.xlarge",
}


@pytest.fixture
async def sagemaker(objects, tmp_path):
    async with FakeSageMaker(objects, tmp_path / "jobs", clean_environ()).serving() as fake:
        yield fake


@pytest.fixture
async def by_jobs(aws, sagemaker, objects, start, monkeypatch):
    """Make trainers whose rounds are trained by jobs."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER", sagemaker.url)
    client = await aws.client("sagemaker")

    def made():
        trainer = start(objects)
        trainer.worker = SageMaker(
            load(TrainerSettings, JOBS), client=client, objects=objects, local=trainer.worker, poll_s=0.1
        )
        return trainer

    return made


def in_steps(dataset, n_steps, **changes):
    return requested(dataset, max_rounds=1, overrides=TINY | {"steps": n_steps}, **changes)


def same(one, other) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


async def test_a_round_trained_by_a_job_is_the_same(by_jobs, sagemaker, objects, start, dataset):
    """Two rounds in jobs give the model and the losses of two rounds in a process, and evaluation stays here."""
    trainer, local = by_jobs(), start(objects)
    asked, again = requested(dataset), requested(dataset)
    await trainer.handle(asked)
    await local.handle(again)
    losses = [
        (await document(objects, f"models/{one.data.request_id}/rounds/2/evaluation.json"))["losses"]
        for one in (asked, again)
    ]

    assert same(await trainer.weights(), await local.weights())
    assert losses[0] == losses[1]
    assert [job.status for job in sagemaker.jobs.values()] == ["Completed"] * 2
    assert "train" not in trainer.worker._local.asked
    assert [job.described["EnableNetworkIsolation"] for job in sagemaker.jobs.values()] == [True] * 2


async def test_a_job_outlives_its_service(by_jobs, sagemaker, objects, start, dataset):
    """A service that stops leaves the job running, and the next one follows it to its end: none is begun twice."""
    first, second, local = by_jobs(), by_jobs(), start(objects)
    asked = in_steps(dataset, STEPS)
    training = asyncio.create_task(first.handle(asked, checkpoint_s=0.01))
    job = await sagemaker.held(0)
    step = await stored_step(objects, asked)
    first.stop.set()
    with pytest.raises(Continue):
        await training
    status = sagemaker.jobs[job].status
    sagemaker.signal_worker(job, signal.SIGCONT)
    await second.handle(asked)
    await local.handle(in_steps(dataset, STEPS))

    assert 0 < step < STEPS
    assert status == "InProgress"
    assert list(sagemaker.jobs) == [job]
    assert same(await second.weights(), await local.weights())


@pytest.mark.slow
async def test_a_job_that_ends_early_is_gone_on_from(by_jobs, sagemaker, objects, start, dataset):
    """After one that somebody stopped and one whose process died the next goes on from the last checkpoint."""
    trainer, local = by_jobs(), start(objects)
    asked, steps = in_steps(dataset, STEPS), [0]
    ends = [sagemaker.stop, lambda name: sagemaker.signal_worker(name, signal.SIGKILL)]
    for number, end in enumerate(ends):
        training = asyncio.create_task(trainer.handle(asked, checkpoint_s=0.01))
        job = await sagemaker.held(number)
        steps.append(await stored_step(objects, asked, after=steps[-1]))
        end(job)
        with pytest.raises(Unavailable, match="crashed"):
            await training
    await trainer.handle(asked)
    await local.handle(in_steps(dataset, STEPS))

    assert [job.status for job in sagemaker.jobs.values()] == ["Stopped", "Failed", "Completed"]
    assert "radqueue: crashed SIGKILL" in sagemaker.jobs[job].failure
    assert steps[1] <= sagemaker.began_at(1) < sagemaker.saved(1)[0]
    assert sagemaker.began_at(2) >= steps[2]
    assert same(await trainer.weights(), await local.weights())


@pytest.mark.slow
async def test_the_machines_of_a_job_train_together(by_jobs, sagemaker, dataset):
    """Each starts a process, the processes meet, and all end when the first machine's has its reply."""
    trainer = by_jobs()
    trainer.worker._settings = load(TrainerSettings, JOBS | {"RADQUEUE_SAGEMAKER_INSTANCES": "2"})
    await trainer.handle(in_steps(dataset, 3))
    (job,) = sagemaker.jobs.values()

    assert job.described["EnableInterContainerTrafficEncryption"]
    assert [process.returncode for process in job.processes] == [0, 0]
    assert job.status == "Completed"


async def test_what_a_job_refuses_is_the_outcome(by_jobs, sagemaker, dataset):
    """A job that says the data does not do ends the training with the same reason as the process would."""
    trainer = by_jobs()
    await trainer.handle(requested(dataset, overrides=TINY | {"imageSize": 64}))

    assert [event.data.reason_code for event in trainer.published] == ["images_too_small"]
    assert [job.status for job in sagemaker.jobs.values()] == ["Completed"]


async def test_a_sagemaker_that_does_not_answer_is_tried_again(by_jobs, sagemaker, dataset):
    """Throttled calls, and refused ones, bring the message back, and count as nobody's failure."""
    trainer = by_jobs()
    sagemaker.answers += ["ThrottlingException"] * 4  # the client asks again by itself, three times
    with pytest.raises(Unavailable, match="SageMaker: ThrottlingException"):
        await trainer.handle(requested(dataset))
    trainer.worker._settings = load(TrainerSettings, JOBS | {"RADQUEUE_SAGEMAKER_INSTANCE": "ml.none"})
    with pytest.raises(Unavailable, match="SageMaker: ValidationException"):
        await trainer.handle(requested(dataset))

    assert sagemaker.jobs == {}


def test_jobs_need_an_image_a_role_and_a_machine():
    """The service does not start without them, and says which are missing."""
    with pytest.raises(Misconfigured) as refused:
        load(TrainerSettings, {"RADQUEUE_ENGINE": "sagemaker"})
    complete = load(TrainerSettings, JOBS)

    assert [line.split(":")[0] for line in str(refused.value).splitlines()] == list(JOBS)[1:]
    assert complete.engine == "sagemaker"


async def stored_step(objects, asked, *, after=0) -> int:
    """Return the step of the round's checkpoint, once there is one after a step."""
    key = f"models/{asked.data.request_id}/rounds/1/partial.0.json"
    async with asyncio.timeout(WITHIN_S):
        while not await objects.exists(key) or (await document(objects, key))["step"] <= after:
            await asyncio.sleep(0.02)
    return (await document(objects, key))["step"]
