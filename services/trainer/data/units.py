"""The units of a dataset: its modality, and the modality values that -1 and 1 stand for in its arrays."""

import re
from collections.abc import Iterable
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FiniteFloat


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
