"""`python -m deploy.local --port P --dir D`: AWS on one machine, in one process, on one endpoint.

Prints `ready http://127.0.0.1:PORT` once the whole topology is created and answers, and writes `D/local.env`, the
environment of every client. SIGTERM and SIGINT end it with exit code 0.
"""

import argparse
import errno
import fcntl
import os
import resource
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING

from deploy.local.aws import MotoApplication
from deploy.local.healthimaging import HealthImagingApplication
from deploy.local.healthimaging_imports import ImportJobs
from deploy.local.imagesets import ImageSetStore
from deploy.local.server import Dispatcher, EndpointServer
from deploy.topology import Topology, create

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

MISUSE = 2
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "local", "AWS_SECRET_ACCESS_KEY": "local"}
"""Any key is accepted; a real one must never be needed, or sent, here."""


class Misuse(Exception):  # noqa: N818 - it states what the user asked for and cannot have
    """The request cannot be met; the message says why and what would work."""


def main(argv: list[str] | None = None) -> int:
    """Serve until a signal comes; return the exit code."""
    arguments = _parser().parse_args(argv)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        lock = _own(arguments.dir)
        server = _bind(arguments.port)
    except Misuse as misuse:
        sys.stderr.write(f"local AWS: {misuse}\n")
        return MISUSE
    with lock:
        _serve(server, arguments.dir, Topology.load(), stop)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deploy.local", description="AWS on one machine.")
    parser.add_argument("--port", type=int, default=4566, help="loopback port; 0 takes any free one (default 4566)")
    parser.add_argument("--dir", type=Path, required=True, help="where HealthImaging and local.env are kept")
    return parser


def _own(directory: Path) -> IO[str]:
    """Take the folder for this process, so that no second one writes to the same store."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("w")
    except OSError as error:
        raise Misuse(f"cannot write to the folder {directory}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise Misuse(f"the folder {directory} is in use by another local AWS; choose another --dir") from error
    return lock


def _bind(port: int) -> EndpointServer:
    try:
        return EndpointServer(port)
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise Misuse(f"port {port} is taken by another program; choose another --port, or 0 for any") from error
        raise Misuse(f"cannot listen on port {port}: {error}") from error


def _serve(server: EndpointServer, directory: Path, topology: Topology, stop: threading.Event) -> None:
    _isolate(server)
    store = ImageSetStore(directory / "healthimaging", region=topology.region)
    jobs = ImportJobs(store, endpoint_url=server.url, region=topology.region)
    server.start(
        Dispatcher(
            imaging=HealthImagingApplication(store, jobs),
            dicomweb=_LaterDicomWeb(store),
            moto=MotoApplication(region=topology.region, stopping=server.stopping),
        )
    )
    try:
        datastore_id = create(topology, endpoint_url=server.url)
        _write_environment(directory / "local.env", client_environment(topology, server.url, datastore_id))
        sys.stdout.write(f"ready {server.url}\n")
        sys.stdout.flush()
        stop.wait()
    finally:
        server.stop()
        store.close()


class _LaterDicomWeb:
    """DICOMweb, loaded at its first request: pydicom would be a fifth of the start-up time."""

    def __init__(self, store: ImageSetStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._app: WSGIApplication | None = None

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        with self._lock:
            if self._app is None:
                from deploy.local.dicomweb import DicomWebApplication  # noqa: PLC0415 - what this class is for

                self._app = DicomWebApplication(self._store)
        return self._app(environ, start_response)


def client_environment(topology: Topology, endpoint_url: str, datastore_id: str) -> dict[str, str]:
    """Return the environment that points a client at the endpoint."""
    queues = {f"RADQUEUE_{key.upper()}_QUEUE": queue.name for key, queue in topology.queues.items()}
    return {
        "AWS_ENDPOINT_URL": endpoint_url,
        "AWS_REGION": topology.region,
        "AWS_DEFAULT_REGION": topology.region,
        **CREDENTIALS,
        "RADQUEUE_BUCKET": topology.bucket.name,
        "RADQUEUE_DATASTORE_ID": datastore_id,
        **queues,
    }


def _isolate(server: EndpointServer) -> None:
    """Keep this process to itself: no profile, proxy or real credential of the user's, and room for open files."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        os.environ.pop(name, None)
    os.environ.update(
        CREDENTIALS,
        AWS_CONFIG_FILE=os.devnull,
        AWS_SHARED_CREDENTIALS_FILE=os.devnull,
        AWS_EC2_METADATA_DISABLED="true",
        MOTO_PORT=str(server.server_port),
        NO_PROXY="*",
        no_proxy="*",
    )
    # pydicom's warnings quote values, which may name a patient. Per process, because filters are not per thread.
    warnings.simplefilter("ignore")
    # moto keeps each object above 5 MB as an open temporary file.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _write_environment(path: Path, environment: dict[str, str]) -> None:
    """Write KEY=VALUE lines, whole or not at all: another process may be waiting for the file."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as draft:
        draft.writelines(f"{name}={value}\n" for name, value in environment.items())
    Path(draft.name).replace(path)


if __name__ == "__main__":
    sys.exit(main())
