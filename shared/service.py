"""What every service does at its start and at its end."""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from shared import log, spot
from shared.aws import Aws, connect
from shared.aws_errors import AWS_ERRORS, Kind, code_of, is_answer, kind_of
from shared.concurrency import Stop
from shared.config import Misconfigured, ServiceSettings, load
from shared.metrics import Metrics
from shared.workfolder import own_folder, temporary_files_in

EXIT_MISCONFIGURED = 2
START_PAUSE_S = 1

Settings = TypeVar("Settings", bound=ServiceSettings)
Serve = Callable[[Settings, Aws, Metrics, asyncio.Event], Awaitable[None]]
LAST_FLUSH_S = 5
"""Seconds that the last metrics get; a stop must not wait for a CloudWatch that does not answer."""


def run(name: str, settings_class: type[Settings], serve: Serve[Settings]) -> None:
    """Read the settings, open the clients and run `serve` until SIGTERM or SIGINT sets its event.

    Exits with 2, and says on standard error what is missing, if the settings or what they name cannot be used; with 1
    after a bug, which is logged by type and place.
    """
    log.setup(name)
    try:
        settings = load(settings_class, os.environ)
        with _work_folder(settings.work_dir):
            asyncio.run(_run(settings, serve))
    except Misconfigured as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"radqueue {name}: {line}\n")
        sys.exit(EXIT_MISCONFIGURED)
    except Exception as error:  # noqa: BLE001 - its text, which Python would print, may quote anything
        log.get_logger().critical("service.crashed", exc_info=error)
        sys.exit(1)


@contextmanager
def _work_folder(work_dir: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            own = stack.enter_context(own_folder(work_dir))
        except OSError as error:
            raise Misconfigured(f"RADQUEUE_WORK_DIR: {work_dir} cannot be used ({type(error).__name__}).") from None
        stack.enter_context(temporary_files_in(own))
        yield


async def _run(settings: Settings, serve: Serve[Settings]) -> None:
    if settings.spot_notice and settings.grace_s > spot.LONGEST_GRACE_S:
        raise Misconfigured(f"RADQUEUE_GRACE_S: a spot instance leaves at most {spot.LONGEST_GRACE_S:g} s.")
    stop = Stop()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    logger = log.get_logger()
    async with connect(os.environ) as aws:
        logger.info("service.started", **settings.model_dump(mode="json"))
        metrics = Metrics(aws.cloudwatch)
        beside = [asyncio.create_task(metrics.keep_flushing(settings.metrics_flush_s, asyncio.Event()))]
        if settings.spot_notice:
            beside.append(asyncio.create_task(spot.watch(os.environ, stop)))
        try:
            await _serve(serve, settings, aws, metrics, stop)
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_FLUSH_S):
                    await metrics.flush()
    logger.info("service.stopped")


async def _serve(serve: Serve[Settings], settings: Settings, aws: Aws, metrics: Metrics, stop: Stop) -> None:
    """Wait for the bucket and serve. A stop that is not heeded yet cancels both, wherever they are."""

    async def start() -> None:
        await _bucket_answers(aws, settings.bucket, settings.start_patience_s)
        await serve(settings, aws, metrics, stop)

    serving, stopping = asyncio.create_task(start()), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
        if stop.heeded or serving.done():
            await serving
    finally:
        for task in (serving, stopping):
            task.cancel()
        await asyncio.gather(serving, stopping, return_exceptions=True)


async def _bucket_answers(aws: Aws, bucket: str, patience_s: float) -> None:
    """Wait until the bucket answers and is there: a service may be started before what it needs.

    Raises:
        Misconfigured: it is not ours, or it is not there or does not answer for `patience_s` seconds.
    """
    where = aws.endpoint_url or f"AWS in {aws.region}"
    until = asyncio.get_running_loop().time() + patience_s
    while True:
        try:
            async with asyncio.timeout_at(until + START_PAUSE_S):
                await aws.s3.head_bucket(Bucket=bucket)
        except AWS_ERRORS as error:
            wrong = f"AWS_ENDPOINT_URL: {where} does not answer ({code_of(error)})."
            if is_answer(error):
                wrong = f"RADQUEUE_BUCKET: S3 at {where} answers {code_of(error)} for this bucket."
            later = kind_of(error) in (Kind.UNAVAILABLE, Kind.MISSING)
            if not later or asyncio.get_running_loop().time() >= until:
                raise Misconfigured(wrong) from None
        else:
            return
        log.get_logger().warning("service.waiting", why=wrong)
        await asyncio.sleep(START_PAUSE_S)
