"""What is released: a wheel that works where there is no checkout, and a source archive that makes the same wheel.

RADQUEUE_TEST_DIST names a folder that holds both; without it they are built here.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from shared.phantom import write_ct_series
from tests.conftest import ROOT, clean_environ

pytestmark = pytest.mark.slow

UNTRACKED = shutil.ignore_patterns(
    *(".*_cache", ".git", ".hypothesis", ".radqueue", ".venv", "*.egg-info", "*.pyc", "build", "dist")
)
PACKAGES = ("cli", "deploy", "maps", "radqueue", "services", "shared")
START_S = 180


def build(checkout, out, *what):
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, *what, checkout]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources") / "a folder's näme"
    return Path(shutil.copytree(ROOT, folder, ignore=UNTRACKED))


@pytest.fixture(scope="module")
def released(checkout, tmp_path_factory):
    """The folder with the source archive and the wheel that was built of it."""
    if given := os.environ.get("RADQUEUE_TEST_DIST"):
        return Path(given).absolute()
    out = tmp_path_factory.mktemp("dist")
    build(checkout, out)
    return out


@pytest.fixture(scope="module")
def wheel(released):
    (found,) = released.glob("radqueue-*.whl")
    return found


class Installed:
    """An environment that has the wheel and what it depends on; commands run elsewhere, with nothing of ours set."""

    def __init__(self, folder, wheel):
        self.environment, self.elsewhere = folder / "environment", folder / "elsewhere"
        self.elsewhere.mkdir(parents=True)
        venv.create(self.environment, with_pip=False, symlinks=True)
        self.python = self.environment / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet", "--no-index", "--no-deps"]
        subprocess.run([*pip, wheel], check=True)
        # The dependencies are those of the tests' environment. Its own .pth files, which lead to the checkout, are not
        # read in a folder that is itself named by one.
        place = Path(sysconfig.get_path("purelib", vars={"base": self.environment, "platbase": self.environment}))
        (place / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
        self.environ = {name: value for name, value in clean_environ().items() if not name.startswith("PYTHON")}
        self.environ |= {"HOME": str(self.elsewhere), "COLUMNS": "200"}

    def run(self, program, *arguments):
        command = [self.environment / "bin" / program, *map(str, arguments)]
        return subprocess.run(
            command, cwd=self.elsewhere, env=self.environ, capture_output=True, text=True, timeout=START_S, check=False
        )

    def start(self, program, *arguments):
        command = [self.environment / "bin" / program, *map(str, arguments)]
        return subprocess.Popen(command, cwd=self.elsewhere, env=self.environ, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    return Installed(tmp_path_factory.mktemp("installed") / "spaced näme", wheel)


@pytest.fixture
def scan(tmp_path):
    return write_ct_series(tmp_path / "scan", slices=4, size=64)


def test_nothing_comes_from_the_checkout(installed):
    """Every one of our packages is the installed one, and the checkout is not on the path."""
    code = f"import json, sys, {', '.join(PACKAGES)}; print(json.dumps([sys.path, {', '.join(PACKAGES)}], default=str))"
    done = installed.run("python", "-c", code)
    path, *modules = json.loads(done.stdout)

    assert str(ROOT) not in path
    assert all(str(installed.environment) in module for module in modules)


def test_the_version_is_told(installed):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    done = installed.run("radqueue", "--version")

    assert (done.returncode, done.stdout.strip()) == (0, version), done.stderr


def test_files_are_checked(installed, scan):
    done = installed.run("radqueue", "ingest-check", scan)

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_shipped_map_works(installed, scan):
    (place,) = installed.environment.glob("lib/python*/site-packages/maps/ct_tissues")
    done = installed.run("radqueue", "map", "check", place, "--input", scan)

    assert done.returncode == 0, done.stdout + done.stderr


def test_a_parameter_is_checked_against_the_shipped_config(installed):
    done = installed.run("radqueue", "train", "--dataset", "chest", "--set", "no_such=1")

    assert done.returncode == 2
    assert "learningRate=" in done.stderr


def test_data_are_deidentified(installed):
    code = """
from pydicom import Dataset
from services.ingest.deidentification import Option, deidentify
one = Dataset()
one.PatientID, one.StudyDescription = "P-1", "CT THORAX OF DOE"
deidentify(one, list(Option), "secret")
print(one.PatientID, one.StudyDescription)
"""
    done = installed.run("python", "-c", code)

    assert done.returncode == 0, done.stderr
    assert "P-1" not in done.stdout
    assert "THORAX" in done.stdout


def test_everything_starts_and_ends(installed, tmp_path):
    """`up` is ready with all services, a training is refused for lack of data alone, and SIGTERM ends it."""
    with installed.start("radqueue", "up", "--dir", tmp_path / "up", "--port", "0") as process:
        try:
            said = process.stdout.readline()
            asked = ("--env", tmp_path / "up" / "local.env", "train", "--dataset", "chest", "--set", "steps=4")
            trained = installed.run("radqueue", *asked)
            process.send_signal(signal.SIGTERM)
            code = process.wait(START_S)
        finally:
            process.kill()

    assert said.startswith("ready http"), (tmp_path / "up" / "logs" / "up.log").read_text()
    assert (trained.returncode, "no training data" in trained.stderr) == (1, True), trained.stderr
    assert code == 0


def test_a_notebook_imports_what_is_public(installed):
    shutil.copy(ROOT / "docs" / "examples" / "gan_pipeline.py", installed.elsewhere)
    code = (
        "from radqueue.pipeline import *; from radqueue.queue import *; print(consume, train_gan); import gan_pipeline"
    )
    done = installed.run("python", "-c", code)

    assert done.returncode == 0, done.stderr


def test_each_file_beside_our_code_is_shipped(checkout, wheel):
    """One that is added to a package needs a line under `tool.setuptools.package-data`; deploy's are for deploying."""
    shipped = set(zipfile.ZipFile(wheel).namelist())
    there = {path.relative_to(checkout) for name in PACKAGES for path in (checkout / name).rglob("*") if path.is_file()}
    wanted = {path.as_posix() for path in there if path.parts[0] != "deploy" or path.suffix == ".py"}
    ours = {name for name in shipped if not name.startswith("radqueue-")}

    assert ours == wanted | {"deploy/topology.json"}


def test_the_source_archive_makes_the_same_wheel(checkout, released, wheel, tmp_path):
    """A wheel of the checkout and a wheel of the source archive hold the same files with the same bytes."""
    build(checkout, tmp_path, "--wheel")
    (other,) = tmp_path.glob("*.whl")

    assert contents(other) == contents(wheel)
    (archive,) = released.glob("radqueue-*.tar.gz")
    with tarfile.open(archive) as members:
        names = {name.partition("/")[2] for name in members.getnames()}
    assert {".ci/run", "Makefile", "deploy/constraints.txt", "deploy/setup", "tests/conftest.py"} <= names


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}
