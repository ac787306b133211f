"""The settings of the trainer, each read once from the environment."""

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from shared.config import ServiceSettings


class TrainerSettings(ServiceSettings):
    """The settings of the trainer beside those of every service."""

    slots: int = Field(default=1, ge=1, le=1)
    """One training at a time: a second one would hold its lease and wait for the first. Start more trainers instead."""
    threads: int = Field(default=0, ge=0, le=1024)
    """Threads that torch computes with; 0 takes one per core. More threads than free cores make it much slower."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")
    """The device that torch computes on: auto takes a GPU if there is one."""
    engine: Literal["local", "torchrun", "sagemaker"] = "local"
    """How to train: in one process; with torchrun, in several that share each batch; or in a SageMaker training job."""
    processes: int = Field(default=0, ge=0, le=1024)
    """Number of processes that torchrun starts; 0 takes one per GPU."""
    sagemaker_image: str | None = Field(default=None, validate_default=True)
    """The image of this service in ECR, for training jobs."""
    sagemaker_role: str | None = Field(
        default=None, pattern=r"^arn:aws[a-z-]*:iam::\d{12}:role/.+$", validate_default=True
    )
    """ARN of the role of training jobs; docs/training.md lists the rights that it needs."""
    sagemaker_instance: str | None = Field(default=None, pattern=r"^ml\.", validate_default=True)
    """Type of the machines of a training job, such as ml.g5.xlarge."""
    sagemaker_instances: int = Field(default=1, ge=1, le=64)
    """Number of machines of a training job."""
    sagemaker_spot: bool = False
    """Take spot machines: cheaper, and interrupted now and then."""
    sagemaker_volume_gb: int = Field(default=50, ge=1, le=16_384)
    """Disk of each machine: the arrays and a few checkpoints have to fit."""
    round_deadline_s: float = Field(default=6 * 3600, gt=0)
    """Wall seconds that training a round or evaluating it may take before it is killed. It then goes on from its last
    checkpoint; without a new one since the last time, that counts as a failed attempt."""
    checkpoint_s: float = Field(default=60, gt=0)
    """Seconds of training from one checkpoint to the next: a worker that dies loses no more than that."""
    memory_bytes: int | None = Field(default=None, ge=1024**3)
    """Address space of the training process. Leave it out on a GPU: CUDA reserves far more addresses than it uses."""
    lease_s: float = Field(default=45, ge=1)
    """Seconds after which another worker may take over a training whose worker died: at most half of `visibility_s`."""
    min_images: int = Field(default=32, ge=8)
    """The least number of images to train on, and of images to evaluate with, that a training needs."""
    data_uris: str = "s3:// gs:// az:// abfs://"
    """Beginnings that the data_uri of a request may have, such as s3://our-bucket/research/; blanks separate them."""
    cache_dir: Path | None = None
    """Folder of the cache, which keeps datasets from one training to the next; None: `datasets` in the work_dir."""
    cache_bytes: int = Field(default=10 * 1024**3, ge=0)
    """Size of the cache above which the oldest datasets that are not in use are removed; 0 keeps none."""
    features_uri: str | None = Field(default=None, pattern=r"^(s3://[^/]+/.+|[^:]+)$")
    """Path or s3:// URI of a network to compare images by, TorchScript or torch.export (.pt2); None: randconv-v1."""
    features_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$", validate_default=True)
    """SHA-256 of that file, in hex: loading a network runs code in it, so no other file is loaded."""
    features_size: int = Field(default=299, ge=16, le=1024)
    """Rows and columns, in pixels, of the images that the network takes."""
    tensorboard: bool = False
    """Write the rounds of a training as a TensorBoard log, too; needs the extra `tensorboard`."""

    @property
    def copies(self) -> Path:
        """Return the folder of the cache."""
        return self.cache_dir or self.work_dir / "datasets"

    @field_validator("tensorboard")
    @classmethod
    def _installed(cls, wanted: bool) -> bool:  # noqa: FBT001 - pydantic calls it so
        if wanted and find_spec("tensorboard") is None:
            raise ValueError("the extra tensorboard is not installed")
        return wanted

    @field_validator("sagemaker_image", "sagemaker_role", "sagemaker_instance")
    @classmethod
    def _with_the_engine(cls, named: str | None, info: ValidationInfo) -> str | None:
        if named is None and info.data.get("engine") == "sagemaker":
            raise ValueError("needed with RADQUEUE_ENGINE=sagemaker")
        return named

    @field_validator("features_sha256")
    @classmethod
    def _with_the_file(cls, sha256: str | None, info: ValidationInfo) -> str | None:
        if sha256 is None and info.data.get("features_uri") is not None:
            raise ValueError("needed with RADQUEUE_FEATURES_URI")
        return sha256
