"""HealthImaging's DICOMweb side: STOW-RS, QIDO-RS, WADO-RS of whole instances and their metadata.

Only primary image sets are shown, as in AWS. Sources: DICOM PS3.18 sections 8.3 (search), 10.4 (retrieve), 10.5
(store), 10.6 (search), annex F (JSON model); PS3.18 annex I (store response).
"""

import fnmatch
import hashlib
import json
import logging
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pydicom
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.errors import InvalidDicomError
from werkzeug.exceptions import (
    BadRequest,
    HTTPException,
    NotAcceptable,
    NotFound,
    RequestEntityTooLarge,
    UnsupportedMediaType,
)
from werkzeug.http import parse_options_header
from werkzeug.wrappers import Request, Response

from deploy.local import imagesets
from deploy.local.imagesets import Arrival, ImageSetStore, Instance, text_of

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

MAX_REQUEST_BYTES = 1_000_000_000 + 1024 * 1024
"""AWS takes up to 1 GB of DICOM in one request; the multipart framing comes on top."""
READ_BYTES = 1024 * 1024
MAX_PART_HEADER_BYTES = 16 * 1024
MAX_INLINE_BYTES = 1024
"""Longer binary values are bulk data, which the metadata leaves out."""
DICOM = "application/dicom"
DICOM_JSON = "application/dicom+json"
UID = re.compile(r"[0-9.]{1,64}")
BAD_DATASET = 0xA900
"""PS3.4 annex B.2.3: the data set does not match (here: the study named in the URL)."""
CANNOT_UNDERSTAND = 0xC000
"""PS3.4 annex B.2.3: cannot understand."""

# pydicom's messages quote values, which may name a patient; the process that serves this ignores warnings as a whole.
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)


class DicomWebApplication:
    """Serve `/datastore/{id}/…`."""

    def __init__(self, store: ImageSetStore) -> None:
        """Take the store."""
        self._store = store

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        """Serve one request."""
        request = Request(environ)
        request.max_content_length = None
        try:
            response = self._respond(request)
        except imagesets.NotFound as error:
            response = _problem(404, str(error))
        except HTTPException as error:
            response = _problem(error.code or 500, error.description or error.name)
        return response(environ, start_response)

    def _respond(self, request: Request) -> Response:
        for method, pattern, serve in ROUTES:
            match = pattern.fullmatch(request.path)
            if match and request.method == method:
                return serve(self._store, request, **{k: v for k, v in match.groupdict().items() if v is not None})
        return _problem(501, "this DICOMweb transaction is not implemented by the local AWS")


def _problem(status: int, message: str) -> Response:
    return Response(json.dumps({"message": message}), status=status, content_type="application/json")


# STOW-RS.


@dataclass(frozen=True, slots=True)
class _Refusal:
    """An instance that is not stored, as far as it could be identified."""

    reason: int
    sop_class_uid: str = ""
    sop_instance_uid: str = ""


def store_instances(store: ImageSetStore, request: Request, *, datastore: str, study: str = "") -> Response:
    """Store the instances of the body; 200 if all were stored, 202 if some were, 409 if none was."""
    store.require_active(datastore)
    if request.content_length is not None and request.content_length > MAX_REQUEST_BYTES:
        raise RequestEntityTooLarge("one request takes up to 1 GB")
    uploads: list[tuple[Path, str]] = []
    try:
        for upload in _uploads(request, store.incoming):
            uploads.append(upload)  # noqa: PERF402 - what came before a broken part is removed below
        outcomes = [examine(path, sha256, study) for path, sha256 in uploads]
        arrivals = [outcome for outcome in outcomes if isinstance(outcome, Arrival)]
        refusals = [outcome for outcome in outcomes if isinstance(outcome, _Refusal)]
        store.store(datastore, arrivals)
    finally:
        imagesets.discard(path for path, _ in uploads)
    status = 200 if not refusals else 202 if arrivals else 409
    return _json(_store_response(f"{request.host_url}datastore/{datastore}", arrivals, refusals), status)


