"""A DICOMweb client: STOW-RS, QIDO-RS and WADO-RS of whole instances (DICOM PS3.18 sections 10.4 to 10.6).

It talks to AWS HealthImaging with `SigV4`, or to any other archive with `Basic`, `Bearer` or no authentication.
IAM: medical-imaging:StoreDICOM, StoreDICOMStudy, SearchDICOMStudies, SearchDICOMSeries, SearchDICOMInstances,
GetDICOMInstance on the data store.

A body is never quoted in an error: archives echo what they were sent, and that may name a patient.
"""

import asyncio
import base64
import hashlib
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlencode

import aiohttp
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials, ReadOnlyCredentials
from yarl import URL

from shared.aws_errors import AWS_ERRORS, code_of
from shared.errors import Unavailable

CHUNK_BYTES = 1024 * 1024
MAX_STORE_BYTES = 1_000_000_000
"""HealthImaging takes up to 1 GB of DICOM in one STOW-RS request."""
TIMEOUT = aiohttp.ClientTimeout(total=None, connect=10, sock_read=300)
"""The archive answers a store only when it has taken in everything, so a read waits long; seconds."""
SERVICE = "medical-imaging"
DICOM = "application/dicom"
DICOM_JSON = "application/dicom+json"
PARTLY_STORED = {200, 202, 409}
"""The statuses of a STOW-RS response that lists its instances (PS3.18 table 10.5.3-1)."""
NO_CONTENT = 204
TOO_MANY_REQUESTS = 429
SERVER_ERROR = 500
NOT_IMPLEMENTED = 501
OK = 200


class DicomWebError(ValueError):
    """The archive refuses the request as it is: repeating it will not help. `status` is the HTTP status."""

    def __init__(self, transaction: str, status: int) -> None:
        """Name the transaction and the status, and nothing of what was said."""
        super().__init__(f"{transaction} was refused with HTTP {status}")
        self.status = status


class StoreTooLarge(ValueError):  # noqa: N818 - it states a fact about the call
    """The instances are more than one STOW-RS request may carry; store them in several calls."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An instance that the archive did not take.

    `reason` is the FailureReason (0008,1197) of PS3.18 table I.2-2; the UIDs are empty if the archive could not
    read them. `tags` are the attributes in its FailedAttributesSequence (0074,1048), if the archive names them.
    """

    reason: int | None
    sop_class_uid: str = ""
    sop_instance_uid: str = ""
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StoreResult:
    """What a STOW-RS request did: the SOP Instance UIDs that are stored now, and the instances that are not."""

    stored: tuple[str, ...]
    failures: tuple[Failure, ...]


class StoreRejected(ValueError):  # noqa: N818 - it states a fact about the instances
    """The archive refused some or all instances; `result` says which, and why."""

    def __init__(self, result: StoreResult) -> None:
        """Count the failures by reason."""
        reasons = sorted({"unknown" if f.reason is None else f"0x{f.reason:04X}" for f in result.failures})
        super().__init__(
            f"{len(result.failures)} of {len(result.failures) + len(result.stored)} instances were refused:"
            f" failure reason {', '.join(reasons)}"
        )
        self.result = result


class Auth(Protocol):
    """Something that authenticates requests."""

    async def headers(self, method: str, url: URL, headers: Mapping[str, str], payload_sha256: str) -> dict[str, str]:
        """Return the headers to add; `payload_sha256` is the body's digest in hexadecimal."""


class SigV4:
    """AWS Signature Version 4 for the service `medical-imaging`.

    The payload is signed with its digest: UNSIGNED-PAYLOAD is documented for S3 alone, and HealthImaging's service
    model marks no operation as unsigned. Hashing costs about a second per gigabyte, and a file that changes between
    hashing and sending is refused instead of stored half old, half new.
    """

    def __init__(self, credentials: Callable[[], Awaitable[ReadOnlyCredentials]], region: str) -> None:
        """`credentials` is asked before each request, because temporary ones expire."""
        self._credentials = credentials
        self._region = region

    async def headers(self, method: str, url: URL, headers: Mapping[str, str], payload_sha256: str) -> dict[str, str]:
        """Return the signature's headers."""
        found = await self._credentials()
        credentials = Credentials(found.access_key or "", found.secret_key or "", found.token)
        # botocore takes the digest of a body that it does not see from this header.
        signed = {**headers, "X-Amz-Content-SHA256": payload_sha256}
        request: Any = AWSRequest(method=method, url=str(url), headers=signed)
        SigV4Auth(credentials, SERVICE, self._region).add_auth(request)
        return {name: value for name, value in request.headers.items() if name not in headers}


