"""The decision after a round: a pure function from the observations to the next parameters, or to the end.

The first row that holds decides:

| observed | rule | what follows |
|---|---|---|
| the last round is good enough | `accepted` | images of the best round |
| as many rounds as were asked for | `out_of_rounds` | images of the best round, which is not approved |
| a loss above 100, or NaN | `diverged` | the same round again: learning rate x 0.5, gamma x 2 |
| no round yet | `first` | a new model |
| it memorised training images | `copies` | augmentation + 0.2 |
| relative distance more than 10 % above the best round's | `worse` | learning rate x 0.5 |
| like real images, but like few of them | `collapsed` | gamma x 2 |
| the discriminator tells more than 90 % of the pairs apart | `overfitted` | augmentation + 0.2, up to 0.8 |
| it tells them apart by far | `overpowered` | gamma x 2, which holds it back |
| the distance fell by less than 10 % | `stalled` | learning rate x 0.5 |
| else | `improving` | steps x 1.5: more images |

A round goes on from the best one's checkpoint. The last one counts as the best if it is not noticeably worse.

A model is good enough if its distance, in the metric that was asked for, is at or below the threshold, if it did not
memorise, and if it covers enough: with few held-out patients a model that makes only some kinds of images can come near
by its means and covariances (relative_fd 1.28 was seen with a coverage of 0.28). Its coverage counts as a share of that
of other real images, because with unlike patients these do not reach 1 either.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

from services.trainer.config import MAX_AUGMENTATION
from services.trainer.reasons import METRICS
from shared.documents.training import StoredRound, Value
from shared.messages import TrainingRequest

Metric = Literal["relative_fd", "distance", "kid"]
Next = Literal["train", "generate"]

NOTICEABLE = 0.1
"""The relative change of the distance below which it is noise of the evaluation."""
ALIKE = 0.5
"""Share of other real images' precision at which generated images count as like real ones."""
OVERFITTED_PAIRS = 0.8
"""Mean sign of D(real) - D(generated) when 90 % of the pairs are told apart."""
OVERPOWERED_MARGIN = 4.0
"""D(real) - D(generated) at which its sigmoid, the probability of telling a pair apart, is above 0.98."""
MORE_AUGMENTATION = 0.2
MIN_LEARNING_RATE = 1e-5
MAX_GAMMA = 1000.0
MAX_STEPS_FACTOR = 4
"""The factor of the first round's steps beyond which rounds do not grow."""


@dataclass(frozen=True, slots=True)
class Goal:
    """The goal of a training, as its request states it."""

    threshold: float = 2.0
    metric: Metric = "relative_fd"
    min_coverage: float = 0.5
    """The least coverage of a model that is good enough, as a share of other real images' coverage."""
    max_rounds: int = 5

    @classmethod
    def of(cls, request: TrainingRequest) -> Self:
        """Return the goal of a request."""
        return cls(request.threshold, request.metric, request.min_coverage, request.max_rounds)


