"""One HTTP/1.1 endpoint for all of AWS: each request goes to the application that serves its service.

Werkzeug's own request handler closes every connection, which costs each SQS and S3 call a new TCP connection and ten
milliseconds. This one keeps connections alive, and for that it must do what a closing server may skip: bound the body
by its declared length, read what the application left of it, and answer `Expect: 100-continue` at once. A thread
serves a connection, so that any number of long polls may wait at the same time.
"""

import contextlib
import io
import re
import socket
import socketserver
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from http.server import HTTPServer
from typing import IO, TYPE_CHECKING, Any, cast
from urllib.parse import unquote

from moto.moto_server.werkzeug_app import MotoRequestHandler
from werkzeug.exceptions import ClientDisconnected
from werkzeug.wsgi import LimitedStream

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

LOOPBACK = "127.0.0.1"
DRAIN_CHUNK_BYTES = 1024 * 1024
STOP_GRACE_S = 5.0
IMAGING_SERVICE = "medical-imaging"
DICOMWEB_PATH = re.compile(r"/datastore/[^/]+/(studies|series|instances)(/|$)")
CREDENTIAL_SCOPE = re.compile(r"Credential=[^/,\s]+/\d{8}/[^/,\s]+/([^/,\s]+)/aws4_request")
"""The SigV4 credential scope: access key / date / region / service / aws4_request."""


class Dispatcher:
    """Send a request to HealthImaging's API, its DICOMweb side, or moto."""

    def __init__(self, *, imaging: "WSGIApplication", dicomweb: "WSGIApplication", moto: "WSGIApplication") -> None:
        """Take the three applications."""
        self._imaging = imaging
        self._dicomweb = dicomweb
        self._moto = moto

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        """Serve one request."""
        path = environ["PATH_INFO"]
        service = signing_service(environ)
        if service in {None, IMAGING_SERVICE} and DICOMWEB_PATH.match(path):
            return self._dicomweb(environ, start_response)
        if service == IMAGING_SERVICE:
            return self._imaging(environ, start_response)
        return self._moto(environ, start_response)


def signing_service(environ: "WSGIEnvironment") -> str | None:
    """Return the service in the credential scope of a request signed by header or query; None if it is unsigned."""
    header = CREDENTIAL_SCOPE.search(environ.get("HTTP_AUTHORIZATION", ""))
    if header:
        return header[1].lower()
    query = CREDENTIAL_SCOPE.search(unquote(environ.get("QUERY_STRING", "")))
    return query[1].lower() if query else None


def _not_started(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
    del environ
    start_response("503 Service Unavailable", [])
    return []


def _no_write(_chunk: bytes) -> None:
    raise NotImplementedError("the applications here return their body")


def _report(error: BaseException) -> None:
    """Say where a bug is, without the error's text: it may quote an upload's key or an attribute."""
    traceback.print_tb(error.__traceback__, file=sys.stderr)
    sys.stderr.write(f"{type(error).__name__}\n")


class EndpointServer(socketserver.ThreadingMixIn, HTTPServer):
    """The listening socket, and the count of requests in progress that an orderly stop waits for."""

    daemon_threads = True
    request_queue_size = 256
    allow_reuse_address = True
    # What the inherited request handler reads.
    ssl_context = None
    multithread = True
    multiprocess = False
    _server_version = "radqueue-local"

    def __init__(self, port: int) -> None:
        """Bind to the loopback interface; `port` 0 takes any free one. Raises OSError where it is taken."""
        self.app: WSGIApplication = _not_started
        self.stopping = threading.Event()
        self._busy = 0
        self._idle = threading.Condition()
        super().__init__((LOOPBACK, port), _RequestHandler)

    @property
    def url(self) -> str:
        """Return the endpoint's URL."""
        return f"http://{LOOPBACK}:{self.server_address[1]}"

    def server_bind(self) -> None:
        """Bind without HTTPServer's reverse name lookup, which may ask the network."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = LOOPBACK, self.server_address[1]

    def start(self, app: "WSGIApplication") -> None:
        """Serve in a background thread."""
        self.app = app
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()

    def stop(self) -> None:
        """Take no more connections and let the requests in progress end, for as long as the grace period."""
        self.stopping.set()
        self.shutdown()
        self.server_close()
        with self._idle:
            self._idle.wait_for(lambda: self._busy == 0, timeout=STOP_GRACE_S)

    @contextlib.contextmanager
    def in_progress(self) -> Iterator[None]:
        """Count one request."""
        with self._idle:
            self._busy += 1
        try:
            yield
        finally:
            with self._idle:
                self._busy -= 1
                self._idle.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Drop a broken connection without a word: a client that goes away is no error of the server's."""
        del request, client_address
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, ConnectionError | TimeoutError):
            _report(error)


