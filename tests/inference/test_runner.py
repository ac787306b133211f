"""The runner with the real SDK: how each way to end is told apart, and what becomes of the process."""

import asyncio
import os

import numpy as np
import pydicom
import pytest

from services.inference import maphost
from services.inference.maps import load
from services.inference.runner import MapChanged, MapRunner, _run_of
from shared.child import ChildFailed

pytestmark = pytest.mark.asyncio(loop_scope="session")


def pixels(study):
    return pydicom.dcmread(study.output / "capture.dcm").pixel_array


async def test_a_warm_process_serves_study_after_study_with_what_a_fresh_one_makes(runner, study, capture_map):
    """A process that has run a study gives the next one the same pixels as a new process does."""
    first, second, fresh = study(), study(), study()
    runs = [await runner.run("capture", first)]
    pid = runner.pid("capture")
    runs.append(await runner.run("capture", second))
    other = MapRunner([capture_map], recycle_after=1)
    runs.append(await other.run("capture", fresh))

    assert [run.outcome for run in runs] == ["ran"] * 3
    assert runner.pid("capture") == pid
    assert other.pid("capture") is None, "recycle_after=1 ends the process after each study"
    assert np.array_equal(pixels(second), pixels(first))
    assert np.array_equal(pixels(second), pixels(fresh))


@pytest.mark.parametrize(
    ("attributes", "outcome", "error_type"),
    [
        ({"Modality": "MR"}, "no_matching_series", ""),
        ({"SeriesDescription": "exit"}, "application_error", "SystemExit"),
        ({"SeriesDescription": "kill"}, "crashed", "SIGKILL"),
    ],
)
async def test_every_failure_is_told_apart_and_its_process_replaced(runner, study, attributes, outcome, error_type):
    """A MAP that does not end well is told by kind, type and place, never by text, and its process serves no more."""
    run = await runner.run("capture", study(**attributes))

    assert (run.outcome, run.error_type) == (outcome, error_type)
    assert runner.pid("capture") is None
    assert "Secret" not in repr(run)
    if run.where:
        assert run.where.startswith("app.py:")


async def test_a_hanging_map_is_killed_at_its_deadline(runner, study, monkeypatch):
    """The deadline ends a MAP that never returns, and the time spent is told."""
    monkeypatch.setattr(runner, "_deadline_s", 0.5)
    run = await runner.run("capture", study(SeriesDescription="hang"))

    assert run.outcome == "deadline"
    assert run.duration_s >= 0.5
    assert runner.pid("capture") is None


async def test_a_cancelled_study_leaves_no_process_behind(runner, study):
    """A worker that is told to stop kills what computes, and does not wait for it."""
    hanging = study(SeriesDescription="hang")
    task = asyncio.create_task(runner.run("capture", hanging))
    while b"printed by the MAP" not in hanging.log_tail():
        await asyncio.sleep(0.02)
    pid = runner.pid("capture")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert runner.pid("capture") is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_what_a_map_prints_goes_into_the_log_of_its_study_alone(runner, study, capfd):
    """Prints, C++ messages and tracebacks of one study end in its own file, and in no other output."""
    one, other = study(PatientName="First^Patient"), study(PatientName="Second^Patient", SeriesDescription="raise")
    await runner.run("capture", one)
    run = await runner.run("capture", other)

    assert (run.outcome, run.error_type) == ("application_error", "KeyError")
    assert b"printed by the MAP about First^Patient" in one.log_tail()
    assert b"Graph execution finished" in one.log_tail()
    assert b"Second^Patient" not in one.log_tail()
    assert b"KeyError" in other.log_tail()
    assert b"First^Patient" not in other.log_tail()
    assert "Patient" not in "".join(capfd.readouterr())


async def test_a_map_that_changed_on_disk_does_not_run_under_its_old_digest(tmp_path, study):
    """A result never carries the digest of a program that did not make it."""
    (tmp_path / "app.py").write_text("import sys\n")
    changing = MapRunner([load("changing", tmp_path)])
    (tmp_path / "app.py").write_text("import os\n")
    with pytest.raises(MapChanged):
        await changing.run("changing", study())

    assert changing.changed
    assert changing.pid("changing") is None


async def test_a_map_that_cannot_be_imported_is_told_by_type_and_place(tmp_path):
    """An import error names the exception and the line, so that it can be mended."""
    (tmp_path / "app.py").write_text("\nraise RuntimeError('text that stays inside')\n")
    broken = MapRunner([load("broken", tmp_path)])
    with pytest.raises(ChildFailed) as caught:
        await broken.start("broken")
    await broken.stop()

    assert str(caught.value) == "raised RuntimeError app.py:2"


async def test_a_process_that_the_kernel_killed_for_memory_is_told_as_such():
    """SIGKILL is a crash, unless the kernel counted a kill for memory meanwhile."""
    killed = ChildFailed("crashed", "SIGKILL")

    assert _run_of(killed, 1.0, "cpu", oom_killed=True).outcome == "out_of_memory"
    assert _run_of(killed, 1.0, "cpu", oom_killed=False).outcome == "crashed"
    assert _run_of(ChildFailed("crashed", "SIGSEGV"), 1.0, "cpu", oom_killed=True).outcome == "crashed"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        type("OutOfMemoryError", (RuntimeError,), {})("what torch.cuda raises"),
    ],
)
async def test_memory_that_ends_is_recognised_however_it_is_raised(error):
    """Python, torch on a processor and torch on a GPU each raise something else when memory ends."""
    assert maphost._told(error)["outcome"] == "out_of_memory"
