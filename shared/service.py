"""What every service does at its start and at its end."""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

from botocore.exceptions import BotoCoreError, ClientError

from shared import log
from shared.aws import Aws, connect
from shared.config import Misconfigured, ServiceSettings, load
from shared.errors import Unavailable

EXIT_MISCONFIGURED = 2

Settings = TypeVar("Settings", bound=ServiceSettings)
Serve = Callable[[Settings, Aws, asyncio.Event], Awaitable[None]]


def run(name: str, settings_class: type[Settings], serve: Serve[Settings]) -> None:
    """Read the settings, open the clients and run `serve` until SIGTERM or SIGINT sets its event.

    Exits with 2, and says on standard error what is missing, where the settings or what they name cannot be used.
    """
    log.setup(name)
    try:
        settings = load(settings_class, os.environ)
        asyncio.run(_run(name, settings, serve))
    except Misconfigured as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"radqueue {name}: {line}\n")
        sys.exit(EXIT_MISCONFIGURED)


async def _run(name: str, settings: Settings, serve: Serve[Settings]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    logger = log.get_logger()
    async with connect(os.environ) as aws:
        await _bucket_answers(aws, settings.bucket)
        logger.info("service.started", **settings.model_dump(mode="json"))
        await serve(settings, aws, stop)
    logger.info("service.stopped", name=name)


async def _bucket_answers(aws: Aws, bucket: str) -> None:
    where = aws.endpoint_url or f"AWS in {aws.region}"
    try:
        await aws.s3.head_bucket(Bucket=bucket)
    except ClientError as error:
        code = error.response["Error"]["Code"]
        raise Misconfigured(f"RADQUEUE_BUCKET: S3 at {where} answers {code} for this bucket.") from None
    except (BotoCoreError, Unavailable) as error:
        raise Misconfigured(f"AWS_ENDPOINT_URL: {where} does not answer ({type(error).__name__}).") from None
