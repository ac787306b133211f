"""The cache of datasets on this machine, kept from one training to the next.

Each dataset has a folder in the cache, named by a hash of its content. A process that uses a folder holds its shared
lock, which the kernel releases however the process ends. While the cache is too large, folders that are not in use are
removed, oldest first. Folders are entered and removed under the lock of the cache itself, so a folder cannot vanish
while a process enters it.
"""

import asyncio
import errno
import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

from shared.config import Misconfigured
from shared.errors import Unavailable
from shared.workfolder import locked

NAME = re.compile(r"[0-9a-f]{64}")
"""The pattern of the names of folders in the cache; other files and folders there are left alone."""
PART = ".part"
"""Suffix of a file that is being fetched."""


def prepare(cache: Path) -> None:
    """Try the cache before work begins. Raises `Misconfigured` if files cannot be written there."""
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "unknown")
        raise Misconfigured(f"RADQUEUE_CACHE_DIR: no file can be written there ({code}).") from None


@asynccontextmanager
async def kept_copies(cache: Path, name: str, *, limit_bytes: int) -> AsyncIterator[Path]:
    """Yield the folder `cache/name`, with what earlier uses left there; it is not removed while the block runs.

    Raises:
        Unavailable: the folder cannot be made on this machine.
    """
    with ExitStack() as held:
        try:
            folder = await asyncio.to_thread(held.enter_context, _entered(cache, name))
        except OSError as error:
            raise Unavailable(f"RADQUEUE_CACHE_DIR: {errno.errorcode.get(error.errno or 0, 'unknown')}") from None
        try:
            yield folder
        finally:
            held.close()
            await asyncio.to_thread(tidy, cache, limit_bytes)


@contextmanager
def _entered(cache: Path, name: str) -> Iterator[Path]:
    folder = cache / name
    with ExitStack() as held:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)  # images of patients
        with locked(cache):
            folder.mkdir(exist_ok=True)
            with suppress(BlockingIOError), locked(folder, wait=False):  # the folder is not in use: these are left over
                for part in folder.glob(f"*{PART}"):
                    part.unlink()
            held.enter_context(locked(folder, shared=True))
        os.utime(folder)
        yield folder


def tidy(cache: Path, limit_bytes: int) -> None:
    """Remove the folders that were used least lately, beyond `limit_bytes` in all; those in use stay."""
    with locked(cache):
        sizes = {folder: _size(folder) for folder in cache.iterdir() if NAME.fullmatch(folder.name)}
        for folder in sorted(sizes, key=lambda folder: folder.stat().st_mtime):
            if sum(sizes.values()) > limit_bytes:
                with suppress(BlockingIOError), locked(folder, wait=False):
                    shutil.rmtree(folder, ignore_errors=True)
                    del sizes[folder]


def _size(folder: Path) -> int:
    """Return the bytes of the files in a folder, in which others may be at work."""
    n_bytes = 0
    for file in folder.iterdir():
        with suppress(FileNotFoundError):
            n_bytes += file.stat().st_size
    return n_bytes
