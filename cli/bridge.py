"""The command line's client as what `shared/operations` work with: coroutines over calls that block.

Operations are asynchronous, for a portal that serves many people at once. The command line serves one, and each of its
calls runs in a thread, so that ^C ends the wait for it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from cli.client import Client
from shared.messages import Event
from shared.objects import ObjectMissing, ObjectSummary

if TYPE_CHECKING:
    from shared.queue import Publish

PAGE = 1000
"""Objects that are listed at a time."""


def publish_of(client: Client) -> "Publish":
    """Return what sends an event to the queues of its class."""

    async def publish(event: Event, *, delay_s: int = 0) -> None:
        await asyncio.to_thread(client.send, event, delay_s=delay_s)

    return publish


@contextmanager
def sqs_of(client: Client) -> Iterator[Any]:
    """Give the block the client of SQS, each of whose calls is awaited; what it raises is explained."""
    with client.sqs() as sqs:
        yield _Awaited(sqs)


class _Awaited:
    """A client of boto3 whose calls run in threads."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        return partial(asyncio.to_thread, getattr(self._client, name))


class Bucket:
    """The bucket of a `Client`, as `shared.operations.bucket.Bucket`."""

    def __init__(self, client: Client) -> None:
        """Take the client."""
        self._client = client

    async def get(self, key: str) -> bytes:
        """Return the whole object. Raises `ObjectMissing`."""
        body = await asyncio.to_thread(self._client.get, key)
        if body is None:
            raise ObjectMissing
        return body

    async def put(self, key: str, body: bytes) -> str:
        """Store `body`; returns the ETag."""
        return await asyncio.to_thread(self._client.put, key, body)

    async def copy(self, key: str, to: str) -> None:
        """Copy an object inside the bucket."""
        await asyncio.to_thread(self._client.copy, key, to)

    async def list(self, prefix: str) -> AsyncIterator[ObjectSummary]:
        """Yield every object whose key starts with `prefix`, in key order."""
        listing = self._client.listing(prefix)
        while page := await asyncio.to_thread(lambda: list(islice(listing, PAGE))):
            for item in page:
                yield item
