"""What the service and the children that read files say to each other: `decoder.Decoder` asks, `worker` answers.

Files go in and out by path. Each request is told by its `do`, and names its reply.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Discriminator, TypeAdapter

from services.ingest.datasets import BlankRule, Deidentification
from services.ingest.geometry import Slice
from shared.child import Json, Message, Request
from shared.messages import Geometry

ARRAY_METHOD = 3
"""Raised when arrays come out differently, so that their keys do."""
CONFIG_HASH_LENGTH = 16


# Archives.


@dataclass(frozen=True, slots=True)
class ZipCaps(Message):
    """Limits of one archive."""

    entries: int
    unpacked_bytes: int
    """All members together."""
    ratio: float
    """Unpacked size over packed size, of a member of a zip and of a gzipped tar."""


@dataclass(frozen=True, slots=True)
class Member(Message):
    """One file of a zip: `path` of its bytes, or the code of why there are none; neither where it is no image."""

    number: int
    path: str | None = None
    reason_code: str | None = None


@dataclass(frozen=True, slots=True)
class Unpacked(Message):
    """The members of an archive; None where the file is none."""

    members: Sequence[Member] | None


@dataclass(frozen=True, slots=True)
class Unpack(Request[Unpacked]):
    """Unpack the zip or tar at `path` into `folder`."""

    path: str
    folder: str
    caps: ZipCaps
    do: Literal["unpack"] = "unpack"


# Files.


@dataclass(frozen=True, slots=True)
class Caps(Message):
    """What reading one file may expand to: bytes of a data set, bytes of pixels, frames."""

    inflated: int
    pixels: int
    frames: int = 20_000


@dataclass(frozen=True, slots=True)
class Instance(Message):
    """A normalised instance."""

    study_uid: str
    series_uid: str
    sop_instance_uid: str
    sha: str
    """The sha256 of the data set as it was uploaded, so that the same data set in another wrapping is the same."""
    warnings: Sequence[str]
    decoder: str = ""
    """The library that decoded its compressed pixels; empty if they are not compressed."""


@dataclass(frozen=True, slots=True)
class Normalise(Request[Instance]):
    """Read the DICOM file at `path`, and write the normalised instance to `out`.

    With `deidentify` it is de-identified before it is written, and all that is replied is that of the de-identified
    instance.
    """

    path: str
    out: str
    caps: Caps
    deidentify: Deidentification | None = None
    secret: str = field(default="", repr=False)
    do: Literal["normalise"] = "normalise"


# Series.


@dataclass(frozen=True, slots=True)
class ArrayConfig(Message):
    """How an array is made."""

    size: int
    """H and W."""
    window: tuple[float, float] | None
    """Modality values that become -1 and 1; None: percentiles, which are not known yet."""
    percentiles: tuple[float, float]
    leave_out: tuple[str, ...] = ()
    """Names of rules: `blank`, `localizer`."""
    screened: str = ""
    """A hash of the rules that blank regions, if de-identified: pictures that may show the patient are left out."""

    def described(self) -> dict[str, object]:
        """Return the configuration as the sidecar tells it."""
        told = asdict(self) | {"method": ARRAY_METHOD}
        if self.window is not None:
            del told["percentiles"]
        return told

    def hash(self) -> str:
        """Return the part of the key that tells arrays of one revision apart."""
        told = json.dumps(self.described(), sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:CONFIG_HASH_LENGTH]


@dataclass(frozen=True, slots=True)
class Described(Message):
    """A series by the headers of its instances."""

    attributes: Mapping[str, Any]
    geometry: Geometry | None
    """The geometry of the series; None if it has no images."""
    warnings: Sequence[str]
    n_grey: int
    """Frames without colour."""
    deidentified: bool
    """True if all instances are de-identified."""


@dataclass(frozen=True, slots=True)
class Describe(Request[Described]):
    """Describe the series of the normalised instances at `paths`."""

    paths: Sequence[str]
    do: Literal["describe"] = "describe"


@dataclass(frozen=True, slots=True)
class Located(Message):
    """Where the frames of an instance lie."""

    slices: Sequence[Slice]
    modality: str | None


@dataclass(frozen=True, slots=True)
class Locate(Request[Located]):
    """Tell where the frames of the normalised instance at `path` lie."""

    path: str
    do: Literal["locate"] = "locate"


@dataclass(frozen=True, slots=True)
class Measured(Message):
    """The window that the percentiles of a series give, where there are any."""

    window: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Measure(Request[Measured]):
    """Measure the window of the series of the normalised instances at `paths`."""

    paths: Sequence[str]
    config: ArrayConfig
    blank: Sequence[BlankRule]
    do: Literal["measure"] = "measure"


@dataclass(frozen=True, slots=True)
class Assembled(Message):
    """What the sidecar of a training array tells of how it was made."""

    shape: Sequence[int]
    pixel_spacing_mm: Sequence[float] | None
    rows_columns: Sequence[int] | None
    left_out: Mapping[str, int]
    """Frames by the rule that left them out."""
    patient_key: str | None
    warnings: Sequence[str]


@dataclass(frozen=True, slots=True)
class Assemble(Request[Assembled]):
    """Write the training array of the normalised instances at `paths` to `out` (npy); the series is done then."""

    paths: Sequence[str]
    out: str
    config: ArrayConfig
    blank: Sequence[BlankRule]
    secret: str = field(repr=False)
    do: Literal["assemble"] = "assemble"


AnyRequest = Annotated[Unpack | Normalise | Describe | Locate | Measure | Assemble, Discriminator("do")]
_REQUESTS: TypeAdapter[AnyRequest] = TypeAdapter(AnyRequest)


def read(told: Json) -> AnyRequest:
    """Return the request that came as JSON."""
    return _REQUESTS.validate_python(told)
