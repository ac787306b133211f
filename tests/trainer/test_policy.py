import pytest

from services.trainer.policy import Observation, accepts, best_round, decide

CONFIG = {"learningRate": 1e-3, "gamma": 3.0, "steps": 100}


def seen(*distances: float, margin: float = 0.5) -> list[Observation]:
    return [Observation(distance, margin, CONFIG) for distance in distances]


@pytest.mark.parametrize(
    ("history", "rule", "changes", "continue_from"),
    [
        (seen(), "first", {}, 0),
        (seen(9.0), "improving", {}, 1),
        (seen(9.0, 5.0), "improving", {}, 2),
        (seen(9.0, 5.0, 4.9), "stalled", {"learningRate": 5e-4, "steps": 150}, 3),
        (seen(9.0, 5.0, 5.4), "stalled", {"learningRate": 5e-4, "steps": 150}, 3),
        (seen(9.0, 5.0, 5.6), "worse", {"learningRate": 5e-4}, 2),
        (seen(9.0, 5.0, margin=6.0), "overpowered", {"gamma": 6.0}, 2),
    ],
)
def test_each_rule(history, rule, changes, continue_from):
    """Each row of the table: what was observed leads to the rule's changes and to the round it goes on from."""
    decision = decide(CONFIG, history)

    assert (decision.rule, decision.changes, decision.continue_from) == (rule, changes, continue_from)


def test_each_divergence_slows_further_from_the_same_round():
    """A round that diverged twice starts where it started, with the rate halved and gamma doubled twice."""
    decision = decide(CONFIG, seen(9.0, 5.0), divergences=2)

    assert (decision.rule, decision.continue_from) == ("diverged", 2)
    assert decision.changes == {"learningRate": 2.5e-4, "gamma": 12.0}


def test_changes_stay_within_bounds():
    """However often a rule fires, the parameters keep within their limits."""
    config = dict(CONFIG)
    for _ in range(40):
        config |= decide(config, seen(9.0, 5.0, 5.0), divergences=1).changes

    assert config == {"learningRate": 1e-5, "gamma": 1000.0, "steps": 400}


def test_best_round_is_the_first_of_the_lowest():
    """The model that is kept is that of the lowest relative distance; of equals, the earlier one."""
    assert best_round(seen(3.0, 2.0, 2.0, 4.0)) == 2


def test_a_model_that_copies_is_never_accepted_and_kept_only_where_all_copy():
    """However near its images are, a round that copies is neither good enough nor the best beside one that does not."""
    history = [Observation(distance, 0.5, CONFIG, copies) for distance, copies in ((3.0, False), (0.1, True))]

    assert accepts(2.0, 2.0, copies=False)
    assert not accepts(0.1, 2.0, copies=True)
    assert best_round(history) == 1
    assert best_round(history[1:]) == 1
