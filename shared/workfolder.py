"""A folder for temporary files that is gone when its process is, however it ended: patients' images lie there."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


@contextmanager
def own_folder(work_dir: Path) -> Iterator[Path]:
    """Give a folder that no other process uses, and remove those of processes that died.

    A process holds a lock on its folder, which the kernel releases however the process ends.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    with _locked(work_dir):  # so that nobody takes the new folder for that of a dead process
        for folder in work_dir.glob("process-*"):
            with suppress(BlockingIOError), _locked(folder, wait=False):
                shutil.rmtree(folder, ignore_errors=True)
        own = Path(tempfile.mkdtemp(prefix="process-", dir=work_dir))
        lock = ExitStack()
        lock.enter_context(_locked(own))
    with lock:
        try:
            yield own
        finally:
            shutil.rmtree(own, ignore_errors=True)


@contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """Have this process and its children make all temporary files in the folder."""
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"], tempfile.tempdir = str(folder), str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = None
        os.environ.pop("TMPDIR")
        if before is not None:
            os.environ["TMPDIR"] = before


@contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the folder's lock. Raises `BlockingIOError` if another process has it and `wait` is not set."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)
