"""What to change when a model is not good enough: a pure function from what was observed to the next parameters.

| observed | rule | change |
|---|---|---|
| a loss above 100, or NaN | `diverged` | the same round again: learning rate x 0.5, gamma x 2 |
| relative_fd is more than 10 % above the best round's | `worse` | go on from the best round: learning rate x 0.5 |
| the discriminator tells nearly all pairs apart | `overpowered` | gamma x 2, which holds it back |
| relative_fd fell by less than 10 % | `stalled` | learning rate x 0.5, steps x 1.5 |
| else | `improving` | nothing: train on |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.trainer.config import Value

NOTICEABLE = 0.1
"""A smaller relative change of relative_fd is noise of the evaluation."""
OVERPOWERED_MARGIN = 4.0
"""D(real) - D(generated) at which sigmoid, the probability of telling a pair apart, is above 0.98."""
MIN_LEARNING_RATE = 1e-5
MAX_GAMMA = 1000.0
MAX_STEPS_FACTOR = 4
"""Rounds never grow beyond this many times the first round's steps."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What one round showed."""

    relative_fd: float
    margin: float
    """Mean of D(real) - D(generated) over the round's last steps."""
    config: Mapping[str, Value]
    copies: bool = False
    """Whether the generated images are copies of training images."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do in the next round."""

    rule: str
    changes: dict[str, Value]
    continue_from: int
    """The round, from 1, whose checkpoint is trained on; 0 is a new model."""


def decide(config: Mapping[str, Value], history: Sequence[Observation], divergences: int = 0) -> Decision:
    """Choose the next round's parameters.

    Args:
        config: the parameters of the last round.
        history: all rounds so far, oldest first; empty before the first.
        divergences: how often the next round was tried already, and diverged.

    Returns:
        The changes to `config`, the name of the rule, and the round to go on from.
    """
    decision = _after(config, history)
    for _ in range(divergences):
        changed = {**config, **decision.changes}
        slower = {"learningRate": _slower(changed), "gamma": _stronger(changed)}
        decision = Decision("diverged", {**decision.changes, **slower}, decision.continue_from)
    return decision


def accepts(relative_fd: float, threshold: float, *, copies: bool) -> bool:
    """Tell whether a model is good enough. One that copies patients never is, however near its images are."""
    return relative_fd <= threshold and not copies


def best_round(history: Sequence[Observation]) -> int:
    """Return the number, from 1, of the round with the lowest relative_fd; the first of equals.

    A round that copies is the best one only where all do.
    """
    return min(range(len(history)), key=lambda index: (history[index].copies, history[index].relative_fd)) + 1


def _after(config: Mapping[str, Value], history: Sequence[Observation]) -> Decision:
    if not history:
        return Decision("first", {}, 0)
    last, best = history[-1], best_round(history)
    if last.relative_fd > (1 + NOTICEABLE) * history[best - 1].relative_fd:
        return Decision("worse", {"learningRate": _slower(config)}, best)
    if last.margin > OVERPOWERED_MARGIN:
        return Decision("overpowered", {"gamma": _stronger(config)}, len(history))
    earlier = min((round_.relative_fd for round_ in history[:-1]), default=float("inf"))
    if last.relative_fd > (1 - NOTICEABLE) * earlier:
        most = MAX_STEPS_FACTOR * int(history[0].config["steps"])
        steps = min(int(config["steps"]) * 3 // 2, max(most, int(config["steps"])))
        return Decision("stalled", {"learningRate": _slower(config), "steps": steps}, len(history))
    return Decision("improving", {}, len(history))


def _slower(config: Mapping[str, Value]) -> float:
    return max(float(config["learningRate"]) / 2, min(MIN_LEARNING_RATE, float(config["learningRate"])))


def _stronger(config: Mapping[str, Value]) -> float:
    return min(float(config["gamma"]) * 2, max(MAX_GAMMA, float(config["gamma"])))