@dataclass(frozen=True, slots=True)
class Observation:
    """The results of one round."""

    config: Mapping[str, Value]
    relative_fd: float
    distance: float = 0.0
    kid: float = 0.0
    coverage: float = 1.0
    """The coverage as a share of other real images' coverage."""
    precision: float = 1.0
    """The precision as a share of other real images' precision."""
    margin: float = 0.0
    """Mean of D(real) - D(generated) over the round's last steps."""
    told_apart: float = 0.0
    """Mean sign of D(real) - D(generated) in the round's last report."""
    copies: bool = False
    """Whether the generated images are memorised training images."""

    @classmethod
    def of(cls, done: StoredRound) -> Self:
        """Return the results of a completed round."""
        evaluation = done.told.evaluation
        generated, real = evaluation.quality, evaluation.real_quality
        return cls(
            done.told.config,
            relative_fd=evaluation.relative_fd,
            distance=evaluation.distance,
            kid=generated.kid if generated else math.inf,
            coverage=generated.coverage / real.coverage if generated and real and real.coverage else 1.0,
            precision=generated.precision / real.precision if generated and real and real.precision else 1.0,
            margin=done.margin,
            told_apart=done.losses[-1].get("told_apart", 0.0) if done.losses else 0.0,
            copies=evaluation.copies,
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """The next thing to do."""

    rule: str
    changes: dict[str, Value]
    continue_from: int
    """The round, from 1, whose checkpoint is trained on; 0 is a new model."""
    next: Next


@dataclass(frozen=True, slots=True)
class Situation:
    """All that a decision depends on."""

    config: Mapping[str, Value]
    """The parameters of the last round."""
    history: Sequence[Observation]
    """All rounds so far, oldest first; empty before the first."""
    goal: Goal
    divergences: int = 0
    """The number of tries at the next round so far, all of which diverged."""

    @property
    def last(self) -> Observation:
        """Return the results of the last round."""
        return self.history[-1]

    def worse(self) -> bool:
        """Tell whether the last round is noticeably worse than the best."""
        return _above(score(self.last, self.goal), score(self.history[self.best - 1], self.goal), NOTICEABLE)

    def stalled(self) -> bool:
        """Tell whether the last round is not noticeably better than all before it."""
        earlier = [score(seen, self.goal) for seen in self.history[:-1]]
        return bool(earlier) and _above(score(self.last, self.goal), min(earlier), -NOTICEABLE)

    @property
    def best(self) -> int:
        """Return the number, from 1, of the best round."""
        return best_round(self.history, self.goal)

    @property
    def continue_from(self) -> int:
        """Return the number, from 1, of the round to go on from; 0 before the first."""
        if not self.history:
            return 0
        return self.best if self.worse() or _flawed(self.last, self.goal) else len(self.history)


class Rule(NamedTuple):
    """A row of the table."""

    name: str
    observed: Callable[[Situation], bool]
    changes: Callable[[Situation], dict[str, Value]] = lambda _: {}
    next: Next = "train"


def _again(seen: Situation) -> dict[str, Value]:
    """Return the changes that the round began with, slowed down once for each divergence."""
    changes = decide(replace(seen, divergences=0)).changes
    for _ in range(seen.divergences):
        seen = replace(seen, config={**seen.config, **changes})
        changes = {**changes, **_slower(seen), **_stronger(seen)}
    return changes


def _slower(seen: Situation) -> dict[str, Value]:
    rate = float(seen.config["learningRate"])
    return {"learningRate": max(rate / 2, min(MIN_LEARNING_RATE, rate))}


def _stronger(seen: Situation) -> dict[str, Value]:
    gamma = float(seen.config["gamma"])
    return {"gamma": min(gamma * 2, max(MAX_GAMMA, gamma))}


def _more_augmented(seen: Situation) -> dict[str, Value]:
    return {"augmentation": round(min(float(seen.config["augmentation"]) + MORE_AUGMENTATION, MAX_AUGMENTATION), 6)}


def _longer(seen: Situation) -> dict[str, Value]:
    steps = int(seen.config["steps"])
    return {"steps": min(steps * 3 // 2, max(MAX_STEPS_FACTOR * int(seen.history[0].config["steps"]), steps))}


RULES = (
    Rule("accepted", lambda seen: bool(seen.history) and accepts(seen.last, seen.goal), next="generate"),
    Rule("out_of_rounds", lambda seen: len(seen.history) >= seen.goal.max_rounds, next="generate"),
    Rule("diverged", lambda seen: seen.divergences > 0, _again),
    Rule("first", lambda seen: not seen.history),
    Rule("copies", lambda seen: seen.last.copies, _more_augmented),
    Rule("worse", Situation.worse, _slower),
    Rule("collapsed", lambda seen: _covers_little(seen.last, seen.goal) and seen.last.precision >= ALIKE, _stronger),
    Rule(
        "overfitted",
        lambda seen: seen.last.told_apart > OVERFITTED_PAIRS and float(seen.config["augmentation"]) < MAX_AUGMENTATION,
        _more_augmented,
    ),
    Rule("overpowered", lambda seen: seen.last.margin > OVERPOWERED_MARGIN, _stronger),
    Rule("stalled", Situation.stalled, _slower),
    Rule("improving", lambda _: True, _longer),
)


def decide(seen: Situation) -> Decision:
    """Choose what comes next: the changes to the last round's parameters, why, and the round to go on from."""
    rule = next(rule for rule in RULES if rule.observed(seen))
    return Decision(rule.name, rule.changes(seen), seen.continue_from, rule.next)


def accepts(observed: Observation, goal: Goal) -> bool:
    """Tell whether a model is good enough."""
    return not why_not(observed, goal)


def why_not(observed: Observation, goal: Goal) -> str:
    """Say why a model is not good enough; empty if it is. One that memorised never is, however near it is."""
    reasons = []
    if observed.copies:
        reasons.append("its images are copies of images that it was trained on")
    distance = score(observed, goal)
    if not distance <= goal.threshold:  # Written so that NaN is no good, too.
        reasons.append(f"its {METRICS[goal.metric]} {distance:.3g} is above {goal.threshold:g}")
    if _covers_little(observed, goal):
        covered = f"its coverage is {observed.coverage:.2g} of that of other real images"
        reasons.append(f"{covered}, below {goal.min_coverage:g}")
    return " and ".join(reasons)


def best_round(history: Sequence[Observation], goal: Goal) -> int:
    """Return the number, from 1, of the round with the lowest distance; the first of equals.

    Rounds that memorised come after all others, and among the others those that cover too little come last.
    """

    def rank(index: int) -> tuple[bool, bool, float]:
        seen = history[index]
        return seen.copies, _covers_little(seen, goal), score(seen, goal)

    return min(range(len(history)), key=rank) + 1


def score(observed: Observation, goal: Goal) -> float:
    """Return the distance in the metric that was asked for; lower is better."""
    distance: float = getattr(observed, goal.metric)
    return distance


def _flawed(observed: Observation, goal: Goal) -> bool:
    return observed.copies or _covers_little(observed, goal)


def _covers_little(observed: Observation, goal: Goal) -> bool:
    return observed.coverage < goal.min_coverage


def _above(distance: float, other: float, share: float) -> bool:
    """Tell whether a distance exceeds another by more than a share of it; the kernel distance may be below zero."""
    return distance > other + share * abs(other)
