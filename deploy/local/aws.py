"""moto's services as one application, made safe for concurrent clients.

Theory of operation. moto's backends are plain dictionaries and lists: a conditional put looks first and writes
afterwards, a receive walks a list that a send appends to. Two threads in them at once break the very promises that the
services rely on (one winner of `If-None-Match: *`, one receiver of a message), so one lock is held around every call.
The lock must be held briefly: a request's body is read before it and its answer is sent after it, and a long poll,
which in moto would wait up to 20 s inside, is turned into an immediate receive that is made only once a look at the
queue has found a message. Step Functions stays outside the lock: its executions call the other services.
"""

import io
import json
import re
import threading
import time
from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

from deploy.local import moto_fixes
from deploy.local.server import client_is_gone, signing_service

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

POLL_INTERVAL_S = 0.05
MAX_WAIT_S = 20
"""SQS allows no longer poll."""
TARGET = "HTTP_X_AMZ_TARGET"
"""The operation of AWS's JSON protocols."""
RECEIVE_TARGET = "AmazonSQS.ReceiveMessage"
CALLS_OTHER_SERVICES = {"states"}
BACKENDS: dict[str, Any] = {
    "ecr": "ecr",
    "iam": "iam",
    "monitoring": "cloudwatch",
    "s3": "s3",
    "sqs": "sqs",
    "ssm": "ssm",
    "states": "stepfunctions",
    "sts": "sts",
}
"""moto's backend for each signing name: its own dispatcher looks through 180 folders of the disk on every request."""
S3_CONTROL = "/v20180820/"


class MotoApplication:
    """Serve every service that moto has."""

    def __init__(self, *, region: str, stopping: threading.Event) -> None:
        """`region` is the one that the queues are in; `stopping` ends all long polls."""
        moto_fixes.apply()
        self._dispatcher: WSGIApplication = DomainDispatcherApplication(create_backend_app)
        self._backends: dict[str, WSGIApplication] = {}
        self._region = region
        self._stopping = stopping
        self._lock = threading.Lock()

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        """Serve one request."""
        body = environ["wsgi.input"].read()
        environ.pop("HTTP_TRANSFER_ENCODING", None)
        service = signing_service(environ)
        if service == "sqs":
            body = self._await_message(environ, body)
        environ["CONTENT_LENGTH"] = str(len(body))
        environ["wsgi.input"] = io.BytesIO(body)
        with self._lock:
            app = self._app(service, environ)
        try:
            with nullcontext() if service in CALLS_OTHER_SERVICES else self._lock:
                return list(app(environ, start_response))
        except NotImplementedError:
            if TARGET not in environ:
                raise
            return _invalid_action(environ[TARGET], start_response)

    def _app(self, service: str | None, environ: "WSGIEnvironment") -> "WSGIApplication":
        """Return what serves a request: the backend, made at its first request, or moto's own search for it."""
        name = BACKENDS.get(service or "")
        if name is None or environ["PATH_INFO"].startswith(S3_CONTROL):
            return self._dispatcher
        if name not in self._backends:
            self._backends[name] = create_backend_app(name)
        return self._backends[name]

    def _await_message(self, environ: "WSGIEnvironment", body: bytes) -> bytes:
        """Wait as long as a ReceiveMessage asks for; return the request with its wait taken out.

        Between the look and the receive another client may take the message: then the answer is empty before its time,
        which SQS's own contract allows. A client that went away receives nothing: a message given to nobody would stay
        hidden for its whole visibility timeout. Raises ConnectionAbortedError for it.
        """
        receive = _Receive.parse(environ, body)
        if receive is None:
            return body
        with self._lock:
            queue = _queue(receive.queue_name, self._region)
        wait_s = receive.wait_s
        if queue is not None and wait_s is None:
            wait_s = int(queue.receive_message_wait_time_seconds)
        # What moto refuses (an unknown queue, a wait out of range) it is left to refuse.
        if queue is None or wait_s is None or not 0 <= wait_s <= MAX_WAIT_S:
            return body
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            if client_is_gone(environ):
                raise ConnectionAbortedError("the client of a long poll went away")
            with self._lock:
                # A generator over moto's list, not its `messages` property: the first visible message is enough.
                if any(message.visible and not message.delayed for message in queue._messages):  # noqa: SLF001
                    break
            if self._stopping.wait(POLL_INTERVAL_S):
                break
        return receive.without_wait


def _invalid_action(target: str, start_response: "StartResponse") -> Iterable[bytes]:
    """Say that moto lacks an operation of a JSON protocol, by a code of AWS's; a server error would be tried again."""
    told = {"__type": "InvalidAction", "message": f"{target} is not implemented by the local AWS"}
    start_response("400 Bad Request", [("Content-Type", "application/x-amz-json-1.0")])
    return [json.dumps(told).encode()]


def _queue(name: str, region: str) -> Any:
    from moto.sqs.models import sqs_backends  # noqa: PLC0415 - a service's backend is loaded at its first request

    return sqs_backends[DEFAULT_ACCOUNT_ID][region].queues.get(name)


class _Receive:
    """A ReceiveMessage in either of SQS's protocols, JSON or query."""

    def __init__(self, queue_name: str, wait_s: int | None, without_wait: bytes) -> None:
        self.queue_name = queue_name
        self.wait_s = wait_s
        self.without_wait = without_wait

    @classmethod
    def parse(cls, environ: "WSGIEnvironment", body: bytes) -> "_Receive | None":
        if environ.get(TARGET) == RECEIVE_TARGET:
            try:
                request = json.loads(body)
                wait_s = request.get("WaitTimeSeconds")
                without_wait = json.dumps({**request, "WaitTimeSeconds": 0}).encode()
                return cls(_last_segment(request["QueueUrl"]), None if wait_s is None else int(wait_s), without_wait)
            except (ValueError, KeyError, AttributeError, TypeError):
                return None
        if b"Action=ReceiveMessage" not in body:
            return None
        form = {name: values[0] for name, values in parse_qs(body.decode("utf-8", "replace")).items()}
        wait = form.get("WaitTimeSeconds", "")
        without_wait = re.sub(rb"&?WaitTimeSeconds=[^&]*", b"", body) + b"&WaitTimeSeconds=0"
        queue_name = _last_segment(form.get("QueueUrl") or environ["PATH_INFO"])
        return cls(queue_name, int(wait) if wait.isdigit() else None, without_wait)


def _last_segment(url: str) -> str:
    return urlsplit(url).path.rpartition("/")[2]
