"""The entrypoint of MAP images, as a process of this machine."""

import json
import os
import signal
import subprocess
import sys

import pytest

from cli.map import entrypoint


@pytest.fixture
def start(tmp_path):
    """Start the entrypoint of an image whose application is a line of Python."""
    started = []

    def entry(code, *arguments, timeout_s=0):
        program = tmp_path / "app.py"
        program.write_text(code)
        (tmp_path / "app.json").write_text(json.dumps({"command": json.dumps([sys.executable, "-u", str(program)])}))
        environ = os.environ | {
            "HOLOSCAN_APP_MANIFEST_PATH": str(tmp_path / "app.json"),
            "HOLOSCAN_TIMEOUT": str(timeout_s),
        }
        command = [sys.executable, "-I", entrypoint.__file__, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, env=environ, **pipes))
        return started[-1]

    yield entry
    for process in started:
        process.kill()
        process.communicate()


def test_arguments_go_to_the_application_and_its_exit_code_comes_back(start):
    """The entrypoint is not seen between the caller and the application."""
    told = start("import sys; print(sys.argv[1:]); sys.exit(5)", "--log-level", "INFO")

    assert told.wait(30) == 5
    assert told.stdout.read() == b"['--log-level', 'INFO']\n"


def test_a_signal_that_ends_the_application_is_told(start):
    """An application that crashes is told as a shell tells it."""
    assert start("import os; os.kill(os.getpid(), 9)").wait(30) == 128 + signal.SIGKILL


def test_an_application_that_takes_too_long_is_asked_to_end_and_killed(start):
    """The timeout of the image ends its application, also one that does not hear."""
    code = "import signal, time; signal.signal(15, lambda *_: print('asked')); print('begun')\nwhile 1: time.sleep(9)"
    ended = start(code, timeout_s=3)

    assert ended.wait(60) == entrypoint.EXIT_TIMEOUT
    assert ended.stdout.read() == b"begun\nasked\n"
    assert b"ended after 3 s" in ended.stderr.read()


def test_what_the_entrypoint_does_not_have_is_told(start):
    """An unknown manifest, and a folder to extract to that is not mounted, are wrong usage."""
    assert start("", "show", "nothing").wait(30) == entrypoint.EXIT_USAGE
    unmounted = start("", "extract")

    assert unmounted.wait(30) == entrypoint.EXIT_USAGE
    assert b"/var/run/holoscan/export" in unmounted.stderr.read()
