"""Sets a service's `stop` when EC2 announces that it takes the spot instance back, so that the drain runs in time.

https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html, read through IMDSv2. A
container reaches the metadata service only if the instance's hop limit is 2 or more.
"""

import asyncio
from collections.abc import Mapping
from http import HTTPStatus

import aiohttp
from pydantic import AwareDatetime, BaseModel, ValidationError

from shared.log import get_logger

ENDPOINT = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
DEFAULT_ENDPOINT = "http://169.254.169.254"
LOOK_S = 5.0
"""Seconds between two looks, as AWS recommends; its notice comes two minutes before the end."""
LONGEST_GRACE_S = 100.0
"""Seconds that the two minutes leave to handlers: the notice is seen up to LOOK_S late, and the drain deletes after
them."""
TIMEOUT = aiohttp.ClientTimeout(total=2)
log = get_logger()


class _Notice(BaseModel):
    action: str
    """What EC2 does with the instance: `terminate`, `stop` or `hibernate`."""
    time: AwareDatetime


async def watch(environ: Mapping[str, str], stop: asyncio.Event) -> None:
    """Look for a notice until there is one, then set `stop`. A metadata service that does not answer is told once."""
    endpoint = (environ.get(ENDPOINT) or DEFAULT_ENDPOINT).rstrip("/")
    warned = False
    async with aiohttp.ClientSession(timeout=TIMEOUT) as http:
        while True:
            try:
                notice = await _look(http, endpoint)
            except (aiohttp.ClientError, OSError, ValidationError) as error:
                if not warned:
                    log.warning("spot.metadata_unusable", error=type(error).__name__, endpoint=endpoint)
                warned = True
            else:
                if notice is not None:
                    log.warning("spot.interrupted", action=notice.action, time=notice.time.isoformat())
                    stop.set()
                    return
            await asyncio.sleep(LOOK_S)


async def _look(http: aiohttp.ClientSession, endpoint: str) -> _Notice | None:
    """Ask with a new token each time: one that is kept may have expired."""
    ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    async with http.put(f"{endpoint}/latest/api/token", headers=ttl, raise_for_status=True) as answer:
        token = {"X-aws-ec2-metadata-token": await answer.text()}
    async with http.get(f"{endpoint}/latest/meta-data/spot/instance-action", headers=token) as answer:
        if answer.status == HTTPStatus.NOT_FOUND:
            return None
        answer.raise_for_status()
        return _Notice.model_validate_json(await answer.read())
