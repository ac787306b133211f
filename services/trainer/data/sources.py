"""Where the arrays of a dataset lie: in the bucket, in another one, or at an address that fsspec reads.

A request names the address, so anyone who may send a request chooses what is read here. Only addresses that begin with
one of RADQUEUE_DATA_URIS are read. By default these are object stores, where the trainer's role decides what it may
read. Local files are not among them, and https:// addresses are not either: one may lie in the internal network, which
trusts this machine.

Settings: RADQUEUE_DATA_URIS. IAM: s3:GetObject and s3:ListBucket on what they name.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

from fsspec.core import url_to_fs

from services.trainer.reasons import CannotTrain
from services.trainer.settings import TrainerSettings
from shared.aws_errors import AWS_ERRORS, Kind, kind_of, unavailable
from shared.errors import Unavailable
from shared.keys import DATASETS
from shared.messages import TrainingRequest
from shared.objects import ObjectMissing, ObjectStore, ObjectSummary

S3 = "s3://"
CHAINED = "::"
"""fsspec would read `a::b://c` through another file system, a local one for instance."""
UNREADABLE = {Kind.MISSING, Kind.DENIED, Kind.MISCONFIGURED}
VERSIONS = {"etag", "md5Hash", "generation", "mtime", "last_modified", "created", "ETag", "Last-Modified"}
"""The names under which file systems list the properties that distinguish versions of a file."""
TIMES = ("mtime", "last_modified", "created")

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Source(Protocol):
    """A place that arrays are read from; `ObjectStore` is one."""

    def list(self, prefix: str) -> AsyncIterator[ObjectSummary]:
        """Yield every object whose key starts with `prefix`."""

    async def get(self, key: str) -> bytes:
        """Return the whole object. Raises `ObjectMissing`."""

    async def download(self, key: str, path: Path) -> None:
        """Write the object into the file `path`. Raises `ObjectMissing`."""


async def source_of(request: TrainingRequest, settings: TrainerSettings, *, objects: ObjectStore) -> tuple[Source, str]:
    """Return the source of the request's arrays, and the prefix below which its classes' folders lie.

    Raises:
        CannotTrain: `data_uri_not_allowed`, `data_uri_not_installed`, `data_uri_unreadable`.
        Unavailable: the source does not answer.
    """
    uri = request.data_uri
    if uri is None:
        return objects, DATASETS
    allowed = tuple(settings.data_uris.split())
    if not uri.startswith(allowed) or CHAINED in uri or {".", ".."} & set(uri.split("/")):
        raise CannotTrain("data_uri_not_allowed")
    uri = f"{uri.rstrip('/')}/"
    if uri.startswith(S3):
        bucket, _, prefix = uri.removeprefix(S3).partition("/")
        return await _bucket(bucket, objects=objects), prefix
    try:
        files, prefix = await asyncio.to_thread(url_to_fs, uri)
    except (ImportError, ValueError):  # the library is missing; the scheme is unknown
        raise CannotTrain("data_uri_not_installed") from None
    return Files(files), f"{prefix.rstrip('/')}/"


async def _bucket(bucket: str, *, objects: ObjectStore) -> ObjectStore:
    try:
        await objects.client.head_bucket(Bucket=bucket)
    except AWS_ERRORS as error:
        if kind_of(error) in UNREADABLE:
            raise CannotTrain("data_uri_unreadable") from None
        raise unavailable("S3", error) from None
    return ObjectStore(objects.client, bucket)


class Files:
    """Reads the files of an fsspec file system, in threads."""

    def __init__(self, files: Any) -> None:
        """Take an `fsspec.AbstractFileSystem`."""
        self._files = files

    async def list(self, prefix: str) -> AsyncIterator[ObjectSummary]:
        """Yield every file below `prefix`; none if it is missing."""
        try:
            self._files.invalidate_cache()  # of listings: fsspec keeps them for as long as the process lives
            await self._do(self._files.ls, prefix, detail=False)  # raises where nothing answers; `find` passes over it
            found: dict[str, dict[str, Any]] = await self._do(self._files.find, prefix, detail=True)
        except ObjectMissing:
            return
        for key, listed in found.items():
            details = listed if VERSIONS & listed.keys() else await self._do(self._files.info, key)
            version = hashlib.sha256(repr(sorted(details.items())).encode()).hexdigest()
            yield ObjectSummary(key, details.get("size") or 0, _time_of(details), version)

    async def get(self, key: str) -> bytes:
        """Return the whole file. Raises `ObjectMissing`."""
        body: bytes = await self._do(self._files.cat_file, key)
        return body

    async def download(self, key: str, path: Path) -> None:
        """Copy the file `key` into the file `path`. Raises `ObjectMissing`."""
        await self._do(self._files.get_file, key, str(path))

    async def _do(self, call: Callable[Arguments, Result], *args: Arguments.args, **named: Arguments.kwargs) -> Result:
        try:
            return await asyncio.to_thread(call, *args, **named)
        except FileNotFoundError:
            raise ObjectMissing from None
        except PermissionError:
            raise CannotTrain("data_uri_unreadable") from None
        except Exception as error:  # noqa: BLE001 - each file system has errors of its own, of a network mostly
            raise Unavailable(f"data_uri: {type(error).__name__}") from None


def _time_of(told: dict[str, Any]) -> datetime:
    """Return when a file was written, as far as its file system says; it decides between revisions of a series."""
    times = (told.get(name) for name in TIMES)
    return next((time for time in times if isinstance(time, datetime)), datetime.min.replace(tzinfo=UTC))
