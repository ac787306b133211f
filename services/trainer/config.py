"""The parameters of a training, checked: what config.js holds, as one frozen object."""

from importlib.resources import files
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.alias_generators import to_camel

from shared.documents.training import Value

DEFAULT_CONFIG = files("services.trainer") / "config.js"
"""The file that a training begins with if its request brings none."""
MAX_AUGMENTATION = 0.8
"""The highest probability of a random change of an image; above it, the generator may learn to make changed images."""


WHAT = {"missing": "missing", "extra_forbidden": "unknown parameter"}
"""Our words for pydantic's types of error; for all other types its own words are used, which hold no value."""


class InvalidConfig(ValueError):  # noqa: N818 - it states a fact about the file
    """A parameter is unknown, missing, of the wrong type or out of range; the text names it, never its value."""


class UnknownParameter(InvalidConfig):
    """A change names a parameter that the file does not have."""


class TrainingConfig(BaseModel):
    """Each field has, in camelCase, the name that it has in config.js, where its meaning stands beside it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, alias_generator=to_camel)

    image_size: int = Field(ge=16, le=256)
    latent_dim: int = Field(ge=1, le=1024)
    width: int = Field(ge=1, le=256)
    steps: int = Field(ge=1, le=10_000_000)
    batch_size: int = Field(ge=2, le=4096)
    learning_rate: float = Field(gt=0, le=1)
    beta2: float = Field(ge=0, lt=1)
    gamma: float = Field(ge=0, le=1e6)
    anneal_images: float = Field(ge=0)
    augmentation: float = Field(ge=0, le=MAX_AUGMENTATION)
    symmetric: bool
    ema_images: float = Field(ge=0)
    seed: int = Field(ge=0, lt=2**63)

    @field_validator("image_size")
    @classmethod
    def _power_of_two(cls, size: int) -> int:
        if size & (size - 1):
            raise ValueError("not a power of two")
        return size

    @classmethod
    def of(cls, parameters: dict[str, Value]) -> Self:
        """Check what `read_config` returned.

        Raises:
            InvalidConfig: the text names the parameters.
        """
        try:
            return cls.model_validate(parameters)
        except ValidationError as error:
            places = (f"{detail['loc'][0]}: {WHAT.get(detail['type'], detail['msg'])}" for detail in error.errors())
            raise InvalidConfig("; ".join(sorted(places))) from None
