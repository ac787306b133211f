"""The child's side as files: all that a MAP's interpreter or container is given of radqueue.

They are laid out apart from the rest, since what lies beside them here may be a whole environment: another interpreter
would import its packages instead of its own.
"""

import shutil
from importlib.resources import files
from pathlib import Path

from services.inference.package.engine import Mount

HOST_FILES = (
    "services/__init__.py",
    "services/inference/__init__.py",
    "services/inference/serving/__init__.py",
    "services/inference/serving/maphost.py",
    "services/inference/serving/protocol.py",
    "shared/__init__.py",
    "shared/child.py",
    "shared/errors.py",
)
"""The files of the child's side, which needs nothing beyond the standard library."""
CONTAINER_ROOT = "/radqueue/host"
"""The folder in which a container sees the files of the child's side."""


def lay_out(folder: Path, *more: str) -> Path:
    """Copy the child's side, and the files named beside it, into a folder, and return that."""
    for name in (*HOST_FILES, *more):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_place(name), folder / name)
    return folder


def mounts(*more: str) -> list[Mount]:
    """Return what shows a container the child's side, and the files named beside it."""
    return [Mount(_place(name), f"{CONTAINER_ROOT}/{name}") for name in (*HOST_FILES, *more)]


def _place(name: str) -> Path:
    package, _, file = name.rpartition("/")
    return Path(str(files(package.replace("/", ".")) / file))
