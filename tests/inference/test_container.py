"""MAPs in containers, by a real engine: the same protocol, nothing of this machine in sight, nothing left behind."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import sysconfig
import textwrap
from dataclasses import replace

import pydicom
import pytest

from services.inference.package.maps import load
from services.inference.serving.runner import Bounds, MapRunner, Serving
from tests.conftest import ROOT
from tests.inference.conftest import APP

LOOK_AROUND = """
import json, os
def told(attempt):
    try:
        return attempt()
    except OSError:
        return "refused"
out = os.environ["HOLOSCAN_OUTPUT_PATH"]
json.dump({
    "uid": os.getuid(),
    "root": told(lambda: open("/new", "w")),
    "host": told(lambda: open("/radqueue/host/shared/child.py", "a")),
    "network": os.listdir("/sys/class/net"),
    "studies": os.listdir("/radqueue/work"),
    "input": len(os.listdir(os.environ["HOLOSCAN_INPUT_PATH"])),
    "caps": [line.split()[1] for line in open("/proc/self/status") if line.startswith("CapEff")][0],
}, open(out + "/told.json", "w"))
"""


@pytest.fixture(scope="module")
def image(engine, container_base, tmp_path_factory):
    """Make an image of a MAP whose program is the text."""

    def make(name, text, **resources):
        folder = tmp_path_factory.mktemp(name)
        (folder / "app.py").write_text(text)
        (folder / "app.json").write_text(json.dumps({"command": json.dumps(["python3", "/opt/holoscan/app/app.py"])}))
        (folder / "pkg.json").write_text(json.dumps({"resources": resources}))
        lines = [f"FROM {container_base}", "COPY app.py /opt/holoscan/app/", "COPY app.json pkg.json /etc/holoscan/"]
        (folder / "Dockerfile").write_text("\n".join(lines))
        tag = f"radqueue-test-{name}:1"
        subprocess.run([engine.program, "build", "--quiet", "--tag", tag, str(folder)], check=True, capture_output=True)
        return load(name, tag, engine=engine)

    return make


def containers(found):
    """Names of the image's containers, also of those that ended."""
    listing = ["ps", "--all", "--filter", f"ancestor={found.image.id}", "--format", "{{.Names}}"]
    command = [found.image.engine.program, *listing]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


ENDS = {
    "raise": ("raise KeyError('Secret^Name')", "application_error", "KeyError"),
    "segfault": ("import ctypes; ctypes.string_at(0)", "crashed", "SIGSEGV"),
    "hang": ("import subprocess, time; subprocess.Popen(['sleep', '600']); time.sleep(600)", "deadline", ""),
}


async def run_alone(found, study, **bounds):
    runner = MapRunner([found], serving={found.name: Serving(isolation="process")}, bounds=Bounds(**bounds))
    try:
        return await runner.run(found.name, study)
    finally:
        await runner.stop()


async def test_a_container_sees_its_study_and_nothing_else(image, study):
    """No root, no network, no writing beside the study, and no other study; its output is there afterwards."""
    found, laid = image("around", LOOK_AROUND), study()
    run = await run_alone(found, laid)
    told = json.loads((laid.output / "told.json").read_text())

    assert run.outcome == "ran"
    assert told == {
        "uid": 1000 if os.geteuid() == 0 else os.geteuid(),
        "root": "refused",
        "host": "refused",
        "network": ["lo"],
        "studies": ["study"],
        "input": 3,
        "caps": "0" * 16,
    }
    assert containers(found) == []


@pytest.mark.parametrize("name", ENDS)
async def test_how_a_container_ended_is_told_as_of_a_process(image, study, name):
    """The image's own command fails as a folder's does, and a hanging one is ended as a container."""
    text, outcome, error_type = ENDS[name]
    found, laid = image(name, text), study()
    run = await run_alone(found, laid, deadline_s=5)

    assert (run.outcome, run.error_type) == (outcome, error_type)
    assert len(list(laid.input.iterdir())) == 3, "the study is back in its place"
    assert containers(found) == []


