"""What the worker answers about a file: plain values, which cross the pipe as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Instance:
    """A normalised instance."""

    study_uid: str
    series_uid: str
    sop_instance_uid: str
    sha: str
    """Of the data set as it was uploaded, so that the same data set in another wrapping is the same."""
    warnings: Sequence[str]
    decoder: str = ""
    """What read its compressed pixels; empty where there are none."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a zip: `path` of its bytes, or the code of why there are none; neither where it is no image."""

    number: int
    path: str | None = None
    reason_code: str | None = None
