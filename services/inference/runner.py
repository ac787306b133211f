"""Runs MAPs: one warm child process per MAP, one of them computing at a time."""

import asyncio
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from services.inference.maps import Map, digest_of
from shared.child import Child, ChildFailed, Limits
from shared.errors import Unavailable
from shared.log import get_logger

LOG_TAIL_BYTES = 64 * 1024
VMSTAT = Path("/proc/vmstat")

log = get_logger()


class MapChanged(Unavailable):
    """A MAP's folder changed since this worker started: only a new process can run it, under its new digest."""

    def __init__(self) -> None:
        """State the fact."""
        super().__init__("a MAP's folder changed since this worker started")


@dataclass(frozen=True, slots=True)
class Run:
    """What became of one study.

    `ran` says that the application ended by itself, not that it wrote anything. `error_type` and `where` name an
    exception and its place, never its text.
    """

    outcome: Literal["ran", "no_matching_series", "application_error", "deadline", "out_of_memory", "crashed"]
    duration_s: float
    device: str = "cpu"
    error_type: str = ""
    where: str = ""


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
        """DICOM files."""
        return self.folder / "input"

    @property
    def output(self) -> Path:
        """What the MAP made."""
        return self.folder / "output"

    def log_tail(self) -> bytes:
        """Return the end of what the MAP printed.

        It may name the patient: it is stored beside the result, and never logged.
        """
        path = self.folder / "log.txt"
        if not path.exists():
            return b""
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
            return file.read()


@dataclass(slots=True)
class _Host:
    """A MAP's process, and the studies that it ran."""

    map: Map
    child: Child
    studies: int = 0


class MapRunner:
    """The processes of all MAPs of a worker."""

    def __init__(
        self,
        maps: Iterable[Map],
        *,
        deadline_s: float = 600,
        start_deadline_s: float = 300,
        recycle_after: int = 100,
        memory_bytes: int | None = None,
    ) -> None:
        """Remember how to run; a process starts at its first use. `deadline_s` is per study."""
        limits = Limits(memory_bytes=memory_bytes)
        self._hosts: Mapping[str, _Host] = {
            found.name: _Host(found, Child(_command(found), limits=limits)) for found in maps
        }
        self._deadline_s = deadline_s
        self._start_deadline_s = start_deadline_s
        self._recycle_after = recycle_after
        self._permit = asyncio.Semaphore(1)
        self.changed = False
        """Whether a MAP's folder was found changed."""

    async def start(self, name: str) -> str:
        """Start the MAP's process if it does not run, and return the device that it will use.

        Raises:
            ChildFailed: the MAP cannot be imported.
            MapChanged: its results would carry a wrong digest.
        """
        host = self._hosts[name]
        if not host.child.alive:
            host.studies = 0
            if await asyncio.to_thread(digest_of, host.map.folder) != host.map.digest:
                log.error("map.changed", map=name)
                self.changed = True
                raise MapChanged
        reply = await host.child.call({}, deadline_s=self._start_deadline_s)
        return str(reply["device"])

    async def run(self, name: str, study: Study) -> Run:
        """Run the MAP on a study that lies in its folder; waits until no other MAP computes.

        Being cancelled kills the process. After any failure and after `recycle_after` studies it is replaced.

        Raises:
            MapChanged: as above.
            Unavailable: the MAP, which could be started once, cannot be started now.
        """
        async with self._permit:
            host = self._hosts[name]
            try:
                device = await self.start(name)
            except ChildFailed as failed:
                log.error("map.not_started", map=name, reason=str(failed))  # noqa: TRY400 - the child's, not ours
                raise Unavailable("the MAP does not start") from None
            log.info("map.running", map=name)
            run = await self._call(host, study, device)
            host.studies += 1
            if run.outcome != "ran" or host.studies >= self._recycle_after:
                await host.child.stop(kill=run.outcome != "ran")
            return run

    async def stop(self) -> None:
        """End all processes."""
        await asyncio.gather(*(host.child.stop() for host in self._hosts.values()))

    def pid(self, name: str) -> int | None:
        """Return the MAP's process id, if its process runs."""
        return self._hosts[name].child.pid

    async def _call(self, host: _Host, study: Study, device: str) -> Run:
        loop = asyncio.get_running_loop()
        started, kills = loop.time(), _out_of_memory_kills()
        try:
            reply = await host.child.call({"study": str(study.folder)}, deadline_s=self._deadline_s)
        except ChildFailed as failed:
            return _run_of(failed, loop.time() - started, device, oom_killed=_out_of_memory_kills() > kills)
        return Run(**reply)


def _command(found: Map) -> list[str]:
    return [sys.executable, "-m", "services.inference.maphost", str(found.folder)]


def _run_of(failed: ChildFailed, duration_s: float, device: str, *, oom_killed: bool) -> Run:
    if failed.reason_code == "crashed" and failed.error_type == "SIGKILL" and oom_killed:
        return Run("out_of_memory", duration_s, device, failed.error_type, "kernel")
    match failed.reason_code:
        case "deadline":
            return Run("deadline", duration_s, device)
        case "out_of_memory":
            return Run("out_of_memory", duration_s, device, failed.error_type, failed.where)
        case "raised":
            return Run("application_error", duration_s, device, failed.error_type, failed.where)
        case _:
            return Run("crashed", duration_s, device, failed.error_type, failed.where)


def _out_of_memory_kills() -> int:
    """Return how many processes the kernel has killed for memory since it started (proc(5), vmstat)."""
    try:
        lines = VMSTAT.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
