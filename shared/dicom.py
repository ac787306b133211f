"""What ingest stores and inference reads: keys of instances, the digest of a series, the revision document."""

import hashlib
import logging
import re
import warnings
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from shared.errors import Unprocessable
from shared.messages import Digest, Geometry, Name, Uid

MAX_UID_LENGTH = 64
"""PS3.5 section 9.1."""
SHA_LENGTH = 16
DIGEST_LENGTH = 32
COMPLETE = "_COMPLETE"
"""Name of the object that says of its folder below `incoming/`: nothing more comes."""

SERIES_ATTRIBUTES = (
    "Modality",
    "SOPClassUID",
    "ImageType",
    "BodyPartExamined",
    "SeriesDescription",
    "ProtocolName",
    "SequenceName",
    "ScanningSequence",
    "MRAcquisitionType",
    "ContrastBolusAgent",
    "ConvolutionKernel",
    "KVP",
    "MagneticFieldStrength",
    "RepetitionTime",
    "EchoTime",
    "Laterality",
    "ViewPosition",
    "PatientPosition",
    "Manufacturer",
    "ManufacturerModelName",
    "SliceThickness",
    "SpacingBetweenSlices",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "Rows",
    "Columns",
    "PhotometricInterpretation",
    "FrameOfReferenceUID",
)
"""What a revision tells of its series, and routing may read: nobody learns from it who the patient is, who works in the
hospital, where or when it was. Beside them stands NumberOfSeriesRelatedInstances."""

_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_INSTANCE_KEY = re.compile(
    r"studies/(?P<study_uid>[0-9.]+)/(?P<series_uid>[0-9.]+)/(?P<sop_instance_uid>[0-9.]+)\.(?P<sha>[0-9a-f]{16})\.dcm"
)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class StoredInstance(_Frozen):
    """One normalised instance."""

    sop_instance_uid: Uid
    sha: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    """First 16 hex digits of the sha256 of the uploaded data set."""
    key: str


class Revision(_Frozen):
    """A series as it stood when it settled: `studies/<StudyUID>/<SeriesUID>/revisions/<digest>.json`."""

    schema_version: Literal[1] = 1
    dataset: Name
    study_uid: Uid
    series_uid: Uid
    digest: Digest
    created: AwareDatetime
    supersedes: Digest | None = None
    instances: tuple[StoredInstance, ...] = Field(min_length=1)
    """Sorted by SOPInstanceUID."""
    attributes: dict[str, str | int | float | list[str] | list[float] | None] = {}
    """Allow-listed series attributes by DICOM keyword, none of which names a person; what routing reads."""
    geometry: Geometry | None = None
    """None for a series without images."""
    warnings: tuple[str, ...] = ()
    """Codes; services/ingest/reasons.py says what each means."""
    array_key: str | None = None
    deidentified: bool = False
    """Its instances were de-identified before they were stored: nothing that comes of them is pushed."""

    @property
    def key(self) -> str:
        """The key that this revision is stored under."""
        return revision_key(self.study_uid, self.series_uid, self.digest)

    def body(self) -> bytes:
        """Return the stored document."""
        return self.model_dump_json(indent=1).encode()

    @classmethod
    def parse(cls, body: bytes) -> "Revision":
        """Read a stored document.

        Raises:
            Unprocessable: `invalid_revision`; the text names the fields, never values.
        """
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            places = sorted({".".join(str(part) for part in detail["loc"]) for detail in error.errors()})
            raise Unprocessable("invalid_revision", ", ".join(places)) from None


def is_uid(text: str) -> bool:
    """Tell whether `text` may become a part of a key: digits and dots as PS3.5 section 9.1 has them."""
    return len(text) <= MAX_UID_LENGTH and _UID.fullmatch(text) is not None


def series_prefix(study_uid: str, series_uid: str) -> str:
    """Return the prefix of everything stored of a series."""
    return f"studies/{study_uid}/{series_uid}/"


def instance_key(study_uid: str, series_uid: str, sop_instance_uid: str, sha: str) -> str:
    """Return the key of a normalised instance."""
    return f"{series_prefix(study_uid, series_uid)}{sop_instance_uid}.{sha}.dcm"


def revision_key(study_uid: str, series_uid: str, digest: str) -> str:
    """Return the key of a revision."""
    return f"{series_prefix(study_uid, series_uid)}revisions/{digest}.json"


def stored_instance(key: str) -> StoredInstance | None:
    """Read a key of a listing; None where it is no instance's."""
    match = _INSTANCE_KEY.fullmatch(key)
    if match is None:
        return None
    return StoredInstance(sop_instance_uid=match["sop_instance_uid"], sha=match["sha"], key=key)


def sha_of(data_set: bytes) -> str:
    """Return the sha in an instance's key; `data_set` is what follows the preamble and the file meta group."""
    return hashlib.sha256(data_set).hexdigest()[:SHA_LENGTH]


def digest_of(instances: Iterable[StoredInstance]) -> str:
    """Return the digest of a series: it depends on which instances there are, not on the order they came in."""
    lines = sorted(f"{instance.sop_instance_uid}:{instance.sha}" for instance in instances)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:DIGEST_LENGTH]


def silence() -> None:
    """Keep pydicom's warnings and log lines from echoing the values they stumble over; call it before parsing.

    Values are read as they are: a value that the standard forbids is no reason to lose an image.
    """
    from pydicom import config  # noqa: PLC0415 - whoever only needs keys should not load pydicom

    config.settings.reading_validation_mode = config.IGNORE
    logger = logging.getLogger("pydicom")
    logger.handlers = [logging.NullHandler()]
    logger.propagate = False
    logger.setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")
