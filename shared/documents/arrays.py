"""What is stored beside training arrays: what each is of and how it was made, and the window of a dataset."""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat

from shared.documents.document import Stored
from shared.messages import Name


def _code(given: object) -> str | None:
    return given if isinstance(given, str) and re.fullmatch(r"[A-Z0-9_ ]{1,16}", given) else None


def _rising(window: tuple[float, float]) -> tuple[float, float]:
    if not window[0] < window[1]:
        raise ValueError("not two values, the lower one first")
    return window


Modality = Annotated[str | None, BeforeValidator(_code)]
"""A Code String (PS3.5 section 6.2); anything else came from a file that has it wrong, and counts as unknown."""
Window = Annotated[tuple[FiniteFloat, FiniteFloat], AfterValidator(_rising)]
"""The modality values (HU in CT) that -1 and 1 stand for."""


class Units(BaseModel):
    """What the numbers of the images mean."""

    model_config = ConfigDict(frozen=True)

    modality: Modality = None
    """The Modality that the dataset's sidecars name; None if they differ."""
    window: Window | None = None
    """The window of the arrays; None if those of the dataset differ."""

    @classmethod
    def common(cls, every: Iterable[Self]) -> Self:
        """Return what all arrays of a dataset agree on."""
        units = set(every)
        modalities = {each.modality for each in units}
        if len(modalities) != 1:
            return cls()
        return units.pop() if len(units) == 1 else cls(modality=modalities.pop())


class StoredSidecar(Stored):
    """The document beside an array, as ingest writes it."""

    study_uid: str
    """The StudyInstanceUID. In a de-identified dataset the UIDs and the digest are keyed hashes, which do not lead back
    to the original."""
    series_uid: str
    digest: str
    revision_key: str | None = Field(default=None, exclude_if=lambda key: key is None)
    """The key of the revision; left out if nothing may lead back to the original."""
    patient_key: str | None
    modality: Any
    """The Modality as the file has it, valid or not."""
    n: int
    """Number of slices."""
    shape: tuple[int, ...]
    window: tuple[float, float] | None
    """Modality values that became -1 and 1."""
    window_from: str | None
    """The key of the window's document; None if the dataset's rules name the window."""
    pixel_spacing_mm: tuple[float, ...] | None
    rows_columns: tuple[int, ...] | None
    left_out: dict[str, int]
    """Number of slices left out, by the rule that did so."""
    config: dict[str, Any]
    """The configuration that the array was made with."""
    config_hash: str
    warnings: tuple[str, ...]


class Sidecar(Stored):
    """What trainings read of the document beside an array. Other people's may have less: what is missing is unknown."""

    series_uid: str | None = None
    patient_key: str | None = None
    class_name: Name | None = Field(default=None, alias="class")
    """The class of the images; only other people's arrays have one, since ingest knows no classes."""
    modality: Modality = None
    window: Window | None = None
    """Modality values that became -1 and 1."""


class DatasetWindow(Stored):
    """The window of one Modality in a dataset, and where it comes from."""

    window: tuple[float, float]
    """Modality values that become -1 and 1."""
    config: Mapping[str, object]
    """The configuration that the percentiles were computed with."""
    source: Mapping[str, str]
    """The series that the percentiles are of, as its array names it."""
