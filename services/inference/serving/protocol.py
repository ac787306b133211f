"""What the worker and a MAP's process say to each other: `runner` asks, `maphost` answers.

The process has the standard library alone, of Python 3.9 or later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from shared.child import Json, Message, Request

Ending = Literal[
    "ran",
    "no_matching_series",
    "application_error",
    "out_of_memory",
    "gpu_out_of_memory",
    "gpu_lost",
    "crashed",
]
"""The ways in which a study can end, as far as the process that ran it can tell."""


@dataclass(frozen=True)
class Ready(Message):
    """The process is ready: the MAP is imported, unless each study has a process of its own."""

    device: str
    """The device that the MAP will use: `cuda` or `cpu`."""


@dataclass(frozen=True)
class Start(Request[Ready]):
    """Import the MAP, if that was not done before."""

    do: Literal["start"] = "start"


@dataclass(frozen=True)
class Ended(Message):
    """What became of a study.

    `ran` says that the application ended by itself, not that it wrote anything. `error_type` and `where` name an
    exception and its place, never its text.
    """

    outcome: Ending
    duration_s: float
    device: str
    error_type: str = ""
    where: str = ""
    rss_bytes: int = 0
    """Bytes of resident memory of a warm process after the study."""


@dataclass(frozen=True)
class RunApplication(Request[Ended]):
    """Run the application on the study in a folder."""

    study: str
    environment: dict[str, str]
    do: Literal["run_application"] = "run_application"


@dataclass(frozen=True)
class RunCommand(Request[Ended]):
    """Run the MAP's own command on the study in a folder, in a new process."""

    study: str
    environment: dict[str, str]
    command: list[str]
    do: Literal["run_command"] = "run_command"


_REQUESTS: dict[str, Any] = {"start": Start, "run_application": RunApplication, "run_command": RunCommand}


def read(told: Json) -> Any:
    """Return the request that came as JSON."""
    return _REQUESTS[told["do"]](**told)
