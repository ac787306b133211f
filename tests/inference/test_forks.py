"""Applications that fork: a study has one outcome, its own, and the studies after it are none the wiser."""

import os
import textwrap
from pathlib import Path

import pytest
import pytest_asyncio

from services.inference.package.maps import load
from services.inference.serving.runner import Bounds, MapRunner

pytestmark = pytest.mark.asyncio(loop_scope="session")

APP = textwrap.dedent(
    '''
    """Writes who made it, after a moment, or forks as a file among the input asks for."""

    import os
    import time
    from pathlib import Path

    from monai.deploy.core import Application

    HOME = Path.cwd()


    class Forking(Application):
        def compose(self):
            """There is nothing to compose."""

        def run(self):
            wish = (Path(os.environ["HOLOSCAN_INPUT_PATH"]) / "wish").read_text()
            output = Path(os.environ["HOLOSCAN_OUTPUT_PATH"])
            if wish == "fork and return" and os.fork() == 0:
                return
            if wish == "fork and return late" and os.fork() == 0:
                time.sleep(0.3)
                return
            if wish == "fork and exit" and os.fork() == 0:
                raise SystemExit(1)
            if wish == "fork and talk":
                helper, reply = os.fork(), b'{"id": 3, "reply": {"outcome": "ran", "duration_s": 0, "device": "cpu"}}'
                while helper == 0:
                    for number in range(20):
                        try:
                            os.write(number, reply + os.linesep.encode())
                        except OSError:
                            pass
                    time.sleep(0.01)
                (output / "helper").write_text(str(helper))
            (HOME / "kept").touch()
            time.sleep(0.5)
            assert (HOME / "kept").exists(), "a fork of an earlier study cleared up"
            (output / "made").write_text(str(os.getpid()))
    '''
)


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def forking(tmp_path_factory):
    """One runner for all, because importing the SDK takes seconds of a processor."""
    folder = tmp_path_factory.mktemp("forking")
    (folder / "app.py").write_text(APP)
    made = MapRunner([load("forking", folder)], bounds=Bounds(deadline_s=15))
    yield made
    await made.stop()


async def ran(runner, study, wish):
    laid = study()
    (laid.input / "wish").write_text(wish)
    run = await runner.run("forking", laid)
    return laid, run


@pytest.mark.parametrize("wish", ["fork and return", "fork and return late", "fork and exit"])
async def test_an_application_whose_fork_comes_back_has_one_outcome(forking, study, wish):
    """Its study ran, and so did those after it: in one process, each to its end, with an output of its own."""
    found = [await ran(forking, study, one) for one in (wish, "", wish, wish, "", "")]

    assert [run.outcome for _, run in found] == ["ran"] * 6
    assert {(laid.output / "made").read_text() for laid, _ in found} == {str(forking.pid("forking"))}
    assert all(run.duration_s >= 0.5 for _, run in found)


async def test_a_fork_that_lives_on_speaks_in_nobodys_name(forking, study):
    """Whatever it writes is in the log of its own study; those after it are right, and it ends with the process."""
    first, run = await ran(forking, study, "fork and talk")
    found = [await ran(forking, study, "") for _ in range(3)]
    helper = int((first.output / "helper").read_text())
    lived = Path(f"/proc/{helper}/exe").exists()
    pid = forking.pid("forking")
    await forking.stop()

    assert lived
    assert [run.outcome, *(run.outcome for _, run in found)] == ["ran"] * 4
    assert {(laid.output / "made").read_text() for laid, _ in found} == {str(pid)}
    assert b'"outcome": "ran"' in first.log_tail()
    assert all(b"outcome" not in laid.log_tail() for laid, _ in found)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(OSError, match="No such"):
        os.readlink(f"/proc/{helper}/exe")  # noqa: PTH115 - proc, where a zombie has none
