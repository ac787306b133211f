"""What can be said of the parameters of a training request before a trainer has it."""

from collections.abc import Mapping

from services.trainer.config import DEFAULT_CONFIG, InvalidConfig, TrainingConfig, Value
from services.trainer.jsconfig import read_config


def parameters() -> dict[str, Value]:
    """Return the parameters that there are, with the values of the shipped config.js."""
    return read_config(DEFAULT_CONFIG.read_text("utf-8"))


def fault_of(overrides: Mapping[str, Value]) -> str | None:
    """Return what the trainer would find wrong with overrides of the shipped config.js; None where nothing is."""
    try:
        TrainingConfig.of({**parameters(), **overrides})
    except InvalidConfig as error:
        return str(error)
    return None
