"""Between one service process and AWS: it numbers the service's calls, and kills the service at one of them.

A boundary is `NAME:before:N`, `NAME:during:N` or `NAME:after:N` for the N-th call of that name: before it is forwarded,
when half of its body was, and when its answer is here and was not passed on. Nothing is forwarded after the kill. Names
hold no UID, no hash and nothing of the scenario, so that they are the same in every run.
"""

import contextlib
import json
import os
import re
import signal
import zlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

LARGEST_BODY_BYTES = 1 << 30
HOP_BY_HOP = {"connection", "expect", "host", "keep-alive", "transfer-encoding"}
NAMELESS = re.compile(r"[0-9]{10,}(?=/|$)|[0-9a-f.-]{12,}(?=[./@]|$)")
"""Times, hashes, UUIDs and UIDs."""


class Killed(ConnectionError):  # noqa: N818 - it states a fact
    """The service is dead."""


@dataclass(eq=False)
class Proxy:
    """The way to AWS of one service process."""

    upstream: str
    kill_at: str | None = None
    url: str = ""
    pid: int = 0
    """Whom to kill."""
    passed: Counter[str] = field(default_factory=Counter)
    places: list[str] = field(default_factory=list)
    """The boundaries that it came to."""
    handles: set[str] = field(default_factory=set)
    """Receipt handles that the service was given."""
    dead: bool = False
    children: list[int] = field(default_factory=list)
    """Process file descriptors of those that it had when it was killed."""

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Listen on a free port. A client that goes away takes its calls along: no poll outlives who asked for it."""
        app = web.Application(client_max_size=LARGEST_BODY_BYTES)
        app.router.add_route("*", "/{path:.*}", self._pass, expect_handler=_go_on)
        runner = web.AppRunner(app, handler_cancellation=True, auto_decompress=False, access_log=None)
        await runner.setup()
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(auto_decompress=False, timeout=timeout) as self._session:
            try:
                await web.TCPSite(runner, "127.0.0.1", 0).start()
                self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
                yield
            finally:
                await runner.cleanup()
                for child in self.children:
                    os.close(child)

    async def _pass(self, request: web.Request) -> web.Response:
        body = await request.read()
        name = name_of(request, body)
        self.passed[name] += 1
        number = self.passed[name]
        try:
            self._at(f"{name}:before:{number}")
            data: Any = self._halves(f"{name}:during:{number}", body) if body and is_upload(request) else body
            response, answer = await self._forward(request, data, len(body))
            self._remember_handles(request, answer)
            self._at(f"{name}:after:{number}")
        except Killed:
            return web.Response(status=503)  # to nobody
        headers = [pair for pair in response.headers.items() if pair[0].lower() not in HOP_BY_HOP]
        return web.Response(status=response.status, headers=headers, body=answer)

    async def _forward(self, request: web.Request, data: Any, size: int) -> tuple[aiohttp.ClientResponse, bytes]:
        headers = [pair for pair in request.headers.items() if pair[0].lower() not in {*HOP_BY_HOP, "content-length"}]
        url = URL(self.upstream + request.raw_path, encoded=True)
        asked = self._session.request(
            request.method, url, headers=[*headers, ("Content-Length", str(size))], data=data, allow_redirects=False
        )
        try:
            async with asked as response:
                return response, await response.read()
        except aiohttp.ClientError:
            if self.dead:
                raise Killed from None
            raise

    async def _halves(self, place: str, body: bytes) -> AsyncIterator[bytes]:
        yield body[: len(body) // 2]
        self._at(place)
        yield body[len(body) // 2 :]

    def _remember_handles(self, request: web.Request, answer: bytes) -> None:
        if request.headers.get("X-Amz-Target") == "AmazonSQS.ReceiveMessage":
            messages = json.loads(answer).get("Messages", [])
            self.handles |= {message["ReceiptHandle"] for message in messages}

    def _at(self, place: str) -> None:
        """Pass a boundary. Raises `Killed` if the service dies here, or did before."""
        if self.dead:
            raise Killed
        self.places.append(place)
        if place == self.kill_at:
            self.dead = True
            self._kill()
            raise Killed

    def _kill(self) -> None:
        """Kill the service with all that it started, or, at every other place, alone."""
        alone = zlib.crc32((self.kill_at or "").encode()) % 2
        for child in descendants(self.pid):
            with contextlib.suppress(ProcessLookupError):  # it ended just now
                self.children.append(os.pidfd_open(child))
                if not alone:
                    os.kill(child, signal.SIGKILL)
        os.kill(self.pid, signal.SIGKILL)


async def _go_on(request: web.Request) -> None:
    """Ask for the body of a client that waits to be asked, unless it died meanwhile."""
    with contextlib.suppress(ConnectionError):
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def name_of(request: web.Request, body: bytes) -> str:
    """Return `OPERATION QUEUE` for SQS, `OPERATION` for CloudWatch, else `METHOD PATH`, or the prefix of a listing."""
    service, _, operation = request.headers.get("X-Amz-Target", "").partition(".")
    if service == "AmazonSQS":
        asked = json.loads(body)
        queue = asked.get("QueueUrl") or asked["QueueName"]
        return f"{operation} {queue.rpartition('/')[2].partition('-')[2]}"
    if operation:
        return operation
    path = request.path.partition("/")[2].partition("/")[2]  # without the bucket
    return NAMELESS.sub("*", f"{request.method} {path}{request.query.get('prefix', '')}")


def is_upload(request: web.Request) -> bool:
    """Tell whether it stores its body: an object of S3, or instances."""
    return request.method == "PUT" or request.path.endswith("/studies")


def descendants(pid: int) -> list[int]:
    """Return the processes that a process started, and those that they did."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]
