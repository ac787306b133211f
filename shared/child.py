"""A killable child process that answers calls over pipes, one JSON document per line.

Theory of operation. Work that may hang, eat memory, crash or hold the interpreter lock (decoding a file, running a MAP,
training) runs in a child, so that the service beside it keeps extending its messages and can always end the work with
SIGKILL. The two speak one JSON document per line:

    child    {"serves": PID}                                      once, before code of others is imported
    parent   {"id": 7, "request": {"do": "train", …}}             one call at a time
    child    {"id": 7, "pid": PID, "progress": {…}}               any number of times
    child    {"id": 7, "pid": PID, "reply": {…}}                  or "error", once

The dots stand for frozen dataclasses, which the `protocol.py` of each child defines once for both sides. The `do` of a
request tells which one it is, and its type names the reply: `class Train(Request[Outcome])` is answered by an
`Outcome`, which is a union if there are several, and `Child.call` returns just that. The two sides do not trust each
other alike. The child belongs to its parent and takes a request as it comes, by the `read` of its protocol. The parent
does not trust the child, in which the code of others runs: it validates each line by the types of the dataclasses,
strictly, with pydantic, which only the parent needs.

A line breaks the protocol if it is not such a document, comes from another process than the one that serves, or answers
another call than the one that waits. The child is then killed, and the call fails with a `ChildFailed` that says
`broke_protocol`. It is unknown then who wrote the line, and nothing is known about the work: the caller tries it again,
in a fresh process.

What an application leaves behind cannot answer in the place of the child. The child keeps both pipes for itself, on
descriptors that are closed on exec and after a fork, and leaves /dev/null as standard input and standard error as
standard output: what a library prints, or a program that it started reads, is not part of the protocol. A process that
an application forked, and that comes back to where the child called the application, ends there (`end_if_forked`): two
processes that both take themselves for the child would share its next call, its files and its reply.

A child leads its own process group, so what it started is killed along with it. What left the group is found by a mark
in its environment, which every process inherits, and is killed as well. The child asks the kernel to be killed when its
parent dies (PR_SET_PDEATHSIG), so a SIGKILL of the service leaves no orphan computing. Its end is seen by a pidfd, not
by the end of its pipes: what it started may have inherited those.

The child's side also runs in interpreters that are not ours, so this file and what it imports need the standard library
alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import json
import logging
import os
import resource
import signal
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, get_args, get_origin

from shared.errors import Unprocessable, place_of

if TYPE_CHECKING:
    from pydantic import TypeAdapter

STDERR_TAIL_BYTES = 64 * 1024
LINE_LIMIT_BYTES = 64 * 1024 * 1024
PIPE_GRACE_S = 1.0
"""Seconds to read what is left in a pipe after its writer ended."""
PR_SET_PDEATHSIG = 1
BROKEN_PROTOCOL = "protocol"
"""The error type of a child that was killed for what it said, in place of a signal or an exit code."""
MARK = "RADQUEUE_CHILD_MARK"
"""The variable that a child and all its descendants have in common."""

Json = dict[str, Any]
Progress = Callable[[Any], None]
"""A function that is given progress: the messages whose type the request's `news` names."""
Reply = TypeVar("Reply")
News = TypeVar("News")
Asked = TypeVar("Asked")


class Message:
    """What crosses the pipe: a frozen dataclass, of which the other side knows every field."""

    __pydantic_config__: ClassVar[Json] = {"extra": "forbid"}


class Request(Message, Generic[Reply]):
    """What a child is asked to do; its type names the message that answers it."""

    news: ClassVar[Any] = None
    """The type of the progress that the child reports; None if it reports none."""


