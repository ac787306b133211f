"""`radqueue map check`, `run`, `show` and `env`, with the real SDK."""

import json
import os
import re
import subprocess
import sys
import textwrap

import pydicom
import pytest
from typer.testing import CliRunner

from cli.main import app
from shared.phantom import Patient, write_ct_series
from tests.cli.conftest import ROOT, plain_environ

CT_TISSUES = ROOT / "maps" / "ct_tissues"

# Writes one secondary capture, which claims to be somebody else's or not, or nothing.
COPIES = textwrap.dedent(
    """
    import os
    from pathlib import Path

    import pydicom
    from monai.deploy.conditions import CountCondition
    from monai.deploy.core import Application, Operator
    from pydicom.uid import SecondaryCaptureImageStorage, generate_uid

    class Copy(Operator):
        def compute(self, op_input, op_output, context):
            made = pydicom.dcmread(sorted(Path(os.environ["HOLOSCAN_INPUT_PATH"]).iterdir())[0])
            made.SOPClassUID = made.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
            made.SOPInstanceUID = made.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            made.SeriesInstanceUID = generate_uid()
            made.AccessionNumber = "another"
            made.save_as(Path(os.environ["HOLOSCAN_OUTPUT_PATH"]) / "made.dcm")

    class App(Application):
        def compose(self):
            self.add_operator(Copy(self, CountCondition(self, 1), name="copy"))
    """
)


