"""`radqueue map build` with a real podman: what is in the image, that it is the same again, and how it behaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import uuid
import zipfile
from pathlib import Path

import pytest

from services.inference.package.engine import Engine, Mount
from tests.cli.conftest import ROOT, plain_environ
from tests.inference.conftest import CONTAINER_BASE, RUN_AS

PROGRAM = textwrap.dedent(
    """
    import json
    import os
    import signal
    import sys

    import tiny

    if sys.argv[1:] == ["fail"]:
        sys.exit(3)
    if sys.argv[1:] == ["abort"]:
        os.abort()
    if sys.argv[1:] == ["wait"]:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        print("ready", flush=True)
        signal.pause()
    said = {"uid": os.getuid(), "tiny": tiny.VALUE, "models": os.listdir(os.environ["HOLOSCAN_MODEL_PATH"])}
    with open(os.environ["HOLOSCAN_OUTPUT_PATH"] + "/said.json", "w") as file:
        json.dump(said, file)
    """
)
APP_YAML = "application: {title: Tiny, version: 2.1}\nresources: {cpu: 1, gpu: 0, memory: 512Mi}\n"


def radqueue(*arguments, arguments_of_engine=(), **environ):
    """Run the command, as users do."""
    more = {
        "RADQUEUE_CONTAINER_ENGINE_ARGS": " ".join(arguments_of_engine),
        "RADQUEUE_CONTAINER_ENGINE_BUILD_ARGS": "--isolation chroot",
    }
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *map(str, arguments)],
        env=plain_environ() | more | environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def lay_application(folder):
    """Write an application that needs a package, which lies beside it."""
    (folder / "models" / "tiny").mkdir(parents=True)
    (folder / "models" / "tiny" / "model.ts").write_text("weights")
    (folder / "__main__.py").write_text(PROGRAM)
    (folder / "app.yaml").write_text(APP_YAML)
    (folder / "README.md").write_text("# Tiny\n")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("not part of it")
    (folder / "venv").mkdir()
    (folder / "venv" / "pyvenv.cfg").write_text("not part of it")
    (folder / "wheels").mkdir()
    (folder / "requirements.txt").write_text("./wheels/tiny-1.0-py3-none-any.whl\n")
    info = "tiny-1.0.dist-info"
    files = {
        "tiny.py": "VALUE = 42\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": f"tiny.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n",
    }
    with zipfile.ZipFile(folder / "wheels" / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(zipfile.ZipInfo(name), text)
    return folder


@pytest.fixture(scope="module")
def engine() -> Engine:
    """A podman that has the base and runs containers."""
    if shutil.which("podman") is None or os.geteuid() != 0:
        pytest.skip("podman is not installed, or this is not root (deploy/test-system installs it)")
    for arguments in RUN_AS:
        found = Engine("podman", shutil.which("podman"), arguments)
        if found.inspect(CONTAINER_BASE) is None:
            pytest.skip(f"there is no image {CONTAINER_BASE} (deploy/test-system makes it)")
        command = found.run_command(CONTAINER_BASE, ["python3", "-m", "pip", "--version"], name=new_name())
        if subprocess.run(command, check=False, capture_output=True, stdin=subprocess.DEVNULL).returncode == 0:
            return found
    return pytest.skip("podman runs no container with pip here")


@pytest.fixture(scope="module")
def built(engine, tmp_path_factory):
    """The image of the application, built by the command; what the command said."""
    folder = lay_application(tmp_path_factory.mktemp("tiny"))
    tag = f"localhost/radqueue-{uuid.uuid4().hex}:1"
    done = radqueue("map", "build", folder, "--tag", tag, "--base", CONTAINER_BASE, "--timeout", "90", "--json")

    assert done.returncode == 0, done.stderr
    yield json.loads(done.stdout)
    subprocess.run([engine.program, "rmi", "--force", tag], check=True, capture_output=True)


@pytest.fixture
def start(engine, built):
    """Start the image with its own entrypoint; ended at the end."""
    processes = {}

    def started(*argv, mounts=()):
        name = new_name()
        command = engine.run_command(built["tag"], argv, name=name, mounts=mounts, own_entrypoint=True)
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes[name] = subprocess.Popen(command, **pipes)
        return processes[name]

    yield started
    for name, process in processes.items():
        engine.remove(name)
        process.communicate()


def new_name():
    return f"radqueue-{uuid.uuid4().hex}"


def test_an_image_says_what_the_specification_asks_for(engine, built):
    """Manifests, folders, labels, variables, a user who is not root, and a base that is named by its digest."""
    inspected = engine.inspect(built["tag"])
    app = json.loads(engine.read(built["tag"], "/etc/holoscan/app.json"))
    pkg = json.loads(engine.read(built["tag"], "/etc/holoscan/pkg.json"))

    assert json.loads(app["command"]) == ["python3", "/opt/holoscan/app"]
    assert (app["timeout"], app["version"], app["workingDirectory"]) == (90, "2.1", "/var/holoscan")
    assert app["input"] == {"path": "input/", "formats": None}
    assert pkg["models"] == {"tiny": "/opt/holoscan/models/tiny"}
    assert pkg["resources"] == {"cpu": 1, "gpu": 0, "memory": "512Mi"}
    assert engine.read(built["tag"], "/opt/holoscan/models/tiny/model.ts") == b"weights"
    assert engine.read(built["tag"], "/opt/holoscan/app/.git/config") is None
    assert engine.read(built["tag"], "/opt/holoscan/app/venv/pyvenv.cfg") is None
    assert (inspected.user, inspected.working_directory) == ("1000:1000", "/var/holoscan")
    assert inspected.labels["org.opencontainers.image.title"] == "Tiny"
    assert inspected.environment["HOLOSCAN_MODEL_PATH"] == "/opt/holoscan/models"
    assert built["base"].partition("@")[2] == inspected.labels["org.opencontainers.image.base.digest"]
    assert built["base"].partition("@")[2].startswith("sha256:")


def test_the_same_folder_makes_the_same_image(engine, built, tmp_path):
    """Dates, modes and the place of the files on this machine do not matter: every byte of the image is the same."""
    folder = lay_application(tmp_path / "elsewhere")
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    before = engine.inspect(built["tag"]).id
    # Without the first image and its layers, nothing of it can be found again.
    subprocess.run([engine.program, "rmi", "--force", built["tag"]], check=True, capture_output=True)
    again = radqueue("map", "build", folder, "--tag", built["tag"], "--base", CONTAINER_BASE, "--timeout", "90")

    assert again.returncode == 0, again.stderr
    assert engine.inspect(built["tag"]).id == before


def test_an_image_runs_as_its_user_and_returns_the_exit_code_of_its_application(start, tmp_path):
    """Success is 0, the application's own code is the container's, and a signal is 128 and its number."""
    tmp_path.chmod(0o777)
    ran = start(mounts=[Mount(tmp_path, "/var/holoscan/output", writable=True)])

    assert ran.wait(60) == 0, ran.stderr.read()
    assert json.loads((tmp_path / "said.json").read_text()) == {"uid": 1000, "tiny": 42, "models": ["tiny"]}
    assert start("fail").wait(60) == 3
    assert start("abort").wait(60) == 128 + signal.SIGABRT


def test_a_signal_reaches_the_application(start):
    """What asks a container to end is what its application hears."""
    waiting = start("wait")
    assert waiting.stdout.readline() == b"ready\n"
    waiting.send_signal(signal.SIGTERM)

    assert waiting.wait(60) == 7


def test_an_image_shows_and_gives_away_what_it_holds(start, tmp_path):
    """`show`, `env` and `extract` of the entrypoint work without anything of ours."""
    tmp_path.chmod(0o777)
    shown, _ = start("show", "pkg").communicate(timeout=60)
    both, _ = start("show").communicate(timeout=60)
    variables, _ = start("env").communicate(timeout=60)
    extracting = start("extract", mounts=[Mount(tmp_path, "/var/run/holoscan/export", writable=True)])

    assert json.loads(shown)["applicationRoot"] == "/opt/holoscan/app"
    assert b"app.json" in both
    assert b"HOLOSCAN_TIMEOUT=90" in variables.splitlines()
    assert extracting.wait(60) == 0
    assert (tmp_path / "app" / "__main__.py").read_text() == PROGRAM
    assert (tmp_path / "models" / "tiny" / "model.ts").read_text() == "weights"
    assert (tmp_path / "docs" / "README.md").exists()
    assert {path.name for path in (tmp_path / "config").iterdir()} == {"app.json", "pkg.json", "app.yaml"}


def test_an_image_is_unpacked_to_a_source_that_says_the_same(engine, built, tmp_path):
    """`map extract` runs nothing of the image, and what it writes is a MAP with the same needs."""
    done = radqueue("map", "extract", built["tag"], "--out", tmp_path / "out", arguments_of_engine=engine.arguments)
    of_image, of_folder = (
        json.loads(radqueue("map", "show", source, "--json", arguments_of_engine=engine.arguments).stdout)
        for source in (built["tag"], tmp_path / "out")
    )

    assert done.returncode == 0, done.stderr
    assert of_image["digest"] == built["digest"]
    for key in ("timeout_s", "cpu", "memory_bytes"):
        assert of_folder[key] == of_image[key] is not None
    assert of_folder["models"] == str(tmp_path / "out" / "models")


def test_a_build_that_fails_tells_why_in_few_lines_and_where_the_rest_is(engine, tmp_path):
    """The lines that tell are shown, all are kept in a file, and that nothing is installed is said before."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "app.py").write_text("")
    build = ["map", "build", tmp_path / "app", "--tag", "failing:1", "--base", CONTAINER_BASE]
    wrong = radqueue(*build, RADQUEUE_CONTAINER_ENGINE_BUILD_ARGS="--no-such-argument", TMPDIR=str(tmp_path))
    (tmp_path / "app" / "requirements.txt").write_text("./there-is-no-such-wheel.whl\n")
    failed = radqueue(*build, TMPDIR=str(tmp_path))
    lines = failed.stderr.splitlines()
    log = Path(lines[-1].rpartition(" ")[2])

    assert (wrong.returncode, failed.returncode) == (1, 1)
    assert "there is no requirements.txt in" in wrong.stderr
    assert "--no-such-argument" in wrong.stderr, "the setting reaches the build"
    assert "there is no requirements.txt" not in failed.stderr
    assert any("there-is-no-such-wheel.whl" in line for line in lines)
    assert len(lines) < 12
    assert log.parent == tmp_path
    assert "COPY app" in log.read_text()


