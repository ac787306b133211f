"""Another strategy than the rules of `policy.py`: search the parameters with Optuna, an extra (`search`).

Each round trains a new model, with the first round's steps, and its parameters come from a tree-structured Parzen
estimator (Optuna's TPESampler) that knows the results of the rounds so far. Nothing is kept between rounds: the study
is rebuilt from their records. The sampler's seed follows from the numbers of the round and of the try, so the same
history leads to the same parameters.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from services.trainer.config import MAX_AUGMENTATION
from services.trainer.strategy import policy
from services.trainer.strategy.policy import Decision, Situation
from shared.documents.training import Value

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

RATES, GAMMAS = 4.0, 8.0
"""The factors below and above the first round's learning rate and gamma between which these are searched."""
RANDOM_ROUNDS = 3
"""Rounds, including the first, before the estimator is used: with fewer it has too little to go by."""
MAX_TRIES = 1000
"""A number above that of the tries of any round, so that each try has a seed of its own."""


def decide(seen: Situation) -> Decision:
    """Choose what comes next as `policy.decide` does, but take the parameters of a further round from the search.

    Raises:
        ModuleNotFoundError: Optuna is not installed.
    """
    if importlib.util.find_spec("optuna") is None:  # reported before the first round, not after it
        raise ModuleNotFoundError("optuna")
    ruled = policy.decide(replace(seen, divergences=0))
    if ruled.next == "generate" or (not seen.history and not seen.divergences):
        return ruled
    return Decision("search", _proposed(seen), 0, "train")


def _proposed(seen: Situation) -> dict[str, Value]:
    import optuna  # noqa: PLC0415 - an extra, and slow to import

    optuna.logging.disable_default_handler()
    first = seen.history[0].config if seen.history else seen.config
    space = _space(first)
    seed = len(seen.history) * MAX_TRIES + seen.divergences
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=RANDOM_ROUNDS)
    study = optuna.create_study(sampler=sampler)
    for done in seen.history:
        tried = {name: done.config[name] for name in space}
        if done.copies:  # Not a value to learn from: a model that memorised comes near, too.
            study.add_trial(optuna.create_trial(state=optuna.trial.TrialState.FAIL, params=tried, distributions=space))
        else:
            value = policy.score(done, seen.goal)
            study.add_trial(optuna.create_trial(value=value, params=tried, distributions=space))
    return {**study.ask(space).params, "steps": first["steps"]}


def _space(first: Mapping[str, Value]) -> "dict[str, BaseDistribution]":
    """Return the ranges that are searched: they lie around the first round's parameters."""
    from optuna.distributions import FloatDistribution  # noqa: PLC0415 - as above

    rate, gamma = float(first["learningRate"]), float(first["gamma"])
    space: dict[str, BaseDistribution] = {
        "learningRate": FloatDistribution(rate / RATES, min(rate * RATES, 1.0), log=True),
        "augmentation": FloatDistribution(0.0, MAX_AUGMENTATION),
    }
    if gamma:
        space["gamma"] = FloatDistribution(gamma / GAMMAS, gamma * GAMMAS, log=True)
    return space
