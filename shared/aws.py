"""The only door to aiobotocore: opens the clients, here and on AWS alike.

A client needs nothing but the standard variables: `AWS_REGION`, credentials, and `AWS_ENDPOINT_URL` for AWS on one
machine.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession, get_session
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import NoCredentialsError

from shared.config import Misconfigured

if TYPE_CHECKING:
    from types_aiobotocore_cloudwatch import CloudWatchClient
    from types_aiobotocore_medical_imaging import HealthImagingClient
    from types_aiobotocore_s3 import S3Client
    from types_aiobotocore_sqs import SQSClient

LONGEST_POLL_S = 20
"""The longest that SQS lets a poll wait, in seconds:
https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-short-and-long-polling.html"""
CONNECT_TIMEOUT_S = 5
CONNECTIONS = 50


@dataclass(frozen=True, slots=True)
class Aws:
    """Open clients, and what signs requests that no SDK makes."""

    s3: "S3Client"
    sqs: "SQSClient"
    cloudwatch: "CloudWatchClient"
    medical_imaging: "HealthImagingClient"
    region: str
    endpoint_url: str | None
    """The endpoint that AWS_ENDPOINT_URL names; None on AWS itself."""
    session: AioSession
    client: Callable[[str], Awaitable[Any]]
    """Opens the client of another service, by its name; it is closed with these."""

    async def credentials(self) -> ReadOnlyCredentials:
        """Return the credentials that are valid now; temporary ones change, so ask before each request."""
        credentials = await self.session.get_credentials()
        if credentials is None:
            raise NoCredentialsError
        frozen: ReadOnlyCredentials = await credentials.get_frozen_credentials()
        return frozen


@asynccontextmanager
async def connect(environ: Mapping[str, str]) -> AsyncIterator[Aws]:
    """Open the clients. Raises `Misconfigured` if the region or the credentials are missing."""
    region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
    if not region:
        raise Misconfigured("AWS_REGION: not set. The region of the bucket, the queues and the data store.")
    endpoint_url = environ.get("AWS_ENDPOINT_URL")
    session = get_session()
    if await session.get_credentials() is None:
        raise Misconfigured("AWS_ACCESS_KEY_ID: no credentials found. Set them, or run where a role gives them.")
    config = AioConfig(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=LONGEST_POLL_S + 40,
        max_pool_connections=CONNECTIONS,
        retries={"mode": "standard", "max_attempts": 3},
        # botocore would put its own together for each request, which is a tenth of what a call costs.
        user_agent="radqueue",
        # AWS's own endpoints require the host prefix of HealthImaging, any other does not have it.
        inject_host_prefix=endpoint_url is None,
        s3={"addressing_style": "path"} if endpoint_url else None,
    )
    create: Any = session.create_client  # its overloads list every service by name
    async with AsyncExitStack() as stack:

        async def client(name: str, **other: Any) -> Any:
            merged = config.merge(AioConfig(**other))
            return await stack.enter_async_context(create(name, region_name=region, config=merged))

        yield Aws(
            s3=await client("s3"),
            # Called all the time: what botocore would check again for each call, mypy has checked, and SQS checks.
            sqs=await client("sqs", parameter_validation=False),
            cloudwatch=await client("cloudwatch"),
            medical_imaging=await client("medical-imaging"),
            region=region,
            endpoint_url=endpoint_url,
            session=session,
            client=client,
        )
