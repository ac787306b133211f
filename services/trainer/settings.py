"""The settings of the trainer, each read once from the environment."""

from pydantic import Field, ValidationInfo, field_validator

from shared.config import ServiceSettings


class TrainerSettings(ServiceSettings):
    """What the trainer needs beyond what every service does."""

    slots: int = Field(default=1, ge=1, le=1)
    """One training at a time: a second one would hold its lease and wait for the first. Start more trainers instead."""
    threads: int = Field(default=0, ge=0, le=1024)
    """Threads that torch computes with; 0 takes one per core. More than there are free cores make it much slower."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")
    """Where torch computes: auto takes a GPU if there is one."""
    round_deadline_s: float = Field(default=6 * 3600, gt=0)
    """Wall seconds for one round of train and evaluate, after which it is killed and counts as a failed attempt."""
    memory_bytes: int | None = Field(default=None, ge=1024**3)
    """Address space of the training process. Leave it out on a GPU: CUDA reserves far more addresses than it uses."""
    lease_s: float = Field(default=45, ge=1)
    """Seconds after which another worker may take over a training whose worker died: at most half of `visibility_s`."""
    min_images: int = Field(default=32, ge=8)
    """Fewest images, of training and evaluation each, that are trained on."""
    features_uri: str | None = Field(default=None, pattern=r"^(s3://[^/]+/.+|[^:]+)$")
    """Path or s3:// URI of a network to compare images by, TorchScript or torch.export (.pt2); None: randconv-v1."""
    features_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$", validate_default=True)
    """SHA-256 of that file, in hex: loading it runs what it holds, so no other file is loaded."""
    features_size: int = Field(default=299, ge=16, le=1024)
    """Pixels, in rows and in columns, of the images that it takes."""

    @field_validator("features_sha256")
    @classmethod
    def _with_the_file(cls, sha256: str | None, info: ValidationInfo) -> str | None:
        if sha256 is None and info.data.get("features_uri") is not None:
            raise ValueError("needed with RADQUEUE_FEATURES_URI")
        return sha256
