"""The one bucket that holds all state, as an asynchronous object store.

IAM: s3:GetObject, s3:PutObject, s3:DeleteObject, s3:ListBucket on the bucket. Conditional writes are plain PutObject.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.aws_errors import AWS_ERRORS, Kind, kind_of, unavailable

if TYPE_CHECKING:
    from types_aiobotocore_s3 import S3Client

CHUNK_BYTES = 1024 * 1024
PART_BYTES = 64 * 1024 * 1024
"""Objects above this size are uploaded in parts of this size (S3 allows 10,000 parts of 5 MiB to 5 GiB)."""
LARGEST_COPY_BYTES = 5 * 1024**3
"""The largest object that one CopyObject takes:
https://docs.aws.amazon.com/AmazonS3/latest/API/API_CopyObject.html"""
COPIED_PART_BYTES = 1024**3
CONTENT_TYPES = {
    ".dcm": "application/dicom",
    ".html": "text/html; charset=utf-8",
    ".json": "application/json",
    ".jsonl": "application/x-ndjson",
    ".png": "image/png",
}


class ObjectMissing(KeyError):  # noqa: N818 - it states a fact about a key
    """No object is stored under the key. The key stays out of the text: an upload's key may hold a name."""

    def __init__(self) -> None:
        """State the fact."""
        super().__init__("no object under this key")


@dataclass(frozen=True, slots=True)
class ObjectSummary:
    """One line of a listing."""

    key: str
    size: int
    last_modified: datetime
    etag: str


