"""The routing table: which MAP runs on which series. Values in, values out; `read` is given the file's text.

```yaml
maps:
  - name: ct_tissues
    source: ct_tissues          # a folder, relative to this file
    when:                       # every condition must hold
      Modality: CT              # equals
      BodyPartExamined: [CHEST, THORAX]   # any of these
      SeriesDescription: {regex: "(?i)lung"}
      SliceThickness: {max: 5}
      n_instances: {min: 3}     # how many instances the series has
```

An attribute with several values, such as ImageType, satisfies a condition when one of them does. An attribute that the
series does not have satisfies none.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydicom.datadict import tag_for_keyword

from shared.config import Misconfigured
from shared.dicom import Revision
from shared.messages import Name

N_INSTANCES = "n_instances"
"""The one condition that is no DICOM keyword: how many instances the series has."""

Scalar = str | int | float
Value = Scalar | list[str] | list[float] | None


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return pattern


class Matches(_Strict):
    """A regular expression that is found somewhere in the text."""

    regex: Annotated[str, AfterValidator(_compiles)]

    def holds(self, value: Scalar) -> bool:
        """Tell whether it is found."""
        return re.search(self.regex, str(value)) is not None


class Within(_Strict):
    """Numbers from `min` to `max`, both included."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _has_a_bound(self) -> "Within":
        if self.min is None and self.max is None:
            raise ValueError("needs min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("min is above max")
        return self

    def holds(self, value: Scalar) -> bool:
        """Tell whether the number lies within; a text that is no number does not."""
        try:
            number = float(value)
        except ValueError:
            return False
        return (self.min is None or number >= self.min) and (self.max is None or number <= self.max)


Condition = Scalar | list[Scalar] | Matches | Within


def _known(keyword: str) -> str:
    if keyword != N_INSTANCES and tag_for_keyword(keyword) is None:
        raise ValueError(f"neither a DICOM keyword nor {N_INSTANCES}")
    return keyword


class Route(_Strict):
    """One MAP, where its source is, and which series it takes."""

    name: Name
    source: str
    when: dict[Annotated[str, AfterValidator(_known)], Condition] = Field(min_length=1)

    def takes(self, revision: Revision) -> bool:
        """Tell whether every condition holds for the series."""
        found: Mapping[str, Value] = {**revision.attributes, N_INSTANCES: len(revision.instances)}
        return all(_holds(condition, found.get(keyword)) for keyword, condition in self.when.items())


class RoutingTable(_Strict):
    """All MAPs of a worker."""

    maps: tuple[Route, ...]

    @model_validator(mode="after")
    def _names_are_unique(self) -> "RoutingTable":
        names = [route.name for route in self.maps]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"more than one MAP is named {', '.join(twice)}")
        return self


def read(text: str) -> RoutingTable:
    """Read `maps.yaml`.

    Raises:
        Misconfigured: with one line per place that is wrong.
    """
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise Misconfigured(f"maps.yaml: {where}not YAML.") from None
    try:
        return RoutingTable.model_validate(document)
    except ValidationError as error:
        raise Misconfigured("\n".join(sorted({_line(detail) for detail in error.errors()}))) from None


def _line(detail: Any) -> str:
    place = ".".join(str(part) for part in detail["loc"] if part != "[key]") or "the document"
    # A condition may be written in several forms; that each of them does not fit is more than one wants to read.
    if len(detail["loc"]) > 4 and detail["loc"][2] == "when" and detail["type"] != "value_error":  # noqa: PLR2004
        place = ".".join(str(part) for part in detail["loc"][:4])
        return f"maps.yaml: {place}: expected a value, a list of values, {{regex: …}}, or {{min: …, max: …}}."
    return f"maps.yaml: {place}: {detail['msg'].removeprefix('Value error, ')}."


def _holds(condition: Condition, value: Value) -> bool:
    if value is None:
        return False
    values = value if isinstance(value, list) else [value]
    return any(_holds_for(condition, one) for one in values)


def _holds_for(condition: Condition, value: Scalar) -> bool:
    if isinstance(condition, Matches | Within):
        return condition.holds(value)
    allowed = condition if isinstance(condition, list) else [condition]
    return any(_equal(one, value) for one in allowed)


def _equal(wanted: Scalar, value: Scalar) -> bool:
    """Compare numbers as numbers: a decimal string of DICOM and a number of YAML may be written differently."""
    if isinstance(wanted, str) and isinstance(value, str):
        return wanted == value
    try:
        return float(wanted) == float(value)
    except ValueError:
        return False
