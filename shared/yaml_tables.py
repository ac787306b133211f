"""YAML that people write, read into a model; an error names each place that is wrong by its line or its name."""

from collections.abc import Callable
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from shared.config import Misconfigured

Table = TypeVar("Table", bound=BaseModel)


class _Repeated(yaml.MarkedYAMLError):
    """A key stands twice in one mapping."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, except that it refuses a repeated key, of which PyYAML takes the last without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _Repeated(problem_mark=key.start_mark)
                seen.add(key.value)
        return node


def read_table(
    text: str, table: type[Table], *, file: str, explain: Callable[[Any], str | None] = lambda _: None
) -> Table:
    """Read a document; an empty one has nothing but the model's defaults.

    `file` is what messages call it. `explain` may say better what is wrong in one of pydantic's error details.

    Raises:
        Misconfigured: with one line per place that is wrong.
    """
    try:
        document = yaml.load(text, _Loader)  # noqa: S506 - a safe loader
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = "a key that stands there twice" if isinstance(error, _Repeated) else "not YAML"
        raise Misconfigured(f"{file}: {where}{what}.") from None
    try:
        return table.model_validate({} if document is None else document)
    except ValidationError as error:
        lines = {f"{file}: {explain(detail) or _line(detail)}" for detail in error.errors()}
        raise Misconfigured("\n".join(sorted(lines))) from None


def _line(detail: Any) -> str:
    place = ".".join(str(part) for part in detail["loc"] if part != "[key]") or "the document"
    unknown = detail["type"] == "extra_forbidden"
    return f"{place}: {'there is no such key' if unknown else detail['msg'].removeprefix('Value error, ')}."
