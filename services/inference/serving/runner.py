"""Runs MAPs: one warm child process or container per MAP, one of them computing at a time."""

import asyncio
import ctypes
import errno
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from services.inference.package.engine import Mount
from services.inference.package.maps import Image, Map
from services.inference.serving import hostfiles
from services.inference.serving.protocol import Ended, Ending, RunApplication, RunCommand, Start
from shared.child import BROKEN_PROTOCOL, Child, ChildFailed, Json, Limits, Request
from shared.errors import Unavailable
from shared.log import get_logger

START = (
    "import sys; sys.path[0] = sys.argv.pop(1); from services.inference.serving.maphost import main; main(sys.argv[1:])"
)
CONTAINER_WORK = "/radqueue/work"
"""Where a container sees the folder that holds the running study and nothing else."""
LOG_TAIL_BYTES = 64 * 1024
"""Of what a MAP printed that is stored beside the result."""
LOG_HEAD_BYTES = LOG_END_BYTES = 1 << 20
"""Of what a MAP prints that stays on disk: its beginning and its end."""
LOG_LOOK_S = 1
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 0x01, 0x02
"""Of linux/falloc.h."""
VMSTAT = Path("/proc/vmstat")
GPUS = Path("/proc/driver/nvidia/gpus")
TRIED_AGAIN = {"crashed", "out_of_memory", "gpu_out_of_memory"}
"""What may come of the studies that a process ran before."""

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
    """Resident memory of a warm process after the study."""
    was_first: bool = True
    """Whether the process had run no other study before."""


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

    def clear(self) -> None:
        """Remove what an attempt left; its log stays."""
        for path in (self.output, self.folder / "work"):
            _remove(path)
            path.mkdir()

    def mend(self) -> str:
        """Put folders where the MAP left something else, such as a link to what is not its own; tell the first.

        Nothing is followed: whoever reads the study afterwards reads what lies in it.
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


@dataclass(frozen=True, slots=True)
class Serving:
    """How one MAP is to be run."""

    isolation: Literal["warm", "process"] = "warm"
    """`process`: a process of its own for each study, by the MAP's own command."""
    deadline_s: float | None = None
    """Wall seconds for one study, where the MAP's own timeout is not what is wanted."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What every MAP of a worker may use; `deadline_s` is for those that have no timeout of their own."""

    deadline_s: float = 600
    start_deadline_s: float = 300
    """Wall seconds to be imported."""
    recycle_after: int = 1000
    """Studies of one process."""
    growth_bytes: int = 2 << 30
    """Resident memory of a process beyond what it had after its first study."""
    memory_bytes: int | None = None
    """Address space of a process, memory of a container."""
    processes: int | None = None
    """Processes and threads; a container has a bound of its own."""
    gpus: tuple[str, ...] = ()
    """Numbers or UUIDs; none named: whatever there is."""


class _Host:
    """A MAP, its process, and what that did so far."""

    def __init__(self, found: Map, serving: Serving, bounds: Bounds) -> None:
        self.map = found
        self._program = found
        """What is run: of a folder a copy, for the folder may change while the version that was in it serves."""
        self._copy: ExitStack | None = None
        """Removes it."""
        self.isolation = serving.isolation
        self.bounds = bounds
        self.deadline_s = serving.deadline_s or found.needs.timeout_s or bounds.deadline_s
        """What was set for this MAP, else its own timeout, else what holds for all."""
        self.child: Child | None = None
        self.studies = 0
        """Those of the process that runs now."""
        self.first_rss_bytes = 0
        self.device = ""
        """What the first process found."""
        self._folder: Path | None = None
        """What the container sees of this machine, or what the process of a folder's MAP is started with."""

    async def start(self) -> None:
        """Start the process, if none runs, and have it import the MAP.

        Raises:
            ChildFailed: the MAP cannot be imported.
            MapChanged: it must not be.
            Unavailable: its files cannot be copied.
            WorkerUnfit: it cannot be here.
        """
        try:
            device = await self._started()
        except ChildFailed as failed:
            if not failed.broke_protocol:
                raise
            device = await self._started()  # what was heard may be of an earlier study
        # An application would go on without its GPU, a hundred times slower, and nobody would know why.
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
        loop = asyncio.get_running_loop()
        started, kills = loop.time(), _out_of_memory_kills()
        self.studies += 1
        try:
            async with _log_kept_small(study):
                with self._seen(study) as place:
                    ended = await self.child.call(self._request(place), deadline_s=self.deadline_s)
            run = Run(**asdict(ended))
        except ChildFailed as failed:
            run = _run_of(failed, loop.time() - started, self.device, _out_of_memory_kills() > kills)
        finally:
            replaced = study.mend()
            await asyncio.to_thread(study.shorten_log)
        if replaced:
            log.warning("map.replaced", map=self.map.name, what=replaced)
            return replace(run, outcome="application_error", error_type="", where=f"{replaced} was replaced")
        # What speaks of a GPU without having had one is wrong by itself: another worker would fare no better.
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
        """Stop for good."""
        await self.stop(kill=kill)
        if self._copy is not None:
            await asyncio.to_thread(self._copy.close)
            self._copy, self._program = None, self.map

    def _take_copy(self) -> None:
        """Copy the MAP's folder. Raises `MapChanged` and `Unavailable`."""
        with ExitStack() as stack:
            made = tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(made))
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
        if image is None:
            self._folder = Path(tempfile.mkdtemp(prefix="map-"))
            home, host = self._folder / "home", hostfiles.lay_out(self._folder / "host")
            home.mkdir()
            return Child(
                _start(found.python, str(host), {**warm, "home": str(home)}),
                limits=Limits(memory_bytes=self.bounds.memory_bytes, processes=self.bounds.processes),
                env={**found.own_environment, **_visible(self.bounds.gpus)},
            )
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


