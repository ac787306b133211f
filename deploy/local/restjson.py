"""Requests of a REST-JSON service as botocore's service model describes them: their routes, parameters and checks.

The model says which operations exist, where each of their parameters travels, what is required, and which pattern,
length and range a value has.
"""

import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, cast

from botocore.model import OperationModel, ServiceModel, Shape, StringShape, StructureShape
from werkzeug.routing import Map, Rule
from werkzeug.wrappers import Request

ERRORS = {
    "ValidationException": 400,
    "ResourceNotFoundException": 404,
    "ConflictException": 409,
    "ThrottlingException": 429,
}


class ApiError(Exception):
    """An error of the model, by its name; `message` never holds a value of the request."""

    def __init__(self, code: str, message: str, status: int | None = None) -> None:
        """Take the HTTP status from the model's errors, or from the caller where the model has none."""
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status or ERRORS[code]


def routes(service: ServiceModel) -> Map:
    """Return the map from a path and method to the operation that the model has there."""
    operations = map(service.operation_model, service.operation_names)
    return Map([Rule(_rule(one.http["requestUri"]), methods=[one.http["method"]], endpoint=one) for one in operations])


def _rule(template: str) -> str:
    # A resource's ARN holds slashes.
    return template.replace("{resourceArn}", "<path:resourceArn>").replace("{", "<").replace("}", ">")


def parameters(operation: OperationModel, request: Request, in_path: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checked parameters by the names that the model gives them."""
    # Every operation of this service takes parameters.
    shape = cast("StructureShape", operation.input_shape)
    body = _body(request)
    payload = shape.serialization.get("payload")
    found: dict[str, Any] = {}
    for name, member in shape.members.items():
        location = member.serialization.get("location")
        wire_name = member.serialization.get("name", name)
        if location == "uri":
            value: Any = in_path.get(wire_name)
        elif location == "querystring":
            value = _from_text(member, request.args.get(wire_name), name)
        else:
            value = (body or None) if name == payload else body.get(wire_name)
        if value is not None:
            found[name] = value
    check(shape, found, "request")
    return found


def _body(request: Request) -> dict[str, Any]:
    content = request.get_data()
    try:
        body = json.loads(content) if content else {}
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise ApiError("ValidationException", "the body is not a JSON object")
    return body


def _from_text(shape: Shape, text: str | None, place: str) -> Any:
    if text is None or shape.type_name != "integer":
        return text
    try:
        return int(text)
    except ValueError as error:
        raise ApiError("ValidationException", f"{place} is not an integer") from error


# Checking a value against the model.


def check(shape: Shape, value: Any, place: str) -> None:
    """Raise a ValidationException that names the place where `value` breaks the model."""
    checker = CHECKS.get(shape.type_name)
    problem = checker(shape, value, place) if checker else None
    if problem:
        raise ApiError("ValidationException", f"{place} {problem}")


def _check_structure(shape: Any, value: Any, place: str) -> str | None:
    if not isinstance(value, dict):
        return "is not an object"
    for name in shape.required_members:
        if value.get(name) is None:
            return f"lacks {name}"
    given = {name: member for name, member in shape.members.items() if value.get(name) is not None}
    if getattr(shape, "is_tagged_union", False) and len(given) != 1:
        return "does not have exactly one member"
    for name, member in given.items():
        check(member, value[name], f"{place}.{name}")
    return None


def _check_list(shape: Any, value: Any, place: str) -> str | None:
    if not isinstance(value, list):
        return "is not a list"
    for index, item in enumerate(value):
        check(shape.member, item, f"{place}[{index}]")
    return _check_bounds(shape, len(value), "members")


def _check_map(shape: Any, value: Any, place: str) -> str | None:
    if not isinstance(value, dict):
        return "is not an object"
    for key, item in value.items():
        check(shape.key, key, f"a key of {place}")
        check(shape.value, item, f"a value of {place}")
    return None


def _check_string(shape: StringShape, value: Any, _place: str) -> str | None:
    if not isinstance(value, str):
        return "is not a string"
    if shape.enum and value not in shape.enum:
        return f"is none of {', '.join(shape.enum)}"
    # Python's `re` has no \\p{ASCII}.
    pattern = shape.metadata.get("pattern", "").replace(r"\p{ASCII}", r"[\x00-\x7f]")
    if pattern and not re.fullmatch(pattern, value):
        return f"does not match {pattern}"
    return _check_bounds(shape, len(value), "characters")


def _check_integer(shape: Shape, value: Any, _place: str) -> str | None:
    if not isinstance(value, int) or isinstance(value, bool):
        return "is not an integer"
    return _check_bounds(shape, value, "")


def _check_boolean(_shape: Shape, value: Any, _place: str) -> str | None:
    return None if isinstance(value, bool) else "is not a boolean"


def _check_timestamp(_shape: Shape, value: Any, _place: str) -> str | None:
    return None if seconds_of(value) is not None else "is not a timestamp"


def _check_bounds(shape: Shape, size: int, unit: str) -> str | None:
    lowest, highest = shape.metadata.get("min"), shape.metadata.get("max")
    if (lowest is not None and size < lowest) or (highest is not None and size > highest):
        return f"is not between {lowest} and {highest} {unit}".rstrip()
    return None


CHECKS: dict[str, Callable[[Any, Any, str], str | None]] = {
    "structure": _check_structure,
    "list": _check_list,
    "map": _check_map,
    "string": _check_string,
    "integer": _check_integer,
    "boolean": _check_boolean,
    "timestamp": _check_timestamp,
}


def seconds_of(value: Any) -> float | None:
    """Return a timestamp as seconds since the epoch; clients send it as a number or in ISO 8601."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    try:
        return datetime.fromisoformat(value).timestamp()
    except (TypeError, ValueError):
        return None
