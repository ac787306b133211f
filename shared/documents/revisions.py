"""A series as ingest stores it and inference reads it: its instances, its digest, the revision document."""

import hashlib
from collections.abc import Iterable
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from shared.documents.document import Stored
from shared.errors import Unprocessable
from shared.messages import Digest, Geometry, Name, Uid

SHA_LENGTH = 16
DIGEST_LENGTH = 32

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
"""The attributes of a series that its revision holds and routing may read. They do not tell who the patient is, who
works in the hospital, where or when it was. NumberOfSeriesRelatedInstances stands beside them."""


class StoredInstance(BaseModel):
    """One normalised instance."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    sop_instance_uid: Uid
    sha: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    """First 16 hex digits of the sha256 of the uploaded data set."""
    key: str


class Revision(Stored):
    """A series as it stood when it settled: `studies/<StudyUID>/<SeriesUID>/revisions/<digest>.json`."""

    dataset: Name
    study_uid: Uid
    series_uid: Uid
    digest: Digest
    created: AwareDatetime
    supersedes: Digest | None = None
    instances: tuple[StoredInstance, ...] = Field(min_length=1)
    """The instances, sorted by SOPInstanceUID."""
    attributes: dict[str, str | int | float | list[str] | list[float] | None] = Field(default={})
    """Allow-listed series attributes by DICOM keyword, none of which names a person; what routing reads."""
    geometry: Geometry | None = None
    """The position of the slices in space; None for a series without images."""
    warnings: tuple[str, ...] = ()
    """Codes of what was noticed; services/ingest/reasons.py says what each means."""
    array_key: str | None = None
    deidentified: bool = False
    """True if the instances were de-identified before they were stored: nothing that comes of them is pushed."""

    @classmethod
    def refusal(cls, _key: str, fields: Iterable[str]) -> Unprocessable:
        """Name the fields that are wrong."""
        return Unprocessable("invalid_revision", ", ".join(sorted(fields)))


def sha_of(data_set: bytes) -> str:
    """Return the sha in an instance's key; `data_set` is what follows the preamble and the file meta group."""
    return hashlib.sha256(data_set).hexdigest()[:SHA_LENGTH]


def digest_of(instances: Iterable[StoredInstance]) -> str:
    """Return the digest of a series: it depends on which instances there are, not on the order they came in."""
    lines = sorted(f"{instance.sop_instance_uid}:{instance.sha}" for instance in instances)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:DIGEST_LENGTH]
