"""An error of AWS is told apart in one place, by its code, its status or its class."""

import errno
import re
from pathlib import Path

import aiohttp
import pytest
from botocore import exceptions
from botocore.exceptions import ClientError

from shared.aws_errors import AWS_ERRORS, KINDS, Kind, answering, code_of, is_answer, kind_of
from shared.errors import Unavailable

SOURCES = Path(__file__).parents[2]
ANSWERS = [
    ("SlowDown", 503, Kind.UNAVAILABLE),
    ("ServiceUnavailable", 503, Kind.UNAVAILABLE),
    ("InternalError", 500, Kind.UNAVAILABLE),
    ("RequestTimeout", 400, Kind.UNAVAILABLE),
    ("ThrottlingException", 400, Kind.UNAVAILABLE),
    ("RequestThrottled", 403, Kind.UNAVAILABLE),
    ("TooManyRequestsException", 429, Kind.UNAVAILABLE),
    ("ServiceQuotaExceededException", 402, Kind.UNAVAILABLE),
    ("ConditionalRequestConflict", 409, Kind.UNAVAILABLE),
    ("OperationAborted", 409, Kind.UNAVAILABLE),
    ("SomethingNew", 502, Kind.UNAVAILABLE),
    ("SomethingNew", 429, Kind.UNAVAILABLE),
    ("SomethingNew", None, Kind.UNAVAILABLE),
    ("NoSuchKey", 404, Kind.MISSING),
    ("404", 404, Kind.MISSING),
    ("NoSuchUpload", 404, Kind.MISSING),
    ("ResourceNotFoundException", 404, Kind.MISSING),
    ("SomethingNew", 404, Kind.MISSING),
    ("PreconditionFailed", 412, Kind.PRECONDITION_FAILED),
    ("412", 412, Kind.PRECONDITION_FAILED),
    ("SomethingNew", 412, Kind.PRECONDITION_FAILED),
    ("AccessDenied", 403, Kind.DENIED),
    ("AccessDeniedException", 400, Kind.DENIED),
    ("403", 403, Kind.DENIED),
    ("SomethingNew", 403, Kind.DENIED),
    ("SomethingNew", 401, Kind.DENIED),
    ("InvalidAccessKeyId", 403, Kind.DENIED),
    ("SignatureDoesNotMatch", 403, Kind.DENIED),
    ("ExpiredToken", 400, Kind.DENIED),
    ("ExpiredTokenException", 400, Kind.DENIED),
    ("UnrecognizedClientException", 400, Kind.DENIED),
    ("RequestTimeTooSkewed", 403, Kind.DENIED),
    ("NoSuchBucket", 404, Kind.MISCONFIGURED),
    ("AWS.SimpleQueueService.NonExistentQueue", 400, Kind.MISCONFIGURED),
    ("QueueDoesNotExist", 400, Kind.MISCONFIGURED),
    ("PermanentRedirect", 301, Kind.MISCONFIGURED),
    ("InvalidParameterValue", 400, Kind.INVALID),
    ("InvalidParameterValueException", 400, Kind.INVALID),
    ("MissingParameter", 400, Kind.INVALID),
    ("400", 400, Kind.REFUSED),
    ("ValidationException", 400, Kind.REFUSED),
    ("ResourceInUse", 400, Kind.REFUSED),
    ("SomethingNew", 409, Kind.REFUSED),
    ("SomethingNew", 499, Kind.REFUSED),
]
RAISED = [
    (exceptions.EndpointConnectionError(endpoint_url="http://127.0.0.1:1"), Kind.UNAVAILABLE),
    (exceptions.ConnectTimeoutError(endpoint_url="http://127.0.0.1:1"), Kind.UNAVAILABLE),
    (exceptions.ReadTimeoutError(endpoint_url="http://127.0.0.1:1"), Kind.UNAVAILABLE),
    (exceptions.ConnectionClosedError(endpoint_url="http://127.0.0.1:1"), Kind.UNAVAILABLE),
    (exceptions.SSLError(endpoint_url="http://127.0.0.1:1", error="x"), Kind.UNAVAILABLE),
    (exceptions.ProxyConnectionError(proxy_url="http://127.0.0.1:1"), Kind.UNAVAILABLE),
    (exceptions.HTTPClientError(error="x"), Kind.UNAVAILABLE),
    (exceptions.ResponseStreamingError(error="x"), Kind.UNAVAILABLE),
    (exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2), Kind.UNAVAILABLE),
    (exceptions.CredentialRetrievalError(provider="iam-role", error_msg="x"), Kind.UNAVAILABLE),
    (exceptions.MetadataRetrievalError(error_msg="x"), Kind.UNAVAILABLE),
    (exceptions.NoCredentialsError(), Kind.MISCONFIGURED),
    (exceptions.PartialCredentialsError(provider="env", cred_var="x"), Kind.MISCONFIGURED),
    (exceptions.NoRegionError(), Kind.MISCONFIGURED),
    (exceptions.ProfileNotFound(profile="x"), Kind.MISCONFIGURED),
    (exceptions.ParamValidationError(report="x"), Kind.INVALID),
    (aiohttp.ClientPayloadError("x"), Kind.UNAVAILABLE),
    (aiohttp.ServerDisconnectedError("x"), Kind.UNAVAILABLE),
    (ConnectionResetError("x"), Kind.UNAVAILABLE),
    (TimeoutError("x"), Kind.UNAVAILABLE),
    (OSError(errno.ENOSPC, "x"), Kind.UNAVAILABLE),
]


