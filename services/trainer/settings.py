"""The settings of the trainer, each read once from the environment."""

from pydantic import Field

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
    lease_s: float = Field(default=60, ge=1)
    """Seconds after which another worker may take over a training whose worker died."""
    min_images: int = Field(default=32, ge=8)
    """Fewest images, of training and evaluation each, that are trained on."""
