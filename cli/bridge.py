"""The command line's client as what `shared/operations` work with: coroutines over calls that block.

Operations are asynchronous, for a portal that serves many people at once. The command line serves one, and each of its
calls runs in a thread, so that ^C ends the wait for it.
"""

import asyncio
from collections.abc import AsyncIterator

from cli.client import Client
from shared.objects import ObjectMissing, ObjectSummary


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
        for item in await asyncio.to_thread(self._client.stored, prefix):
            yield item
