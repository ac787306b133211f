"""The runner with the real SDK: how each way to end is told apart, and what becomes of the process."""

import asyncio
import os

import pytest
import torch

from services.inference.package.maps import load
from services.inference.serving import maphost
from services.inference.serving.host import _run_of
from services.inference.serving.runner import (
    GpuLost,
    MapRunner,
)
from shared.child import ChildFailed

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.mark.parametrize(
    ("attributes", "outcome", "error_type"),
    [
        ({"Modality": "MR"}, "no_matching_series", ""),
        ({"SeriesDescription": "exit"}, "application_error", "SystemExit"),
        ({"SeriesDescription": "wrapped"}, "out_of_memory", "RuntimeError"),
        ({"SeriesDescription": "segfault"}, "crashed", "SIGSEGV"),
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


async def test_what_a_warm_process_fails_at_a_fresh_one_decides(runner, study):
    """A crash that comes of an earlier study is no failure of this one, and nothing of the first try is left."""
    await runner.run("capture", study())
    warm = study(SeriesDescription="crash when warm")
    run = await runner.run("capture", warm)

    assert (run.outcome, run.was_first) == ("ran", True)
    assert [path.name for path in warm.output.iterdir()] == ["capture.dcm"]


async def test_a_hanging_map_is_killed_at_its_deadline(runner, study, monkeypatch):
    """The deadline ends a MAP that never returns, and the time spent is told."""
    monkeypatch.setattr(runner._hosts["capture"], "deadline_s", 0.5)
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


async def test_a_lost_gpu_is_the_workers_end_and_not_the_studys(runner, study, monkeypatch):
    """An error of the device or its driver ends the worker, and so does a GPU that a new process finds gone."""
    host = runner._hosts["capture"]
    await runner.start("capture")
    with monkeypatch.context() as patched:

        async def started():
            host.device = "cuda"

        patched.setattr(host, "start", started)
        with pytest.raises(GpuLost):
            await runner.run("capture", study(SeriesDescription="gpu lost"))

    assert isinstance(runner.unfit, GpuLost)

    runner.unfit = None
    host.device = "cpu"
    monkeypatch.setattr(runner._hosts["capture"], "device", "cuda")
    with pytest.raises(GpuLost):
        await runner.run("capture", study())

    assert isinstance(runner.unfit, GpuLost)
    assert runner.pid("capture") is None
    runner.unfit = None


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
    ("error", "outcome"),
    [
        (MemoryError(), "out_of_memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        (OSError(12, "Cannot allocate memory"), "out_of_memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "gpu_out_of_memory"),
        (torch.AcceleratorError("CUDA error: out of memory"), "gpu_out_of_memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), "gpu_out_of_memory"),
        (torch.AcceleratorError("CUDA error: no CUDA-capable device is detected"), "gpu_lost"),
        (RuntimeError("CUDA error: unknown error\nCUDA kernel errors might be asynchronously reported"), "gpu_lost"),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "application_error"),
        (RuntimeError("CUDA error: device-side assert triggered"), "application_error"),
    ],
)
async def test_memory_that_ends_and_a_gpu_that_is_lost_are_recognised_however_they_are_raised(error, outcome):
    """Python, the kernel, torch on a processor and the CUDA runtime each say it in another way."""
    assert maphost._told(list(maphost._chain(error)))["outcome"] == outcome


async def test_a_map_without_a_gpu_that_says_it_lost_one_fails_alone(runner, study):
    """The worker goes on: what never had a GPU cannot have lost it."""
    run = await runner.run("capture", study(SeriesDescription="gpu lost"))

    assert run.outcome == "application_error"
    assert runner.unfit is None
