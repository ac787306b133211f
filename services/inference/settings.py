"""The settings of the inference worker, each read once from the environment."""

from pathlib import Path

from pydantic import Field, SecretStr

from shared.config import ServiceSettings


class InferenceSettings(ServiceSettings):
    """What the inference worker needs beyond what every service does."""

    slots: int = Field(default=3, ge=1, le=100)
    """Messages handled at the same time; one computes, the others download and push."""
    maps_file: Path = Path(__file__).parents[2] / "maps" / "maps.yaml"
    """The routing table: which MAP runs on which series."""
    datastore_id: str = ""
    """The HealthImaging data store that takes the results."""
    dicomweb_url: str | None = None
    """Another archive that takes the results: what `/studies` is appended to."""
    dicomweb_username: str = ""
    """Who we are to that archive (HTTP basic authentication); empty is nobody."""
    dicomweb_password: SecretStr = SecretStr("")
    """The password for it."""
    deadline_s: float = Field(default=600, gt=0)
    """Wall seconds that a MAP gets for one study; then it is killed."""
    start_deadline_s: float = Field(default=300, gt=0)
    """Wall seconds that a MAP gets to be imported."""
    recycle_after: int = Field(default=100, ge=1)
    """Studies after which a MAP's process is replaced, so that what leaks does not add up."""
    map_memory_bytes: int | None = Field(default=None, gt=0)
    """Address space of a MAP's process. Leave it unset on a GPU: CUDA reserves far more than it uses."""
