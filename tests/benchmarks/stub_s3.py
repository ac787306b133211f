"""An S3 for benches: `python -m tests.benchmarks.stub_s3 FOLDER LATENCY_S` says `ready URL`.

It keeps objects as files, answers each call after a latency, and knows what ingest calls: GET, HEAD, PUT (with
`If-None-Match`), uploads in parts that come in order, and ListObjectsV2, of one bucket, without signatures. So what a
client waits for is the latency and itself.
"""

import asyncio
import bisect
import hashlib
import sys
import uuid
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from urllib.parse import quote
from xml.sax.saxutils import escape

from aiohttp import web

PAGE = 1_000
CHUNK_BYTES = 1024 * 1024


class Bucket:
    """Objects by key, and the keys in order."""

    def __init__(self, folder: Path, latency_s: float) -> None:
        """Begin with none."""
        self._folder, self._latency_s = folder, latency_s
        self._stored: dict[str, tuple[Path, int, str, datetime]] = {}
        self._keys: list[str] = []
        self._parts: dict[str, Path] = {}

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer one call."""
        await asyncio.sleep(self._latency_s)
        _, _, key = request.path.lstrip("/").partition("/")
        if not key:
            return self._list(request) if "list-type" in request.query else web.Response()
        if request.method in {"PUT", "POST"}:
            return await (self._put(key, request) if request.method == "PUT" else self._post(key, request))
        if key not in self._stored:
            return web.Response(status=404, text="<Error><Code>NoSuchKey</Code></Error>")
        return self._told(key, request.method)

    def _told(self, key: str, method: str) -> web.StreamResponse:
        path, size, etag, modified = self._stored[key]
        headers = {"ETag": etag, "Last-Modified": format_datetime(modified, usegmt=True)}
        if method == "HEAD":
            return web.Response(headers=headers | {"Content-Length": str(size)})
        if size <= CHUNK_BYTES:
            return web.Response(body=path.read_bytes(), headers=headers)
        return web.FileResponse(path, chunk_size=CHUNK_BYTES, headers=headers)

    async def _put(self, key: str, request: web.Request) -> web.Response:
        if key in self._stored and request.headers.get("If-None-Match") == "*":
            return web.Response(status=412, text="<Error><Code>PreconditionFailed</Code></Error>")
        digest = hashlib.md5(usedforsecurity=False)
        path = self._parts[request.query["uploadId"]] if "uploadId" in request.query else self._new_file()
        with path.open("ab") as file:
            async for chunk in request.content.iter_chunked(CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
        etag = f'"{digest.hexdigest()}"'
        if "uploadId" not in request.query:
            self._store(key, path, etag)
        return web.Response(headers={"ETag": etag})

    async def _post(self, key: str, request: web.Request) -> web.Response:
        """Begin an upload in parts, or end it."""
        upload_id = request.query.get("uploadId")
        if upload_id is None:
            path = self._new_file()
            self._parts[path.name] = path
            told = f"<InitiateMultipartUploadResult><UploadId>{path.name}</UploadId></InitiateMultipartUploadResult>"
        else:
            self._store(key, self._parts.pop(upload_id), f'"{upload_id}-1"')
            told = f'<CompleteMultipartUploadResult><ETag>"{upload_id}-1"</ETag></CompleteMultipartUploadResult>'
        return web.Response(text=told, content_type="application/xml")

    def _new_file(self) -> Path:
        return self._folder / uuid.uuid4().hex

    def _store(self, key: str, path: Path, etag: str) -> None:
        if key not in self._stored:
            bisect.insort(self._keys, key)
        self._stored[key] = path, path.stat().st_size, etag, datetime.now(UTC)

    def _list(self, request: web.Request) -> web.Response:
        prefix = request.query.get("prefix", "")
        first = bisect.bisect_left(self._keys, request.query.get("continuation-token", prefix))
        found = [key for key in self._keys[first : first + PAGE + 1] if key.startswith(prefix)]
        lines = []
        for key in found[:PAGE]:
            _, size, etag, modified = self._stored[key]
            times = f"<LastModified>{modified:%Y-%m-%dT%H:%M:%S.000Z}</LastModified>"
            lines.append(
                f"<Contents><Key>{quote(key)}</Key><Size>{size}</Size><ETag>{escape(etag)}</ETag>{times}</Contents>"
            )
        more = "true" if len(found) > PAGE else "false"
        token = f"<NextContinuationToken>{escape(found[PAGE])}</NextContinuationToken>" if len(found) > PAGE else ""
        told = f"<IsTruncated>{more}</IsTruncated>{token}<EncodingType>url</EncodingType>{''.join(lines)}"
        return web.Response(text=f"<ListBucketResult>{told}</ListBucketResult>", content_type="application/xml")


async def serve(folder: Path, latency_s: float) -> None:
    """Answer until the process ends."""
    app = web.Application(client_max_size=2**40)
    app.router.add_route("*", "/{path:.*}", Bucket(folder, latency_s).answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    print(f"ready http://127.0.0.1:{port}", flush=True)  # noqa: T201 - told to whoever started it
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), float(sys.argv[2])))
