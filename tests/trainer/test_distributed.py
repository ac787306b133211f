import json
import os
import signal
import subprocess
import uuid
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

from services.trainer.__main__ import TOGETHER
from services.trainer.config import TrainingConfig
from services.trainer.distributed import agreed
from services.trainer.gan.reference_step import PENALTY_EVERY, Training, reference_step
from services.trainer.gan.training import start as started
from services.trainer.jsconfig import modify_config, read_config
from services.trainer.protocol import Generate
from shared.child import MARK, _kill_marked, _line, _marked
from shared.documents.arrays import Units
from shared.errors import Continue
from tests.trainer.trainers import TINY, requested, until

SHIPPED = Path("services/trainer/config.js")
STEPS = PENALTY_EVERY + 2


def trained(*, normalising: bool) -> dict[str, torch.Tensor]:
    """Return the weights after some steps, in double precision; BatchNorm normalises by the batch or not at all."""
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    images = torch.rand(12, 1, 16, 16, generator=random, dtype=torch.float64) * 2 - 1
    labels = torch.arange(12) % 2
    config = TrainingConfig.of(read_config(modify_config(SHIPPED.read_text(encoding="utf-8"), TINY)))
    training = started(config, torch.device("cpu"), n_classes=2)
    for network in (training.gan.generator, training.gan.discriminator, training.gan.average):
        network.double()
    training.gan.generator.train(normalising)
    told = [reference_step(training, images, config, labels) for _ in range(STEPS)]
    return weights_of(training) | {"told": torch.stack(told), "augmentation": training.augmentation}


def weights_of(training: Training) -> dict[str, torch.Tensor]:
    networks = {"generator": training.gan.generator, "discriminator": training.gan.discriminator}
    networks["average"] = training.gan.average
    return {f"{of}.{name}": value for of, one in networks.items() for name, value in one.state_dict().items()}


def train_in(rank: int, folder: Path) -> None:
    """Train as one of two processes, and leave the weights in a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    outcomes = {normalising: trained(normalising=normalising) for normalising in (False, True)}
    wishes = [agreed(wanted=rank == which) for which in range(2)]
    torch.save((outcomes, wishes), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[tuple[dict, list[bool]]]:
    """What each of two processes has after training together, and what they agreed on."""
    folder = tmp_path_factory.mktemp("together")
    multiprocessing.start_processes(train_in, args=(folder,), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_processes_take_the_step_of_one(outcomes, one_thread):
    """Where no norm is over the batch, two processes with half of it each come to the weights of one with all of it."""
    alone = trained(normalising=False)

    torch.testing.assert_close(outcomes[0][0][False], alone, rtol=1e-7, atol=1e-9)


def test_the_processes_stay_equal(outcomes):
    """Weights, running statistics, the average and what adapts are the same in both, bit for bit."""
    first, second = (outcome[True] for outcome, _ in outcomes)

    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["generator.start.2.running_mean"].abs().min() > 0


def test_the_first_process_decides(outcomes):
    """What the first wants is done by both, and what only the second wants by none."""
    assert [wishes for _, wishes in outcomes] == [[True, False]] * 2


async def test_a_training_by_two_processes_is_paused_and_goes_on(objects, start, dataset):
    """It ends as one that nothing disturbed, in processes that refused a batch which they cannot share out."""
    first = start(objects, argv=(*TOGETHER, "2"))
    second, undisturbed = (type(first)(objects, first.worker, first.work_dir) for _ in range(2))
    in_steps = {"max_rounds": 1, "overrides": TINY | {"steps": 20}}
    await first.handle(requested(dataset, overrides=TINY | {"batchSize": 5}))
    refused = [event.data.reason_code for event in first.published]
    asked = requested(dataset, **in_steps)
    first.worker.on_checkpoint = first.stop.set
    with pytest.raises(Continue):
        await first.handle(asked, checkpoint_s=0.01)
    first.worker.on_checkpoint = lambda: None
    await second.handle(asked)
    await undisturbed.handle(requested(dataset, **in_steps))
    weights, expected = await second.weights(), await undisturbed.weights()

    assert refused == ["batch_not_divisible"]
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert first.worker.calls == len(first.worker.asked)


async def test_processes_end_with_the_service_even_where_they_hang(tmp_path):
    """The kernel kills the launcher with what started it, and the processes with the launcher."""
    mark = f"{MARK}={uuid.uuid4().hex}"
    argv = ["bash", "-c", 'exec 3<&0; "$0" "$@" <&3 & wait', *TOGETHER, "2"]
    torch.save({}, tmp_path / "empty.pt")
    asked = Generate(str(SHIPPED), str(tmp_path / "empty.pt"), 1, str(tmp_path), None, Units(), (), "cpu", 1)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": os.environ | dict([mark.split("=")])}
    try:
        with subprocess.Popen(argv, **pipes) as service:
            service.stdin.write(_line({"id": 1, "request": asked}))
            service.stdin.flush()
            _, answer = (json.loads(service.stdout.readline()) for _ in range(2))  # by then both processes are there
            processes = _marked(mark)
            for pid in processes:
                os.kill(pid, signal.SIGSTOP)
            service.kill()
            await until(lambda: not _marked(mark))
    finally:
        _kill_marked(mark)

    assert answer["error"]["type"] == "KeyError"
    assert len(processes) == 4
