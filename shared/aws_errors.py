"""What an error of AWS means: the one place that tells botocore's and aiohttp's errors apart.

A caller catches `AWS_ERRORS` and asks `kind_of`, or lets `answering` turn all of them into `Unavailable`. The text of
an error stays out of every log and message, because it may quote a request: an error is named by `code_of`.

Sources: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html,
https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/CommonErrors.html
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from http import HTTPStatus

import aiohttp
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    NoRegionError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
)

from shared.errors import Unavailable

AWS_ERRORS = (BotoCoreError, ClientError, aiohttp.ClientError, OSError)
"""All that a call to AWS raises; reading a body raises aiohttp's, and what happens on this machine is an OSError."""


class Kind(StrEnum):
    """What an error says about the call that raised it."""

    UNAVAILABLE = "unavailable"
    """Nothing answers, or the answer is a throttle, a conflict or a server's own failure: it may work later."""
    MISSING = "missing"
    """What was asked for does not exist."""
    PRECONDITION_FAILED = "precondition_failed"
    """A conditional write came second: another writer was there before."""
    DENIED = "denied"
    """The credentials are unknown, expired or not allowed to do this."""
    MISCONFIGURED = "misconfigured"
    """What a setting names (the bucket, a queue, the region, the credentials) does not exist."""
    INVALID = "invalid"
    """The request itself is wrong: sent again, it would be refused again."""
    REFUSED = "refused"
    """Refused for a reason that only the caller may know."""


KINDS = {
    Kind.UNAVAILABLE: {
        # S3 asks to send it again: the other writer may not have stored anything yet, so neither has won.
        "ConditionalRequestConflict",
        "InternalError",
        "InternalFailure",
        "InternalServerException",
        "OperationAborted",
        "ProvisionedThroughputExceededException",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestTimeout",
        "ServiceQuotaExceededException",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
    },
    Kind.MISSING: {"404", "NoSuchKey", "NoSuchUpload", "NotFound", "ResourceNotFound", "ResourceNotFoundException"},
    Kind.PRECONDITION_FAILED: {"412", "PreconditionFailed"},
    Kind.DENIED: {
        "403",
        "AccessDenied",
        "AccessDeniedException",
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "InvalidSignatureException",
        "InvalidToken",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    },
    Kind.MISCONFIGURED: {
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
        "NoSuchBucket",
        "NonExistentQueue",
        "PermanentRedirect",
        "QueueDoesNotExist",
    },
    Kind.INVALID: {
        "InvalidParameterCombination",
        "InvalidParameterValue",
        "MissingParameter",
        "MissingRequiredParameter",
    },
}
"""Each kind's codes. HEAD has no body to name a code in, so botocore puts the status there."""
KIND_OF_CODE = {code: kind for kind, codes in KINDS.items() for code in codes}
KIND_OF_STATUS: dict[int, Kind] = {
    HTTPStatus.UNAUTHORIZED: Kind.DENIED,
    HTTPStatus.FORBIDDEN: Kind.DENIED,
    HTTPStatus.NOT_FOUND: Kind.MISSING,
    HTTPStatus.PRECONDITION_FAILED: Kind.PRECONDITION_FAILED,
    HTTPStatus.TOO_MANY_REQUESTS: Kind.UNAVAILABLE,
}
"""The kind that an HTTP status stands for, if the code is not in the list above."""
MISCONFIGURATIONS = (NoCredentialsError, NoRegionError, PartialCredentialsError, ProfileNotFound)


def kind_of(error: BaseException) -> Kind:
    """Tell what one of `AWS_ERRORS` says about the call that raised it."""
    if isinstance(error, ClientError):
        return _kind_of_answer(code_of(error), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    if isinstance(error, ParamValidationError):
        return Kind.INVALID
    return Kind.MISCONFIGURED if isinstance(error, MISCONFIGURATIONS) else Kind.UNAVAILABLE


def _kind_of_answer(code: str, status: int | None) -> Kind:
    # InvalidParameterValueException of one service is InvalidParameterValue of another.
    for name in (code, code.removesuffix("Exception")):
        if name in KIND_OF_CODE:
            return KIND_OF_CODE[name]
    if status is None or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return Kind.UNAVAILABLE
    return KIND_OF_STATUS.get(status, Kind.REFUSED)


def code_of(error: BaseException) -> str:
    """Name an error without its text: the service's code, or else the type of the exception."""
    if not isinstance(error, ClientError):
        return type(error).__name__
    code: str = error.response["Error"]["Code"]
    return code.rsplit(".", 1)[-1]  # SQS says `AWS.SimpleQueueService.NonExistentQueue`


def is_answer(error: BaseException) -> bool:
    """Tell whether the service itself answered with this error, rather than not answering at all."""
    return isinstance(error, ClientError)


def unavailable(service: str, error: BaseException) -> Unavailable:
    """Return the `Unavailable` that says which service did not do as asked, and how: `S3: SlowDown`."""
    if _is_of_this_machine(error):
        return Unavailable(f"this machine: {errno.errorcode.get(getattr(error, 'errno', 0) or 0, 'unknown')}")
    return Unavailable(f"{service}: {code_of(error)}")


def _is_of_this_machine(error: BaseException) -> bool:
    # Several of botocore's and aiohttp's errors are OSErrors as well.
    elsewhere = (BotoCoreError, aiohttp.ClientError, ConnectionError, TimeoutError)
    return isinstance(error, OSError) and not isinstance(error, elsewhere)


@contextmanager
def answering(service: str) -> Iterator[None]:
    """Raise all that AWS raises in the block as `Unavailable`.

    This holds for expired credentials, a policy or a throttle, too: the work is good, and can be done when they are
    mended.
    """
    try:
        yield
    except AWS_ERRORS as error:
        raise unavailable(service, error) from None
