"""The folder of one study, which the application reads, writes and prints into, and may leave in disorder."""

import asyncio
import ctypes
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

LOG_TAIL_BYTES = 64 * 1024
"""The most bytes of what a MAP printed that are stored beside the result."""
LOG_HEAD_BYTES = LOG_END_BYTES = 1 << 20
"""Bytes of the beginning and of the end of what a MAP prints that stay on disk."""
LOG_LOOK_S = 1
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 0x01, 0x02
"""Flags of fallocate(2), from linux/falloc.h."""


@dataclass(frozen=True, slots=True)
class Study:
    """The folder of one study: a MAP reads `input`, writes `output`, may leave things in `work`, prints into `log`."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> "Study":
        """Make the folders."""
        study = cls(folder)
        for path in (study.input, study.output, folder / "work"):
            path.mkdir(parents=True)
        return study

    @property
    def input(self) -> Path:
        """The folder of the DICOM files that the MAP reads."""
        return self.folder / "input"

    @property
    def output(self) -> Path:
        """The folder that the MAP writes its results to."""
        return self.folder / "output"

    def clear(self) -> None:
        """Remove what an attempt left; its log stays."""
        for path in (self.output, self.folder / "work"):
            _remove(path)
            path.mkdir()

    def mend(self) -> str:
        """Put folders where the MAP left something else, such as a link to what is not its own; name the first.

        No link is followed, so what is read of the study afterwards lies in its folder.
        """
        replaced = []
        for name in ("", "input", "output", "work"):
            path = self.folder / name
            if path.is_symlink() or not path.is_dir():
                _remove(path)
                path.mkdir()
                replaced.append(name or "study")
        log_file = self.folder / "log.txt"
        if os.path.lexists(log_file) and (log_file.is_symlink() or not log_file.is_file()):
            _remove(log_file)
            replaced.append(log_file.name)
        return replaced[0] if replaced else ""

    def open_log(self) -> int:
        """Return a descriptor of the file that takes what the MAP prints; its maker is to close it."""
        return os.open(self.folder / "log.txt", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def shorten_log(self) -> None:
        """Leave the beginning and the end of a long log, and say between them how much is left out."""
        path = self.folder / "log.txt"
        if not path.is_file() or path.stat().st_size <= LOG_HEAD_BYTES + LOG_END_BYTES:
            return
        n_left_out = path.stat().st_size - LOG_HEAD_BYTES - LOG_END_BYTES
        with path.open("rb") as file, path.with_suffix(".short").open("wb") as short:
            short.write(file.read(LOG_HEAD_BYTES))
            short.write(f"\n[radqueue: {n_left_out} bytes are left out here]\n".encode())
            file.seek(-LOG_END_BYTES, os.SEEK_END)
            shutil.copyfileobj(file, short)
        path.with_suffix(".short").replace(path)

    def log_tail(self, more_bytes: int = 0) -> bytes:
        """Return the last 64 KiB of what the MAP printed, and as many bytes more.

        It may name the patient: it is scrubbed before it is stored, and never logged.
        """
        try:
            number = os.open(self.folder / "log.txt", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # there is none, or it is a link
            return b""
        with open(number, "rb") as file:  # noqa: PTH123 - a descriptor
            file.seek(max(0, os.fstat(number).st_size - LOG_TAIL_BYTES - more_bytes))
            return file.read(LOG_TAIL_BYTES + more_bytes)


@asynccontextmanager
async def log_kept_small(study: Study) -> AsyncIterator[None]:
    """Free the disk under the middle of the log while the MAP prints into it, however much that is.

    Nothing that the MAP has open changes: the file keeps its length, and a hole reads as zeros (fallocate(2)). Where
    the file system has no holes, the log is shortened at the end alone.
    """
    descriptor = study.open_log()

    async def look() -> None:
        while True:
            await asyncio.sleep(LOG_LOOK_S)
            n_bytes = os.fstat(descriptor).st_size - LOG_HEAD_BYTES - LOG_END_BYTES
            if n_bytes > 0:  # in no thread, which might outlive the descriptor
                _punch(descriptor, LOG_HEAD_BYTES, n_bytes)

    looking = asyncio.create_task(look())
    try:
        yield
    finally:
        looking.cancel()
        with suppress(asyncio.CancelledError):
            await looking
        os.close(descriptor)


def _punch(descriptor: int, first: int, n_bytes: int) -> None:
    fallocate = ctypes.CDLL(None).fallocate
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    fallocate(descriptor, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, first, n_bytes)


def _remove(path: Path) -> None:
    """Remove whatever is there, following no link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
