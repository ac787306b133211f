"""Settings: read once from the environment, checked, and explained if they are wrong."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

PREFIX = "RADQUEUE_"


class Misconfigured(Exception):  # noqa: N818 - it states a fact about the settings
    """The environment does not hold usable settings; the text has one line for each that is wrong, without values."""


class ServiceSettings(BaseModel):
    """What every service needs. The field `quiet_s` is read from the variable `RADQUEUE_QUIET_S`, and so on."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    bucket: str = Field(default="radqueue", min_length=1)
    """The bucket that holds all state."""
    ingest_queue: str = Field(default="radqueue-ingest", min_length=1)
    """Name of the queue that receives S3 notifications."""
    inference_queue: str = Field(default="radqueue-inference", min_length=1)
    """Name of the queue of the inference workers."""
    training_queue: str = Field(default="radqueue-training", min_length=1)
    """Name of the queue of training requests."""
    reporting_queue: str = Field(default="radqueue-reporting", min_length=1)
    """Name of the queue of the reporter."""
    slots: int = Field(default=10, ge=1, le=100)
    """Messages handled at the same time."""
    poll_s: int = Field(default=20, ge=0, le=20)
    """Seconds a poll waits for messages (SQS allows 20)."""
    visibility_s: int = Field(default=90, ge=10, le=43_200)
    """Seconds until SQS gives a message to another worker after this process died."""
    grace_s: float = Field(default=25, ge=0)
    """Seconds that running handlers get to finish after SIGTERM."""
    start_patience_s: float = Field(default=30, ge=0)
    """Seconds that a start waits for a bucket or a queue: a service may be started before what it needs is there."""
    spot_notice: bool = False
    """Drain when EC2 announces that it takes the spot instance back: looks at the instance metadata every 5 s."""
    metrics_flush_s: float = Field(default=15, gt=0)
    """Seconds between two sends of metrics to CloudWatch."""
    work_dir: Path = Path(tempfile.gettempdir()) / f"radqueue-{os.getuid()}"
    """The folder of temporary files, patients' images too; what a killed process left there goes at the next start."""
    retry_base_s: float = Field(default=2, gt=0)
    """Mean delay of the first retry is half of this; it doubles with each receive, up to 300 s."""


Settings = TypeVar("Settings", bound=BaseModel)


def load(settings: type[Settings], environ: Mapping[str, str]) -> Settings:
    """Read every field of `settings` from the variable of its name in capitals, after `RADQUEUE_`.

    Raises:
        Misconfigured: naming each variable, what is wrong with it, and what it is for.
    """
    found = {}
    for name in settings.model_fields:
        value = environ.get(PREFIX + name.upper())
        if value is not None:
            found[name] = value
    try:
        return settings.model_validate(found)
    except ValidationError as error:
        lines = []
        for detail in error.errors(include_input=False, include_url=False):
            name = str(detail["loc"][0]) if detail["loc"] else ""
            description = settings.model_fields[name].description if name in settings.model_fields else ""
            lines.append(f"{PREFIX}{name.upper()}: {detail['msg']}. {description or ''}".strip())
        raise Misconfigured("\n".join(lines)) from None
