"""Fixtures of the trainer's tests."""

import uuid
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from shared.objects import ObjectStore
from tests.trainer.trainers import Trainer, Watched, put_series


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Have torch compute with one thread: small work is not faster with more, and a busy machine makes it slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def objects(aws, local_aws) -> ObjectStore:
    return ObjectStore(aws.s3, local_aws.bucket)


@pytest.fixture
async def start(tmp_path):
    """Make trainers; their processes are ended with the test."""
    workers: list[Watched] = []

    def made(objects, **options) -> Trainer:
        workers.append(Watched(**options))
        return Trainer(objects, workers[-1], tmp_path)

    yield made
    for started in workers:
        await started.stop(kill=True)


@pytest.fixture
async def dataset(objects) -> str:
    """Four patients of eight slices as ingest stores them, one with a superseded revision and two series."""
    name = f"d-{uuid.uuid4().hex[:8]}"
    rng = np.random.default_rng(0)
    for number, patient in enumerate("aabcd"):
        await put_series(objects, name, f"1.2.{number}", patient=patient, rng=rng)
    await put_series(objects, name, "1.2.4", patient="d", rng=rng, digest="02" * 8)
    return name
