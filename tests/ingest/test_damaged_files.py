"""A few hundred files that were damaged by chance; `python -m tests.chaos.damaged_files` reads ten thousand."""

import pytest

from services.ingest.reasons import REASONS
from tests.chaos.damaged_files import MUTATIONS, mutant, read_all, seeds


@pytest.fixture(scope="module")
def files():
    return seeds()


def test_a_number_is_always_the_same_file(files):
    """A file that went wrong can be made again from its number, and files of other numbers are others."""
    assert mutant(7, files) == mutant(7, files)
    assert len({mutant(number, files) for number in range(50)}) > 45


async def test_valid_files_are_taken_in(files, tmp_path, monkeypatch):
    """What the damage is done to is sound: one file in each transfer syntax, and pydicom's."""
    monkeypatch.setattr("tests.chaos.damaged_files.mutant", lambda number, files: files[number])
    tally = await read_all(range(len(files)), files, tmp_path)

    assert tally.wrong == []
    assert tally.outcomes["taken in"] >= 60
    assert tally.outcomes["frame_damaged"] == tally.outcomes["unsupported_transfer_syntax"] == 0


async def test_every_damaged_file_is_taken_in_or_refused_with_a_code(files, tmp_path):
    """No child exceeds its limits or needs to die, and what is taken in can be read by others."""
    tally = await read_all(range(300), files, tmp_path)

    assert tally.wrong == []
    assert set(tally.outcomes) - {"taken in"} <= set(REASONS)
    assert tally.outcomes.total() == 300
    assert tally.outcomes["taken in"] > 30
    assert tally.peak_bytes > 0
    assert len(MUTATIONS) == 10
