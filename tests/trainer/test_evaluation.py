"""The way of an evaluation: from the settings and the files to the decision."""

import hashlib
import uuid

import numpy as np
import pytest
import torch
from torch import nn

from services.trainer import worker
from services.trainer.config import DEFAULT_CONFIG
from services.trainer.evaluation.evaluate import evaluate
from services.trainer.evaluation.extractor import fetch_extractor
from services.trainer.evaluation.features import RANDCONV
from services.trainer.jsconfig import modify_config
from services.trainer.protocol import Evaluate, Extractor, Images, Train
from services.trainer.settings import TrainerSettings
from shared.config import Misconfigured, load
from shared.messages import Evaluation

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.usefixtures("one_thread"),
]
TINY = {"imageSize": 16, "width": 2, "latentDim": 4, "batchSize": 4, "steps": 3}
CPU = torch.device("cpu")


@pytest.fixture
def extractor(tmp_path):
    """A small TorchScript network in a file, and the file's hash."""
    path = tmp_path / "pooled.pt"
    network = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()).double()
    torch.jit.trace(Bytes(network), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).save(path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


class Bytes(nn.Module):
    """A network that takes bytes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images.double())


def slices(n: int, seed: int) -> torch.Tensor:
    """Smooth random images, (n, 1, 16, 16) in [-1, 1]."""
    coarse = torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, (16, 16), mode="bicubic", align_corners=False).tanh()


async def test_extractor_comes_from_s3_or_a_path_and_is_the_one_of_the_hash(aws, local_aws, aws_client, extractor):
    """The same file arrives under its own name by either road; a missing one and another one stop the service."""
    path, sha256 = extractor
    key = f"extractors/{uuid.uuid4().hex}/pooled.pt"
    aws_client("s3").put_object(Bucket=local_aws.bucket, Key=key, Body=path.read_bytes())

    async def fetched(uri: str, sha256: str = sha256):
        environ = {"RADQUEUE_FEATURES_URI": uri, "RADQUEUE_FEATURES_SHA256": sha256}
        return await fetch_extractor(load(TrainerSettings, environ), s3=aws.s3)

    found = await fetched(f"s3://{local_aws.bucket}/{key}")

    assert found != path
    assert (found.name, found.read_bytes()) == (path.name, path.read_bytes())
    assert await fetched(str(path)) == path
    assert await fetch_extractor(TrainerSettings(), s3=aws.s3) is None
    with pytest.raises(Misconfigured, match="RADQUEUE_FEATURES_URI: there is no such object"):
        await fetched(f"s3://{local_aws.bucket}/nothing.pt")
    with pytest.raises(Misconfigured, match="RADQUEUE_FEATURES_URI: S3: NoSuchBucket"):
        await fetched(f"s3://no-bucket-of-this-name/{key}")
    with pytest.raises(Misconfigured, match="RADQUEUE_FEATURES_URI: the file cannot be read"):
        await fetched(str(path.with_name("nothing.pt")))
    with pytest.raises(Misconfigured, match=f"RADQUEUE_FEATURES_SHA256: the file's hash is {sha256}"):
        await fetched(str(path), "0" * 64)


def test_extractor_without_a_hash_is_misconfigured():
    """A file that would be run is named by its hash, or not at all."""
    with pytest.raises(Misconfigured, match=r"RADQUEUE_FEATURES_SHA256: .*needed with RADQUEUE_FEATURES_URI"):
        load(TrainerSettings, {"RADQUEUE_FEATURES_URI": "features.pt"})


@pytest.mark.parametrize("trained", [False, True], ids=["randconv", "extractor"])
def test_round_is_evaluated_in_the_space_of_the_settings(tmp_path, extractor, trained):
    """A round's evaluation names the space that it was told, and holds every number in a form the messages take."""
    path, sha256 = extractor
    config = tmp_path / "config.js"
    config.write_text(modify_config(DEFAULT_CONFIG.read_text(encoding="utf-8"), TINY), encoding="utf-8")
    for name, n, seed in (("train", 40, 1), ("held_out", 16, 2)):
        np.save(tmp_path / f"{name}.npy", slices(n, seed)[:, 0].numpy())
    files = {side: [str(tmp_path / f"{side}.npy")] for side in ("train", "held_out")}
    asked = {"images": Images(**files), "config": str(config), "out": str(tmp_path), "device": "cpu", "threads": 1}
    training = Train(**asked, checkpoint=None, until=3, checkpoint_s=60, stop=str(tmp_path / "stop"))
    worker.train_round(training, lambda _: None)
    space = Extractor(str(path), sha256, 32) if trained else None
    judging = Evaluate(**asked, checkpoint=str(tmp_path / "checkpoint.pt"), extractor=space)
    told = Evaluation.model_validate(worker.evaluate_round(judging).evaluation.model_dump())

    assert told.space == (f"pooled@{sha256[:12]}/d12" if trained else "randconv-v1/d8")
    assert (told.metric, told.n) == ("FD", 16)
    assert told.quality.kid > told.real_quality.kid
    assert told.memorisation.n_held_out == 16
    assert "few_images" in told.warnings if trained else told.warnings is not None


def test_images_that_are_training_images_are_near_and_copies():
    """Copies of training images are at the floor of the distance, and are flagged; other real images are not."""
    train, unseen, fresh = slices(200, 1), slices(100, 2), slices(200, 3)
    copying, honest = (
        Evaluation.model_validate(evaluate(unseen, made, train, RANDCONV, CPU)) for made in (train[:100], fresh)
    )

    assert copying.relative_fd == pytest.approx(1, abs=0.5)
    assert copying.copies
    assert "copies" in copying.warnings
    assert honest.relative_fd == pytest.approx(1, abs=0.5)
    assert not honest.copies
    assert honest.warnings == ()
