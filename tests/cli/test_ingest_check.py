"""`radqueue ingest-check`: the truth about an archive, without AWS."""

import io
import json
import os
import zipfile
from pathlib import Path

import pydicom
import pytest
from pydicom import dcmread

from services.ingest.reasons import REASONS
from shared.phantom import write_ct_series

BUNDLED = Path(pydicom.__file__).parent / "data" / "test_files"
PATIENT = "Secretperson^Jane"


def named(path: Path) -> bytes:
    """The file, with a patient's name that must not be told."""
    dataset = dcmread(path)
    dataset.PatientName = dataset.PatientID = PATIENT
    file = io.BytesIO()
    dataset.save_as(file)
    return file.getvalue()


@pytest.fixture
def archive(tmp_path):
    """Good files, compressed ones, a zip, and files of every other kind."""
    folder = tmp_path / "archive"
    (folder / "deep").mkdir(parents=True)
    whole = named(BUNDLED / "CT_small.dcm")
    (folder / "deep" / "good").write_bytes(whole)
    (folder / "bare.dcm").write_bytes(named(BUNDLED / "MR_small_RLE.dcm")[128 + 4 :])
    (folder / "short.dcm").write_bytes(whole[:-100])
    (folder / "note.txt").write_text("not DICOM")
    (folder / ".hidden").write_text("not looked at")
    with zipfile.ZipFile(folder / "study.zip", "w") as study:
        study.writestr(f"{PATIENT}/1", whole)
        study.writestr("readme.txt", "lies beside the images")
        study.writestr("2", whole[:-10])
    return folder


def test_every_file_has_a_verdict(radqueue, archive):
    """Taken in or refused, why, with which decoder and how fast; the exit code says that not all were taken in."""
    ran = radqueue("ingest-check", archive, "--json")
    told = json.loads(ran.stdout)
    verdicts = {Path(file["path"]).relative_to(archive).as_posix(): file for file in told["files"]}

    assert ran.returncode == 1
    assert {path: file["reason_code"] for path, file in verdicts.items()} == {
        "bare.dcm": None,
        "deep/good": None,
        "note.txt": "not_dicom",
        "short.dcm": "truncated",
        "study.zip#0": None,
        "study.zip#2": "truncated",
    }
    assert all(file["taken"] == (file["reason_code"] is None) for file in verdicts.values())
    assert all(file["seconds"] > 0 for file in verdicts.values())
    assert verdicts["bare.dcm"]["decoder"] == "pylibjpeg-rle"
    assert verdicts["bare.dcm"]["warnings"] == ["preamble_missing"]
    assert (told["taken"], told["refused"], told["reasons"]) == (3, 3, {"truncated": 2, "not_dicom": 1})
    assert list(told["reasons"]) == ["truncated", "not_dicom"]  # the most frequent first
    assert told["warnings"] == {"preamble_missing": 1}


def test_every_series_has_a_verdict(radqueue, tmp_path):
    """Its geometry and numbers; a gap is told, and what ingest would refuse as another data set under one UID."""
    whole = sorted(write_ct_series(tmp_path / "whole", slices=6, size=32).iterdir())
    gaps = sorted(write_ct_series(tmp_path / "gaps", seed=1, slices=6, size=32).iterdir())
    gaps[2].unlink()
    changed = dcmread(whole[3])
    changed.PatientComments = "changed"
    changed.save_as(tmp_path / "whole" / "z")
    (tmp_path / "whole" / "y").write_bytes(whole[1].read_bytes())  # a repeat, which changes nothing
    ran = radqueue("ingest-check", tmp_path, "--json")
    text = radqueue("ingest-check", tmp_path).stdout
    told = json.loads(ran.stdout)
    uids = [str(dcmread(paths[0]).SeriesInstanceUID) for paths in (whole, gaps)]
    by_uid = {one["series_uid"]: one for one in told["series"]}
    regular, gapped = (by_uid[uid] for uid in uids)
    (refused,) = [file for file in told["files"] if not file["taken"]]

    assert (regular["n_instances"], regular["geometry"]["verdict"], regular["warnings"]) == (6, "regular", [])
    assert (gapped["n_instances"], gapped["geometry"]["verdict"], gapped["geometry"]["n_gaps"]) == (5, "gaps", 1)
    assert gapped["warnings"] == ["missing_slices", "uneven_spacing"]
    assert refused["path"].endswith("/whole/z")
    assert (refused["reason_code"], refused["place"]) == ("conflicting_duplicate", str(whole[3]))
    assert {file["series_uid"] for file in told["files"]} == set(uids)
    assert "2 series (" in text
    assert "missing_slices" in text


def test_nothing_of_a_patient_is_told(radqueue, archive):
    """Neither what stands in the files nor the names inside a zip come out."""
    for options in ([], ["--json"]):
        ran = radqueue("ingest-check", archive, *options)

        assert "Secretperson" not in ran.stdout + ran.stderr
        assert "Traceback" not in ran.stderr


def test_the_text_says_what_to_do(radqueue, archive):
    """Each reason is shown with its meaning, and the last lines sum up."""
    ran = radqueue("ingest-check", archive)

    assert REASONS["truncated"] in ran.stdout
    assert f"{archive}/short.dcm: refused: truncated" in ran.stdout
    assert "6 files: 3 taken in (not compressed 2, pylibjpeg-rle 1), 3 refused" in ran.stdout
    assert ran.returncode == 1


def test_an_archive_without_fault_ends_with_0(radqueue, tmp_path):
    """Where everything would be taken in, the exit code is 0; one file may be asked for alone."""
    write_ct_series(tmp_path / "series", slices=3, size=32)
    whole = radqueue("ingest-check", tmp_path / "series")
    one = radqueue("ingest-check", next((tmp_path / "series").iterdir()), "--json")

    assert (whole.returncode, one.returncode) == (0, 0)
    assert json.loads(one.stdout)["taken"] == 1


def test_the_limits_are_those_of_the_service(radqueue, archive):
    """The settings of ingest count here too, and a wrong one is told as such."""
    limited = radqueue("ingest-check", archive / "deep", "--json", env={"RADQUEUE_MAX_PIXEL_BYTES": "1000"})
    wrong = radqueue("ingest-check", archive, env={"RADQUEUE_DECODERS": "many"})

    assert json.loads(limited.stdout)["reasons"] == {"too_large": 1}
    assert wrong.returncode == 2
    assert "RADQUEUE_DECODERS" in wrong.stderr


def test_a_name_that_is_no_text_is_shown(radqueue, tmp_path):
    """Files of old systems have names in other encodings."""
    write_ct_series(tmp_path / "ct", slices=1, size=16)
    (next((tmp_path / "ct").iterdir())).rename(tmp_path / os.fsdecode(b"M\xfcller"))
    ran = radqueue("ingest-check", tmp_path, env={"PYTHONIOENCODING": "utf-8:strict"})

    assert ran.returncode == 0
    assert "ller: taken in" in ran.stdout


def test_no_file_is_an_error(radqueue, tmp_path):
    """An empty folder, or one that is not there, is refused in one sentence."""
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        ran = radqueue("ingest-check", tmp_path / folder)

        assert ran.returncode == 1
        assert folder in ran.stderr
        assert "Traceback" not in ran.stderr
