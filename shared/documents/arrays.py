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
"""A Code String (PS3.5 section 6.2); what is none came from a file that has it wrong, and is unknown."""
Window = Annotated[tuple[FiniteFloat, FiniteFloat], AfterValidator(_rising)]
"""Modality values that -1 and 1 stand for, HU in CT."""


class Units(BaseModel):
    """What the numbers of the images mean."""

    model_config = ConfigDict(frozen=True)

    modality: Modality = None
    """As the dataset's sidecars name it; None where they differ."""
    window: Window | None = None
    """None where the arrays of the dataset differ."""

    @classmethod
    def common(cls, every: Iterable[Self]) -> Self:
        """Return what all arrays of a dataset agree on."""
        units = set(every)
        modalities = {one.modality for one in units}
        if len(modalities) != 1:
            return cls()
        return units.pop() if len(units) == 1 else cls(modality=modalities.pop())


class StoredSidecar(Stored):
    """The document beside an array, as ingest writes it."""

    study_uid: str
    """Of a de-identified dataset the UIDs and the digest are keyed hashes: they lead to no original."""
    series_uid: str
    digest: str
    revision_key: str | None = Field(default=None, exclude_if=lambda key: key is None)
    """Left out where nothing may lead to the original."""
    patient_key: str | None
    modality: Any
    """As the file has it, whatever that is."""
    n: int
    """Slices."""
    shape: tuple[int, ...]
    window: tuple[float, float] | None
    """Modality values that became -1 and 1."""
    window_from: str | None
    """The key of the window's document; None where the dataset's rules name one."""
    pixel_spacing_mm: tuple[float, ...] | None
    rows_columns: tuple[int, ...] | None
    left_out: dict[str, int]
    """Slices, by the rule that left them out."""
    config: dict[str, Any]
    """How the array was made."""
    config_hash: str
    warnings: tuple[str, ...]


class Sidecar(Stored):
    """What trainings read of the document beside an array. Other people's may have less: what is missing is unknown."""

    series_uid: str | None = None
    patient_key: str | None = None
    class_name: Name | None = Field(default=None, alias="class")
    """Of other people's arrays: ingest knows no classes."""
    modality: Modality = None
    window: Window | None = None
    """Modality values that became -1 and 1."""


class DatasetWindow(Stored):
    """The window of one Modality in a dataset, and where it comes from."""

    window: tuple[float, float]
    """Modality values that become -1 and 1."""
    config: Mapping[str, object]
    """What the percentiles were asked by."""
    source: Mapping[str, str]
    """The series they are of, as its array names it."""
