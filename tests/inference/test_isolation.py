"""A process per study by the MAP's own command: how each way to end is told apart from outside, in any interpreter.

The programs are plain scripts: nothing here depends on what they import.
"""

import json
import os
import subprocess
import sys
import textwrap
import time
import venv

import pytest
import pytest_asyncio

from services.inference.package.maps import load
from services.inference.serving import hostfiles, maphost
from services.inference.serving.runner import Bounds, MapRunner, Serving
from shared.child import ChildFailed

SCRIPTS = {
    "raise": ("raise KeyError('Secret^Name')", "application_error", "KeyError", "app.py:3"),
    "chained": (
        "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise ValueError('Secret^Name') from error",
        "application_error",
        "ValueError",
        "app.py:6, from ZeroDivisionError app.py:4",
    ),
    "wrapped": (
        "try:\n    bytearray(64 << 30)\nexcept MemoryError as error:\n    raise RuntimeError('Secret^Name') from error",
        "out_of_memory",
        "RuntimeError",
        "app.py:6, from MemoryError app.py:4",
    ),
    "while handling": (
        "try:\n    raise MemoryError\nexcept MemoryError:\n    raise ValueError('Secret^Name')",
        "application_error",
        "ValueError",
        "app.py:6",
    ),
    "exit": ("sys.exit('Secret^Name')", "application_error", "exit 1", ""),
    "segfault": ("import ctypes; ctypes.string_at(0)", "crashed", "SIGSEGV", ""),
    "kill": ("os.kill(os.getpid(), 9)", "crashed", "SIGKILL", ""),
    "memory": ("bytearray(64 << 30)", "out_of_memory", "MemoryError", "app.py:3"),
    "numpy": ("import numpy; numpy.ones(8 << 30)", "out_of_memory", "MemoryError", None),
    "gpu memory": (
        "class OutOfMemoryError(RuntimeError): ...\nraise OutOfMemoryError('CUDA out of memory.')",
        "gpu_out_of_memory",
        "OutOfMemoryError",
        "app.py:4",
    ),
    "nothing selected": ("selected_series = []\nselected_series[0]", "no_matching_series", "", ""),
    "well": ("pass", "ran", "", ""),
}


@pytest_asyncio.fixture
async def script(tmp_path):
    """Make a runner of a MAP whose program is the text, after `import os, sys, time`."""
    runners = []

    def make(text, *, python=None, deadline_s=60.0, **bounds):
        folder = tmp_path / "map"
        folder.mkdir()
        (folder / "app.py").write_text("import os, sys, time\n\n" + textwrap.dedent(text))
        serving = {"m": Serving(isolation="process", deadline_s=deadline_s)}
        runners.append(MapRunner([load("m", folder, python=python)], serving=serving, bounds=Bounds(**bounds)))
        return runners[-1]

    yield make
    for runner in runners:
        await runner.stop()


@pytest.mark.parametrize("name", SCRIPTS)
async def test_how_a_command_ended_is_told_by_its_exit_and_its_last_traceback(script, study, name):
    """Kind, type and place are those that the warm process tells; the text stays in the log of the study."""
    text, outcome, error_type, where = SCRIPTS[name]
    laid = study()
    run = await script(text, memory_bytes=4 << 30).run("m", laid)

    assert (run.outcome, run.error_type) == (outcome, error_type)
    assert where is None or run.where == where
    assert "Secret" not in repr(run)
    assert (b"Secret" in laid.log_tail()) == ("Secret" in text)


async def test_a_command_is_told_where_the_study_is_in_both_families_of_names(script, study):
    """It runs in the study's work folder, with the variables of today and those of App SDK 0.x."""
    laid = study()
    runner = script(
        """
        import json
        names = ("HOLOSCAN_INPUT_PATH", "MONAI_INPUTPATH", "HOLOSCAN_OUTPUT_PATH", "CUDA_VISIBLE_DEVICES")
        told = {name: os.environ.get(name) for name in names} | {"cwd": os.getcwd()}
        open(os.environ["HOLOSCAN_OUTPUT_PATH"] + "/told.json", "w").write(json.dumps(told))
        """,
        gpus=("GPU-1",),
    )
    run = await runner.run("m", laid)
    told = json.loads((laid.output / "told.json").read_text())

    assert run.outcome == "ran"
    assert told == {
        "HOLOSCAN_INPUT_PATH": str(laid.input),
        "MONAI_INPUTPATH": str(laid.input),
        "HOLOSCAN_OUTPUT_PATH": str(laid.output),
        "CUDA_VISIBLE_DEVICES": "GPU-1",
        "cwd": str(laid.folder / "work"),
    }


async def test_at_the_deadline_nothing_that_a_command_started_is_left(script, study):
    """What it started is killed with it, in its own group or not; the route's deadline goes before the worker's."""
    laid = study()
    runner = script(
        """
        import subprocess
        for new_session in (False, True):
            print(subprocess.Popen(["sleep", "600"], start_new_session=new_session).pid, flush=True)
        time.sleep(600)
        """,
        deadline_s=3,
    )
    run = await runner.run("m", laid)
    pids = [int(line) for line in laid.log_tail().split()]

    assert run.outcome == "deadline"
    assert len(pids) == 2
    for pid in pids:
        until = time.monotonic() + 20
        while os.path.exists(f"/proc/{pid}/exe") and time.monotonic() < until:  # noqa: PTH110 - a zombie has none
            time.sleep(0.01)
        with pytest.raises(OSError, match="No such"):
            os.readlink(f"/proc/{pid}/exe")  # noqa: PTH115 - proc


@pytest.fixture
def bare_python(tmp_path):
    """An interpreter without any package: not radqueue's dependencies, and no SDK."""
    venv.create(tmp_path / "bare", symlinks=True)
    return str(tmp_path / "bare" / "bin" / "python")


async def test_a_folder_with_an_interpreter_of_its_own_needs_none_of_our_packages(script, study, bare_python):
    """The child's side runs on the standard library; what is missing for a warm start is the MAP's own SDK."""
    laid = study()
    runner = script(
        "import importlib.util\nprint(sys.prefix, importlib.util.find_spec('pydantic'))", python=bare_python
    )
    run = await runner.run("m", laid)
    warm = MapRunner([runner._hosts["m"].map])
    with pytest.raises(ChildFailed) as caught:
        await warm.start("m")
    await warm.stop()

    assert run.outcome == "ran"
    assert laid.log_tail().split() == [bare_python.removesuffix("/bin/python").encode(), b"None"]
    assert caught.value.error_type == "ModuleNotFoundError"


def test_a_map_may_have_modules_of_our_names(tmp_path):
    """Our own modules are out of sight before the first module of the MAP is imported."""
    (tmp_path / "shared.py").write_text("NAME = 'of the MAP'")
    (tmp_path / "app.py").write_text("import shared\nraise RuntimeError(shared.NAME)")
    host = json.dumps({"application": str(tmp_path)})
    call = b'{"id": 1, "request": {"do": "start"}}\n'
    from services.inference.serving.host import START  # noqa: PLC0415 - beside its use

    root = hostfiles.lay_out(tmp_path / "host")
    done = subprocess.run(
        [sys.executable, "-c", START, root, host], input=call, capture_output=True, check=True, timeout=60
    )

    assert b"RuntimeError: of the MAP" in done.stderr


def test_a_log_without_a_traceback_is_told_by_the_exit_code(tmp_path):
    """A program in another language, or one that prints a message and exits, has no exception."""
    (tmp_path / "log.txt").write_text("error: cannot do this\n")

    assert maphost._told_by_log(tmp_path / "log.txt", 7)["error_type"] == "exit 7"
