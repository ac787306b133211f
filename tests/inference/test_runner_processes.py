"""The runner with the real SDK: the processes that serve study after study, and the versions that they serve."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pydicom
import pytest

from services.inference.package.maps import load
from services.inference.serving.runner import (
    MapChanged,
    MapRunner,
    Serving,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")


def made_by(study):
    return pydicom.dcmread(study.output / "capture.dcm")


async def test_a_warm_process_makes_what_a_fresh_one_makes_byte_for_byte(runner, study, capture_map):
    """Study after study, a warm process writes the pixels that the MAP's own command writes in a new process."""
    uids = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.3.4"}
    first, second, fresh = study(**uids), study(**uids), study(**uids)
    runs = [await runner.run("capture", first)]
    pid = runner.pid("capture")
    runs.append(await runner.run("capture", second))
    other = MapRunner([capture_map], serving={"capture": Serving(isolation="process")})
    runs.append(await other.run("capture", fresh))
    await other.stop()

    assert [run.outcome for run in runs] == ["ran"] * 3
    assert runner.pid("capture") == pid
    assert other.pid("capture") is None, "a process of its own ends with its study"
    assert made_by(second).PixelData == made_by(first).PixelData == made_by(fresh).PixelData
    assert made_by(second).PatientID == made_by(fresh).PatientID


async def test_a_study_finds_nothing_of_the_one_before(runner, study):
    """Neither its files nor what it put into the environment are seen by the next study of the same process."""
    one, other = study(SeriesDescription="look around"), study(SeriesDescription="look around")
    for each in (one, other):
        assert (await runner.run("capture", each)).outcome == "ran"
    served, found = json.loads((other.output / "found.json").read_text())

    assert len(served) > 1, "both ran in one process"
    assert found == [None]


async def test_a_process_that_has_grown_is_replaced(runner, study, monkeypatch):
    """A MAP that leaks 100 MB per study serves until it has grown by more than the bound."""
    host = runner._hosts["capture"]
    await host.stop()
    monkeypatch.setattr(host, "bounds", replace(host.bounds, growth_bytes=150_000_000))
    pids = []
    for _ in range(3):
        await runner.run("capture", study(SeriesDescription="leak"))
        pids.append(runner.pid("capture"))

    assert pids[0] == pids[1] is not None
    assert pids[2] is None


async def test_a_series_of_two_thousand_slices_is_served_like_any_other(runner, study):
    """As many slices as a whole-body scan has go through a warm process, and nothing of them stays in it."""
    runs = [await runner.run("capture", study(n=n)) for n in (3, 2000, 3)]

    assert [run.outcome for run in runs] == ["ran"] * 3
    assert runs[2].rss_bytes - runs[0].rss_bytes < 50_000_000


async def test_a_new_version_is_tried_beside_the_one_that_serves_and_takes_over_warm(
    runner, study, capture_map, tmp_path
):
    """A version that was tried serves from its installation on in the process that tried it; the old one ends."""
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "app.py").write_bytes((capture_map.place / "app.py").read_bytes() + b"# newer\n")
    newer = load("capture", tmp_path / "newer")
    own = MapRunner([capture_map])
    own._hosts = dict(runner._hosts)
    await own.run("capture", study())
    before = own.pid("capture")
    try:
        tried = await own.try_out(newer, study())
        serving = own.pid("capture")
        await own.install(newer)
        after = own.pid("capture")
        run = await own.run("capture", study())

        assert (tried.outcome, run.outcome) == ("ran", "ran")
        assert serving == before
        assert after == own.pid("capture") != before
        with pytest.raises(ProcessLookupError):
            os.kill(before, 0)
    finally:
        await own.stop()


async def test_a_map_that_changed_on_disk_does_not_run_under_its_old_digest(tmp_path, study):
    """A result never carries the digest of a program that did not make it."""
    (tmp_path / "app.py").write_text("import sys\n")
    changing = MapRunner([load("changing", tmp_path)])
    (tmp_path / "app.py").write_text("import os\n")
    with pytest.raises(MapChanged):
        await changing.run("changing", study())

    assert changing.unfit is None
    assert changing.pid("changing") is None


async def test_a_folder_may_change_while_its_version_runs(tmp_path, study):
    """What serves is a copy, also in the next process; it is gone when the MAP is."""
    app, first, second = tmp_path / "app.py", study(), study()
    app.write_text("import os\nopen(os.environ['HOLOSCAN_OUTPUT_PATH'] + '/a', 'w').write(__file__)\n")
    changing = MapRunner([load("m", tmp_path)], serving={"m": Serving(isolation="process")})
    await changing.run("m", first)
    app.write_text("raise RuntimeError\n")
    run = await changing.run("m", second)
    program = Path((second.output / "a").read_text())

    assert run.outcome == "ran"
    assert program == Path((first.output / "a").read_text()) != app
    assert program.exists()
    await changing.stop()
    assert not program.parent.exists()
