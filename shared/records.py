"""State as JSON objects: a pydantic model under a key of the object store."""

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from shared.errors import Unprocessable
from shared.objects import ObjectMissing, ObjectStore

Record = TypeVar("Record", bound=BaseModel)


async def stored(objects: ObjectStore, key: str, kind: type[Record]) -> Record | None:
    """Return the record under `key`, or None where there is none yet.

    Raises:
        Unprocessable: `invalid_record`: something else wrote there.
    """
    try:
        return kind.model_validate_json(await objects.get(key))
    except ObjectMissing:
        return None
    except ValidationError:
        raise Unprocessable("invalid_record", key) from None


async def store_once(objects: ObjectStore, key: str, record: Record) -> Record:
    """Store the record unless there is one already, and return the one that is there."""
    if await objects.put_if_absent(key, record.model_dump_json(indent=1).encode()):
        return record
    return await stored(objects, key, type(record)) or record
