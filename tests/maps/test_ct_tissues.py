"""The example application, run as a user runs a MAP: in a process of its own, on files, judged by what it wrote."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, SegmentationStorage, generate_uid

from shared.phantom import Patient, write_ct_series

ROOT = Path(__file__).parents[2]
APP = ROOT / "maps" / "ct_tissues"
MODELS = APP / "models"
MODEL = MODELS / "ct_tissues" / "model.ts"
REAL = Path(os.environ.get("RADQUEUE_TEST_DATA", ROOT.parent / "shared" / "data"))
KEPT = ("StudyInstanceUID", "PatientID", "StudyDate", "AccessionNumber", "StudyID")
"""What HealthImaging compares before it shows a derived object with its study."""
TISSUES = {"Air": 1, "Soft tissue": 2, "Bone": 3}

needs_sdk = pytest.mark.skipif(
    importlib.util.find_spec("holoscan") is None, reason="the MONAI Deploy App SDK is not installed"
)


def launch(arguments: list[str], environment: dict[str, str] | None = None, code: list[str] | None = None) -> str:
    """Run the application in a fresh process and give back all that it printed."""
    # The SDK wants the CUDA runtime in the process even where there is no GPU; a MAP's own image brings it along.
    packages = Path(importlib.util.find_spec("nvidia").submodule_search_locations[0])
    runtime = next(packages.glob("*/lib/libcudart.so.13"))
    process = subprocess.run(
        [sys.executable, *(code or [str(APP)]), *arguments],
        env={**os.environ, "LD_PRELOAD": str(runtime), "OMP_NUM_THREADS": "1", **(environment or {})},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout

    return process.stdout


def segment(source: Path, output: Path) -> tuple[pydicom.Dataset, str]:
    """Run the application on a folder of instances; gives back the segmentation and what was printed."""
    output.mkdir(exist_ok=True)
    printed = launch(["-i", str(source), "-o", str(output), "-m", str(MODELS)])
    written = list(output.rglob("*"))
    assert len(written) == 1, written

    return pydicom.dcmread(written[0]), printed


def instances(folder: Path) -> list[pydicom.Dataset]:
    return [pydicom.dcmread(path) for path in sorted(folder.iterdir())]


def threshold(instance: pydicom.Dataset) -> np.ndarray:
    """Tissue by Hounsfield units, computed here from the file alone."""
    hu = instance.pixel_array * float(instance.RescaleSlope) + float(instance.RescaleIntercept)
    return np.select([hu < -300, hu < 200], [1, 2], 3)


def label_maps(seg: pydicom.Dataset, sources: list[pydicom.Dataset]) -> dict[str, np.ndarray]:
    """The segmentation as one label map per source instance, each frame put where its own references say."""
    by_uid = {source.SOPInstanceUID: source for source in sources}
    labels = {uid: np.zeros((source.Rows, source.Columns), np.uint8) for uid, source in by_uid.items()}
    frames = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    for frame, groups in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        (reference,) = groups.DerivationImageSequence[0].SourceImageSequence
        uid = reference.ReferencedSOPInstanceUID
        place = groups.PlanePositionSequence[0].ImagePositionPatient
        np.testing.assert_allclose(place, by_uid[uid].ImagePositionPatient, atol=1e-3)
        assert not labels[uid][frame > 0].any(), "a voxel has two labels"

        labels[uid][frame > 0] = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
    return labels


def dice_by_tissue(seg: pydicom.Dataset, sources: list[pydicom.Dataset]) -> dict[str, float]:
    maps = label_maps(seg, sources)
    ours = np.stack([maps[source.SOPInstanceUID] for source in sources])
    reference = np.stack([threshold(source) for source in sources])
    scores = {}
    for tissue, label in TISSUES.items():
        found, wanted = ours == label, reference == label
        scores[tissue] = float(2 * np.sum(found & wanted) / (found.sum() + wanted.sum()))
    return scores


def check_geometry(seg: pydicom.Dataset, sources: list[pydicom.Dataset]) -> None:
    shared = seg.SharedFunctionalGroupsSequence[0]
    np.testing.assert_allclose(
        shared.PlaneOrientationSequence[0].ImageOrientationPatient, sources[0].ImageOrientationPatient, atol=1e-6
    )
    np.testing.assert_allclose(shared.PixelMeasuresSequence[0].PixelSpacing, sources[0].PixelSpacing, atol=1e-6)
    assert (seg.Rows, seg.Columns) == (sources[0].Rows, sources[0].Columns)
    assert seg.FrameOfReferenceUID == sources[0].FrameOfReferenceUID


@pytest.fixture(scope="module")
def phantom_run(tmp_path_factory) -> tuple[pydicom.Dataset, list[pydicom.Dataset], str]:
    folder = tmp_path_factory.mktemp("phantom")
    patient = Patient("PHANTOM^UNMISTAKABLE", "ID-UNMISTAKABLE", "19010203")
    write_ct_series(folder / "in", seed=4711, slices=6, size=192, patient=patient)
    seg, printed = segment(folder / "in", folder / "out")
    return seg, instances(folder / "in"), printed


def test_the_model_is_small_enough_to_commit():
    """The network is under 4 MB, and alone in its folder, as the SDK's named models require."""
    assert MODEL.stat().st_size < 4_000_000
    assert list(MODEL.parent.iterdir()) == [MODEL]


