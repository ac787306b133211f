"""The runner with the real SDK: how each way to end is told apart, and what becomes of the process."""

import asyncio
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pydicom
import pytest
import torch

from services.inference.package.maps import load
from services.inference.serving import maphost
from services.inference.serving import study as study_module
from services.inference.serving.host import _run_of
from services.inference.serving.runner import (
    GpuLost,
    MapChanged,
    MapRunner,
    Serving,
)
from services.inference.serving.study import LOG_END_BYTES, LOG_HEAD_BYTES, log_kept_small
from shared.child import ChildFailed

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


async def test_megabytes_on_standard_output_are_no_trouble(runner, study):
    """What a MAP prints goes beside the protocol, and the end of it is kept."""
    noisy = study(SeriesDescription="chatter")
    run = await runner.run("capture", noisy)

    assert run.outcome == "ran"
    assert len(noisy.log_tail()) == 64 * 1024
    assert b"xxxSecret^Name" in noisy.log_tail()


async def test_a_long_log_keeps_its_beginning_and_its_end(runner, study):
    """However much a MAP prints, the log is no longer than two pieces, and says how much is left out between them."""
    noisy = study(SeriesDescription="chatter")
    await runner.run("capture", noisy)
    before, found, after = (noisy.folder / "log.txt").read_bytes().partition(b"\n[radqueue: ")

    assert found
    assert b"printed by the MAP" in before
    assert len(before) == LOG_HEAD_BYTES
    assert re.match(rb"\d{7} bytes are left out here\]\nx", after)
    assert b"xxxSecret^Name" in after


async def test_a_log_takes_little_of_the_disk_while_it_grows(study, monkeypatch):
    """The middle of what is printed is freed at once, under a file that its writer has open."""
    monkeypatch.setattr(study_module, "LOG_LOOK_S", 0.01)
    noisy = study()
    path = noisy.folder / "log.txt"
    async with log_kept_small(noisy):
        with path.open("ab") as log:
            log.write(b"a" * LOG_HEAD_BYTES + b"b" * 8 * LOG_HEAD_BYTES + b"c" * LOG_END_BYTES)
            log.flush()
            async with asyncio.timeout(20):
                while path.stat().st_blocks * 512 > LOG_HEAD_BYTES + LOG_END_BYTES + 65536:
                    await asyncio.sleep(0.01)
            log.write(b"d")
    noisy.shorten_log()
    text = path.read_bytes()

    assert text.startswith(b"a" * LOG_HEAD_BYTES + b"\n[radqueue: 8388609 bytes are left out here]\n")
    assert text.endswith(b"\n" + b"c" * (LOG_END_BYTES - 1) + b"d")


async def test_a_series_of_two_thousand_slices_is_served_like_any_other(runner, study):
    """As many slices as a whole-body scan has go through a warm process, and nothing of them stays in it."""
    runs = [await runner.run("capture", study(n=n)) for n in (3, 2000, 3)]

    assert [run.outcome for run in runs] == ["ran"] * 3
    assert runs[2].rss_bytes - runs[0].rss_bytes < 50_000_000


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


async def test_what_a_map_put_in_place_of_a_folder_is_not_followed(tmp_path, study):
    """A link to a folder of somebody else is removed, and what it leads to is neither read, changed nor removed."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "secret.txt").write_text("of somebody else")
    program = tmp_path / "linking"
    program.mkdir()
    (program / "app.py").write_text(
        "import os, shutil\n"
        "study = os.path.dirname(os.environ['HOLOSCAN_OUTPUT_PATH'])\n"
        "os.rmdir(f'{study}/output')\n"
        f"os.symlink({str(secret)!r}, f'{{study}}/output')\n"
        "os.remove(f'{study}/log.txt')\n"
        f"os.symlink({str(secret / 'secret.txt')!r}, f'{{study}}/log.txt')\n"
    )
    laid = study()
    serving = {"linking": Serving(isolation="process")}
    alone = MapRunner([load("linking", program)], serving=serving)
    run = await alone.run("linking", laid)
    await alone.stop()
    made, printed = list(laid.output.iterdir()), laid.log_tail()
    laid.clear()

    assert (run.outcome, run.where) == ("application_error", "output was replaced")
    assert (made, printed) == ([], b"")
    assert (secret / "secret.txt").read_text() == "of somebody else"


async def test_a_log_that_became_a_link_is_not_read(study, tmp_path):
    """Also where it is replaced after the run, and where a study is cleared before it is mended."""
    laid = study()
    (tmp_path / "secret.txt").write_text("of somebody else")
    (laid.folder / "log.txt").symlink_to(tmp_path / "secret.txt")
    laid.output.rmdir()
    laid.output.symlink_to(tmp_path)
    laid.clear()

    assert laid.log_tail() == b""
    assert (tmp_path / "secret.txt").exists()
    assert laid.mend() == "log.txt"
