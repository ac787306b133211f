"""The kill sweep over a test service: a sample of it, and proof that it would find a broken runtime."""

import pytest

from tests.chaos.sweep import Scenario, arena, boundaries, every_kill, sampled
from tests.chaos.worker import MUTANTS

SINGLES, PAIRS = 24, 6


@pytest.fixture(scope="module")
def here():
    with arena() as found:
        yield found


@pytest.fixture(scope="module")
def places(here):
    return boundaries(here)


def test_nothing_is_lost_and_nothing_done_twice_wherever_the_worker_is_killed(here, places):
    """A seeded sample of kills, one of each kind of boundary at least, and of pairs of kills."""
    verdicts = here.run_all(sampled(places, SINGLES, PAIRS))

    assert {verdict.scenario: verdict.wrong for verdict in verdicts if verdict.wrong} == {}
    assert sum(verdict.kills for verdict in verdicts) >= SINGLES


@pytest.fixture(scope="module")
def mutated(here):
    """Every mutant under the same kills, all at once."""
    kills = every_kill(["handler:begin:2", "effect:before:2", "effect:after:1"])
    verdicts = here.run_all([Scenario(kill.kills, mutant, patience_s=12) for kill in kills for mutant in MUTANTS])
    return {mutant: [one for one in verdicts if one.scenario.mutant == mutant] for mutant in MUTANTS}


@pytest.mark.parametrize("mutant", sorted(MUTANTS))
def test_the_sweep_finds_a_broken_runtime(mutated, mutant):
    """A runtime that deletes first, that acknowledges on error, or that keeps no lease is caught."""
    assert any(verdict.wrong for verdict in mutated[mutant])