def test_the_training_script_writes_such_a_model(tmp_path):
    """Training ends in a TorchScript archive that names no path of the machine that it ran on."""
    pytest.importorskip("torch")
    out = tmp_path / "model" / "model.ts"
    command = ["-m", "maps.ct_tissues.train", "--steps", "2", "--batch-size", "2", "--phantoms", "1", "--out", str(out)]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True, timeout=300)
    with zipfile.ZipFile(out) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}

    assert {"data.pkl", "constants.pkl", "version"} <= records.keys()
    assert not [name for name, content in records.items() if str(ROOT).encode() in content]


@needs_sdk
def test_a_phantom_gets_one_segmentation_at_source_geometry(phantom_run):
    """A CT series becomes one binary DICOM segmentation of three segments, on the slices of its source."""
    seg, sources, _ = phantom_run

    assert seg.SOPClassUID == SegmentationStorage
    assert seg.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert seg.SegmentationType == "BINARY"
    assert [segment.SegmentLabel for segment in seg.SegmentSequence] == list(TISSUES)
    assert "Not for clinical use" in seg.SeriesDescription
    check_geometry(seg, sources)


@needs_sdk
def test_every_voxel_of_a_new_phantom_gets_its_tissue(phantom_run):
    """On a phantom that training did not see, each tissue overlaps its Hounsfield range with a Dice of at least 0.9."""
    seg, sources, _ = phantom_run
    scores = dice_by_tissue(seg, sources)

    assert min(scores.values()) >= 0.9, scores
    assert all(labels.all() for labels in label_maps(seg, sources).values()), "every voxel has a label"


@needs_sdk
def test_the_segmentation_belongs_to_the_study(phantom_run):
    """What the archive matches a derived object by is copied from the source to the letter."""
    seg, sources, _ = phantom_run

    assert {name: seg[name].value for name in KEPT} == {name: sources[0][name].value for name in KEPT}


@needs_sdk
def test_nothing_of_the_patient_is_printed(phantom_run):
    """Name, id and birth date stay out of what the application and the SDK print."""
    _, _, printed = phantom_run

    assert "UNMISTAKABLE" not in printed
    assert "19010203" not in printed


@needs_sdk
def test_a_warm_process_runs_study_after_study(tmp_path):
    """A host that builds a new application per study, with paths from the environment, gets each study's own result."""
    for seed in (1, 2):
        write_ct_series(tmp_path / f"in{seed}", seed=seed, slices=2, size=64)
        (tmp_path / f"out{seed}").mkdir()
    host = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from app import CTTissuesApp\n"
        "for n in '12':\n"
        "    os.environ['HOLOSCAN_INPUT_PATH'] = f'{sys.argv[2]}/in{n}'\n"
        "    os.environ['HOLOSCAN_OUTPUT_PATH'] = f'{sys.argv[2]}/out{n}'\n"
        "    CTTissuesApp(argv=[]).run()\n"
    )
    launch([str(APP), str(tmp_path)], {"HOLOSCAN_MODEL_PATH": str(MODELS)}, ["-c", host])
    studies = [{i.StudyInstanceUID for i in instances(tmp_path / name)} for name in ("in1", "out1", "in2", "out2")]

    assert studies[0] == studies[1] != studies[2] == studies[3]


def real_series(name: str) -> Path:
    folder = REAL / name
    if not folder.is_dir():
        pytest.skip(f"real CT {name} is not on this machine (RADQUEUE_TEST_DATA)")
    return folder


def normalised(source: Path, target: Path) -> Path:
    """A copy as ingest stores it: decompressed, and with the identifiers that an anonymiser emptied."""
    target.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # These files hold values that pydicom complains about.
        for path in sorted(source.iterdir()):
            instance = pydicom.dcmread(path)
            if instance.file_meta.TransferSyntaxUID.is_compressed:
                instance.decompress()
            instance.SOPClassUID = CTImageStorage
            instance.SOPInstanceUID = instance.file_meta.MediaStorageSOPInstanceUID
            instance.StudyInstanceUID = instance.StudyInstanceUID or generate_uid(entropy_srcs=[source.name, "study"])
            instance.SeriesInstanceUID = instance.SeriesInstanceUID or generate_uid(
                entropy_srcs=[source.name, "series"]
            )
            instance.save_as(target / path.name)
    return target


@needs_sdk
@pytest.mark.parametrize("name", ["ct_phantom_philips_tilt54", "ct_body_j2k_nosop20"])
def test_real_ct_gets_its_tissues(name, tmp_path):
    """On real CT, one with a tilted gantry, every tissue's Dice is at least 0.9 on the source's own slices."""
    source = normalised(real_series(name), tmp_path / "in")
    seg, _ = segment(source, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sources = instances(source)
        scores = dice_by_tissue(seg, sources)

        assert min(scores.values()) >= 0.9, scores
        assert {name: seg[name].value for name in KEPT} == {name: sources[0][name].value for name in KEPT}
        check_geometry(seg, sources)