async def test_a_fork_bomb_stays_in_its_container(image, study):
    """It reaches the limit of processes, hangs, and is gone at the deadline."""
    bomb = "import os, time\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        time.sleep(0.1)"
    found = with_arguments(image("bomb", bomb), "--pids-limit", "50")
    run = await run_alone(found, study(), deadline_s=4)

    assert run.outcome == "deadline"
    assert containers(found) == []


def with_arguments(found, *arguments):
    engine = replace(found.image.engine, arguments=(*found.image.engine.arguments, *arguments))
    return replace(found, image=replace(found.image, engine=engine))


def running_in(name, engine):
    return subprocess.run([engine.program, "top", name, "args"], check=False, capture_output=True, text=True).stdout


async def test_a_killed_worker_leaves_no_container(engine, image):
    """Nobody holds its standard input any more, and so it ends, although it is no child of the worker's."""
    hanging = image("hang", "import subprocess; subprocess.run(['sleep', '600'])")
    code = textwrap.dedent(
        f"""
        import asyncio, tempfile, pathlib
        from services.inference.package.engine import Engine
        from services.inference.package.maps import load
        from services.inference.serving.runner import MapRunner, Serving, Study
        engine = Engine({engine.kind!r}, {engine.program!r}, {engine.arguments!r})
        found = load("hang", {hanging.image.reference!r}, engine=engine)
        runner = MapRunner([found], serving={{"hang": Serving(isolation="process")}})
        asyncio.run(runner.run("hang", Study.make(pathlib.Path(tempfile.mkdtemp()))))
        """
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL) as worker:
        async with asyncio.timeout(60):
            while not any("sleep 600" in running_in(name, engine) for name in containers(hanging)):
                await asyncio.sleep(0.1)
            worker.send_signal(signal.SIGKILL)
            while containers(hanging):
                await asyncio.sleep(0.1)

    assert worker.returncode == -signal.SIGKILL


@pytest.mark.asyncio(loop_scope="session")
async def test_a_warm_container_makes_what_a_warm_process_makes(image, study, runner):
    """The same program under the same SDK, once in a container: study after study the same pixels, in one container."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the SDK's packages of this interpreter do not fit the container's Python 3.11")
    packages = sysconfig.get_paths()["purelib"]
    sdk = ("--volume", f"{packages}:/sdk:ro", "--env", "PYTHONPATH=/sdk")
    found = with_arguments(image("capture", APP, memory="4Gi"), *sdk)
    own = MapRunner([found])
    first, second, outside = study(), study(), study()
    try:
        runs = [await own.run("capture", first)]
        names = containers(found)
        runs.append(await own.run("capture", second))
        same = containers(found) == names
    finally:
        await own.stop()
    runs.append(await runner.run("capture", outside))
    pixels = [pydicom.dcmread(each.output / "capture.dcm").PixelData for each in (first, second, outside)]

    assert [run.outcome for run in runs] == ["ran"] * 3
    assert len(names) == 1
    assert same
    assert pixels[0] == pixels[1] == pixels[2]
    assert b"printed by the MAP" in second.log_tail()
    assert containers(found) == []


async def test_a_container_that_puts_links_in_place_of_its_study_reaches_nothing(image, study, tmp_path):
    """The whole folder may be a link to one of this machine: nothing of that is read, given away or removed."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "secret.txt").write_text("of somebody else")
    owner = (tmp_path / "secret" / "secret.txt").stat().st_uid
    text = (
        "import os\nos.chdir('/radqueue/work')\nos.rename('study', 'away')\n"
        f"os.symlink({str(tmp_path / 'secret')!r}, 'study')\n"
    )
    laid = study()
    run = await run_alone(image("links", text), laid)

    assert (run.outcome, run.where) == ("application_error", "study was replaced")
    assert not laid.folder.is_symlink()
    assert list(laid.output.iterdir()) == []
    assert (tmp_path / "secret" / "secret.txt").stat().st_uid == owner
    assert sorted(path.name for path in (tmp_path / "secret").iterdir()) == ["secret.txt"]
