"""Checks of the parameters of a training request, before a trainer receives it."""

from collections.abc import Mapping

from services.trainer.config import DEFAULT_CONFIG, InvalidConfig, TrainingConfig
from services.trainer.jsconfig import read_config
from shared.documents.training import Value


def parameters() -> dict[str, Value]:
    """Return all parameters, with their values in the shipped config.js."""
    return read_config(DEFAULT_CONFIG.read_text("utf-8"))


def fault_of(overrides: Mapping[str, Value]) -> str | None:
    """Return what the trainer would find wrong with overrides of the shipped config.js; None if they are right."""
    try:
        TrainingConfig.of({**parameters(), **overrides})
    except InvalidConfig as error:
        return str(error)
    return None
