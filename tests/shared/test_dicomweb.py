"""The DICOMweb client, against the local HealthImaging and against a server that answers as it is told."""

import hashlib
import hmac
import json
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import aiohttp
import pytest
from botocore.credentials import ReadOnlyCredentials

from shared import dicomweb
from shared.dicomweb import Basic, Bearer, DicomWeb, DicomWebError, SigV4, StoreRejected, StoreTooLarge, base_url
from shared.errors import Unavailable

SECRET = "not-a-real-secret"


async def credentials():
    return ReadOnlyCredentials("AKIDEXAMPLE", SECRET, "session-token")


@pytest.fixture
async def session():
    async with aiohttp.ClientSession() as opened:
        yield opened


@pytest.fixture
async def archive(local_aws, aws_client, session):
    """The client of a new data store of the local HealthImaging."""
    datastore_id = aws_client("medical-imaging").create_datastore(datastoreName="test")["datastoreId"]
    url = base_url(endpoint_url=local_aws.endpoint_url, datastore_id=datastore_id)
    return DicomWeb(url, session=session, auth=SigV4(credentials, local_aws.region))


@pytest.fixture
def uid():
    """Make a new UID."""
    return lambda: f"2.25.{uuid.uuid4().int}"


class Recorder(ThreadingHTTPServer):
    """An archive that gives one answer and remembers what it was sent."""

    daemon_threads = True

    def __init__(self, status, body=b"", content_type="application/dicom+json"):
        self.answer = (status, body, content_type)
        self.requests = []
        super().__init__(("127.0.0.1", 0), _RecordingHandler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/dicom-web"


class _RecordingHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append((self.command, self.path, self.headers, body))
        status, answer, content_type = self.server.answer
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_GET  # noqa: N815 - the name that http.server looks for

    def log_message(self, *_):
        """Stay quiet."""


@pytest.fixture
def recorder():
    """Start a server that gives one answer."""
    started = []

    def start(*answer):
        server = Recorder(*answer)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


async def test_what_was_stored_is_found_and_retrieved(archive, dicom_bytes, uid, tmp_path):
    """Files and bytes in one request come back from all three searches and byte for byte from a retrieve."""
    study, series, sops = uid(), uid(), [uid(), uid()]
    instances = [dicom_bytes(StudyInstanceUID=study, SeriesInstanceUID=series, SOPInstanceUID=sop) for sop in sops]
    path = tmp_path / "instance.dcm"
    path.write_bytes(instances[0])
    result = await archive.store([path, instances[1]])

    assert result.stored == tuple(sops)
    assert [s["0020000D"]["Value"] for s in await archive.search_studies(StudyInstanceUID=study)] == [[study]]
    assert [s["0020000E"]["Value"] for s in await archive.search_series(study, Modality="CT")] == [[series]]
    assert len(await archive.search_instances(study, series, limit=1)) == 1
    assert await archive.search_studies(PatientID="nobody") == []
    assert [await archive.retrieve_instance(study, series, sop) for sop in sops] == instances


async def test_storing_again_succeeds(archive, dicom_bytes):
    """A push that is repeated after a crash has the same result."""
    instance = dicom_bytes()

    assert await archive.store([instance]) == await archive.store([instance])


async def test_a_refused_instance_is_named_with_its_reason(archive, dicom_bytes, uid):
    """`StoreRejected` tells the stored ones, the refused ones and why, and quotes no value."""
    study, sop = uid(), uid()
    with pytest.raises(StoreRejected) as caught:
        await archive.store(
            [dicom_bytes(StudyInstanceUID=study), dicom_bytes(SOPInstanceUID=sop), b"Secret^Name"], study_uid=study
        )
    failures = caught.value.result.failures

    assert len(caught.value.result.stored) == 1
    assert [(f.reason, f.sop_instance_uid) for f in failures] == [(0xA900, sop), (0xC000, "")]
    assert str(caught.value) == "2 of 3 instances were refused: failure reason 0xA900, 0xC000"


async def test_more_than_one_request_may_carry_is_refused_before_it_is_sent(recorder, session, monkeypatch):
    """The limit of a STOW-RS request is checked on this side."""
    monkeypatch.setattr(dicomweb, "MAX_STORE_BYTES", 1000)
    server = recorder(200)
    with pytest.raises(StoreTooLarge):
        await DicomWeb(server.url, session=session).store([b"x" * 1001])

    assert server.requests == []


async def test_nothing_to_store_is_no_request(recorder, session):
    """An empty sequence is stored without asking anyone."""
    server = recorder(500)

    assert (await DicomWeb(server.url, session=session).store([])).stored == ()
    assert server.requests == []


def _signature(method, path, query, headers, payload_sha256):
    """Compute a SigV4 signature from the AWS documentation's steps, without an SDK."""
    scope, names, _ = headers["Authorization"].removeprefix("AWS4-HMAC-SHA256 ").split(", ")
    scope = scope.split("/", 1)[1]
    names = names.removeprefix("SignedHeaders=")
    lines = "".join(f"{name}:{' '.join(headers[name].split())}\n" for name in names.split(";"))
    canonical = f"{method}\n{path}\n{query}\n{lines}\n{names}\n{payload_sha256}"
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    to_sign = "\n".join(["AWS4-HMAC-SHA256", headers["X-Amz-Date"], scope, digest])
    key = f"AWS4{SECRET}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    return hmac.new(key, to_sign.encode(), "sha256").hexdigest()


async def test_a_store_is_signed_with_the_digest_of_its_body(recorder, session, dicom_bytes):
    """The signature that arrives is the one that AWS would compute from the request and its whole body."""
    stored = {"00081199": {"vr": "SQ", "Value": [{"00081155": {"vr": "UI", "Value": ["1.2"]}}]}}
    server = recorder(200, json.dumps(stored).encode())
    await DicomWeb(server.url, session=session, auth=SigV4(credentials, "eu-west-1")).store([dicom_bytes()])
    ((method, path, headers, body),) = server.requests

    assert headers["X-Amz-Content-SHA256"] == hashlib.sha256(body).hexdigest()
    assert headers["X-Amz-Security-Token"] == "session-token"
    assert "/eu-west-1/medical-imaging/aws4_request" in headers["Authorization"]
    expected = _signature(method, path, "", headers, hashlib.sha256(body).hexdigest())
    assert headers["Authorization"].endswith(f"Signature={expected}")


async def test_a_search_is_signed_over_its_encoded_query(recorder, session):
    """A query with characters that libraries encode differently is signed and sent in AWS's canonical form."""
    server = recorder(204)
    client = DicomWeb(server.url, session=session, auth=SigV4(credentials, "us-east-1"))
    await client.search_studies(PatientName="A b*,ü", limit=3)
    ((method, target, headers, _),) = server.requests
    path, query = urlsplit(target).path, urlsplit(target).query

    assert query == "PatientName=A%20b%2A%2C%C3%BC&limit=3"
    expected = _signature(method, path, query, headers, hashlib.sha256().hexdigest())
    assert headers["Authorization"].endswith(f"Signature={expected}")


async def test_basic_authentication_and_none(recorder, session):
    """Any other archive is reached with a user and a password, or without."""
    server = recorder(204)
    await DicomWeb(server.url, session=session, auth=Basic("user", "pass")).search_studies()
    await DicomWeb(server.url, session=session).search_studies()
    with_user, without = (headers["Authorization"] for _, _, headers, _ in server.requests)

    assert with_user == "Basic dXNlcjpwYXNz"
    assert without is None


async def test_a_token_is_sent_as_it_is(recorder, session):
    """A gate before an archive reads it from the Authorization header (RFC 6750)."""
    server = recorder(200, b"[]")
    await DicomWeb(server.url, session=session, auth=Bearer("a.token")).search_studies()

    assert server.requests[0][2]["Authorization"] == "Bearer a.token"


async def test_the_attributes_that_an_archive_names_are_told(recorder, session):
    """FailedAttributesSequence says which attributes are to blame; their values stay out."""
    failed = {"00081197": {"Value": [0x0110]}, "00741048": {"Value": [{"00720026": {"Value": ["00100020"]}}]}}
    server = recorder(409, json.dumps({"00081198": {"Value": [failed]}}).encode())
    with pytest.raises(StoreRejected) as refused:
        await DicomWeb(server.url, session=session).store([b"any"])

    assert refused.value.result.failures[0].tags == ("00100020",)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_what_may_pass_is_unavailable(recorder, session, status):
    """Throttling and server errors are worth another attempt."""
    client = DicomWeb(recorder(status, b"Secret^Name").url, session=session)
    for call in (lambda: client.store([b"x"]), client.search_studies, lambda: client.retrieve_instance("1", "2", "3")):
        with pytest.raises(Unavailable) as caught:
            await call()
        assert "Secret" not in str(caught.value)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 406, 413, 415, 501])
