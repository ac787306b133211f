"""The set-up of a stranger: another folder, another user's pip, nothing of this machine's configuration."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path):
    """What a release's archive holds that set-up reads, in a folder that nobody planned for, and no git."""
    folder = tmp_path / "a folder's näme"
    shutil.copytree(ROOT / "deploy", folder / "deploy", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("cli", "maps", "radqueue", "services", "shared", "pyproject.toml", "README.md", "LICENSE", "Makefile"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder)
    return folder


def set_up(checkout, *options, path=None, **environment):
    """Run deploy/setup as somebody with no pip configuration, unless `environment` gives one."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    plain |= {"PIP_CONFIG_FILE": os.devnull, "HOME": str(checkout.parent), "PYTHON": "", "TORCH": ""} | environment
    if path is not None:
        plain["PATH"] = str(path)
    return subprocess.run(
        [checkout / "deploy" / "setup", "environment", *options],
        cwd=checkout.parent,
        env=plain,
        capture_output=True,
        text=True,
        check=False,
    )


def programs_but_python(folder, *pythons):
    """A PATH with this machine's programs, but of Pythons only those named."""
    folder.mkdir()
    for program in ("sh", "env", "uname", "getconf", "cut", "sort", "head", "printf", "dirname", "basename", "grep"):
        (folder / program).symlink_to(shutil.which(program))
    for name, says in pythons:
        (folder / name).write_text(says)
        (folder / name).chmod(0o755)
    return folder


TOO_OLD = "#!/bin/sh\ncase $1 in -V) echo Python 3.9.2 ;; esac\nexit 1\n"


@pytest.mark.slow
def test_a_stranger_on_plain_pypi_gets_one_set_of_versions(checkout):
    done = set_up(checkout, "--dry-run")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Would install" in done.stdout
    assert "torch-2" in done.stdout
    assert "PyTorch with CUDA" in done.stdout or "PyTorch for the CPU" in done.stdout


def test_a_python_that_is_too_old_is_named(checkout, tmp_path):
    done = set_up(checkout, path=programs_but_python(tmp_path / "bin", ("python3.9", TOO_OLD)), PYTHON="python3.9")

    assert done.returncode == 1
    assert "python3.9 is Python 3.9.2" in done.stderr


def test_without_a_python_the_package_to_install_is_told(checkout, tmp_path):
    done = set_up(checkout, path=programs_but_python(tmp_path / "bin", ("python3", TOO_OLD)))

    assert done.returncode == 1
    assert "apt-get install python3 python3-venv" in done.stderr


def test_python3_11_is_found_where_python3_is_too_old(checkout, tmp_path):
    asked = '#!/bin/sh\ncase "$2" in *version_info*) exit 0 ;; *venv*) exit 1 ;; esac\n'
    path = programs_but_python(tmp_path / "bin", ("python3", TOO_OLD), ("python3.11", asked))

    done = set_up(checkout, path=path)

    assert done.returncode == 1
    assert "python3.11 cannot make virtual environments" in done.stderr


def test_a_torch_that_is_neither_cpu_nor_cuda_is_refused(checkout):
    done = set_up(checkout, TORCH="rocm")

    assert done.returncode == 1
    assert "TORCH is cpu or cuda, not 'rocm'" in done.stderr


def test_the_places_of_the_users_own_pip_configuration_win(checkout):
    done = set_up(checkout, "--dry-run", PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="0", TORCH="cpu")

    assert done.returncode != 0
    assert "your pip configuration" in done.stdout
    assert "download.pytorch.org" not in done.stdout + done.stderr