class Bearer:
    """A token that the archive, or the gate before it, gave out (RFC 6750)."""

    def __init__(self, token: str) -> None:
        """Take the token."""
        self._token = token

    async def headers(self, method: str, url: URL, headers: Mapping[str, str], payload_sha256: str) -> dict[str, str]:
        """Return the Authorization header."""
        del method, url, headers, payload_sha256
        return {"Authorization": f"Bearer {self._token}"}


class Basic:
    """HTTP basic authentication."""

    def __init__(self, username: str, password: str) -> None:
        """Take what the archive knows the user by."""
        self._value = "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()

    async def headers(self, method: str, url: URL, headers: Mapping[str, str], payload_sha256: str) -> dict[str, str]:
        """Return the Authorization header."""
        del method, url, headers, payload_sha256
        return {"Authorization": self._value}


def base_url(
    *, override: str | None = None, endpoint_url: str | None = None, region: str = "", datastore_id: str = ""
) -> str:
    """Return where DICOMweb is: the override, else the data store at AWS's endpoint override, else at AWS itself."""
    if override:
        return override.rstrip("/")
    host = (endpoint_url or f"https://dicom-medical-imaging.{region}.amazonaws.com").rstrip("/")
    return f"{host}/datastore/{datastore_id}"


class DicomWeb:
    """One archive. Every method raises `Unavailable` when it does not answer, and `DicomWebError` when it refuses."""

    def __init__(self, base_url: str, *, session: aiohttp.ClientSession, auth: Auth | None = None) -> None:
        """`base_url` is what `/studies` is appended to; the session stays the caller's."""
        self._base_url = base_url.rstrip("/")
        self._session = session
        self._auth = auth

    async def store(self, instances: Sequence[Path | bytes], *, study_uid: str = "") -> StoreResult:
        """Store Part 10 instances, files or bytes; storing the same bytes again succeeds and changes nothing.

        The files are read twice, for the signature and for the body, a chunk at a time.

        Raises:
            StoreRejected: an instance was refused; those that were not are stored.
            StoreTooLarge: more than HealthImaging takes in one request.
        """
        if not instances:
            return StoreResult((), ())
        body = _MultipartBody(instances)
        digest, size = await asyncio.to_thread(body.measure)
        headers = {"Accept": DICOM_JSON, "Content-Type": body.content_type, "Content-Length": str(size)}
        path = f"studies/{study_uid}" if study_uid else "studies"
        async with self._request("POST", path, headers, payload_sha256=digest, body=body.chunks()) as response:
            if response.status not in PARTLY_STORED:
                raise DicomWebError("STOW-RS", response.status)
            result = _parse_store(await _json(response, "STOW-RS"))
        if result.failures:
            raise StoreRejected(result)
        if not result.stored:
            raise DicomWebError("STOW-RS", response.status)
        return result

    async def search_studies(self, **filters: str | int) -> list[dict[str, Any]]:
        """Return the studies that match, in the DICOM JSON model.

        A filter is a DICOM keyword or tag, or `limit`, `offset`, `includefield`.
        """
        return await self._search("studies", filters)

    async def search_series(self, study_uid: str = "", **filters: str | int) -> list[dict[str, Any]]:
        """Return the series that match, of one study or of all."""
        return await self._search(f"studies/{study_uid}/series" if study_uid else "series", filters)

    async def search_instances(
        self, study_uid: str = "", series_uid: str = "", **filters: str | int
    ) -> list[dict[str, Any]]:
        """Return the instances that match, of one series, of one study or of all."""
        path = "instances"
        if series_uid:
            path = f"series/{series_uid}/{path}"
        return await self._search(f"studies/{study_uid}/{path}" if study_uid else path, filters)

    async def retrieve_instance(
        self, study_uid: str, series_uid: str, sop_instance_uid: str, *, image_set_id: str = ""
    ) -> bytes:
        """Return one instance's Part 10 file in the transfer syntax in which it is kept.

        `image_set_id` is HealthImaging's own: without it, only primary image sets are looked at.
        """
        headers = {"Accept": f'{DICOM}; transfer-syntax=*, multipart/related; type="{DICOM}"; transfer-syntax=*'}
        query = {"imageSetId": image_set_id} if image_set_id else {}
        path = f"studies/{study_uid}/series/{series_uid}/instances/{sop_instance_uid}"
        async with self._request("GET", path, headers, query=query) as response:
            if response.status != OK:
                raise DicomWebError("WADO-RS", response.status)
            content = await response.read()
            if response.content_type == DICOM:
                return content
            return _only_part(content, response.headers["Content-Type"])

    async def _search(self, path: str, filters: Mapping[str, str | int]) -> list[dict[str, Any]]:
        async with self._request("GET", path, {"Accept": DICOM_JSON}, query=filters) as response:
            if response.status == NO_CONTENT:
                return []
            if response.status != OK:
                raise DicomWebError("QIDO-RS", response.status)
            found = await _json(response, "QIDO-RS")
        if not isinstance(found, list):
            raise DicomWebError("QIDO-RS", response.status)
        return found

    @asynccontextmanager
    async def _request(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        *,
        query: Mapping[str, str | int] | None = None,
        payload_sha256: str = hashlib.sha256().hexdigest(),
        body: AsyncIterator[bytes] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send one request; what may pass by itself (no connection, 5xx, 429) is raised as `Unavailable`."""
        # Everything outside RFC 3986's unreserved characters is encoded, because SigV4's canonical form is; a client
        # library's own, laxer encoding would break the signature of a query with a comma or an asterisk.
        search = urlencode(query or {}, quote_via=quote, safe="")
        url = URL(f"{self._base_url}/{path}" + (f"?{search}" if search else ""), encoded=True)
        try:
            added = await self._auth.headers(method, url, headers, payload_sha256) if self._auth else {}
        except AWS_ERRORS as error:
            raise Unavailable(f"no credentials: {code_of(error)}") from None
        try:
            async with self._session.request(
                method, url, headers={**headers, **added}, data=body, timeout=TIMEOUT, allow_redirects=False
            ) as response:
                status = response.status
                if status == TOO_MANY_REQUESTS or (status >= SERVER_ERROR and status != NOT_IMPLEMENTED):
                    raise Unavailable(f"DICOMweb answers HTTP {status}")
                yield response
        except (aiohttp.ClientError, TimeoutError) as error:
            # The text of the error would name the URL, whose query may hold a patient's id.
            raise Unavailable(f"DICOMweb does not answer: {type(error).__name__}") from None


class _MultipartBody:
    """Instances as a multipart/related body that is read from their files as it is sent (RFC 2387)."""

    def __init__(self, instances: Sequence[Path | bytes]) -> None:
        self._instances = instances
        self._boundary = uuid.uuid4().hex
        self.content_type = f'multipart/related; type="{DICOM}"; boundary={self._boundary}'

    def measure(self) -> tuple[str, int]:
        """Return the SHA-256 in hexadecimal and the size in bytes of the whole body."""
        digest, size = hashlib.sha256(), 0
        for piece in self._pieces():
            size += len(piece)
            if size > MAX_STORE_BYTES:
                raise StoreTooLarge(f"one STOW-RS request takes up to {MAX_STORE_BYTES} bytes")
            digest.update(piece)
        return digest.hexdigest(), size

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body, reading the disk beside the event loop."""
        pieces = self._pieces()
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece

    def _pieces(self) -> Iterator[bytes]:
        for instance in self._instances:
            yield f"--{self._boundary}\r\nContent-Type: {DICOM}\r\n\r\n".encode()
            if isinstance(instance, bytes):
                yield instance
            else:
                with instance.open("rb") as file:
                    while chunk := file.read(CHUNK_BYTES):
                        yield chunk
            yield b"\r\n"
        yield f"--{self._boundary}--\r\n".encode()


async def _json(response: aiohttp.ClientResponse, transaction: str) -> Any:
    try:
        return json.loads(await response.read())
    except ValueError:
        raise DicomWebError(transaction, response.status) from None


def _parse_store(response: Any) -> StoreResult:
    """Read the store instances response (PS3.18 annex I.2): stored, failed, and those that could not be identified."""
    if not isinstance(response, dict):
        return StoreResult((), ())
    stored = tuple(_first(item, "00081155", "") for item in _items(response, "00081199"))
    failed = [*_items(response, "00081198"), *_items(response, "0008119A")]
    failures = tuple(
        Failure(
            _first(item, "00081197", None),
            _first(item, "00081150", ""),
            _first(item, "00081155", ""),
            tuple(_first(one, "00720026", "") for one in _items(item, "00741048")),
        )
        for item in failed
    )
    return StoreResult(stored, failures)


def _items(dataset: Mapping[str, Any], tag: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = dataset.get(tag, {}).get("Value", [])
    return items


def _first(dataset: Mapping[str, Any], tag: str, default: Any) -> Any:
    values = dataset.get(tag, {}).get("Value") or [default]
    return values[0]


def _only_part(content: bytes, content_type: str) -> bytes:
    """Return the content of a multipart body's first part; instances may be large, so nothing else is copied."""
    header = Message()
    header["Content-Type"] = content_type
    delimiter = b"--" + str(header.get_param("boundary")).encode("latin-1")
    start = content.find(b"\r\n\r\n", content.find(delimiter))
    end = content.find(b"\r\n" + delimiter, start + 4)
    if start < 0 or end < 0:
        raise DicomWebError("WADO-RS", OK)
    return content[start + 4 : end]