async def test_what_will_not_pass_is_an_error_without_the_body(recorder, session, status):
    """A refusal carries its status; what the archive said stays out of the text."""
    client = DicomWeb(recorder(status, b"Secret^Name").url, session=session)
    for call in (lambda: client.store([b"x"]), client.search_studies, lambda: client.retrieve_instance("1", "2", "3")):
        with pytest.raises(DicomWebError) as caught:
            await call()
        assert caught.value.status == status
        assert "Secret" not in str(caught.value)


@pytest.mark.parametrize("body", [b"", b"<xml/>", b"[]", b"{}"])
async def test_a_store_that_names_nothing_is_no_success(recorder, session, body):
    """An answer without a reference to what was stored proves nothing."""
    with pytest.raises(DicomWebError):
        await DicomWeb(recorder(200, body).url, session=session).store([b"x"])


async def test_an_archive_that_is_not_there_is_unavailable(recorder, session):
    """A refused connection is worth another attempt, and the query is not quoted."""
    server = recorder(200)
    server.shutdown()
    server.server_close()
    with pytest.raises(Unavailable) as caught:
        await DicomWeb(server.url, session=session).search_studies(PatientName="Secret")

    assert "Secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/dicom", b"\r\n\r\ncontent\r\n"),
        (
            'multipart/related; type="application/dicom"; boundary="b"',
            b"preamble\r\n--b\r\nContent-Type: application/dicom\r\n\r\n\r\n\r\ncontent\r\n\r\n--b--\r\n",
        ),
    ],
)
async def test_a_retrieve_reads_both_forms_of_answer(recorder, session, content_type, body):
    """Archives answer with the instance itself or as the only part of a multipart body."""
    client = DicomWeb(recorder(200, body, content_type).url, session=session)

    assert await client.retrieve_instance("1", "2", "3") == b"\r\n\r\ncontent\r\n"


async def test_a_multipart_answer_that_is_cut_off_is_an_error(recorder, session):
    """Half an instance is never returned as one."""
    body = b"--b\r\nContent-Type: application/dicom\r\n\r\nhalf"
    client = DicomWeb(recorder(200, body, "multipart/related; boundary=b").url, session=session)
    with pytest.raises(DicomWebError):
        await client.retrieve_instance("1", "2", "3")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"override": "https://pacs/dicom-web/", "endpoint_url": "http://x"}, "https://pacs/dicom-web"),
        ({"endpoint_url": "http://127.0.0.1:1/", "datastore_id": "d"}, "http://127.0.0.1:1/datastore/d"),
        (
            {"region": "eu-west-1", "datastore_id": "d"},
            "https://dicom-medical-imaging.eu-west-1.amazonaws.com/datastore/d",
        ),
    ],
)
def test_the_base_url_is_the_override_or_the_data_store(arguments, expected):
    """The override wins over the endpoint, the endpoint over AWS itself."""
    assert base_url(**arguments) == expected
