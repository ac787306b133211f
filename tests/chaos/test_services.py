"""The kill sweep over the four services: a sample of it, and proof that it would find a broken service."""

import re

import pytest
import pytest_asyncio

from tests.chaos.journeys import JOURNEYS
from tests.chaos.mutants import MUTANTS
from tests.chaos.services import arena, sampled
from tests.chaos.sweep import Scenario

EACH = 2
"""Kills of each service."""
FOUND_BY = {
    "delete_first": ("reporter", "PUT events/date=2026-05-01/*.jsonl:before:1", "is missing|is not there"),
    "store_later": ("reporter", "DeleteMessageBatch reporting:after:1", "is missing|is not there"),
    "announce_first": ("inference", "SendMessage reporting:after:2", "was announced without its"),
    "forget_the_winner": ("inference", "POST */studies:after:1", "archived: another attempt's is too much"),
}
"""The service that has the mistake, a kill that brings it to light, and a pattern of what is found then."""

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(1200)]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def verdicts(tmp_path_factory):
    """Every scenario of this file, by service or mutant: side by side they take half the time."""
    async with arena(tmp_path_factory.mktemp("chaos")) as here:
        await here.learn(list(JOURNEYS))
        tasks = [(name, name, kill) for name in JOURNEYS for kill in sampled(here.places[name], EACH)]
        tasks += [(mutant, name, Scenario((place,), mutant)) for mutant, (name, place, _) in FOUND_BY.items()]
        found = await here.run_all([task[1:] for task in tasks])
    return {name: [one for task, one in zip(tasks, found, strict=True) if task[0] == name] for name, *_ in tasks}


@pytest.mark.parametrize("service", JOURNEYS)
async def test_a_killed_service_leaves_what_an_undisturbed_one_does(verdicts, service):
    """One result, one set of instances in HealthImaging, one event id in the report, wherever the service is killed."""
    assert {one.scenario: one.wrong for one in verdicts[service] if one.wrong} == {}


async def test_the_sample_kills(verdicts):
    """Most of its boundaries were come to; a few depend on the time that things take."""
    assert sum(one.kills for service in JOURNEYS for one in verdicts[service]) >= EACH * len(JOURNEYS) / 2


@pytest.mark.parametrize("mutant", MUTANTS)
async def test_the_sweep_finds_a_broken_service(verdicts, mutant):
    """A service that deletes or announces before it stores, or that pushes two attempts' instances, is caught."""
    (verdict,) = verdicts[mutant]

    assert verdict.kills == 1
    assert any(re.search(FOUND_BY[mutant][2], one) for one in verdict.wrong), verdict.wrong
