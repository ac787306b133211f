"""The runner with the real SDK: what a MAP prints, and what it puts in place of its study's folders."""

import asyncio
import re

import pytest

from services.inference.package.maps import load
from services.inference.serving import study as study_module
from services.inference.serving.runner import MapRunner, Serving
from services.inference.serving.study import LOG_END_BYTES, LOG_HEAD_BYTES, log_kept_small

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_megabytes_on_standard_output_are_no_trouble(runner, study):
    """What a MAP prints goes beside the protocol, and the end of it is kept."""
    noisy = study(SeriesDescription="chatter")
    run = await runner.run("capture", noisy)

    assert run.outcome == "ran"
    assert len(noisy.log_tail()) == 64 * 1024
    assert b"xxxSecret^Name" in noisy.log_tail()


async def test_a_long_log_keeps_its_beginning_and_its_end(runner, study):
    """However much a MAP prints, the log is no longer than two pieces, and says how much is left out between them."""
    noisy = study(SeriesDescription="chatter")
    await runner.run("capture", noisy)
    before, found, after = (noisy.folder / "log.txt").read_bytes().partition(b"\n[radqueue: ")

    assert found
    assert b"printed by the MAP" in before
    assert len(before) == LOG_HEAD_BYTES
    assert re.match(rb"\d{7} bytes are left out here\]\nx", after)
    assert b"xxxSecret^Name" in after


async def test_a_log_takes_little_of_the_disk_while_it_grows(study, monkeypatch):
    """The middle of what is printed is freed at once, under a file that its writer has open."""
    monkeypatch.setattr(study_module, "LOG_LOOK_S", 0.01)
    noisy = study()
    path = noisy.folder / "log.txt"
    async with log_kept_small(noisy):
        with path.open("ab") as log:
            log.write(b"a" * LOG_HEAD_BYTES + b"b" * 8 * LOG_HEAD_BYTES + b"c" * LOG_END_BYTES)
            log.flush()
            async with asyncio.timeout(20):
                while path.stat().st_blocks * 512 > LOG_HEAD_BYTES + LOG_END_BYTES + 65536:
                    await asyncio.sleep(0.01)
            log.write(b"d")
    noisy.shorten_log()
    text = path.read_bytes()

    assert text.startswith(b"a" * LOG_HEAD_BYTES + b"\n[radqueue: 8388609 bytes are left out here]\n")
    assert text.endswith(b"\n" + b"c" * (LOG_END_BYTES - 1) + b"d")


async def test_what_a_map_prints_goes_into_the_log_of_its_study_alone(runner, study, capfd):
    """Prints, C++ messages and tracebacks of one study end in its own file, and in no other output."""
    one, other = study(PatientName="First^Patient"), study(PatientName="Second^Patient", SeriesDescription="raise")
    await runner.run("capture", one)
    run = await runner.run("capture", other)

    assert (run.outcome, run.error_type) == ("application_error", "KeyError")
    assert b"printed by the MAP about First^Patient" in one.log_tail()
    assert b"Graph execution finished" in one.log_tail()
    assert b"Second^Patient" not in one.log_tail()
    assert b"KeyError" in other.log_tail()
    assert b"First^Patient" not in other.log_tail()
    assert "Patient" not in "".join(capfd.readouterr())


async def test_what_a_map_put_in_place_of_a_folder_is_not_followed(tmp_path, study):
    """A link to a folder of somebody else is removed, and what it leads to is neither read, changed nor removed."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "secret.txt").write_text("of somebody else")
    program = tmp_path / "linking"
    program.mkdir()
    (program / "app.py").write_text(
        "import os, shutil\n"
        "study = os.path.dirname(os.environ['HOLOSCAN_OUTPUT_PATH'])\n"
        "os.rmdir(f'{study}/output')\n"
        f"os.symlink({str(secret)!r}, f'{{study}}/output')\n"
        "os.remove(f'{study}/log.txt')\n"
        f"os.symlink({str(secret / 'secret.txt')!r}, f'{{study}}/log.txt')\n"
    )
    laid = study()
    serving = {"linking": Serving(isolation="process")}
    alone = MapRunner([load("linking", program)], serving=serving)
    run = await alone.run("linking", laid)
    await alone.stop()
    made, printed = list(laid.output.iterdir()), laid.log_tail()
    laid.clear()

    assert (run.outcome, run.where) == ("application_error", "output was replaced")
    assert (made, printed) == ([], b"")
    assert (secret / "secret.txt").read_text() == "of somebody else"


async def test_a_log_that_became_a_link_is_not_read(study, tmp_path):
    """Also where it is replaced after the run, and where a study is cleared before it is mended."""
    laid = study()
    (tmp_path / "secret.txt").write_text("of somebody else")
    (laid.folder / "log.txt").symlink_to(tmp_path / "secret.txt")
    laid.output.rmdir()
    laid.output.symlink_to(tmp_path)
    laid.clear()

    assert laid.log_tail() == b""
    assert (tmp_path / "secret.txt").exists()
    assert laid.mend() == "log.txt"