def answer(code, status) -> ClientError:
    metadata = {} if status is None else {"ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError({"Error": {"Code": code, "Message": "Jane Doe"}, **metadata}, "PutObject")


@pytest.mark.parametrize(("code", "status", "kind"), ANSWERS)
def test_an_answer_is_told_apart_by_its_code_and_then_by_its_status(code, status, kind):
    """A code that is known decides; one that is not leaves it to the status."""
    error = answer(code, status)

    assert kind_of(error) is kind
    assert is_answer(error)
    assert code_of(error) == code.rsplit(".", 1)[-1]


@pytest.mark.parametrize(("error", "kind"), RAISED, ids=lambda value: type(value).__name__)
def test_what_is_no_answer_is_told_apart_by_its_class(error, kind):
    """Nobody answered: it may pass by itself, unless it is about the settings or the request."""
    assert isinstance(error, AWS_ERRORS)
    assert kind_of(error) is kind
    assert not is_answer(error)
    assert code_of(error) == type(error).__name__


def test_a_code_is_of_one_kind():
    """No code stands in two rows of the table, with or without the ending that some services give it."""
    kinds: dict[str, set[Kind]] = {}
    for kind, codes in KINDS.items():
        for code in codes:
            kinds.setdefault(code.removesuffix("Exception"), set()).add(kind)

    assert [code for code, found in kinds.items() if len(found) > 1] == []


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (answer("SlowDown", 503), "S3: SlowDown"),
        (answer("AccessDenied", 403), "S3: AccessDenied"),
        (exceptions.ReadTimeoutError(endpoint_url="http://jane.doe"), "S3: ReadTimeoutError"),
        (exceptions.ConnectionError(error="jane.doe"), "S3: ConnectionError"),
        (aiohttp.ClientOSError(errno.ECONNRESET, "jane.doe"), "S3: ClientOSError"),
        (TimeoutError("jane.doe"), "S3: TimeoutError"),
        (OSError(errno.ENOSPC, "jane.doe"), "this machine: ENOSPC"),
        (OSError("jane.doe"), "this machine: unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unavailable_names_the_error_without_its_text(error, text):
    """The text of an error may quote a request; the error's name and the service are enough to act on."""
    with pytest.raises(Unavailable) as caught, answering("S3"):
        raise error

    assert str(caught.value) == text
    assert caught.value.__suppress_context__


def test_a_bug_stays_a_bug():
    """What AWS does not raise passes through."""
    with pytest.raises(KeyError), answering("S3"):
        raise KeyError("x")


def test_no_other_module_tells_them_apart():
    """The bases of botocore's errors are named in one module only."""
    modules = [path for top in ("shared", "services", "cli", "deploy") for path in (SOURCES / top).rglob("*.py")]
    bases = re.compile(r"\b(BotoCoreError|(?<!aiohttp\.)ClientError)\b")

    assert [path.name for path in modules if bases.search(path.read_text())] == ["aws_errors.py"]
