"""Folders that are gone when their process is."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from shared.workfolder import own_folder, temporary_files_in
from tests.conftest import ROOT

HOLDER = """
import sys, tempfile
from pathlib import Path
from shared.workfolder import own_folder, temporary_files_in
with own_folder(Path(sys.argv[1])) as own, temporary_files_in(own):
    print(tempfile.mkdtemp(), flush=True)
    sys.stdin.read()
"""


def test_a_killed_process_leaves_a_folder_that_the_next_one_removes(tmp_path):
    """What a process that got SIGKILL had is gone after the next start; what a living one has is left alone."""
    holders = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            text=True,
        )
        for _ in range(2)
    ]
    killed, alive = (Path(holder.stdout.readline().strip()) for holder in holders)
    holders[0].send_signal(signal.SIGKILL)
    holders[0].communicate()
    left = killed.exists()
    with own_folder(tmp_path) as own:
        folders = set(tmp_path.iterdir())
    holders[1].communicate()

    assert left
    assert folders == {own, alive.parent}
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_of_the_process_and_its_children_lie_in_the_folder(tmp_path):
    """Both look there, and where they looked before afterwards."""
    before = tempfile.gettempdir()
    with temporary_files_in(tmp_path):
        own = tempfile.gettempdir()
        child = subprocess.check_output(
            [sys.executable, "-c", "import tempfile; print(tempfile.gettempdir())"], text=True
        )

    assert own == child.strip() == str(tmp_path)
    assert tempfile.gettempdir() == before
