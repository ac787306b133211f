import sys
from dataclasses import replace

import pytest

from services.trainer.reasons import CannotTrain
from services.trainer.rounds import modify
from services.trainer.run import Run
from services.trainer.strategy.optuna_search import decide
from services.trainer.strategy.policy import Goal, Observation, Situation
from tests.trainer.trainers import requested

FIRST = {"learningRate": 1e-3, "gamma": 3.0, "steps": 100, "augmentation": 0.1, "seed": 0}
GOAL = Goal(threshold=0.1, max_rounds=100)


def searched(n_rounds: int, **goal) -> list[Observation]:
    """Let the search choose the parameters of some rounds whose distance is least at a rate of 3e-4."""
    history: list[Observation] = []
    while len(history) < n_rounds:
        decision = decide(Situation(history[-1].config if history else FIRST, history, replace(GOAL, **goal)))
        config = {**FIRST, **decision.changes}
        history.append(Observation(config, 1 + abs(config["learningRate"] / 3e-4 - 1)))
    return history


def test_the_same_history_leads_to_the_same_parameters():
    """Nothing is kept between rounds: the study is rebuilt, and another try at a round has other parameters."""
    pytest.importorskip("optuna")
    history = searched(4)
    once, again = (decide(Situation(FIRST, history, GOAL)) for _ in range(2))
    other = decide(Situation(FIRST, history, GOAL, divergences=1))

    assert (once.rule, once.continue_from, once.next) == ("search", 0, "train")
    assert once == again
    assert other.changes != once.changes
    assert history[0].config == FIRST


def test_the_search_stays_in_its_space_and_finds_better_parameters():
    """Parameters lie around the first round's, and the later rounds are nearer to the best rate than the first ones."""
    pytest.importorskip("optuna")
    history = searched(20)
    distances = [seen.relative_fd for seen in history]

    assert all(1e-3 / 4 <= seen.config["learningRate"] <= 4e-3 for seen in history)
    assert all(3.0 / 8 <= seen.config["gamma"] <= 24.0 for seen in history)
    assert all(0.0 <= seen.config["augmentation"] <= 0.8 for seen in history)
    assert sorted(distances[10:])[5] < sorted(distances[:10])[5]


def test_the_search_ends_as_the_rules_do_and_learns_nothing_from_copies():
    """A model that is good enough or the last round end it; a round that copied is no good example."""
    pytest.importorskip("optuna")
    history = searched(4)
    copied = [*history, replace(history[0], relative_fd=0.01, copies=True)]

    assert decide(Situation(FIRST, history, replace(GOAL, threshold=1e9))).rule == "accepted"
    assert decide(Situation(FIRST, history, replace(GOAL, max_rounds=4))).rule == "out_of_rounds"
    assert decide(Situation(FIRST, copied, GOAL)).rule == "search"


async def test_a_trainer_without_optuna_says_so(objects, start, tmp_path, monkeypatch):
    """A request for the search, where it is not installed, is refused before the first round, with what is missing."""
    monkeypatch.setitem(sys.modules, "optuna", None)
    request = requested("any", strategy="optuna").data
    run = Run(request, f"models/{request.request_id}", 1, start(objects).ports(), tmp_path)
    with pytest.raises(CannotTrain, match="search_not_installed"):
        await modify(run)