class MapRunner:
    """The processes of all MAPs of a worker."""

    def __init__(
        self, maps: Iterable[Map] = (), *, serving: Mapping[str, Serving] | None = None, bounds: Bounds | None = None
    ) -> None:
        """Remember how to run; a process starts at its first use."""
        self._bounds = bounds or Bounds()
        self._hosts = {one.name: _Host(one, (serving or {}).get(one.name, Serving()), self._bounds) for one in maps}
        self._tried: dict[str, _Host] = {}
        """By name, the processes of versions that were tried and serve nobody yet."""
        self._permit = asyncio.Semaphore(1)
        self.unfit: WorkerUnfit | None = None
        """Why this worker must end, if it must."""

    def use(self, gpus: tuple[str, ...]) -> None:
        """Let the MAPs that come from now on use these devices; those that are there keep what they have."""
        self._bounds = replace(self._bounds, gpus=gpus)

    async def start(self, name: str) -> str:
        """Start the MAP's process if it does not run, and return the device that it will use.

        Raises:
            ChildFailed: the MAP cannot be imported.
            MapChanged: its folder holds another version, and this one was not started before.
            WorkerUnfit: its GPU is gone.
        """
        host = self._hosts[name]
        await self._start(host)
        return host.device

    async def run(self, name: str, study: Study, *, digest: str | None = None) -> Run:
        """Run the MAP on a study that lies in its folder; waits until no other MAP computes.

        Being cancelled kills the process. After any failure it is replaced, as after many studies and when its memory
        has grown. Where earlier studies of the process may be the cause of a failure, or somebody else answered in its
        place, a fresh one tries again.

        Raises:
            WorkerUnfit, MapChanged: as above.
            Unavailable: the MAP, which could be started once, cannot be started now, cannot be copied, or serves in
                another version than that of `digest` by now.
        """
        async with self._permit:
            host = self._hosts.get(name)
            if host is None or digest not in {None, host.map.digest}:
                raise Unavailable("the MAP was replaced meanwhile")
            run = await self._run(host, study)
            if run.outcome in TRIED_AGAIN and (not run.was_first or run.error_type == BROKEN_PROTOCOL):
                log.warning("map.tried_again", map=name, outcome=run.outcome, error_type=run.error_type)
                await asyncio.to_thread(study.clear)
                run = await self._run(host, study)
        if run.outcome == "gpu_lost":
            self.unfit = GpuLost()
            raise self.unfit
        return run

    async def try_out(self, found: Map, study: Study | None, serving: Serving | None = None) -> Run | None:
        """Run another version of a MAP on a study, beside the one that serves; waits until no other MAP computes.

        Without a study it is started, and there is no run.

        Raises:
            ChildFailed: it cannot be imported.
        """
        await self.forget_tried(found.name)
        host = self._tried[found.name] = _Host(found, serving or Serving(), self._bounds)
        async with self._permit:
            await host.start()
            if study is None:
                return None
            run = await host.run(study)
            if host.is_spent(run):
                await host.stop(kill=True)
        return run

    async def install(self, found: Map, serving: Serving | None = None) -> None:
        """Let this MAP serve under its name from the next study on; one that was tried is warm already."""
        tried = self._tried.pop(found.name, None)
        if tried is not None and tried.map.digest != found.digest:
            await tried.end(kill=True)
            tried = None
        async with self._permit:
            before = self._hosts.get(found.name)
            self._hosts[found.name] = tried or _Host(found, serving or Serving(), self._bounds)
        if before is not None:
            await before.end()

    async def remove(self, name: str) -> None:
        """Let the MAP of this name serve no more; waits until none computes."""
        async with self._permit:
            host = self._hosts.pop(name, None)
        if host is not None:
            await host.end()

    async def forget_tried(self, name: str) -> None:
        """End the process of a version that was tried and is not wanted."""
        tried = self._tried.pop(name, None)
        if tried is not None:
            await tried.end(kill=True)

    async def stop(self) -> None:
        """End all processes."""
        await asyncio.gather(*(host.end() for host in [*self._hosts.values(), *self._tried.values()]))

    def pid(self, name: str) -> int | None:
        """Return the MAP's process id, if its process runs."""
        child = self._hosts[name].child
        return child.pid if child is not None else None

    async def _start(self, host: _Host) -> None:
        try:
            await host.start()
        except WorkerUnfit as unfit:
            self.unfit = unfit
            await host.stop(kill=True)
            raise

    async def _run(self, host: _Host, study: Study) -> Run:
        try:
            await self._start(host)
        except ChildFailed as failed:
            log.error("map.not_started", map=host.map.name, reason=str(failed))  # noqa: TRY400 - the child's, not ours
            raise Unavailable("the MAP does not start") from None
        log.info("map.running", map=host.map.name)
        run = replace(await host.run(study), was_first=host.studies == 1)
        if host.is_spent(run):
            await host.stop(kill=run.outcome != "ran")
        return run


@asynccontextmanager
async def _log_kept_small(study: Study) -> AsyncIterator[None]:
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


def _start(python: str, root: str, asked: Json) -> list[str]:
    return [python, "-c", START, root, json.dumps(asked)]


def _visible(gpus: Sequence[str]) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}


def _give_to_container(folder: Path, image: Image) -> None:
    """Make the folder and all in it that of the user of the container, who is nobody where we are root."""
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
