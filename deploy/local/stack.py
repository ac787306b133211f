"""The whole of radqueue on this machine: the local AWS and the four services, each a process, kept running.

Theory of operation. One thread starts every process, looks at them ten times a second, starts again what died, and ends
them all; it lives as long as they do, because the kernel kills a leashed process when the *thread* that started it
ends. So nothing is left running when this process is killed, not even by SIGKILL. Each process leads a session of its
own: the terminal's ^C reaches this process alone, which then ends the others in order, the services before their AWS.

Standard output and standard error of a process go to `logs/<name>.log`, and what it says there tells that it is ready.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Self

LEASH = files("deploy.local") / "leash.py"
SERVICES = ("ingest", "inference", "trainer", "reporter")
AWS = "aws"
"""The name of the local AWS among the processes."""

TICK_S = 0.1
READY_TIMEOUT_S = 180.0
TOLD_EVERY_S = 15.0
"""A cold disk reads 2 GB of libraries before the first service consumes."""
QUICK_DEATH_S = 10.0
QUICK_DEATHS = 5
"""So many deaths in a row, each within QUICK_DEATH_S of the start or before it was ready, end everything."""
FIRST_PAUSE_S = 0.5
AWS_STOP_S = 10.0
EXIT_MISCONFIGURED = 2
TAIL_LINES = 12

ONE_MACHINE = {
    "RADQUEUE_POLL_S": "2",
    "RADQUEUE_QUIET_S": "3",
    "RADQUEUE_VISIBILITY_S": "30",
    "RADQUEUE_GRACE_S": "10",
    "RADQUEUE_LEASE_S": "10",
    # As many threads as cores make each training step several times slower where anything else computes, too.
    "RADQUEUE_THREADS": str(max(1, (os.cpu_count() or 1) // 2)),
    "RADQUEUE_METRICS_FLUSH_S": "5",
}
"""Settings of the services that suit one person at one machine; the user's own environment wins over them."""
PATH_SETTINGS = ("_FILE", "_DIR", "_URI")
"""How the names of settings end that may be paths; an address, s3://…, is none."""

Say = Callable[[str], None]


class StackFailed(Exception):  # noqa: N818 - it states what became of it
    """radqueue does not run here; the text says why, for people."""


class StackMisconfigured(StackFailed):
    """A service cannot use its settings, or what they name; the text holds all that it says of them."""


