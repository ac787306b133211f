"""What the operations need of the bucket: `ObjectStore` has it, and the command line's own client, too."""

import json
from collections.abc import AsyncIterator
from typing import Any, Protocol

from shared.objects import ObjectMissing, ObjectSummary


class Bucket(Protocol):
    """Reads and writes objects; `get` and `copy` raise `ObjectMissing`."""

    async def get(self, key: str) -> bytes:
        """Return the whole object."""

    async def put(self, key: str, body: bytes) -> str:
        """Store `body`, replacing what was there; returns the ETag."""

    async def copy(self, key: str, to: str) -> None:
        """Copy an object inside the bucket, whatever its size."""

    def list(self, prefix: str) -> AsyncIterator[ObjectSummary]:
        """Yield every object whose key starts with `prefix`, in key order."""


async def document(key: str, *, objects: Bucket) -> dict[str, Any] | None:
    """Return the JSON object under `key`, or None where there is none."""
    try:
        found: dict[str, Any] = json.loads(await objects.get(key))
    except ObjectMissing:
        return None
    return found
