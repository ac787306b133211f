"""A killable child process that answers calls over pipes, one JSON document per line.

Theory of operation. Work that may hang, eat memory, crash or hold the interpreter lock (decoding a file, running a MAP,
training) runs in a child, so that the service beside it keeps extending its messages and can always end the work with
SIGKILL. The parent writes one call per line to the child's standard input; the child answers with any number of
`{"progress": …}` lines and ends with one `{"reply": …}` or `{"error": …}` line. The child keeps the real standard
output for itself and points file descriptor 1 at standard error, so that a library that prints cannot break the
protocol.

A child leads its own process group: killing it takes what it started along. What left the group is found by a mark in
its environment, which every process inherits, and is killed as well. The child asks the kernel to be killed when its
parent dies (PR_SET_PDEATHSIG), so a SIGKILL of the service leaves no orphan computing. Its end is seen by a pidfd, not
by the end of its pipes: what it started may have inherited those.

The child's side also runs in interpreters that are not ours, so this file and what it imports need the standard library
alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import resource
import signal
import sys
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.errors import Unprocessable, place_of

STDERR_TAIL_BYTES = 64 * 1024
LINE_LIMIT_BYTES = 64 * 1024 * 1024
PIPE_GRACE_S = 1.0
"""Seconds to read what is left in a pipe after its writer ended."""
PR_SET_PDEATHSIG = 1
MARK = "RADQUEUE_CHILD_MARK"
"""The variable that a child and all its descendants have in common."""

Json = dict[str, Any]
Progress = Callable[[Json], None]


class ChildFailed(RuntimeError):  # noqa: N818 - it states what became of the call
    """A call brought no reply.

    `reason_code` is one of `deadline` (killed for time), `out_of_memory`, `cpu_limit`, `crashed` (ended by a signal or
    exited) and `raised` (the function raised; `error_type` and `where` name the exception and its place, never its
    text).
    """

    def __init__(self, reason_code: str, error_type: str = "", where: str = "") -> None:
        """State the reason and the place."""
        super().__init__(" ".join(part for part in (reason_code, error_type, where) if part))
        self.reason_code = reason_code
        self.error_type = error_type
        self.where = where


@dataclass(frozen=True, slots=True)
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

    async def call(self, request: Json, *, deadline_s: float, on_progress: Progress | None = None) -> Any:
        """Send `request` and return the reply.

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
            return _value_of(answer)

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
            # All that the child printed is in the pipe, whose end never comes while somebody else holds it open.
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

    async def _exchange(self, process: asyncio.subprocess.Process, request: Json, on_progress: Progress | None) -> Json:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the child was started without pipes")
        with contextlib.suppress(ConnectionError):  # a child that just died is told apart below, by its exit
            process.stdin.write(json.dumps(request).encode() + b"\n")
            await process.stdin.drain()
        reading = asyncio.create_task(_answer_in(process.stdout, on_progress))
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

    async def _drain_stderr(self, process: asyncio.subprocess.Process) -> None:
        if process.stderr is None:
            return
        while chunk := await process.stderr.read(8192):
            self._stderr += chunk
            del self._stderr[:-STDERR_TAIL_BYTES]


async def _answer_in(stdout: asyncio.StreamReader, on_progress: Progress | None) -> Json | None:
    """Read up to the answer, telling progress on the way; None where the pipe ends before it."""
    try:
        while line := await stdout.readline():
            answer: Json = json.loads(line)
            if "progress" not in answer:
                return answer
            if on_progress is not None:
                on_progress(answer["progress"])
    except ValueError:  # half a line, of a child that was killed while it wrote, or one above the limit
        raise ChildFailed("crashed", "protocol") from None
    return None


async def _returncode(process: asyncio.subprocess.Process) -> int:
    """Return it, of a process that has ended: asyncio hears of that a moment after the kernel told us."""
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
        with contextlib.suppress(OSError):  # it ended, or is somebody else's
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


def serve(function: Callable[[Json, Progress], Any]) -> None:
    """Run the child's side: answer each line on standard input with what `function(request, progress)` returns.

    Returns when standard input closes. Exceptions are answered by type and place, never by text, which may name a
    patient.
    """
    limits = become_child()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def write(answer: Json) -> None:
        replies.write(json.dumps(answer) + "\n")
        replies.flush()

    for line in sys.stdin:
        if limits.get("cpu_s"):
            _, hard = resource.getrlimit(resource.RLIMIT_CPU)
            resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + limits["cpu_s"] + 1, hard))
        try:
            write({"reply": function(json.loads(line), lambda progress: write({"progress": progress}))})
        except BaseException as error:  # noqa: BLE001 - whatever it was, the parent must hear of it
            traceback.print_exc()
            write({"error": _error_json(error)})


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


def _error_json(error: BaseException) -> Json:
    if isinstance(error, Unprocessable):
        return {"unprocessable": error.reason_code, "detail": error.detail}
    return {"type": type(error).__name__, "where": place_of(error)}


def _value_of(answer: Json) -> Any:
    if "reply" in answer:
        return answer["reply"]
    error = answer["error"]
    if "unprocessable" in error:
        raise Unprocessable(error["unprocessable"], error["detail"])
    if error["type"] == "MemoryError":
        raise ChildFailed("out_of_memory", error["type"], error["where"])
    raise ChildFailed("raised", error["type"], error["where"])


def _failure_of_exit(returncode: int) -> ChildFailed:
    if returncode == -signal.SIGXCPU:
        return ChildFailed("cpu_limit")
    if returncode < 0:
        return ChildFailed("crashed", signal.Signals(-returncode).name)
    return ChildFailed("crashed", f"exit {returncode}")
