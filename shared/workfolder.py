"""A folder for temporary files that is gone when its process is, however it ended: patients' images lie there."""

import fcntl
import hashlib
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
    with locked(work_dir):  # so that no other process takes the new folder for that of a dead one
        for folder in work_dir.glob("process-*"):
            with suppress(BlockingIOError), locked(folder, wait=False):
                shutil.rmtree(folder, ignore_errors=True)
        own = Path(tempfile.mkdtemp(prefix="process-", dir=work_dir))
        lock = ExitStack()
        lock.enter_context(locked(own))
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
def locked(folder: Path, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Hold the folder's lock, alone or `shared`, until the block ends or the process does.

    Raises:
        BlockingIOError: another process holds it, and `wait` is not set.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(descriptor, kind | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
