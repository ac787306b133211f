"""YAML that people write, read into a model; every place that is wrong is told by its line or its name."""

from collections.abc import Callable
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from shared.config import Misconfigured

Table = TypeVar("Table", bound=BaseModel)


def read_table(
    text: str, table: type[Table], *, file: str, explain: Callable[[Any], str | None] = lambda _: None
) -> Table:
    """Read a document; an empty one has nothing but the model's defaults.

    `file` is what messages call it. `explain` may say better what is wrong in one of pydantic's error details.

    Raises:
        Misconfigured: with one line per place that is wrong.
    """
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise Misconfigured(f"{file}: {where}not YAML.") from None
    try:
        return table.model_validate({} if document is None else document)
    except ValidationError as error:
        lines = {f"{file}: {explain(detail) or _line(detail)}" for detail in error.errors()}
        raise Misconfigured("\n".join(sorted(lines))) from None


def _line(detail: Any) -> str:
    place = ".".join(str(part) for part in detail["loc"] if part != "[key]") or "the document"
    return f"{place}: {detail['msg'].removeprefix('Value error, ')}."