def _uploads(request: Request, folder: Path) -> Iterator[tuple[Path, str]]:
    """Write each part of the body to a file of its own; yield its path and SHA-256."""
    media_type, options = parse_options_header(request.content_type or "")
    if media_type == DICOM:
        yield _save(folder, iter(lambda: request.stream.read(READ_BYTES), b""))
        return
    if media_type != "multipart/related" or options.get("type", DICOM) != DICOM:
        raise UnsupportedMediaType(f'send multipart/related; type="{DICOM}"')
    if not options.get("boundary"):
        raise BadRequest("the multipart boundary is missing")
    reader = _MultipartReader(request.stream, options["boundary"].encode("latin-1"))
    count = 0
    while (part_type := reader.next_part()) is not None:
        path, sha256 = _save(folder, reader.content())
        count += 1
        if part_type not in {"", DICOM}:
            # Without its file the part is refused as one that cannot be understood.
            path.unlink()
        yield path, sha256
    if not count:
        raise BadRequest("the body holds no part")


def _save(folder: Path, chunks: Iterable[bytes]) -> tuple[Path, str]:
    path, digest, size = folder / uuid.uuid4().hex, hashlib.sha256(), 0
    try:
        with path.open("wb") as file:
            for chunk in chunks:
                size += len(chunk)
                if size > MAX_REQUEST_BYTES:
                    raise RequestEntityTooLarge("one request takes up to 1 GB")  # noqa: TRY301 - the file goes too
                digest.update(chunk)
                file.write(chunk)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path, digest.hexdigest()


class _MultipartReader:
    """Read a multipart body part by part, holding no more than a chunk of it (RFC 2046 section 5.1)."""

    def __init__(self, stream: IO[bytes], boundary: bytes) -> None:
        self._stream = stream
        self._delimiter = b"\r\n--" + boundary
        # The first delimiter may stand at the very beginning, without the line end before it.
        self._buffer = b"\r\n"
        self._inside = False

    def next_part(self) -> str | None:
        """Go to the next part and return its media type, or None at the end of the body."""
        if not self._inside:
            for _ in self._until(self._delimiter):
                pass
        self._inside = False
        while len(self._buffer) < 2:  # noqa: PLR2004 - the two hyphens of the closing delimiter
            self._fill()
        if self._buffer.startswith(b"--"):
            return None
        header = b"".join(self._until(b"\r\n\r\n", MAX_PART_HEADER_BYTES))
        for line in header.decode("latin-1").splitlines():
            name, _, value = line.partition(":")
            if name.strip().lower() == "content-type":
                return parse_options_header(value.strip())[0]
        return ""

    def content(self) -> Iterator[bytes]:
        """Yield the part's content; must be read to its end."""
        yield from self._until(self._delimiter)
        self._inside = True

    def _until(self, marker: bytes, limit: int | None = None) -> Iterator[bytes]:
        """Yield what comes before `marker`, and consume it."""
        size = 0
        while (found := self._buffer.find(marker)) < 0:
            # The marker may be cut in two by the end of the buffer.
            ready = len(self._buffer) - len(marker) + 1
            if ready > 0:
                size += ready
                yield self._buffer[:ready]
                self._buffer = self._buffer[ready:]
            if limit is not None and size > limit:
                raise BadRequest("the headers of a part are too long")
            self._fill()
        yield self._buffer[:found]
        self._buffer = self._buffer[found + len(marker) :]

    def _fill(self) -> None:
        chunk = self._stream.read(READ_BYTES)
        if not chunk:
            raise BadRequest("the multipart body ends before its closing boundary")
        self._buffer += chunk


def examine(path: Path, sha256: str, study: str = "") -> Arrival | _Refusal:
    """Read an uploaded file's header; a refusal names what could be read of it."""
    try:
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        attributes = dataset.to_json_dict(
            bulk_data_threshold=MAX_INLINE_BYTES,
            bulk_data_element_handler=lambda _: "",
            suppress_invalid_tags=True,
        )
        transfer_syntax_uid = str(dataset.file_meta.get("TransferSyntaxUID", ""))
    except (InvalidDicomError, OSError, EOFError, AttributeError, KeyError, NotImplementedError, TypeError, ValueError):
        return _Refusal(CANNOT_UNDERSTAND)
    arrival = Arrival(path, sha256, transfer_syntax_uid, _without_bulk(attributes))
    identity = (text_of(attributes, "00080016"), arrival.sop_instance_uid)
    uids = (*identity, arrival.study_uid, arrival.series_uid, transfer_syntax_uid)
    if not all(UID.fullmatch(uid) for uid in uids):
        return _Refusal(CANNOT_UNDERSTAND, *identity)
    if study and study != arrival.study_uid:
        return _Refusal(BAD_DATASET, *identity)
    return arrival


