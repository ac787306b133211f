"""How the tests of the command line run it: as users do, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def radqueue(tmp_path):
    """Run `radqueue ARGUMENT…` with nothing of the user's AWS settings, and return what came of it."""

    def run(*arguments, env=None, timeout=60):
        return subprocess.run(
            [sys.executable, "-m", "cli.main", *map(str, arguments)],
            cwd=tmp_path,
            env=plain_environ() | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture
def start_radqueue(tmp_path):
    """Start `radqueue ARGUMENT…` and return its process; it is killed if it still runs at the end."""
    started = []

    def start(*arguments, env=None):
        with (tmp_path / "stderr.txt").open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "cli.main", *map(str, arguments)],
                cwd=tmp_path,
                env=plain_environ() | (env or {}),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def plain_environ():
    """This process's environment without AWS settings, and a width that no line is broken at."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RADQUEUE_"))}
    nothing = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    return kept | nothing | {"AWS_EC2_METADATA_DISABLED": "true", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