@dataclass(slots=True)
class _Process:
    """One process: how it is started, and how it fares."""

    name: str
    argv: tuple[str, ...]
    says_ready: bytes
    log: Path
    environ: Mapping[str, str] = field(default_factory=dict)
    running: "subprocess.Popen[bytes] | None" = None
    log_start: int = 0
    started: float = 0.0
    ready: bool = False
    quick_deaths: int = 0
    start_at: float = 0.0
    """When it is started again, in monotonic seconds."""

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.log_start = log.tell()
            self.running = subprocess.Popen(
                [sys.executable, "-I", "-S", str(LEASH), str(os.getpid()), *self.argv],
                cwd=self.log.parent,  # where nothing lies that could be imported instead of ours
                env=dict(self.environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started, self.ready = time.monotonic(), False

    def look(self) -> int | None:
        """Note whether it is ready; return its exit code if it has ended."""
        if self.running is None:
            return None
        self.ready = self.ready or self.says_ready in self.said()
        return self.running.poll()

    def said(self) -> bytes:
        """What it printed since its start."""
        with self.log.open("rb") as log:
            log.seek(self.log_start)
            return log.read()

    def last_words(self) -> str:
        """Return the last lines that it printed, plain text rather than log events where there is both."""
        lines = self.said().decode(errors="replace").splitlines()
        plain = [line for line in lines if line.strip() and not line.startswith("{")]
        return "\n".join((plain or lines)[-TAIL_LINES:])

    def complaints(self) -> str:
        """Return what it says of its settings: each line begins with who says it."""
        said = (line.partition(f"radqueue {self.name}: ") for line in self.said().decode(errors="replace").splitlines())
        return "\n".join(f"  {line}" for before, found, line in said if found and not before) or self.last_words()

    def signal(self, number: signal.Signals) -> None:
        if self.running is not None and self.running.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.running.pid, number)

    def wait(self, until: float) -> None:
        """Wait for its end until `until`, in monotonic seconds, then kill it."""
        if self.running is None:
            return
        try:
            self.running.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            self.running.wait()


class Stack:
    """radqueue, running. A context manager: entering returns when every process is ready, leaving ends them all."""

    def __init__(
        self,
        directory: Path,
        *,
        port: int = 0,
        services: Sequence[str] = SERVICES,
        environ: Mapping[str, str] | None = None,
        say: Say = lambda _: None,
    ) -> None:
        """Prepare, and start nothing.

        Args:
            directory: where local.env, run.json, the logs and HealthImaging's data are kept; made if it is not there.
            port: of the local AWS; 0 takes any free one.
            services: which of them to run.
            environ: instead of this process's own environment; its RADQUEUE_ variables are settings of the services.
            say: is told what happens, in sentences for people.
        """
        self.directory = directory.absolute()
        self.logs = self.directory / "logs"
        self.env: dict[str, str] = {}
        """What a client needs in its environment, once the local AWS is ready; as in local.env."""
        self._failed: StackFailed | None = None
        self._port, self._services, self._say = port, tuple(services), say
        self._environ = dict(os.environ if environ is None else environ)
        self._processes: dict[str, _Process] = {}
        self._ready, self._ended, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Start, and wait until everything is ready. Raises `StackFailed`."""
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End everything."""
        self.stop()

    @property
    def endpoint_url(self) -> str:
        """Where the local AWS listens."""
        return self.env["AWS_ENDPOINT_URL"]

    @property
    def pids(self) -> dict[str, int]:
        """The running processes by name: `aws` and the services. A process that was started again has a new pid."""
        alive = ((name, process.running) for name, process in self._processes.items())
        return {name: running.pid for name, running in alive if running is not None and running.poll() is None}

    @property
    def failure(self) -> str | None:
        """Why it has ended by itself, if it has."""
        return str(self._failed) if self._failed is not None else None

    @property
    def client_environ(self) -> dict[str, str]:
        """The whole environment of a process that is to use this AWS and nothing of the user's."""
        return _without_aws(self._environ) | self.env

    def start(self) -> None:
        """Begin to start the processes."""
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StackFailed(f"cannot write to the folder {self.directory}: {error.strerror}") from None
        self._thread = threading.Thread(target=self._supervise, name="supervisor", daemon=True)
        self._thread.start()

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Wait until every process is ready. Raises `StackFailed`."""
        until, told = time.monotonic() + timeout_s, time.monotonic()
        while not self._ready.wait(TICK_S):
            self.check()
            if self._ended.is_set():
                raise StackFailed("stopped before it was ready")
            late = ", ".join(process.name for process in self._processes.values() if not process.ready)
            if time.monotonic() > until:
                raise StackFailed(f"not ready after {timeout_s:.0f} s: {late}; see {self.logs}")
            if time.monotonic() > told + TOLD_EVERY_S:
                told = time.monotonic()
                self._say(f"still starting: {late}")

    def check(self) -> None:
        """Raise `StackFailed` if it has ended by itself."""
        if self._failed is not None:
            raise self._failed

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end, at most `timeout_s`; tells whether it ended."""
        return self._ended.wait(timeout_s)

    def wait_end(self) -> None:
        """Wait for its end, however long; signals are handled meanwhile."""
        while not self._ended.wait(1.0):
            pass

    def stop(self) -> None:
        """End every process: the services, which get their grace, then the local AWS."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def kill(self) -> None:
        """End every process without its grace; made for a second ^C while `stop` waits."""
        for process in list(self._processes.values()):
            process.signal(signal.SIGKILL)

    # What the supervising thread does.

    def _supervise(self) -> None:
        try:
            self._start_aws()
            self._start_services()
            while not self._stop.wait(TICK_S):
                self._tick()
        except StackFailed as failed:
            self._failed = failed
        except OSError as error:
            self._failed = StackFailed(f"cannot run in {self.directory}: {error.strerror}")
        finally:
            try:
                self._shut_down()
            finally:
                self._ended.set()

    def _start_aws(self) -> None:
        local_env = self.directory / "local.env"
        argv = (sys.executable, "-m", "deploy.local", "--port", str(self._port), "--dir", str(self.directory))
        aws = _Process(AWS, argv, b"ready http", self.logs / "aws.log", _without_aws(self._environ))
        self._processes[AWS] = aws
        self._note("starting", process=AWS)
        aws.start()
        while not aws.ready and not self._stop.wait(TICK_S):
            code = aws.look()
            if code is not None:
                raise StackFailed(f"the local AWS did not start (exit code {code})\n{aws.last_words()}")
        if aws.ready:
            self.env = read_env(local_env)
            self._say(f"local AWS on {self.endpoint_url}")

    def _start_services(self) -> None:
        if self._stop.is_set():
            return
        tuned = ONE_MACHINE | {"RADQUEUE_WORK_DIR": str(self.directory / "work")}
        environ = tuned | self.client_environ | _user_paths(self._environ) | {"PYTHONUNBUFFERED": "1"}
        for name in self._services:
            argv = (sys.executable, "-m", f"services.{name}")
            service = _Process(name, argv, b"queue.consuming", self.logs / f"{name}.log", environ)
            self._processes[name] = service
            service.start()
            self._note("started", process=name, pid=service.running.pid if service.running else None)
        self._write_run()

    def _tick(self) -> None:
        code = self._processes[AWS].look()
        if code is not None:
            raise StackFailed(
                f"the local AWS died (exit code {code}). Its buckets and queues were in memory and are gone, "
                f"so everything ends here; see {self._processes[AWS].log}\n{self._processes[AWS].last_words()}"
            )
        for name in self._services:
            self._look_at(self._processes[name])
        if not self._ready.is_set() and all(process.ready for process in self._processes.values()):
            self._note("ready")
            self._ready.set()

    def _look_at(self, service: _Process) -> None:
        if service.running is None:
            if time.monotonic() >= service.start_at:
                service.start()
                self._note("started", process=service.name, pid=service.running.pid if service.running else None)
                self._write_run()
            return
        code = service.look()
        if code is not None:
            self._after_death(service, code)

    def _after_death(self, service: _Process, code: int) -> None:
        """Decide on a service that has ended: start it again after a pause, or give up."""
        words = service.last_words()
        self._note("died", process=service.name, exit_code=code)
        if code == EXIT_MISCONFIGURED:
            raise StackMisconfigured(f"{service.name} is misconfigured:\n{service.complaints()}")
        quick = not service.ready or time.monotonic() - service.started < QUICK_DEATH_S
        service.quick_deaths = service.quick_deaths + 1 if quick else 0
        if service.quick_deaths >= QUICK_DEATHS:
            raise StackFailed(
                f"{service.name} died {QUICK_DEATHS} times in a row (exit code {code}); see {service.log}\n{words}"
            )
        pause = FIRST_PAUSE_S * 2 ** (service.quick_deaths - 1) if quick else 0.0
        ended = "died" if code else "ended"
        self._say(f"{service.name} {ended} (exit code {code}), starts again in {pause:g} s; see {service.log}")
        service.running, service.ready, service.start_at = None, False, time.monotonic() + pause

    def _shut_down(self) -> None:
        services = [process for name, process in self._processes.items() if name != AWS]
        aws = self._processes.get(AWS)
        # Without their AWS they can neither finish nor hand back what they do.
        polite = aws is not None and aws.running is not None and aws.running.poll() is None
        for service in services:
            service.signal(signal.SIGTERM if polite else signal.SIGKILL)
        until = time.monotonic() + self._grace_s() + 5
        for service in services:
            service.wait(until)
        if aws is not None:
            aws.signal(signal.SIGTERM)
            aws.wait(time.monotonic() + AWS_STOP_S)
        with contextlib.suppress(OSError):
            run = self.directory / "run.json"
            if json.loads(run.read_text())["up"] == os.getpid():  # another stack may have the folder
                run.unlink()
        with contextlib.suppress(OSError):
            self._note("stopped", failure=self.failure)

    def _grace_s(self) -> float:
        try:
            return float(self._environ.get("RADQUEUE_GRACE_S", ONE_MACHINE["RADQUEUE_GRACE_S"]))
        except ValueError:  # the services say so themselves
            return 0.0

    def _write_run(self) -> None:
        """Tell other programs which processes these are: `{"endpoint": …, "up": pid, "aws": pid, "ingest": pid, …}`."""
        draft = self.directory / f"run.json.{os.getpid()}"
        draft.write_text(json.dumps({"endpoint": self.endpoint_url, "up": os.getpid(), **self.pids}, indent=1))
        draft.replace(self.directory / "run.json")

    def _note(self, event: str, **keys: str | int | None) -> None:
        line = {"event": f"up.{event}", **keys, "service": "up", "timestamp": datetime.now(UTC).isoformat()}
        with (self.logs / "up.log").open("a") as log:
            log.write(json.dumps(line) + "\n")


def read_env(path: Path) -> dict[str, str]:
    """Read KEY=VALUE lines; blank lines, comments and `export` are allowed."""
    lines = (line.strip().removeprefix("export ") for line in path.read_text("utf-8").splitlines())
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name.strip(): value.strip().strip("\"'") for name, _, value in pairs}


def _user_paths(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that name files, as absolute paths: the services run in the folder of their logs."""
    named = {name: value for name, value in environ.items() if name.startswith("RADQUEUE_")}
    paths = {name: value for name, value in named.items() if name.endswith(PATH_SETTINGS) and "://" not in value}
    return {name: str(Path(value).absolute()) for name, value in paths.items() if value}


def _without_aws(environ: Mapping[str, str]) -> dict[str, str]:
    """Leave out every AWS setting and proxy of the user's: nothing here may reach a real account."""
    kept = {
        name: value
        for name, value in environ.items()
        if not name.startswith("AWS_") and not name.lower().endswith("_proxy")
    }
    nothing = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    return kept | nothing | {"AWS_EC2_METADATA_DISABLED": "true"}
