"""The routing table: which MAP runs on which series. Values in, values out; `read` is given the file's text.

```yaml
maps:
  - name: ct_tissues
    source: ct_tissues          # a folder, relative to this file
    isolation: process          # a process per study by the MAP's own command; warm if it is not given
    python: /opt/ct/bin/python  # the interpreter of a folder; the worker's own if it is not given
    deadline_s: 900             # wall seconds per study; else the MAP's own timeout, else RADQUEUE_DEADLINE_S
    outputs: {SEG: 1}           # at least so many instances of a Modality; else at least one instance
    when:                       # every condition must hold
      Modality: CT              # equals
      BodyPartExamined: [CHEST, THORAX]   # any of these
      SeriesDescription: {regex: "(?i)lung"}
      SliceThickness: {max: 5}
      ContrastBolusAgent: {missing: true}
      n_instances: {min: 3}     # how many instances the series has
      geometry.verdict: regular # what ingest found of how the slices lie; fields of shared.messages.Geometry
    level: series               # or `study`: all series of a settled study that meet the conditions, in one run
    push: healthimaging         # where results go; without it, where the worker's settings say
    originals: true             # push the series that the MAP read, too, before its results
    golden: golden/ct           # a study that a new version is tried on: a folder, or s3://bucket/prefix/
```

Conditions are on what ingest tells of a series, `shared.documents.revisions.SERIES_ATTRIBUTES`: nothing that says who
the patient is. An attribute with several values, such as ImageType, satisfies a condition when one of them does. An
attribute that the series does not have satisfies `{missing: true}` and nothing else.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydicom.datadict import tag_for_keyword

from shared.documents.revisions import SERIES_ATTRIBUTES, Revision
from shared.messages import Geometry, Name
from shared.yaml_tables import read_table

N_INSTANCES = "n_instances"
"""The condition on how many instances a series has. It and those on its geometry are not DICOM keywords."""
GEOMETRY = frozenset(f"geometry.{name}" for name in Geometry.model_fields if name != "normal")

TargetName = Literal["healthimaging", "healthimaging-import", "dicomweb", "s3"]
"""The place that results go to: HealthImaging by STOW-RS or by an import job, a PACS by STOW-RS, or nowhere but S3."""
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
        """Tell whether the expression is found in the value."""
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
        """Tell whether the number lies within the bounds; a text that is not a number does not."""
        try:
            number = float(value)
        except ValueError:
            return False
        return (self.min is None or number >= self.min) and (self.max is None or number <= self.max)


class Missing(_Strict):
    """Whether the series lacks the attribute, or has it without a value."""

    missing: bool


Condition = Scalar | list[Scalar] | Matches | Within | Missing


def _known(keyword: str) -> str:
    if keyword in {N_INSTANCES, *GEOMETRY, *SERIES_ATTRIBUTES}:
        return keyword
    if tag_for_keyword(keyword) is not None:  # never true of a series, or of every one that lacks it
        raise ValueError(f"not among what ingest tells of a series: {', '.join(SERIES_ATTRIBUTES)}")
    raise ValueError(f"neither a DICOM keyword nor {N_INSTANCES} nor geometry.verdict or another of its fields")


class Route(_Strict):
    """One MAP, where its source is, and which series it takes."""

    name: Name
    source: str
    python: str | None = None
    isolation: Literal["warm", "process"] = "warm"
    deadline_s: float | None = Field(default=None, gt=0)
    outputs: dict[str, Annotated[int, Field(ge=1)]] | None = None
    """The least number of instances by Modality. Empty: any file will do; None: at least one instance of any kind."""
    when: dict[Annotated[str, AfterValidator(_known)], Condition] = Field(min_length=1)
    level: Literal["series", "study"] = "series"
    push: TargetName | None = None
    originals: bool | None = None
    golden: str | None = None

    def takes(self, revision: Revision) -> bool:
        """Tell whether every condition holds for the series."""
        return not self.unmet(revision)

    def unmet(self, revision: Revision) -> dict[str, Value]:
        """Return the conditions that do not hold for the series, each with what the series has instead."""
        found = _facts(revision)
        return {
            keyword: found.get(keyword)
            for keyword, condition in self.when.items()
            if not _holds(condition, found.get(keyword))
        }


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


def read(text: str, file: str = "maps.yaml") -> RoutingTable:
    """Read the routing table; `file` is what messages call it.

    Raises:
        Misconfigured: with one line per place that is wrong.
    """
    return read_table(text, RoutingTable, file=file, explain=_explained)


EXPECTED = {
    "maps": "`maps:` with a list of MAPs, each with name, source and when",
    "name": "letters, digits, '_', '.' and '-', at most 128",
    "source": "a folder, or an image with its tag",
    "python": "the path of an interpreter",
    "isolation": "warm or process",
    "deadline_s": "seconds, more than 0",
    "outputs": "the least number of instances by Modality, such as {SEG: 1}",
    "when": "at least one condition, such as {Modality: CT}",
    "level": "series or study",
    "push": ", ".join(get_args(TargetName)),
    "originals": "true or false",
    "golden": "a folder, or s3://bucket/prefix/",
}
"""What each key of the table takes, in words for error messages."""
KEYS = [key for key in EXPECTED if key != "maps"]
CONDITION = "a value, a list of values, {regex: …}, {min: …, max: …} or {missing: true}"


def _explained(detail: Any) -> str | None:
    """Say in one line what is expected at a place; pydantic tells of each form that it could have had."""
    place = [str(part) for part in detail["loc"] if part != "[key]"]
    match place:
        case [_, _, "when", _, *_] if detail["type"] == "value_error":
            return f"{'.'.join(place[:4])}: {detail['ctx']['error']}."
        case _ if detail["type"] == "value_error":
            return None
        case [_, _, "when", _, *_]:
            return f"{'.'.join(place[:4])}: expected {CONDITION}."
        case ["maps", _, key] if key not in EXPECTED:
            return f"{'.'.join(place)}: there is no such key; there are {', '.join(KEYS)}."
        case ["maps", _, key, *_] | [key] if key in EXPECTED:
            found = "is missing; " if detail["type"] == "missing" else ""
            return f"{'.'.join(place)}: {found}expected {EXPECTED[key]}."
    return f"{''.join(f'{part}.' for part in place)[:-1] or 'the document'}: expected {EXPECTED['maps']}."


def _facts(revision: Revision) -> Mapping[str, Value]:
    geometry = revision.geometry.model_dump(exclude={"normal"}) if revision.geometry else {}
    lies = {f"geometry.{name}": value for name, value in geometry.items()}
    return {**revision.attributes, **lies, N_INSTANCES: len(revision.instances)}


def _holds(condition: Condition, value: Value) -> bool:
    several = value if isinstance(value, list) else [value]
    values: list[Scalar] = [one for one in several if one is not None and one != ""]
    if isinstance(condition, Missing):
        return condition.missing == (not values)
    return any(_holds_for(condition, one) for one in values)


def _holds_for(condition: Scalar | list[Scalar] | Matches | Within, value: Scalar) -> bool:
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
