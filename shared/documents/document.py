"""What every stored document has, and how one is read and written; `shared/keys.py` says which lies where.

Nothing here reaches S3: services read with `shared.idempotency`, the command line with its own client.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from shared.errors import Unprocessable


class Stored(BaseModel):
    """The model of a stored document. A body that was ever written parses for ever; unknown fields are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: Literal[1] = 1
    """The version of the format. A document without one is of the first version, which once did not have the field."""

    @classmethod
    def refusal(cls, key: str, _fields: Iterable[str]) -> Unprocessable:
        """Return what to raise for a body that does not fit the model; `_fields` are those that are wrong."""
        return Unprocessable("invalid_record", key)


Model = TypeVar("Model", bound=Stored)


@dataclass(frozen=True, slots=True)
class Document(Generic[Model]):
    """One stored document: its key, and the model of what lies there."""

    key: str
    model: type[Model]

    def parse(self, body: bytes) -> Model:
        """Read a body.

        Raises:
            Unprocessable: `invalid_record` with the key, or what the model has instead; never with a value.
        """
        try:
            return self.model.model_validate_json(body)
        except ValidationError as error:
            fields = {".".join(map(str, detail["loc"])) for detail in error.errors()}
            raise self.model.refusal(self.key, fields) from None


def body_of(document: Stored) -> bytes:
    """Return the body that is stored."""
    return document.model_dump_json(indent=1, by_alias=True).encode()
