import math
import re
from dataclasses import replace

import pytest

from services.trainer.strategy import policy
from services.trainer.strategy.policy import RULES, Goal, Observation, Situation, accepts, best_round, decide, why_not

CONFIG = {"learningRate": 1e-3, "gamma": 3.0, "steps": 100, "augmentation": 0.1}
GOAL = Goal(threshold=2.0)


def seen(*distances: float, **last) -> list[Observation]:
    """Make a history of rounds; what is given of the last one beside its distance is in `last`."""
    history = [Observation(CONFIG, distance) for distance in distances]
    return [*history[:-1], replace(history[-1], **last)] if last else history


def decided(history, config=CONFIG, goal=GOAL, divergences=0):
    return decide(Situation(config, history, goal, divergences))


@pytest.mark.parametrize(
    ("history", "rule", "changes", "continue_from"),
    [
        ([], "first", {}, 0),
        (seen(9.0), "improving", {"steps": 150}, 1),
        (seen(9.0, 5.0), "improving", {"steps": 150}, 2),
        (seen(9.0, 5.0, 4.9), "stalled", {"learningRate": 5e-4}, 3),
        (seen(9.0, 5.0, 5.4), "stalled", {"learningRate": 5e-4}, 3),
        (seen(9.0, 5.0, 5.6), "worse", {"learningRate": 5e-4}, 2),
        (seen(9.0, 5.0, margin=6.0), "overpowered", {"gamma": 6.0}, 2),
        (seen(9.0, 5.0, told_apart=0.9), "overfitted", {"augmentation": 0.3}, 2),
        (seen(9.0, 5.0, coverage=0.4), "collapsed", {"gamma": 6.0}, 1),
        (seen(9.0, 5.0, coverage=0.4, precision=0.4), "improving", {"steps": 150}, 1),
        (seen(9.0, 5.0, copies=True), "copies", {"augmentation": 0.3}, 1),
        (seen(5.0, copies=True), "copies", {"augmentation": 0.3}, 1),
    ],
)
def test_each_rule(history, rule, changes, continue_from):
    """Each row of the table: what was observed leads to the rule's changes and to the round it goes on from."""
    decision = decided(history)

    assert (decision.rule, decision.changes, decision.continue_from) == (rule, changes, continue_from)
    assert decision.next == "train"


@pytest.mark.parametrize(
    ("history", "rule"),
    [
        (seen(9.0, 2.0), "accepted"),
        (seen(9.0, 8.0, 7.0, 6.0, 5.0), "out_of_rounds"),
        (seen(9.0, 8.0, 7.0, 6.0, 1.0, copies=True), "out_of_rounds"),
    ],
)
def test_when_it_ends(history, rule):
    """The loop ends with a model that is good enough, or when its rounds are used up."""
    decision = decided(history)

    assert (decision.rule, decision.next, decision.changes) == (rule, "generate", {})


def test_the_table_is_the_code():
    """The docstring's table has the rules of the code, in the order in which they are tried."""
    assert re.findall(r"^\| .* \| `(\w+)` \| .* \|$", policy.__doc__, re.MULTILINE) == [rule.name for rule in RULES]


def test_each_divergence_slows_further_from_the_same_round():
    """A round that diverged twice starts where it started, with the rate halved and gamma doubled twice."""
    decision = decided(seen(9.0, 5.0), divergences=2)

    assert (decision.rule, decision.continue_from) == ("diverged", 2)
    assert decision.changes == {"learningRate": 2.5e-4, "gamma": 12.0, "steps": 150}


def test_a_divergence_slows_what_the_round_began_with():
    """The slowing comes on top of what the rule of the round had changed, and does not take it back."""
    decision = decided(seen(9.0, 5.0, 5.6), divergences=1)

    assert decision.changes == {"learningRate": 2.5e-4, "gamma": 6.0}
    assert decision.continue_from == 2


def test_changes_stay_within_bounds():
    """However often a rule fires, the parameters keep within their limits."""
    config = dict(CONFIG)
    for _ in range(40):
        for history in (seen(9.0, 5.0, 5.0), seen(9.0), seen(5.0, copies=True)):
            config |= decided(history, config, divergences=1).changes

    assert config == {"learningRate": 1e-5, "gamma": 1000.0, "steps": 400, "augmentation": 0.8}


def test_a_discriminator_that_overfits_in_spite_of_all_augmentation_is_held_back():
    """Where the images are changed as much as is useful, the next rule has its turn."""
    decision = decided(seen(9.0, 5.0, told_apart=0.9, margin=6.0), {**CONFIG, "augmentation": 0.8})

    assert (decision.rule, decision.changes) == ("overpowered", {"gamma": 6.0})


def test_best_round_is_the_first_of_the_lowest():
    """The model that is kept is that of the lowest relative distance; of equals, the earlier one."""
    assert best_round(seen(3.0, 2.0, 2.0, 4.0), GOAL) == 2


def test_a_model_that_copies_is_never_accepted_and_kept_only_where_all_copy():
    """However near its images are, a round that copies is neither good enough nor the best beside one that does not."""
    history = seen(3.0, 0.1, copies=True)

    assert accepts(Observation(CONFIG, 2.0), GOAL)
    assert not accepts(history[1], GOAL)
    assert best_round(history, GOAL) == 1
    assert best_round(history[1:], GOAL) == 1


def test_why_a_model_is_not_approved_is_told_in_words():
    """Each thing that is missing is named with its number and with what was asked for; NaN is no good distance."""
    seen_last = Observation(CONFIG, 2.5, coverage=0.28, copies=True)

    assert why_not(seen_last, GOAL) == (
        "its images are copies of images that it was trained on and its relative distance 2.5 is above 2 and its "
        "coverage is 0.28 of that of other real images, below 0.5"
    )
    assert why_not(Observation(CONFIG, math.nan), GOAL) == "its relative distance nan is above 2"
    assert not why_not(Observation(CONFIG, 2.0), GOAL)


def test_a_near_model_that_covers_little_is_not_accepted_and_is_not_the_best():
    """A model that makes some kinds of images only is not good enough, unless the request asks for no coverage."""
    history = seen(3.0, 1.28, coverage=0.28)

    assert not accepts(history[1], GOAL)
    assert best_round(history, GOAL) == 1
    assert accepts(history[1], replace(GOAL, min_coverage=0.0))


@pytest.mark.parametrize(("metric", "best"), [("relative_fd", 1), ("distance", 2), ("kid", 3)])
def test_the_metric_that_was_asked_for_decides(metric, best):
    """Threshold, best round and the comparison of rounds are in the metric of the request."""
    first, second, third = (
        Observation(CONFIG, *numbers) for numbers in ((1.5, 30.0, 0.2), (9.0, 1.5, 0.1), (9.0, 30.0, -0.01))
    )
    goal = Goal(threshold=2.0 if metric != "kid" else 0.0, metric=metric)
    history = [first, second, third]

    assert best_round(history, goal) == best
    assert [accepts(one, goal) for one in history] == [number == best for number in (1, 2, 3)]


def test_a_kernel_distance_below_zero_is_compared_as_well():
    """KID may be negative: nearer to zero is then noticeably worse."""
    goal = Goal(threshold=-1.0, metric="kid")

    assert (
        decided([Observation(CONFIG, 1.0, kid=-0.02), Observation(CONFIG, 1.0, kid=-0.01)], goal=goal).rule == "worse"
    )
