"""What the operations need of the bucket: `ObjectStore` has it, and the command line's own client, too."""

from collections.abc import AsyncIterator
from typing import Protocol

from shared.documents.document import Document, Model, body_of
from shared.errors import Unprocessable
from shared.objects import ObjectMissing, ObjectSummary
from shared.operations.refused import Refused


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


async def read(document: Document[Model], *, objects: Bucket) -> Model | None:
    """Return what a document holds, or None if there is none. Raises `Refused` where this version cannot read it."""
    try:
        return document.parse(await objects.get(document.key))
    except ObjectMissing:
        return None
    except Unprocessable:
        raise Refused(f"{document.key} is damaged, or of a newer version of radqueue") from None


async def store(document: Document[Model], content: Model, *, objects: Bucket) -> None:
    """Store a document, replacing what was there."""
    await objects.put(document.key, body_of(content))