class ChildFailed(RuntimeError):  # noqa: N818 - it states what became of the call
    """A call brought no reply.

    `reason_code` is one of `deadline` (killed for time), `out_of_memory`, `cpu_limit`, `crashed` (ended by a signal,
    exited, or broke the protocol) and `raised` (the function raised; `error_type` and `where` name the exception and
    its place, never its text).
    """

    def __init__(self, reason_code: str, error_type: str = "", where: str = "") -> None:
        """State the reason and the place."""
        super().__init__(" ".join(part for part in (reason_code, error_type, where) if part))
        self.reason_code = reason_code
        self.error_type = error_type
        self.where = where

    @property
    def broke_protocol(self) -> bool:
        """Whether something else than an answer to the call was read: another try, in a fresh process, may work."""
        return self.error_type == BROKEN_PROTOCOL


@dataclass(frozen=True)
class Limits:
    """What a child may use; None is unlimited."""

    memory_bytes: int | None = None
    """Address space (RLIMIT_AS) of the child."""
    cpu_s: int | None = None
    """Processor seconds per call (RLIMIT_CPU)."""
    processes: int | None = None
    """Processes and threads that its user may have beyond those at its start (RLIMIT_NPROC; root has no such limit)."""


class Child:
    """The parent's side: starts the child at the first call, and again at the first call after it ended."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        limits: Limits | None = None,
        env: Mapping[str, str] | None = None,
        kill_argv: Sequence[str] = (),
    ) -> None:
        """Remember how to start it; `env` is added to this process's environment.

        `kill_argv` is a command that ends what signals to `argv` do not reach: a container.
        """
        self._argv = tuple(argv)
        self._kill_argv = tuple(kill_argv)
        self._mark = f"{MARK}={uuid.uuid4().hex}"
        self._limits = limits or Limits()
        self._env = dict(env or {})
        self._process: asyncio.subprocess.Process | None = None
        self._exited = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None
        self._stderr_task: asyncio.Task[None] | None = None
        self._stderr = bytearray()
        self._lock = asyncio.Lock()
        self._ids = itertools.count(1)
        """The ids of calls, which no two processes of this child share."""
        self._serving: int | None = None
        """The id of the process that may answer, as it names itself: in a container it has another one for us."""
        self.calls = 0
        """Calls answered by the process that runs now."""

    @property
    def alive(self) -> bool:
        """Whether a process is running."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int | None:
        """The process id, if a process is running."""
        return self._process.pid if self._process is not None and self.alive else None

    def stderr_tail(self) -> bytes:
        """Return the last 64 KiB that the child printed. It may hold patient attributes: never log it."""
        return bytes(self._stderr)

    async def call(self, request: Request[Reply], *, deadline_s: float, on_progress: Progress | None = None) -> Reply:
        """Send `request` and return the reply, which is of the type that the request names.

        A call that is cancelled, or not answered within `deadline_s`, kills the child: its state is unknown.

        Raises:
            ChildFailed: no reply came.
            Unprocessable: the child's function said so.
        """
        async with self._lock:
            process = await self._started()
            try:
                async with asyncio.timeout(deadline_s):
                    answer = await self._exchange(process, request, on_progress)
            except TimeoutError:
                await self.stop(kill=True)
                raise ChildFailed("deadline") from None
            except BaseException:
                await self.stop(kill=True)
                raise
            self.calls += 1
            if answer.reply is None:
                raise _failure_of_error(answer.error or _Error())
            return answer.reply

    async def stop(self, *, kill: bool = False, grace_s: float = 5.0) -> None:
        """End the child: close its input and wait `grace_s`, then kill it with all that it started.

        Being cancelled does not keep it from ending; the next `stop` waits for that.
        """
        process, self._process = self._process, None
        if process is not None:
            self._ending = asyncio.create_task(self._end(process, kill=kill, grace_s=grace_s))
        ending = self._ending
        if ending is None:
            return
        try:
            await asyncio.shield(ending)
        finally:
            if ending.done():
                self._ending = None

    async def _end(self, process: asyncio.subprocess.Process, *, kill: bool, grace_s: float) -> None:
        if process.stdin is not None:
            process.stdin.close()
        if not kill:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._exited.wait(), grace_s)
        if self._kill_argv:
            await self._kill_container(grace_s)
        else:
            await asyncio.to_thread(_kill_marked, self._mark)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await self._exited.wait()
        await _returncode(process)
        if self._stderr_task is not None:
            # All that the child printed is in the pipe, whose end never comes while another process holds it open.
            await asyncio.wait([self._stderr_task], timeout=PIPE_GRACE_S)
            self._stderr_task.cancel()
        process._transport.close()  # type: ignore[attr-defined]  # noqa: SLF001 - the only way to let go of the pipes

    async def _kill_container(self, grace_s: float) -> None:
        """Have the engine end it; its client ends by itself then, and the engine's own processes must not be killed."""
        if self._exited.is_set():
            return
        nowhere = asyncio.subprocess.DEVNULL
        killing = await asyncio.create_subprocess_exec(*self._kill_argv, stdout=nowhere, stderr=nowhere)
        try:
            await asyncio.wait_for(killing.wait(), grace_s)
        except TimeoutError:  # an engine that hangs; without its standard input the container ends by itself
            killing.kill()
            await killing.wait()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._exited.wait(), grace_s)

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        await self.stop(kill=True)
        self._stderr.clear()
        self._serving = None
        self.calls = 0
        name, _, mark = self._mark.partition("=")
        environment = {**os.environ, **self._env, name: mark, "RADQUEUE_CHILD": json.dumps(asdict(self._limits))}
        self._process = await asyncio.create_subprocess_exec(
            *self._argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            limit=LINE_LIMIT_BYTES,
            start_new_session=True,
        )
        self._exited = _exit_of(self._process.pid)
        self._stderr_task = asyncio.create_task(self._drain_stderr(self._process))
        return self._process

    async def _exchange(
        self, process: asyncio.subprocess.Process, request: Request[Reply], on_progress: Progress | None
    ) -> _Answer[Reply, Any]:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the child was started without pipes")
        number = next(self._ids)
        with contextlib.suppress(ConnectionError):  # a child that just died is told apart below, by its exit
            process.stdin.write(_line({"id": number, "request": request}))
            await process.stdin.drain()
        reading = asyncio.create_task(self._answer(process.stdout, number, request, on_progress))
        exited = asyncio.create_task(self._exited.wait())
        try:
            await asyncio.wait([reading, exited], return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():  # it may have answered before it ended
                await asyncio.wait([reading], timeout=PIPE_GRACE_S)
            if reading.done() and (answer := reading.result()) is not None:
                return answer
            await exited
        finally:
            reading.cancel()
            exited.cancel()
            await asyncio.gather(reading, exited, return_exceptions=True)
        returncode = await _returncode(process)
        # A container's engine tells a signal as a shell does.
        raise _failure_of_exit(128 - returncode if self._kill_argv and returncode > 128 else returncode)  # noqa: PLR2004

    async def _answer(
        self, stdout: asyncio.StreamReader, number: int, request: Request[Reply], on_progress: Progress | None
    ) -> _Answer[Reply, Any] | None:
        """Read up to the answer to call `number`, telling progress on the way; None if the pipe ends before it.

        Raises:
            ChildFailed: the protocol is broken.
        """
        while (answer := await self._next(stdout, type(request))) is not None:
            if (answer.id, answer.pid) != (number, self._serving) or not answer.is_whole:
                raise ChildFailed("crashed", BROKEN_PROTOCOL)
            if answer.progress is None:
                return answer
            if on_progress is not None:
                on_progress(answer.progress)
        return None

    async def _next(self, stdout: asyncio.StreamReader, kind: Any) -> _Answer[Any, Any] | None:
        """Read what the child says next in answer to a request of that kind; None at the end of the pipe."""
        try:
            line = await stdout.readline()
            if line and self._serving is None:
                self._serving = json.loads(line)["serves"]
                line = await stdout.readline()
            # Half a line is of a child that was killed while it wrote: its end says of what.
            return _reader(kind).validate_json(line, strict=True) if line.endswith(b"\n") else None
        except (ValueError, KeyError, TypeError):  # also a line above the limit
            raise ChildFailed("crashed", BROKEN_PROTOCOL) from None

    async def _drain_stderr(self, process: asyncio.subprocess.Process) -> None:
        if process.stderr is None:
            return
        while chunk := await process.stderr.read(8192):
            self._stderr += chunk
            del self._stderr[:-STDERR_TAIL_BYTES]


@dataclass(frozen=True)
class _Error(Message):
    """What the child's function raised: a refusal with its reason and place, or an exception by type and place."""

    unprocessable: str | None = None
    detail: str = ""
    type: str = ""
    where: str = ""


@dataclass(frozen=True)
class _Answer(Message, Generic[Reply, News]):
    """A line that the child writes."""

    id: int
    """The id of the call."""
    pid: int
    """The id of the process that wrote the line, as it names itself."""
    progress: News | None = None
    reply: Reply | None = None
    error: _Error | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the line holds exactly one of the three."""
        return [self.progress, self.reply, self.error].count(None) == 2  # noqa: PLR2004 - of three


@cache
def _reader(asked: Any) -> TypeAdapter[_Answer[Any, Any]]:
    """Return what validates the lines that answer such a request."""
    from pydantic import TypeAdapter  # noqa: PLC0415 - the child's side has the standard library alone

    (reply,) = (get_args(base)[0] for base in asked.__orig_bases__ if get_origin(base) is Request)
    answer: Any = _Answer
    return TypeAdapter(answer[reply, asked.news])


async def _returncode(process: asyncio.subprocess.Process) -> int:
    """Return the code of a process that has ended: asyncio hears of the end a moment after the kernel told us."""
    while process.returncode is None:  # noqa: ASYNC110 - there is no event for it
        await asyncio.sleep(0.001)
    return process.returncode


def _kill_marked(mark: str) -> None:
    """Kill every process of ours that has the mark in the environment it was started with, until there is none.

    A process that forks faster than it is killed is stopped first.
    """
    for number in (signal.SIGSTOP, signal.SIGKILL):
        signalled: set[int] = set()
        while found := _marked(mark) - signalled:
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            signalled |= found


def _marked(mark: str) -> set[int]:
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended, or belongs to another user
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
    return found


def _exit_of(pid: int) -> asyncio.Event:
    """Return an event that is set when the process has ended."""
    exited, loop = asyncio.Event(), asyncio.get_running_loop()
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        exited.set()
        return exited

    def ended() -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        exited.set()

    loop.add_reader(pidfd, ended)
    return exited


def serve(function: Callable[[Asked, Progress], Message], read: Callable[[Json], Asked]) -> None:
    """Run the child's side: answer each call on standard input with what `function(request, progress)` returns.

    `read` makes the request of its JSON. Returns when standard input closes. Exceptions are answered by type and place,
    never by text, which may name a patient.
    """
    limits = become_child()
    pipes = _take_pipes()
    pipes.write({"serves": os.getpid()})
    for line in pipes.requests():
        if limits.get("cpu_s"):
            _, hard = resource.getrlimit(resource.RLIMIT_CPU)
            resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + limits["cpu_s"] + 1, hard))
        call = json.loads(line)
        answer = partial(pipes.answer, call["id"])
        try:
            answer("reply", function(read(call["request"]), partial(answer, "progress")))
        except BaseException as error:  # noqa: BLE001 - whatever it was, the parent must hear of it
            traceback.print_exc()
            answer("error", _error_of(error))


def end_if_forked() -> None:
    """End this process where it is a fork of the one that serves, made by what that called; to be called after that."""
    if _served_by not in {None, os.getpid()}:
        os._exit(0)


_served_by: int | None = None
"""The process that serves, also in its forks."""


class _Pipes:
    """The two ends that the child keeps for itself; a process that it forks has neither."""

    def __init__(self, requests: int, replies: int) -> None:
        self._requests = requests
        self._replies = replies
        self._kept = [requests, replies]

    def requests(self) -> Iterator[bytes]:
        """Yield the lines of the parent."""
        with open(self._requests, "rb", closefd=False) as lines:
            yield from lines

    def answer(self, number: int, kind: str, said: Message) -> None:
        """Say something of call `number`; a fork that comes here ends, for it is not what was asked."""
        end_if_forked()
        self.write({"id": number, "pid": os.getpid(), kind: said})

    def write(self, told: Json) -> None:
        """Write one line."""
        line = memoryview(_line(told))
        while line:
            line = line[os.write(self._replies, line) :]

    def close(self) -> None:
        """Let go of both; once, for a fork of a fork may use the numbers for something of its own."""
        while self._kept:
            os.close(self._kept.pop())


def _take_pipes() -> _Pipes:
    """Take standard input and output away from whatever else runs in this process, or is started by it."""
    global _served_by  # noqa: PLW0603 - a process serves once, and its forks are to know
    _served_by = os.getpid()
    pipes = _Pipes(os.dup(0), os.dup(1))  # neither of which is inherited by a program (PEP 446)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    os.dup2(2, 1)
    os.register_at_fork(after_in_child=pipes.close)
    return pipes


def _plain(value: Any) -> Any:
    """Return the fields of a dataclass, or of a model of pydantic's, that stands in a message."""
    kind: Any = type(value)
    names = _names(kind)
    return value.model_dump(mode="json") if names is None else {name: getattr(value, name) for name in names}


@cache
def _names(kind: Any) -> tuple[str, ...] | None:
    return tuple(field.name for field in fields(kind)) if is_dataclass(kind) else None


_ENCODER = json.JSONEncoder(default=_plain)


def _line(told: Json) -> bytes:
    return _ENCODER.encode(told).encode() + b"\n"


def become_child() -> Json:
    """Take over the limits that the parent set, and end with it; returns the limits."""
    limits: Json = json.loads(os.environ.get("RADQUEUE_CHILD", "{}"))
    die_with_parent()
    # Some supervisors signal every process of a service at a stop; when the child ends is its parent's to decide.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if limits.get("memory_bytes"):
        resource.setrlimit(resource.RLIMIT_AS, (limits["memory_bytes"], limits["memory_bytes"]))
    if limits.get("processes"):
        most = _tasks_of(os.getuid()) + limits["processes"]
        resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
    # Libraries warn with the values they stumble over; nothing of that may reach a log.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    return limits


def _tasks_of(uid: int) -> int:
    """Return how many processes and threads the user has: the limit counts them all, wherever they came from."""
    n = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == uid:
                n += sum(1 for _ in (folder / "task").iterdir())
    return n


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died between the two lines above
        os._exit(1)


def _error_of(error: BaseException) -> _Error:
    if isinstance(error, Unprocessable):
        return _Error(unprocessable=error.reason_code, detail=error.detail)
    return _Error(type=type(error).__name__, where=place_of(error))


def _failure_of_error(error: _Error) -> Exception:
    if error.unprocessable is not None:
        return Unprocessable(error.unprocessable, error.detail)
    if error.type == "MemoryError":
        return ChildFailed("out_of_memory", error.type, error.where)
    return ChildFailed("raised", error.type, error.where)


def _failure_of_exit(returncode: int) -> ChildFailed:
    if returncode == -signal.SIGXCPU:
        return ChildFailed("cpu_limit")
    if returncode < 0:
        return ChildFailed("crashed", signal.Signals(-returncode).name)
    return ChildFailed("crashed", f"exit {returncode}")