class _RequestHandler(MotoRequestHandler):
    """Serve the requests of one connection, one after the other."""

    protocol_version = "HTTP/1.1"
    # Headers and body leave together; Nagle's algorithm with delayed acknowledgement would add 40 ms to each answer.
    wbufsize = 64 * 1024
    disable_nagle_algorithm = True

    def handle_expect_100(self) -> bool:
        """Tell the client to send its body: it is waiting, so the answer must not stay in the buffer."""
        self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.wfile.flush()
        return True

    def run_wsgi(self) -> None:
        """Serve one request."""
        server = cast("EndpointServer", self.server)
        with server.in_progress():
            self.environ = environ = self.make_environ()
            length = self.headers.get("Content-Length") or "0"
            if not length.isdigit():
                self.send_error(HTTPStatus.BAD_REQUEST)
                self.close_connection = True
                return
            # A chunked body is bounded already. A body that ends early is a client that went away: it raises, so no
            # truncated object is ever stored.
            if not environ.get("wsgi.input_terminated"):
                environ["wsgi.input"] = (
                    LimitedStream(cast("IO[bytes]", self.rfile), int(length)) if int(length) else io.BytesIO()
                )
                environ["wsgi.input_terminated"] = True
            body = environ["wsgi.input"]
            try:
                self._answer(environ)
                while body.read(DRAIN_CHUNK_BYTES):
                    pass
                self.wfile.flush()
            except (ClientDisconnected, ConnectionError, TimeoutError):
                self.close_connection = True
        if server.stopping.is_set():
            self.close_connection = True

    def _answer(self, environ: "WSGIEnvironment") -> None:
        status, headers = "", list[tuple[str, str]]()

        def start_response(
            new_status: str, new_headers: list[tuple[str, str]], _exc_info: Any = None, /
        ) -> Callable[[bytes], object]:
            nonlocal status, headers
            status, headers = new_status, new_headers
            return _no_write

        try:
            chunks = cast("EndpointServer", self.server).app(environ, start_response)
        except (ClientDisconnected, ConnectionError, TimeoutError):
            raise
        except Exception as error:  # noqa: BLE001 - the server's border: the client gets a 500, the terminal the place
            _report(error)
            status, headers = "500 Internal Server Error", [("Content-Type", "text/plain")]
            chunks = [b"internal error of the local AWS\n"]
        try:
            self._send(int(status.split(" ", 1)[0]), headers, chunks)
        finally:
            if hasattr(chunks, "close"):
                chunks.close()

    def _send(self, status: int, headers: list[tuple[str, str]], chunks: Iterable[bytes]) -> None:
        names = {name.lower() for name, _ in headers}
        bodiless = self.command == "HEAD" or status in {HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED}
        if not bodiless and "content-length" not in names:
            whole = b"".join(chunks)
            headers = [*headers, ("Content-Length", str(len(whole)))]
            chunks = [whole]
        self.send_response_only(status)
        if "date" not in names:
            self.send_header("Date", self.date_time_string())
        for name, value in headers:
            if name.lower() != "connection":
                self.send_header(name, value)
        self.end_headers()
        for chunk in () if bodiless else chunks:
            self.wfile.write(chunk)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Log nothing: a request's path may hold the name of an upload."""

    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002 - the name is the base class's
        """Log nothing, as above."""


def client_is_gone(environ: "WSGIEnvironment") -> bool:
    """Tell whether the client closed the connection that waits for this answer."""
    connection: socket.socket = environ["werkzeug.socket"]
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
