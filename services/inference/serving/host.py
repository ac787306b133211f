"""The process or container of one MAP: how it is started, what it may use, and what became of a study in it.

Theory of operation. A `Host` belongs to one version of a MAP. What it runs is a copy of the MAP's folder, or an image
by its digest: so the folder may change while the version that was in it serves. Its process is `maphost`, started with
the MAP's own interpreter or in a container, and is spoken to as `protocol` says. It starts at the first `start`, and
anew at the next one after it ended; `run` tells apart how a study can end, including that of the process.
"""

import asyncio
import errno
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from services.inference.package.engine import Mount
from services.inference.package.maps import Image, Map
from services.inference.serving import hostfiles
from services.inference.serving.protocol import Ended, Ending, RunApplication, RunCommand, Start
from services.inference.serving.study import Study, log_kept_small
from shared.child import Child, ChildFailed, Json, Limits, Request
from shared.errors import Unavailable
from shared.log import get_logger

START = (
    "import sys; sys.path[0] = sys.argv.pop(1); from services.inference.serving.maphost import main; main(sys.argv[1:])"
)
CONTAINER_WORK = "/radqueue/work"
"""The path at which a container sees the folder that holds the running study and nothing else."""
VMSTAT = Path("/proc/vmstat")
GPUS = Path("/proc/driver/nvidia/gpus")

Outcome = Literal[Ending, "deadline"]
log = get_logger()


class WorkerUnfit(Unavailable):
    """This process cannot serve a MAP any more, and a new one may: its messages are given back, and it ends."""


class MapChanged(Unavailable):
    """The version that is asked for is not on disk any more: the one that is there must be tried before it serves."""

    def __init__(self) -> None:
        """State the fact."""
        super().__init__("the MAP's folder changed before the version in it was copied")


class GpuLost(WorkerUnfit):
    """The GPU, or its driver, does not answer any more: studies are not to blame."""

    def __init__(self) -> None:
        """State the fact."""
        super().__init__("the GPU does not answer any more")


@dataclass(frozen=True, slots=True)
class Run:
    """What became of one study.

    `ran` says that the application ended by itself, not that it wrote anything. `error_type` and `where` name an
    exception and its place, never its text.
    """

    outcome: Outcome
    duration_s: float
    device: str = "cpu"
    error_type: str = ""
    where: str = ""
    rss_bytes: int = 0
    """Bytes of resident memory of a warm process after the study."""
    was_first: bool = True
    """True if the process had run no other study before."""


@dataclass(frozen=True, slots=True)
class Serving:
    """How one MAP is to be run."""

    isolation: Literal["warm", "process"] = "warm"
    """`process`: a process of its own for each study, by the MAP's own command."""
    deadline_s: float | None = None
    """Wall seconds for one study, if they are to replace the MAP's own timeout."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What every MAP of a worker may use; `deadline_s` is for those that have no timeout of their own."""

    deadline_s: float = 600
    start_deadline_s: float = 300
    """Wall seconds that a MAP gets to be imported."""
    recycle_after: int = 1000
    """The number of studies after which a process is replaced."""
    growth_bytes: int = 2 << 30
    """Bytes of resident memory that a process may gain after its first study."""
    memory_bytes: int | None = None
    """Bytes of address space of a process, or of memory of a container."""
    processes: int | None = None
    """The number of processes and threads that a MAP may start; a container has a bound of its own."""
    gpus: tuple[str, ...] = ()
    """The GPUs that MAPs may use, by number or UUID; if none is named, all of the machine."""