def radqueue_map(*arguments):
    """Run the command, as users do."""
    return subprocess.run(
        [sys.executable, "-m", "cli.main", "map", *map(str, arguments)],
        env=plain_environ(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def invoke(monkeypatch):
    """Run what starts no MAP in this process: a process of its own would be most of the time that it takes."""
    for name in {*os.environ} - {*plain_environ()}:
        monkeypatch.delenv(name)

    def run(*arguments):
        return CliRunner(env=plain_environ()).invoke(app, ["map", *map(str, arguments)])

    return run


def findings_of(done):
    """The findings of `check --json`, without those that are in order."""
    told = json.loads(done.stdout)
    return {one["check"]: one for one in told["findings"] if one["level"] != "ok"}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_ct_series(tmp_path_factory.mktemp("study"), slices=4, size=32)


def test_a_map_that_works_is_found_to_work(study, tmp_path):
    """Manifests, interpreter, libcudart, model, a run and its output are each found in order; exit code 0."""
    done = radqueue_map("check", CT_TISSUES, "--input", study, "--log", tmp_path / "log.txt")
    lines = done.stdout.splitlines()

    assert done.returncode == 0, done.stdout + done.stderr
    for check in ("manifests", "interpreter", "requirements", "libcudart", "application", "models", "study", "outputs"):
        assert any(line.startswith(f"ok {check}: ") for line in lines), check
    assert "ok models: ct_tissues is a TorchScriptModel, and loads as RecursiveScriptModule" in lines
    assert "ok outputs: 1 DICOM instance (SEG) with the study's attributes" in lines
    assert (tmp_path / "log.txt").stat().st_size > 0


def test_a_result_that_the_archive_would_hide_is_found(study, tmp_path):
    """An output that does not copy an attribute of the study fails the check, with the attribute and the remedy."""
    (tmp_path / "app.py").write_text(COPIES)
    done = radqueue_map("check", tmp_path, "--input", study, "--json")
    found = findings_of(done)["outputs"]

    assert done.returncode == 1
    assert found["level"] == "error"
    assert found["text"] == "the attributes named are not those of the study (AccessionNumber)"
    assert "non-primary" in found["remedy"]


def test_what_keeps_a_map_from_being_imported_is_found(tmp_path):
    """A missing module and a broken model are each told with their own words and a remedy."""
    (tmp_path / "app.py").write_text("import monai.deploy.core\nimport there_is_no_such_module\n")
    (tmp_path / "requirements.txt").write_text("numpy==0.1  # too old\nthere-is-no-such-package>=2\n./local.whl\n")
    (tmp_path / "models" / "m").mkdir(parents=True)
    (tmp_path / "models" / "m" / "model.ts").write_bytes(b"not a model")
    (tmp_path / "app.yaml").write_text("resources: {memory: 900Ti}\n")
    done = radqueue_map("check", tmp_path, "--json")
    found = findings_of(done)

    assert done.returncode == 1
    assert found["application"]["text"].startswith("ModuleNotFoundError: No module named 'there_is_no_such_module'")
    assert f"{tmp_path / 'app.py'}:2" in found["application"]["text"]
    assert found["models"]["text"] == f"the SDK knows no model in {tmp_path / 'models'}"
    told = [one["text"] for one in json.loads(done.stdout)["findings"] if one["check"] == "requirements"]
    assert told[0] == "not installed: there-is-no-such-package>=2"
    assert re.fullmatch(r"other versions: numpy==0\.1 \(there is .+\)", told[1])
    assert told[2:] == ["not compared: ./local.whl"]
    assert found["manifests"]["text"].startswith("asks for 9.22e+05 GiB of memory")
    assert all(one["remedy"] for one in found.values())


def test_an_interpreter_without_the_sdk_is_found(tmp_path):
    """The interpreter that is named is the one that is asked."""
    (tmp_path / "app.py").write_text("from monai.deploy.core import Application\nclass A(Application):\n    pass\n")
    done = radqueue_map("check", tmp_path, "--python", "/usr/bin/env", "--json")

    assert done.returncode == 1
    assert "/usr/bin/env ended" in findings_of(done)["interpreter"]["text"]


def test_a_program_without_the_sdk_is_checked_as_what_it_is(study, tmp_path):
    """Served warm it cannot be, which is all that is said; with a process per study it is a program like any other."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # -S: no site packages
    python.chmod(0o755)
    (tmp_path / "app.py").write_text(
        "import os, pathlib\npathlib.Path(os.environ['HOLOSCAN_OUTPUT_PATH'], 'a.txt').write_text('a')\n"
    )
    (tmp_path / "app.yaml").write_text("resources: {cpu: 1, gpus: 1}\n")
    how = ("check", tmp_path, "--input", study, "--python", python, "--json")
    warm, alone = radqueue_map(*how), radqueue_map(*how, "--isolation", "process", "--outputs", "any")
    wants_more = radqueue_map(*how, "--isolation", "process", "--outputs", "SEG=1")
    on_text = radqueue_map("check", tmp_path, "--input", tmp_path / "app.yaml", *how[4:], "--isolation", "process")
    errors = [one for one in json.loads(warm.stdout)["findings"] if one["level"] == "error"]

    assert [one["text"] for one in errors] == ["the MONAI Deploy App SDK is not installed there"]
    assert "isolation: process" in errors[0]["remedy"]
    assert findings_of(warm)["study"]["text"] == "it was not run"
    assert alone.returncode == 0, alone.stdout
    assert "wrote 1 file (text/plain), and no DICOM" in alone.stdout
    assert "keys that mean nothing: app.yaml: resources: gpus" in alone.stdout
    assert f"there is no DICOM file in {tmp_path / 'app.yaml'}" in on_text.stdout
    assert wants_more.returncode == 1
    assert findings_of(wants_more)["outputs"]["text"] == "it ended well and wrote nothing that an archive takes"


def test_a_source_that_is_no_map_is_told_with_exit_code_1(invoke, tmp_path):
    """A folder without a program, and a manifest that is broken, are findings like any other."""
    empty = invoke("check", tmp_path, "--json")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "app.json").write_text('{"command": ""}')
    broken = invoke("check", tmp_path, "--json")

    assert (empty.exit_code, broken.exit_code) == (1, 1)
    assert "neither app.py nor __main__.py" in findings_of(empty)["manifests"]["text"]
    assert findings_of(broken)["manifests"]["text"].startswith("app.json: command: expected")


def test_a_map_is_run_by_hand_as_the_worker_runs_it(study, tmp_path):
    """What the MAP writes is in the folder, the study is left alone, and JSON is all that is printed."""
    before = {path: path.read_bytes() for path in study.iterdir()}
    done = radqueue_map("run", CT_TISSUES, "--input", study, "--output", tmp_path / "out", "--json")
    told = json.loads(done.stdout)
    (written,) = (tmp_path / "out").iterdir()

    assert done.returncode == 0, done.stderr
    assert (told["outcome"], told["files"]) == ("ran", [str(written)])
    assert pydicom.dcmread(written).Modality == "SEG"
    assert {path: path.read_bytes() for path in study.iterdir()} == before


def test_a_map_that_fails_by_hand_fails_the_command(study, tmp_path):
    """The outcome, the exception's type and its place are told; that nothing was written is a failure, too."""
    failing, silent = tmp_path / "failing", tmp_path / "silent"
    for folder, code in ((failing, 'raise KeyError("x")\n'), (silent, "")):
        folder.mkdir()
        (folder / "app.py").write_text(code)
    how = ("--input", study, "--output", tmp_path / "out", "--isolation", "process")
    failed, wrote_nothing = radqueue_map("run", failing, *how), radqueue_map("run", silent, *how)

    assert (failed.returncode, wrote_nothing.returncode) == (1, 1)
    assert re.match(r"application_error in [0-9.]+ s on cpu: KeyError app\.py:1\n", failed.stdout)
    assert "exit code other than 0. Mend the application at that place" in failed.stdout
    assert "--log FILE writes what it prints" in failed.stdout
    assert wrote_nothing.stdout.startswith("no_output in ")


def test_what_cannot_be_meant_is_wrong_usage(invoke, tmp_path):
    """A study that is not there, an isolation that there is not, and an image that is a folder."""
    missing = invoke("run", CT_TISSUES, "--input", tmp_path / "none", "--output", tmp_path / "out")
    isolation = invoke("check", CT_TISSUES, "--isolation", "thread")
    image = invoke("extract", CT_TISSUES, "--out", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    write_ct_series(tmp_path / "two" / "a", slices=1, size=16, patient=Patient("A", "1"))
    write_ct_series(tmp_path / "two" / "b", slices=1, size=16, patient=Patient("B", "2"))
    empty = invoke("check", CT_TISSUES, "--input", tmp_path / "empty")
    two = invoke("check", CT_TISSUES, "--input", tmp_path / "two")
    outputs = invoke("check", CT_TISSUES, "--outputs", "SEG")

    assert [done.exit_code for done in (missing, isolation, image, empty, two, outputs)] == [2] * 6
    assert "does not exist" in missing.stderr
    assert "there is no file in" in empty.stderr
    assert "holds 2 studies" in two.stderr
    assert "such as SEG=1" in outputs.stderr
    assert "warm or process" in isolation.stderr
    assert "is no image" in image.stderr


def test_a_map_tells_what_it_says_of_itself(invoke):
    """The manifests and the variables of a folder are shown without importing it."""
    told = json.loads(invoke("show", CT_TISSUES, "--json").stdout)
    variables = dict(line.split("=", 1) for line in invoke("env", CT_TISSUES).stdout.splitlines())
    lines = invoke("show", CT_TISSUES).stdout.splitlines()

    assert told["models"] == str(CT_TISSUES / "models")
    assert told["memory_bytes"] == 2 << 30
    assert f"{'memory':<18}2 GiB" in lines
    assert f"{'application':<18}{CT_TISSUES}" in lines
    assert variables["HOLOSCAN_INPUT_PATH"] == variables["MONAI_INPUTPATH"] == "INPUT"
    assert variables["HOLOSCAN_MODEL_PATH"] == str(CT_TISSUES / "models")
