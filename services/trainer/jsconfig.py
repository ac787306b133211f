"""Reads and edits a config that is a JavaScript module: `export default { name: literal, … };`.

The file is parsed, never run, and edited in place: only the bytes of the changed values differ, so comments, order and
layout stay as a person left them. Values are literals: numbers, strings, true and false.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import tree_sitter_javascript
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from tree_sitter import Language, Node, Parser

from services.trainer.config import InvalidConfig, TrainingConfig, UnknownParameter
from shared.documents.training import Value

_JAVASCRIPT = Language(tree_sitter_javascript.language())
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f", "v": "\v", "0": "\0"}
_INTEGER = re.compile(r"0[xX][0-9a-fA-F]+|0[oO][0-7]+|0[bB][01]+|0|[1-9][0-9]*")
_DECIMAL = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def read_config(text: str) -> dict[str, Value]:
    """Return the properties of the exported object, in the file's order.

    A number written like an integer (`32`, `0x20`) is an int, any other (`2e-4`, `3.0`) a float.

    Raises:
        InvalidConfig: the file does not export one object of literals; the text names the line or the property.
    """
    return {name: _value(name, node) for name, node in _properties(text.encode())}


def modify_config(text: str, changes: Mapping[str, Value]) -> str:
    """Return `text` with the values of some properties replaced.

    Raises:
        UnknownParameter: a property is not in the file; the text names it.
        InvalidConfig: as `read_config`; or a new value cannot be written as a literal.
    """
    source = text.encode()
    places = dict(_properties(source))
    unknown = sorted(set(changes) - set(places))
    if unknown:
        raise UnknownParameter(f"unknown parameter: {', '.join(unknown)}")
    for name, node in places.items():
        _value(name, node)
    # From the end to the start: an edit leaves the places before it where they are.
    for name, node in sorted(places.items(), key=lambda place: place[1].start_byte, reverse=True):
        if name in changes:
            source = source[: node.start_byte] + _literal(name, changes[name]).encode() + source[node.end_byte :]
    return source.decode()


def checked_config(text: str) -> TrainingConfig:
    """Return the parameters of a training that the file holds.

    Raises:
        InvalidConfig: as `read_config`; or a parameter is missing, unknown, of the wrong type or out of range. The text
            names line and parameter, never the value.
    """
    places = dict(_properties(text.encode()))
    try:
        return TrainingConfig.model_validate({name: _value(name, node) for name, node in places.items()})
    except ValidationError as error:
        raise InvalidConfig("; ".join(_reason(detail, places) for detail in error.errors())) from None


def modify_config_file(path: str | Path, **changes: Value) -> None:
    """Edit the file in place: `modify_config_file("config.js", learningRate=1e-4)`.

    Raises:
        UnknownParameter, InvalidConfig: as `modify_config` and, of the outcome, `checked_config`; the file stays as it
            was.
    """
    path = Path(path)
    with path.open(encoding="utf-8", newline="") as file:  # newline="" keeps the file's own line ends
        text = modify_config(file.read(), changes)
    checked_config(text)
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)


def _reason(detail: ErrorDetails, places: Mapping[str, Node]) -> str:
    name = str(detail["loc"][0])
    what = {"missing": "missing", "extra_forbidden": "unknown parameter"}.get(detail["type"], detail["msg"])
    return f"line {places[name].start_point.row + 1}: {name}: {what}" if name in places else f"{name}: {what}"


def _properties(source: bytes) -> Iterator[tuple[str, Node]]:
    root = Parser(_JAVASCRIPT).parse(source).root_node
    if root.has_error:
        raise InvalidConfig(f"line {_first_error(root).start_point.row + 1}: not JavaScript")
    exported = [
        node.child_by_field_name("value")
        for node in root.named_children
        if node.type == "export_statement" and any(child.type == "default" for child in node.children)
    ]
    if len(exported) != 1 or exported[0] is None or exported[0].type != "object":
        raise InvalidConfig("not one `export default { … }`")
    seen: set[str] = set()
    for pair in exported[0].named_children:
        if pair.type == "comment":
            continue
        key, value = pair.child_by_field_name("key"), pair.child_by_field_name("value")
        if pair.type != "pair" or key is None or value is None or key.type not in ("property_identifier", "string"):
            raise InvalidConfig(f"line {pair.start_point.row + 1}: not `name: literal`")
        name = _string(key) if key.type == "string" else _text(key)
        if name in seen:
            raise InvalidConfig(f"{name}: given twice")
        seen.add(name)
        yield name, value


def _first_error(node: Node) -> Node:
    """Return the innermost first node with an error: its line is the one to name."""
    for child in node.children:
        if child.has_error or child.is_missing:
            return _first_error(child)
    return node


def _value(name: str, node: Node) -> Value:
    if node.type in ("true", "false"):
        return node.type == "true"
    if node.type == "string":
        return _string(node)
    sign, number = 1, node
    if node.type == "unary_expression" and node.child_count == 2 and _text(node.children[0]) in "+-":  # noqa: PLR2004
        sign, number = (-1 if _text(node.children[0]) == "-" else 1), node.children[1]
    if number.type == "number":
        digits = _text(number).replace("_", "")
        if _INTEGER.fullmatch(digits):
            return sign * int(digits, 0)
        if _DECIMAL.fullmatch(digits) and math.isfinite(float(digits)):
            return sign * float(digits)
    raise InvalidConfig(f"{name}: not a number, a string, true or false")


def _string(node: Node) -> str:
    text = "".join(
        _unescaped(_text(part)) if part.type == "escape_sequence" else _text(part) for part in node.named_children
    )
    try:  # Two escapes may be one character (a surrogate pair).
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise InvalidConfig(f"line {node.start_point.row + 1}: not a character") from None


def _unescaped(sequence: str) -> str:
    escaped = sequence[1:]
    if escaped[0] in "ux":
        try:
            return chr(int(escaped.strip("ux{}"), 16))
        except (ValueError, OverflowError):
            raise InvalidConfig("not a character") from None
    if escaped in ("\n", "\r\n", "\r", "\u2028", "\u2029"):  # a line that goes on
        return ""
    return _ESCAPES.get(escaped, escaped)


def _literal(name: str, value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidConfig(f"{name}: not a finite number")
    return repr(value.item() if isinstance(value, np.generic) else value)


def _text(node: Node) -> str:
    return (node.text or b"").decode()
