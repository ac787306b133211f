"""The GPUs of this machine, shared by its workers by the memory that their MAPs ask for.

Theory of operation. CUDA gives memory to whoever comes first, and fails whoever comes last, in the middle of a study.
So each worker writes down what its MAPs ask for before it starts them: a file per worker and GPU in a folder that all
workers of the machine share, with the bytes in it, and locked for as long as the worker lives. The kernel releases the
lock however the worker ends, so a file without a lock is nobody's. Who finds no room waits: in a replacement of workers
the one before is about to end.
"""

import asyncio
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from services.inference.manifests import Needs
from shared.config import Misconfigured
from shared.log import get_logger

QUERY = ("nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits")
QUERY_S = 60
WAIT_S = 2
MIB = 1 << 20
log = get_logger()


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device."""

    index: str
    uuid: str
    memory_bytes: int


def installed() -> list[Gpu]:
    """Return the GPUs of this machine, as the driver tells them; none where there is no driver."""
    if shutil.which(QUERY[0]) is None:
        return []
    done = subprocess.run(QUERY, check=False, capture_output=True, text=True, timeout=QUERY_S)
    return parse(done.stdout) if done.returncode == 0 else []


def parse(text: str) -> list[Gpu]:
    """Read what `nvidia-smi` answers: a line for each device, memory in MiB."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    return [Gpu(index, uuid, int(mib) * MIB) for index, uuid, mib in rows if mib.isdigit()]


@asynccontextmanager
async def reserved(folder: Path, needs: Iterable[Needs], allowed: Sequence[str]) -> AsyncIterator[tuple[str, ...]]:
    """Give the UUIDs of the devices that this worker's MAPs may use; waits until there is room for all of them.

    `folder` is the same for all workers of the machine; `allowed` names devices by number or UUID, all where it is
    empty. A MAP that wants a GPU and does not say how much of its memory gets a whole one. Where no MAP wants one, or
    the machine has none, `allowed` is returned as it is.

    Raises:
        Misconfigured: the MAPs ask for more than there is.
    """
    wanting = [one for one in needs if one.gpu]
    devices = await asyncio.to_thread(installed) if wanting else []
    if not devices:
        yield tuple(allowed)
        return
    usable = [one for one in devices if not allowed or one.index in allowed or one.uuid in allowed]
    n = max(one.gpu for one in wanting)
    said = [one.gpu_memory_bytes for one in wanting]
    asked = None if None in said else sum(filter(None, said))
    if sum(one.memory_bytes >= (asked or 0) for one in usable) < n:
        raise Misconfigured(f"RADQUEUE_GPUS: the MAPs ask for {n} GPUs with {(asked or 0) // MIB} MiB each.")
    with ExitStack() as held:
        while len(found := _take(folder, usable, n, asked, held)) < n:
            log.info("gpu.waiting", gpus=n, memory_bytes=asked)
            await asyncio.sleep(WAIT_S)
        log.info("gpu.reserved", gpus=[one.uuid for one in found], memory_bytes=asked)
        yield tuple(one.uuid for one in found)


def _take(folder: Path, devices: Sequence[Gpu], n: int, asked: int | None, held: ExitStack) -> list[Gpu]:
    """Reserve memory on `n` devices, all or none; `asked` bytes of each, or the whole of it."""
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):  # one worker at a time counts and takes
        with_room = [
            one for one in devices if _taken(folder / one.uuid) + (asked or one.memory_bytes) <= one.memory_bytes
        ]
        if len(with_room) < n:
            return []
        for one in with_room[:n]:
            descriptor, _ = tempfile.mkstemp(dir=folder / one.uuid)
            held.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.write(descriptor, str(asked or one.memory_bytes).encode())
        return with_room[:n]


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def _taken(folder: Path) -> int:
    """Return the bytes that living workers reserved, and forget those of dead ones."""
    folder.mkdir(exist_ok=True)
    total = 0
    for path in folder.iterdir():
        try:
            with _locked(path, wait=False):
                path.unlink()
        except BlockingIOError:
            total += int(path.read_text("ascii"))
    return total
