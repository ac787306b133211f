"""The settings of the inference worker, each read once from the environment."""

import shlex
from importlib.resources import files

from pydantic import Field, SecretStr

from services.inference.routing import TargetName
from shared.config import ServiceSettings


class InferenceSettings(ServiceSettings):
    """What the inference worker needs beyond what every service does."""

    slots: int = Field(default=3, ge=1, le=100)
    """The number of messages handled at the same time; one computes, the others download and push."""
    maps_file: str = str(files("maps") / "maps.yaml")
    """The routing table: which MAP runs on which series. A file, or s3://bucket/key; read again when it changes."""
    maps_look_s: float = Field(default=5, gt=0)
    """Seconds between two looks at the routing table."""
    map_versions_look_s: float = Field(default=60, gt=0)
    """Seconds between two looks at the MAPs' sources: a new version is tried, and takes over if it is good."""
    study_quiet_s: float = Field(default=120, gt=0, le=890)
    """Seconds without news of a study after which MAPs that read a study as a whole get it."""
    study_max_settle_s: float = Field(default=3600, gt=0)
    """Seconds after which a study that still grows is taken as it is, at most once in that time."""
    push_to: TargetName | None = None
    """The place that results go to: healthimaging, healthimaging-import, dicomweb or s3. Unset: dicomweb if it
    has a URL, else healthimaging."""
    push_originals: bool = False
    """Push the series that a MAP read before its results, so that a viewer has both."""
    datastore_id: str = ""
    """The HealthImaging data store that takes the results."""
    import_role_arn: str = ""
    """The role with which HealthImaging's import jobs read and write `imports/*` of the bucket."""
    dicomweb_url: str | None = None
    """The URL of a PACS that takes the results; `/studies` is appended to it."""
    dicomweb_username: str = ""
    """The user name for that PACS (HTTP basic authentication); if it is empty, none is sent."""
    dicomweb_password: SecretStr = SecretStr("")
    """The password for that PACS."""
    dicomweb_token: SecretStr = SecretStr("")
    """A token for that PACS instead (HTTP bearer authentication)."""
    deadline_s: float = Field(default=600, gt=0)
    """Wall seconds that a MAP gets for one study; then it is killed. A MAP's own timeout goes before it, and
    `deadline_s` of its route before both."""
    start_deadline_s: float = Field(default=300, gt=0)
    """Wall seconds that a MAP gets to be imported."""
    recycle_after: int = Field(default=1000, ge=1)
    """Studies after which a MAP's process is replaced, so that what leaks does not add up."""
    map_growth_bytes: int = Field(default=2 << 30, gt=0)
    """Bytes of resident memory that a MAP's process may gain after its first study; beyond that, it is replaced."""
    map_memory_bytes: int | None = Field(default=None, gt=0)
    """Bytes of address space of a MAP's process, or of memory of a container whose pkg.json names none. Leave
    it unset on a GPU: CUDA reserves far more than it uses."""
    map_processes: int | None = Field(default=4096, gt=0)
    """Processes and threads that a MAP may start. Root has no such limit; a container has one of its own."""
    gpus: str = ""
    """The devices that MAPs may use, by number or UUID, with commas; of several, those with room are taken. If it
    is empty, all."""
    container_engine: str | None = None
    """The program that runs MAPs that are images: docker, podman or nerdctl. Unset: the first of them that answers."""
    container_engine_args: str = ""
    """More arguments for the container engine's `run` and `create`, such as `--runtime runc`."""
    container_engine_build_args: str = ""
    """More arguments for the engine's `build`, or buildah's, such as `--isolation chroot`, for `radqueue map build`."""

    @property
    def engine_arguments(self) -> list[str]:
        """The words of `container_engine_args`, as a shell splits them."""
        return shlex.split(self.container_engine_args)
