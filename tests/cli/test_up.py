import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy.local.stack import LEASH, Stack, StackFailed, _user_paths, read_env

WAIT_S = 60


def until(condition, what):
    """Wait for a condition, and say what was waited for when it does not come."""
    end = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)
    return found


def alive(pid):
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def run_json(directory):
    try:
        return json.loads((directory / "run.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}


def children(run):
    return [pid for name, pid in run.items() if name not in {"endpoint", "up"}]


def test_up_runs_restarts_and_ends(start_radqueue, tmp_path):
    """It says ready, starts a killed service again, and leaves nothing running after SIGTERM, with exit code 0."""
    directory = tmp_path / "d"
    process = start_radqueue("up", "--dir", directory, "--port", 0, "--service", "reporter")
    word, endpoint = process.stdout.readline().split()
    before = run_json(directory)

    assert (word, endpoint) == ("ready", before["endpoint"])
    assert read_env(directory / "local.env")["AWS_ENDPOINT_URL"] == endpoint
    assert before["up"] == process.pid
    assert set(before) == {"endpoint", "up", "aws", "reporter"}

    os.kill(before["reporter"], signal.SIGKILL)
    after = until(lambda: (found := run_json(directory)).get("reporter") != before["reporter"] and found, "a restart")

    assert after["aws"] == before["aws"]
    assert '"exit_code": -9' in (directory / "logs" / "up.log").read_text()

    process.send_signal(signal.SIGTERM)

    assert process.wait(WAIT_S) == 0
    assert not any(alive(pid) for pid in {*children(before), *children(after)})
    assert not (directory / "run.json").exists()


def test_nothing_outlives_a_killed_supervisor(start_radqueue, tmp_path):
    """After SIGKILL of `radqueue up` the kernel ends the local AWS and the services."""
    directory = tmp_path / "d"
    process = start_radqueue("up", "--dir", directory, "--port", 0, "--service", "reporter")
    until(lambda: len(children(run_json(directory))) == 2, "the start")
    pids = children(run_json(directory))
    process.kill()

    until(lambda: not any(alive(pid) for pid in pids), "the end of its processes")


def test_a_misconfigured_service_ends_everything_with_its_words(tmp_path):
    """Starting it again would not help, so the first exit code 2 ends everything and shows which setting it is."""
    stack = Stack(tmp_path / "d", services=("reporter",), environ=os.environ | {"RADQUEUE_SLOTS": "0"})

    with pytest.raises(StackFailed, match=r"reporter is misconfigured:\n  RADQUEUE_SLOTS: "):
        stack.__enter__()
    assert stack.pids == {}


def test_all_that_is_wrong_with_a_table_is_shown_with_exit_code_2(radqueue, tmp_path):
    """However many places of a table are wrong, each is a line under its own name; they are the user's to mend."""
    wrong = [{"name": f"map_{number:02}", "source": "x", "when": {"Colour": 1}} for number in range(20)]
    (tmp_path / "mine.yaml").write_text(json.dumps({"maps": wrong}))
    options = ("up", "--dir", tmp_path / "d", "--port", 0, "--service", "inference")
    done = radqueue(*options, env={"RADQUEUE_MAPS_FILE": "mine.yaml"}, timeout=WAIT_S)
    lines = done.stderr.splitlines()

    assert done.returncode == 2
    assert "radqueue: inference is misconfigured:" in lines
    assert sum(line.startswith("  mine.yaml: ") and "Colour" in line for line in lines) == 20


def test_paths_of_the_user_mean_the_user_s_folder():
    """The services run elsewhere, so their paths are made absolute; addresses and empty values stay as they are."""
    given = {"RADQUEUE_MAPS_FILE": "mine.yaml", "RADQUEUE_FEATURES_URI": "net.pt", "RADQUEUE_WORK_DIR": ""}
    addresses = {"RADQUEUE_DATASETS_FILE": "s3://bucket/datasets.yaml", "RADQUEUE_SLOTS": "3", "OTHER_FILE": "x"}
    here = {"RADQUEUE_MAPS_FILE": str(Path.cwd() / "mine.yaml"), "RADQUEUE_FEATURES_URI": str(Path.cwd() / "net.pt")}

    assert _user_paths(given | addresses) == here


def test_a_taken_folder_is_said(tmp_path, local_aws):
    """Two local AWS never share a folder; the second says so in one sentence."""
    with pytest.raises(StackFailed, match="in use by another local AWS"):
        Stack(local_aws.directory, services=()).__enter__()


def test_a_service_that_keeps_dying_is_given_up(tmp_path, monkeypatch):
    """After five quick deaths in a row everything ends, showing the service's last words."""
    monkeypatch.setattr("deploy.local.stack.FIRST_PAUSE_S", 0.01)
    stack = Stack(tmp_path / "d", services=("no_such_service",))

    with pytest.raises(StackFailed, match=r"died 5 times in a row \(exit code 1\).*\n(.*\n)*.*No module named"):
        stack.__enter__()


def test_the_user_s_settings_win_and_their_aws_does_not_and_its_death_ends_everything(tmp_path):
    """RADQUEUE_ variables of the user reach the services, AWS ones never do; the local AWS's death ends all else."""
    mine = {"RADQUEUE_POLL_S": "7", "AWS_ENDPOINT_URL": "http://192.0.2.1", "AWS_PROFILE": "mine", "AWS_REGION": "x"}
    with Stack(tmp_path / "d", services=("reporter",), environ=os.environ | mine) as stack:
        lines = (stack.logs / "reporter.log").read_text().splitlines()
        (started,) = [event for event in map(json.loads, lines) if event["event"] == "service.started"]

        assert (started["poll_s"], started["visibility_s"]) == (7, 30)
        assert "AWS_PROFILE" not in stack.client_environ
        assert stack.client_environ["AWS_ENDPOINT_URL"] == stack.endpoint_url != mine["AWS_ENDPOINT_URL"]

        pids = stack.pids
        os.kill(pids["aws"], signal.SIGKILL)

        assert stack.wait(WAIT_S)
        with pytest.raises(StackFailed, match="were in memory and are gone"):
            stack.check()
        assert not any(alive(pid) for pid in pids.values())


def test_a_leash_whose_parent_died_before_it_does_not_start_the_program():
    """A parent that is gone already cannot die again, so the signal would never come."""
    program = [
        sys.executable,
        LEASH,
        "1",
        sys.executable,
        "-c",
        "print('started')",
    ]
    done = subprocess.run(program, capture_output=True, check=False)

    assert (done.returncode, done.stdout) == (1, b"")


def test_an_environment_file_is_read_as_a_shell_would(tmp_path):
    """Comments, blank lines, `export` and quotes are understood."""
    path = tmp_path / "env"
    path.write_text("# a comment\n\nexport A=1\nB='two words'\nC=http://h:1/?x=y\n")

    assert read_env(path) == {"A": "1", "B": "two words", "C": "http://h:1/?x=y"}