def _without_bulk(attributes: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for tag, element in attributes.items():
        if "BulkDataURI" in element:
            continue
        if element.get("vr") == "SQ":
            kept[tag] = {**element, "Value": [_without_bulk(item) for item in element.get("Value", [])]}
        else:
            kept[tag] = element
    return kept


def _store_response(base_url: str, arrivals: Sequence[Arrival], refusals: Sequence[_Refusal]) -> dict[str, Any]:
    """Build the store instances response (PS3.18 annex I.2)."""
    response: dict[str, Any] = {}
    if arrivals:
        response["00081190"] = _element("UR", f"{base_url}/studies/{arrivals[0].study_uid}")
        response["00081199"] = {"vr": "SQ", "Value": [_stored(base_url, arrival) for arrival in arrivals]}
    identified = [refusal for refusal in refusals if refusal.sop_instance_uid]
    if identified:
        response["00081198"] = {"vr": "SQ", "Value": [_failed(refusal) for refusal in identified]}
    others = [refusal for refusal in refusals if not refusal.sop_instance_uid]
    if others:
        response["0008119A"] = {"vr": "SQ", "Value": [{"00081197": _element("US", other.reason)} for other in others]}
    return response


def _stored(base_url: str, arrival: Arrival) -> dict[str, Any]:
    url = f"{base_url}/studies/{arrival.study_uid}/series/{arrival.series_uid}/instances/{arrival.sop_instance_uid}"
    return {
        "00081150": _element("UI", text_of(arrival.attributes, "00080016")),
        "00081155": _element("UI", arrival.sop_instance_uid),
        "00081190": _element("UR", url),
    }


def _failed(refusal: _Refusal) -> dict[str, Any]:
    return {
        "00081150": _element("UI", refusal.sop_class_uid),
        "00081155": _element("UI", refusal.sop_instance_uid),
        "00081197": _element("US", refusal.reason),
    }


def _element(vr: str, *values: Any) -> dict[str, Any]:
    given = [value for value in values if value != ""]
    return {"vr": vr, "Value": given} if given else {"vr": vr}


def _json(document: Any, status: int = 200) -> Response:
    return Response(json.dumps(document), status=status, content_type=DICOM_JSON)


# QIDO-RS.

STUDY_TAGS = [
    "00080005",
    "00080020",
    "00080030",
    "00080050",
    "00080056",
    "00080061",
    "00080090",
    "00080201",
    "00081030",
    "00081190",
    "00100010",
    "00100020",
    "00100030",
    "00100040",
    "0020000D",
    "00200010",
    "00201206",
    "00201208",
]
SERIES_TAGS = [
    "00080005",
    "00080060",
    "00080201",
    "0008103E",
    "00081190",
    "00180015",
    "0020000D",
    "0020000E",
    "00200011",
    "00201209",
    "00400244",
    "00400245",
    "00400275",
]
INSTANCE_TAGS = [
    "00080005",
    "00080016",
    "00080018",
    "00080056",
    "00080201",
    "00081190",
    "0020000D",
    "0020000E",
    "00200013",
    "00280008",
    "00280010",
    "00280011",
    "00280100",
    "00083002",
]
"""What a search returns without being asked (PS3.18 tables 10.6.3-3 to 10.6.3-5)."""


def search_studies(store: ImageSetStore, request: Request, *, datastore: str) -> Response:
    """Search for studies."""
    instances = store.primary_instances(datastore)
    records = [_study_record(request, datastore, group) for group in _grouped(instances, lambda i: i.study_uid)]
    return _search(request, records, STUDY_TAGS)


def search_series(store: ImageSetStore, request: Request, *, datastore: str, study: str = "") -> Response:
    """Search for series, of one study or of all."""
    instances = store.primary_instances(datastore, study=study)
    studies = {group[0].study_uid: group for group in _grouped(instances, lambda i: i.study_uid)}
    records = []
    for group in _grouped(instances, lambda i: i.series_uid):
        record = {
            **_study_record(request, datastore, studies[group[0].study_uid]),
            **group[0].attributes,
            "00081190": _element("UR", _url(request, datastore, group[0], "series")),
            "00201209": _element("IS", len(group)),
        }
        records.append(record)
    return _search(request, records, SERIES_TAGS if study else [*STUDY_TAGS, *SERIES_TAGS])


def search_instances(
    store: ImageSetStore, request: Request, *, datastore: str, study: str = "", series: str = ""
) -> Response:
    """Search for instances, of one series, of one study or of all."""
    records = [
        {
            **instance.attributes,
            "00080056": _element("CS", "ONLINE"),
            "00081190": _element("UR", _url(request, datastore, instance, "instances")),
            "00083002": _element("UI", instance.transfer_syntax_uid),
        }
        for instance in store.primary_instances(datastore, study=study, series=series)
    ]
    above = [] if series else SERIES_TAGS if study else [*STUDY_TAGS, *SERIES_TAGS]
    return _search(request, records, [*above, *INSTANCE_TAGS])


def _study_record(request: Request, datastore: str, instances: Sequence[Instance]) -> dict[str, Any]:
    modalities = sorted({text_of(instance.attributes, "00080060") for instance in instances})
    return {
        **instances[0].attributes,
        "00080056": _element("CS", "ONLINE"),
        "00080061": _element("CS", *modalities),
        "00081190": _element("UR", _url(request, datastore, instances[0], "studies")),
        "00201206": _element("IS", len({instance.series_uid for instance in instances})),
        "00201208": _element("IS", len(instances)),
    }


def _url(request: Request, datastore: str, instance: Instance, level: str) -> str:
    url = f"{request.host_url}datastore/{datastore}/studies/{instance.study_uid}"
    if level != "studies":
        url += f"/series/{instance.series_uid}"
    if level == "instances":
        url += f"/instances/{instance.sop_instance_uid}"
    return url


def _grouped(instances: Iterable[Instance], key: Callable[[Instance], str]) -> list[list[Instance]]:
    groups: dict[str, list[Instance]] = {}
    for instance in instances:
        groups.setdefault(key(instance), []).append(instance)
    return list(groups.values())


def _search(request: Request, records: Iterable[dict[str, Any]], tags: Iterable[str]) -> Response:
    """Filter, page and trim the records as the query parameters say (PS3.18 section 8.3.4)."""
    conditions: dict[str, str] = {}
    included = set(tags)
    everything = False
    for name, value in request.args.items(multi=True):
        if name == "includefield":
            everything = everything or value == "all"
            included |= {_tag(field) for field in value.split(",") if field != "all"}
        elif name not in {"limit", "offset", "fuzzymatching"}:
            conditions[_tag(name)] = value
    found = [record for record in records if all(_matches(record, *condition) for condition in conditions.items())]
    offset = _natural(request, "offset", 0)
    page = found[offset : offset + _natural(request, "limit", len(found))]
    wanted = included | set(conditions)
    trimmed = [record if everything else {t: e for t, e in record.items() if t in wanted} for record in page]
    return _json([dict(sorted(record.items())) for record in trimmed]) if trimmed else Response(status=204)


def _tag(field: str) -> str:
    """Return the eight hexadecimal digits of an attribute named by tag or by keyword."""
    if re.fullmatch(r"[0-9A-Fa-f]{8}", field):
        return field.upper()
    tag = tag_for_keyword(field)
    if tag is None:
        raise BadRequest("a query parameter is neither a tag nor a keyword")
    return f"{tag:08X}"


def _natural(request: Request, name: str, default: int) -> int:
    text = request.args.get(name)
    if text is None:
        return default
    if not text.isdigit():
        raise BadRequest(f"{name} is not a number")
    return int(text)


def _matches(record: dict[str, Any], tag: str, wanted: str) -> bool:
    """Match one attribute by the rules of its value representation (PS3.4 section C.2.2.2)."""
    if wanted in {"", "*"}:
        return True
    element = record.get(tag, {})
    vr = element.get("vr") or _vr(tag)
    values = [text_of({tag: {"Value": [value]}}, tag) for value in element.get("Value", [])]
    if vr == "UI":
        return any(value in wanted.replace("\\", ",").split(",") for value in values)
    if vr in {"DA", "TM", "DT"} and "-" in wanted:
        lowest, _, highest = wanted.partition("-")
        return any(
            lowest <= value and (not highest or value <= highest or value.startswith(highest)) for value in values
        )
    if vr == "PN":
        return any(fnmatch.fnmatchcase(value.lower(), _pattern(wanted.lower())) for value in values)
    return any(fnmatch.fnmatchcase(value, _pattern(wanted)) for value in values)


def _pattern(wanted: str) -> str:
    # Only * and ? are wildcards in DICOM; a bracket is itself.
    return wanted.replace("[", "[[]")


def _vr(tag: str) -> str:
    try:
        return dictionary_VR(int(tag, 16))
    except KeyError:
        return "UN"


# WADO-RS.


def retrieve_instance(
    store: ImageSetStore, request: Request, *, datastore: str, study: str, series: str, sop: str
) -> Response:
    """Return one instance's Part 10 file, byte for byte."""
    instance = _instance(store, datastore, (study, series, sop), request.args.get("imageSetId"))
    accepted = [parse_options_header(choice.strip()) for choice in request.headers.get("Accept", "*/*").split(",")]
    for media_type, options in accepted:
        transfer_syntax = options.get("transfer-syntax", "*")
        if transfer_syntax not in {"*", instance.transfer_syntax_uid}:
            continue
        if media_type == DICOM:
            return Response(
                store.read(instance), content_type=f"{DICOM}; transfer-syntax={instance.transfer_syntax_uid}"
            )
        if media_type in {"*/*", "multipart/*"} or (
            media_type == "multipart/related" and options.get("type", DICOM) in {DICOM, "*/*"}
        ):
            return _multipart(store.read(instance), instance.transfer_syntax_uid)
    raise NotAcceptable(f"the instance is kept as {instance.transfer_syntax_uid} and is not transcoded")


def _multipart(content: bytes, transfer_syntax_uid: str) -> Response:
    boundary = uuid.uuid4().hex
    head = f"--{boundary}\r\nContent-Type: {DICOM}; transfer-syntax={transfer_syntax_uid}\r\n\r\n"
    body = b"".join((head.encode(), content, f"\r\n--{boundary}--\r\n".encode()))
    return Response(body, content_type=f'multipart/related; type="{DICOM}"; boundary={boundary}')


def retrieve_metadata(
    store: ImageSetStore, request: Request, *, datastore: str, study: str, series: str, sop: str = ""
) -> Response:
    """Return the metadata of one instance, or of a series."""
    del request
    instances = store.primary_instances(datastore, study=study, series=series, sop=sop)
    if not instances:
        raise NotFound("no such instance")
    return _json([dict(sorted(instance.attributes.items())) for instance in instances])


def _instance(store: ImageSetStore, datastore: str, uids: tuple[str, str, str], image_set_id: str | None) -> Instance:
    """Find an instance in the primary image sets, or in the one that is named, whichever kind it is."""
    if image_set_id is None:
        candidates = store.primary_instances(datastore, study=uids[0], series=uids[1], sop=uids[2])
    else:
        candidates = store.instances(store.image_set(datastore, image_set_id))
    for instance in candidates:
        if (instance.study_uid, instance.series_uid, instance.sop_instance_uid) == uids:
            return instance
    raise NotFound("no such instance")


def _route(
    method: str, path: str, serve: Callable[..., Response]
) -> tuple[str, re.Pattern[str], Callable[..., Response]]:
    return method, re.compile("/datastore/(?P<datastore>[^/]+)" + re.sub(r"{(\w+)}", r"(?P<\1>[^/]+)", path)), serve


ROUTES = [
    _route("POST", "/studies", store_instances),
    _route("POST", "/studies/{study}", store_instances),
    _route("GET", "/studies", search_studies),
    _route("GET", "/series", search_series),
    _route("GET", "/studies/{study}/series", search_series),
    _route("GET", "/instances", search_instances),
    _route("GET", "/studies/{study}/instances", search_instances),
    _route("GET", "/studies/{study}/series/{series}/instances", search_instances),
    _route("GET", "/studies/{study}/series/{series}/instances/{sop}", retrieve_instance),
    _route("GET", "/studies/{study}/series/{series}/instances/{sop}/metadata", retrieve_metadata),
    _route("GET", "/studies/{study}/series/{series}/metadata", retrieve_metadata),
]