class Host:
    """A MAP, its process, and what that did so far."""

    def __init__(self, found: Map, serving: Serving, bounds: Bounds) -> None:
        """Remember how to run it; the process starts with `start`."""
        self.map = found
        self._program = found
        """The MAP that is run: a copy of its folder, which may change while the version that was in it serves."""
        self._copy: ExitStack | None = None
        """Removes the copy of the folder when it is closed."""
        self.isolation = serving.isolation
        self.bounds = bounds
        self.deadline_s = serving.deadline_s or found.needs.timeout_s or bounds.deadline_s
        """Wall seconds for one study: what was set for this MAP, else its own timeout, else what holds for all."""
        self.child: Child | None = None
        self.studies = 0
        """The number of studies that the process which runs now was given."""
        self.first_rss_bytes = 0
        self.device = ""
        """The device that the last start found: `cuda` or `cpu`; empty before the first."""
        self._folder: Path | None = None
        """The folder that the container sees of this machine, or that the process of a folder's MAP is started with."""

    async def start(self) -> None:
        """Start the process, if none runs, and have it import the MAP.

        Raises:
            ChildFailed: the MAP cannot be imported.
            MapChanged: its folder holds another version by now.
            Unavailable: its files cannot be copied.
            WorkerUnfit: it cannot be served by this worker.
        """
        try:
            device = await self._started()
        except ChildFailed as failed:
            if not failed.broke_protocol:
                raise
            device = await self._started()  # what was heard may be of an earlier study
        # An application would go on without its GPU, a hundred times slower, and leave no trace of why.
        if self.device == "cuda" and device != "cuda":
            raise GpuLost
        self.device = device

    async def _started(self) -> str:
        if self.child is None or not self.child.alive:
            await self.stop(kill=True)
            if self._copy is None and self.map.place is not None:
                await asyncio.to_thread(self._take_copy)
            self.child = self._new_child()
        return (await self.child.call(Start(), deadline_s=self.bounds.start_deadline_s)).device

    async def run(self, study: Study) -> Run:
        """Run the MAP on a study; its process has been started."""
        if self.child is None:
            raise RuntimeError("the process was not started")

        # Run.
        loop = asyncio.get_running_loop()
        started, kills = loop.time(), _out_of_memory_kills()
        self.studies += 1
        try:
            async with log_kept_small(study):
                with self._seen(study) as place:
                    ended = await self.child.call(self._request(place), deadline_s=self.deadline_s)
            run = Run(**asdict(ended))
        except ChildFailed as failed:
            run = _run_of(failed, loop.time() - started, self.device, _out_of_memory_kills() > kills)
        finally:
            replaced = study.mend()
            await asyncio.to_thread(study.shorten_log)

        # Judge: what the process says of itself is not all that is known.
        if replaced:
            log.warning("map.replaced", map=self.map.name, what=replaced)
            return replace(run, outcome="application_error", error_type="", where=f"{replaced} was replaced")
        # A MAP that speaks of a GPU without having had one is wrong itself: another worker would fare no better.
        if run.outcome == "gpu_lost" and self.device != "cuda":
            return replace(run, outcome="application_error")
        if run.outcome == "crashed" and run.error_type == "SIGKILL" and _out_of_memory_kills() > kills:
            return replace(run, outcome="out_of_memory", where="kernel")
        return run

    def is_spent(self, run: Run) -> bool:
        """Tell whether the process is to be replaced after this run."""
        self.first_rss_bytes = self.first_rss_bytes or run.rss_bytes
        grown = run.rss_bytes - self.first_rss_bytes > self.bounds.growth_bytes
        if grown:
            log.warning("map.grown", map=self.map.name, rss_bytes=run.rss_bytes, studies=self.studies)
        return grown or run.outcome != "ran" or self.studies >= self.bounds.recycle_after or self.isolation == "process"

    async def stop(self, *, kill: bool = False) -> None:
        """End the process, with all that it started."""
        child, self.child = self.child, None
        if child is not None:
            await child.stop(kill=kill)
        self.studies = self.first_rss_bytes = 0
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    async def end(self, *, kill: bool = False) -> None:
        """End the process for good, and remove the copy of the MAP's folder."""
        await self.stop(kill=kill)
        if self._copy is not None:
            await asyncio.to_thread(self._copy.close)
            self._copy, self._program = None, self.map

    def _take_copy(self) -> None:
        """Copy the MAP's folder. Raises `MapChanged` and `Unavailable`."""
        with ExitStack() as stack:
            temporary = tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(temporary))
            try:
                copied = self.map.copied_to(folder)
                if copied.changed():
                    raise MapChanged
            except OSError as error:
                code = errno.errorcode.get(error.errno or 0, "unknown")
                raise Unavailable(f"the MAP's folder cannot be copied: {code}") from None
            self._copy, self._program = stack.pop_all(), copied

    def _request(self, place: str) -> Request[Ended]:
        environment = self._program.environment(f"{place}/input", f"{place}/output", f"{place}/work")
        if self.isolation == "process":
            return RunCommand(place, environment, list(self._program.command))
        return RunApplication(place, environment)

    def _new_child(self) -> Child:
        """Return a child that starts at its first call."""
        found, image = self._program, self.map.image
        warm = {"application": found.application} if self.isolation == "warm" else {}

        # A process.
        if image is None:
            self._folder = Path(tempfile.mkdtemp(prefix="map-"))
            home, host = self._folder / "home", hostfiles.lay_out(self._folder / "host")
            home.mkdir()
            return Child(
                _start(found.python, str(host), {**warm, "home": str(home)}),
                limits=Limits(memory_bytes=self.bounds.memory_bytes, processes=self.bounds.processes),
                env={**found.own_environment, **_visible(self.bounds.gpus)},
            )

        # A container.
        name = f"radqueue-{uuid.uuid4().hex}"
        self._folder = Path(tempfile.mkdtemp(prefix="container-"))
        _give_to_container(self._folder, image)
        needs = found.needs
        argv = image.engine.run_command(
            image.id,
            _start(found.python, hostfiles.CONTAINER_ROOT, {**warm, "container": True}),
            name=name,
            mounts=[*hostfiles.mounts(), Mount(self._folder, CONTAINER_WORK, writable=True)],
            environment=found.own_environment,
            needs=replace(needs, memory_bytes=needs.memory_bytes or self.bounds.memory_bytes),
            gpus=(self.bounds.gpus or (("all",) if GPUS.is_dir() else ())) if needs.gpu else (),
        )
        return Child(argv, kill_argv=tuple(image.engine.kill_command(name)))

    @contextmanager
    def _seen(self, study: Study) -> Iterator[str]:
        """Give the path under which the process sees the study; a container sees no other study than this one."""
        if self._folder is None or self.map.image is None:
            yield str(study.folder)
            return
        _give_to_container(study.folder, self.map.image)
        place = self._folder / "study"
        study.folder.rename(place)
        try:
            yield f"{CONTAINER_WORK}/study"
        finally:
            # A link is renamed, not followed; `Study.mend` removes it.
            if not os.path.lexists(place):
                place.mkdir()
            place.rename(study.folder)


def _start(python: str, root: str, asked: Json) -> list[str]:
    return [python, "-c", START, root, json.dumps(asked)]


def _visible(gpus: Sequence[str]) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}


def _give_to_container(folder: Path, image: Image) -> None:
    """Make the container's user the owner of the folder and all in it; unless we are root, that user is ours."""
    if os.geteuid() != 0:
        return
    uid, gid = map(int, image.engine.user.split(":"))
    for path in (folder, *folder.rglob("*")):
        os.chown(path, uid, gid, follow_symlinks=False)


def _run_of(failed: ChildFailed, duration_s: float, device: str, oom_killed: bool) -> Run:  # noqa: FBT001 - a fact
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
    """Return how many processes the kernel has killed for memory, also for that of a cgroup (proc(5), vmstat)."""
    try:
        lines = VMSTAT.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
