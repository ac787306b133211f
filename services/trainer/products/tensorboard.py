"""The rounds of a training as a TensorBoard log. The package `tensorboard` is an extra."""

import contextlib
from pathlib import Path
from typing import Any

Json = dict[str, Any]
FOLDER = "tensorboard"
NAME = "events.out.tfevents.0.radqueue"
"""The name of the log: TensorBoard requires its beginning; the rest is fixed, so that a second log replaces it."""


def write(rounds: list[Json], folder: Path) -> str:
    """Write the losses at the steps of their reports, and each round's evaluation and parameters at its last step.

    Args:
        rounds: the content of each evaluation.json, oldest first.
        folder: receives the log in a folder of its own: `tensorboard --logdir FOLDER/tensorboard`.

    Returns:
        The name of the file in the folder.
    """
    from torch.utils.tensorboard.writer import SummaryWriter  # noqa: PLC0415 - it is an extra

    log = folder / FOLDER
    step = 0
    with contextlib.closing(SummaryWriter(str(log))) as writer:
        for done in rounds:
            for loss in done["losses"]:
                step = int(loss["step"])
                _add(writer, "loss", loss, step)
            event_data = done["told"]
            _add(writer, "evaluation", event_data["evaluation"], step)
            _add(writer, "quality", event_data["evaluation"].get("quality") or {}, step)
            _add(writer, "parameters", event_data["config"], step)
    (written,) = log.iterdir()
    written.rename(log / NAME)
    return f"{FOLDER}/{NAME}"


def _add(writer: Any, group: str, numbers: Json, step: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            writer.add_scalar(f"{group}/{name}", value, step)