class ObjectStore:
    """Reads and writes one bucket. Every method raises `Unavailable` when S3 does not answer."""

    def __init__(self, s3: "S3Client", bucket: str) -> None:
        """Take an open aiobotocore S3 client."""
        self._s3 = self.client = s3
        self.bucket = bucket

    async def get(self, key: str) -> bytes:
        """Return the whole object. Raises `ObjectMissing`."""
        body, _ = await self.get_with_etag(key)
        return body

    async def get_with_etag(self, key: str) -> tuple[bytes, str]:
        """Return the whole object and the ETag that `put_if_match` takes. Raises `ObjectMissing`."""
        with _s3_errors():
            response = await self._s3.get_object(Bucket=self.bucket, Key=key)
            async with response["Body"] as stream:
                return await stream.read(), response["ETag"]

    async def size(self, key: str) -> int:
        """Return the object's size in bytes. Raises `ObjectMissing`."""
        with _s3_errors():
            response = await self._s3.head_object(Bucket=self.bucket, Key=key)
            return response["ContentLength"]

    async def exists(self, key: str) -> bool:
        """Tell whether an object is stored under `key`."""
        try:
            await self.size(key)
        except ObjectMissing:
            return False
        return True

    async def put(self, key: str, body: bytes) -> str:
        """Store `body`, replacing what was there; returns the ETag."""
        with _s3_errors():
            return await self._put(key, body)

    async def put_if_absent(self, key: str, body: bytes) -> bool:
        """Store `body` only if the key is free (`If-None-Match: *`); tells whether it was."""
        return await self._put_if(key, body, {"IfNoneMatch": "*"}) is not None

    async def put_if_match(self, key: str, body: bytes, etag: str) -> str | None:
        """Replace the object only if it still has `etag` (`If-Match`); returns the new ETag, or None."""
        return await self._put_if(key, body, {"IfMatch": etag})

    async def _put_if(self, key: str, body: bytes, condition: dict[str, Any]) -> str | None:
        try:
            return await self._put(key, body, **condition)
        except AWS_ERRORS as error:
            # An If-Match on a key that is gone finds it missing.
            if kind_of(error) in {Kind.PRECONDITION_FAILED, Kind.MISSING}:
                return None
            raise unavailable("S3", error) from None

    async def _put(self, key: str, body: bytes, media_type: str | None = None, **condition: Any) -> str:
        kind = media_type or _media_type(key)
        stored = await self._s3.put_object(Bucket=self.bucket, Key=key, Body=body, ContentType=kind, **condition)
        return stored["ETag"]

    async def list(self, prefix: str) -> AsyncIterator[ObjectSummary]:
        """Yield every object whose key starts with `prefix`, in key order."""
        with _s3_errors():
            pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
            async for page in pages:
                for item in page.get("Contents", []):
                    yield ObjectSummary(item["Key"], item["Size"], item["LastModified"], item["ETag"])

    async def delete(self, key: str) -> None:
        """Remove the object; a key that is free already is fine."""
        with _s3_errors():
            await self._s3.delete_object(Bucket=self.bucket, Key=key)

    async def copy(self, key: str, to: str) -> None:
        """Copy an object inside the bucket; above 5 GiB in parts. Raises `ObjectMissing`."""
        size = await self.size(key)
        source: Any = {"Bucket": self.bucket, "Key": key}
        with _s3_errors():
            if size <= LARGEST_COPY_BYTES:
                await self._s3.copy_object(Bucket=self.bucket, Key=to, CopySource=source)
                return
            async with self._multipart(to, _media_type(to)) as (where, parts):
                for number, start in enumerate(range(0, size, COPIED_PART_BYTES), 1):
                    span = f"bytes={start}-{min(start + COPIED_PART_BYTES, size) - 1}"
                    part = await self._s3.upload_part_copy(
                        **where, CopySource=source, CopySourceRange=span, PartNumber=number
                    )
                    parts.append({"PartNumber": number, "ETag": part["CopyPartResult"]["ETag"]})

    async def download(self, key: str, path: Path) -> None:
        """Stream the object into the file `path`, in chunks of 1 MiB. Raises `ObjectMissing`."""
        with _s3_errors():
            response = await self._s3.get_object(Bucket=self.bucket, Key=key)
            async with response["Body"] as stream:
                with path.open("wb") as file:
                    while chunk := await stream.read(CHUNK_BYTES):
                        await asyncio.to_thread(file.write, chunk)

    async def sha256(self, key: str) -> str:
        """Return the hash of the whole object in hex, read in chunks of 1 MiB. Raises `ObjectMissing`."""
        digest = hashlib.sha256()
        with _s3_errors():
            response = await self._s3.get_object(Bucket=self.bucket, Key=key)
            async with response["Body"] as stream:
                while chunk := await stream.read(CHUNK_BYTES):
                    await asyncio.to_thread(digest.update, chunk)
        return digest.hexdigest()

    async def upload(self, path: Path, key: str, *, media_type: str | None = None) -> None:
        """Stream the file `path` into the object; above 64 MiB in parts, so that memory stays bounded.

        Without a `media_type` the key's suffix tells the object's Content-Type.
        """
        if path.stat().st_size <= PART_BYTES:
            body = await asyncio.to_thread(path.read_bytes)
            with _s3_errors():
                await self._put(key, body, media_type)
            return
        with _s3_errors():
            async with self._multipart(key, media_type or _media_type(key)) as (where, parts):
                bodies = _parts(path)
                number = 0
                while body := await asyncio.to_thread(next, bodies, b""):
                    number += 1
                    part = await self._s3.upload_part(**where, PartNumber=number, Body=body)
                    parts.append({"PartNumber": number, "ETag": part["ETag"]})

    @asynccontextmanager
    async def _multipart(self, key: str, media_type: str) -> AsyncIterator[tuple[dict[str, Any], Any]]:
        """Give the block what names the upload, and the list that it fills with parts; afterwards the object is there.

        An upload that fails leaves no parts behind.
        """
        where: dict[str, Any] = {"Bucket": self.bucket, "Key": key}
        created = await self._s3.create_multipart_upload(**where, ContentType=media_type)
        where["UploadId"] = created["UploadId"]
        parts: Any = []
        try:
            yield where, parts
            await self._s3.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})
        except BaseException:
            await self._s3.abort_multipart_upload(**where)
            raise


def _media_type(key: str) -> str:
    return CONTENT_TYPES.get(Path(key).suffix, "application/octet-stream")


def _parts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while body := file.read(PART_BYTES):
            yield body


@contextmanager
def _s3_errors() -> Iterator[None]:
    """Raise what S3 raises as the errors of this module."""
    try:
        yield
    except AWS_ERRORS as error:
        if kind_of(error) is Kind.MISSING:
            raise ObjectMissing from None
        raise unavailable("S3", error) from None