def test_without_a_builder_the_context_is_written(tmp_path):
    """What another machine can build is laid out, and what to do there is said; without a place for it, it fails."""
    folder, context, nothing = lay_application(tmp_path / "app"), tmp_path / "context", tmp_path / "bin"
    nothing.mkdir()
    build = ["map", "build", folder, "--tag", "tiny:1", "--base", "example/base@sha256:0a"]
    failed = radqueue(*build, PATH=str(nothing))
    done = radqueue(*build, "--context", context, PATH=str(nothing))

    assert (failed.returncode, done.returncode) == (1, 0)
    assert "no docker, podman or buildah" in failed.stderr
    assert f"docker build --tag tiny:1 {context}" in done.stdout
    assert (
        (context / "Dockerfile").read_text().startswith("FROM example/base@sha256:0a\nCOPY app /opt/holoscan/app/\nRUN")
    )
    assert {path.name for path in context.iterdir()} == {
        *("Dockerfile", "app", "app.json", "app.yaml", "docs", "models", "pkg.json", "tools"),
    }
    assert Path(context, "tools").read_bytes() == Path(ROOT, "cli", "map", "entrypoint.py").read_bytes()


def test_a_folder_that_is_no_application_is_not_built(tmp_path):
    """The command fails with the reason, and leaves nothing behind."""
    done = radqueue("map", "build", tmp_path, "--tag", "tiny:1", "--base", "b@sha256:0", "--context", tmp_path / "c")

    assert done.returncode == 2
    assert "neither app.py nor __main__.py" in done.stderr
    assert not (tmp_path / "c").exists()
