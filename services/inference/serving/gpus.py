"""The GPUs of this machine, shared by its workers by the memory that their MAPs ask for.

Theory of operation. CUDA gives memory to the process that comes first, and fails the one that comes last, in mid-study.
So each worker writes down what its MAPs ask for before it starts them: a file per worker and GPU in a folder that all
workers of the machine share, with the bytes in it, and locked for as long as the worker lives. The kernel releases the
lock however the worker ends, so a file without a lock has no owner. A worker that finds no room waits: when workers are
replaced, the one before is about to end. Memory for a MAP that comes later, with a new table or in a new version, is
reserved before it is tried; without room for it, it is tried again at the next look, and what serves goes on.
"""

import asyncio
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from services.inference.package.manifests import Needs
from shared.config import Misconfigured
from shared.log import get_logger

QUERY = ("nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits")
QUERY_S = 60
WAIT_S = 2
MIB = 1 << 20
DIGITS = 20
"""The width of the number in a worker's file: one that replaces another must be as long."""
log = get_logger()


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device."""

    index: str
    uuid: str
    memory_bytes: int


def installed() -> list[Gpu]:
    """Return the GPUs of this machine, as the driver lists them; an empty list without a driver."""
    if shutil.which(QUERY[0]) is None:
        return []
    done = subprocess.run(QUERY, check=False, capture_output=True, text=True, timeout=QUERY_S)
    return parse(done.stdout) if done.returncode == 0 else []


def parse(text: str) -> list[Gpu]:
    """Read what `nvidia-smi` answers: a line for each device, memory in MiB."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    return [Gpu(index, uuid, int(mib) * MIB) for index, uuid, mib in rows if mib.isdigit()]


class Share:
    """What one worker has of the machine's GPUs, until it is closed."""

    def __init__(self, folder: Path, allowed: Sequence[str]) -> None:
        """Hold nothing yet.

        `folder` is the same for all workers of the machine; `allowed` names devices by number or UUID; if it is empty,
        all are.
        """
        self._folder, self._allowed = folder, tuple(allowed)
        self._held: dict[str, int] = {}
        """The descriptors of the locked files that hold the reserved bytes, by the UUID of the device."""

    @property
    def devices(self) -> tuple[str, ...]:
        """The UUIDs of the devices that MAPs may use; what is allowed, while none of them wants one."""
        return tuple(self._held) or self._allowed

    async def wait_for(self, needs: Iterable[Needs]) -> None:
        """Reserve what MAPs ask for together; waits until there is room for all of them. Raises as `cover` does."""
        wanted = list(needs)
        while not await asyncio.to_thread(self.cover, wanted):
            log.info("gpu.waiting")
            await asyncio.sleep(WAIT_S)

    def cover(self, needs: Iterable[Needs]) -> bool:
        """Reserve what MAPs ask for together, instead of what was reserved before; tell whether there is room.

        A MAP that wants a GPU and does not say how much of its memory gets a whole one. Without room nothing changes;
        on a machine without a GPU nothing is reserved.

        Raises:
            Misconfigured: the MAPs ask for more than there is.
        """
        wanting = [one for one in needs if one.gpu]
        devices = installed() if wanting else []
        if not devices:
            self._release()
            return True
        usable = [one for one in devices if not self._allowed or {one.index, one.uuid} & {*self._allowed}]
        # Those that are held stay: the processes that run use them.
        usable.sort(key=lambda one: one.uuid not in self._held)
        n = max(len(self._held), *(one.gpu for one in wanting))
        said = [one.gpu_memory_bytes for one in wanting]
        asked = None if None in said else sum(filter(None, said))
        if sum(one.memory_bytes >= (asked or 0) for one in usable) < n:
            raise Misconfigured(f"RADQUEUE_GPUS: the MAPs ask for {n} GPUs with {(asked or 0) // MIB} MiB each.")
        return self._take(usable, n, asked)

    def close(self) -> None:
        """Give everything back."""
        self._release()

    def _take(self, devices: Sequence[Gpu], n: int, asked: int | None) -> bool:
        """Reserve memory on `n` devices, all or none; `asked` bytes of each, or the whole of it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with _locked(self._folder):  # one worker at a time counts and takes
            with_room = [one for one in devices if self._taken_by_others(one) + _share(one, asked) <= one.memory_bytes]
            if len(with_room) < n:
                return False
            for one in with_room[:n]:
                if one.uuid not in self._held:
                    self._held[one.uuid], _ = tempfile.mkstemp(dir=self._folder / one.uuid)
                    fcntl.flock(self._held[one.uuid], fcntl.LOCK_EX)
                _write(self._held[one.uuid], _share(one, asked))
            for uuid in self._held.keys() - {one.uuid for one in with_room[:n]}:
                os.close(self._held.pop(uuid))
        log.info("gpu.reserved", gpus=list(self._held), memory_bytes=asked)
        return True

    def _taken_by_others(self, gpu: Gpu) -> int:
        mine = _read(self._held[gpu.uuid]) if gpu.uuid in self._held else 0
        return _taken(self._folder / gpu.uuid) - mine

    def _release(self) -> None:
        while self._held:
            os.close(self._held.popitem()[1])


def _share(gpu: Gpu, asked: int | None) -> int:
    return asked or gpu.memory_bytes


def _read(descriptor: int) -> int:
    return int(os.pread(descriptor, DIGITS, 0))


def _write(descriptor: int, n_bytes: int) -> None:
    os.pwrite(descriptor, f"{n_bytes:0{DIGITS}}".encode(), 0)


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
