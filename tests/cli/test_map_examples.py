"""The example applications of the MONAI Deploy App SDK, as they are, through `radqueue map check`.

RADQUEUE_SDK_EXAMPLES names a checkout's folder `examples/apps`, RADQUEUE_SDK_PYTHON an interpreter that has what they
require. Networks are stand-ins: TorchScript modules and MONAI bundles of a few bytes that threshold or average.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pydicom
import pytest

from shared.phantom import write_ct_series
from tests.cli.conftest import plain_environ

EXAMPLES = os.environ.get("RADQUEUE_SDK_EXAMPLES")
PYTHON = os.environ.get("RADQUEUE_SDK_PYTHON", sys.executable)
pytestmark = [
    pytest.mark.skipif(EXAMPLES is None, reason="RADQUEUE_SDK_EXAMPLES is not set"),
    # It is what the SDK loads, all the same.
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]

TRANSFORMS = [
    {"_target_": "LoadImaged", "keys": "image"},
    {"_target_": "EnsureChannelFirstd", "keys": "image"},
    {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"},
    {"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": -57, "a_max": 164, "b_min": 0, "b_max": 1},
    {"_target_": "EnsureTyped", "keys": "image"},
]
BACK = [
    {"_target_": "Activationsd", "keys": "pred", "softmax": True},
    {
        "_target_": "Invertd",
        "keys": "pred",
        "transform": "@preprocessing",
        "orig_keys": "image",
        "meta_key_postfix": "meta_dict",
        "nearest_interp": False,
        "to_tensor": True,
    },
    {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
]
INFERENCE = {
    "imports": ["$import glob"],
    "device": "$torch.device('cpu')",
    "preprocessing": {"_target_": "Compose", "transforms": TRANSFORMS},
    "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [32, 32, 32], "sw_batch_size": 1},
    "postprocessing": {"_target_": "Compose", "transforms": BACK},
}
IMAGE = {"type": "image", "dtype": "float32", "num_channels": 1, "spatial_shape": [32, 32, 32], "value_range": [0, 1]}


def segments(path, n):
    """Write a network of `n` classes that thresholds, as a MONAI bundle."""
    import torch  # noqa: PLC0415 - only where the examples are

    class Thresholds(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1, n - 1, 1, 1, 1))

        def forward(self, x):
            return torch.cat([torch.zeros_like(x), (x - 0.5) * self.scale], dim=1)

    ends = {"inputs": {"image": IMAGE}, "outputs": {"pred": IMAGE | {"num_channels": n}}}
    metadata = {"version": "1", "monai_version": "1", "network_data_format": ends}
    extra = {"metadata.json": json.dumps(metadata), "inference.json": json.dumps(INFERENCE)}
    path.mkdir(parents=True)
    torch.jit.save(torch.jit.script(Thresholds()), str(path / "model.ts"), _extra_files=extra)


def classes(path, n):
    """Write a network of `n` classes that averages."""
    import torch  # noqa: PLC0415 - only where the examples are

    class Averages(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.arange(float(n))[None])

        def forward(self, x):
            return x.mean(dim=(1, 2, 3))[:, None] * self.scale

    path.mkdir(parents=True)
    torch.jit.save(torch.jit.script(Averages()), str(path / "model.ts"))


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """A CT series, and one that says to be a mammogram."""
    folder = tmp_path_factory.mktemp("studies")
    write_ct_series(folder / "ct", slices=16, size=64)
    for path in write_ct_series(folder / "mg", slices=1, size=128).iterdir():
        made = pydicom.dcmread(path)
        made.Modality = "MG"
        made.save_as(path)
    return folder


def check(application, study, *more):
    """Return the exit code of the check, and its findings by what was looked at."""
    program = Path(EXAMPLES, application)
    command = ["map", "check", str(program), "--input", str(study), "--python", PYTHON, "--json", *map(str, more)]
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *command],
        env=plain_environ(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return done.returncode, {one["check"]: one["text"] for one in json.loads(done.stdout)["findings"]}


def test_an_application_that_writes_pictures():
    """simple_imaging_app takes a picture and writes one."""
    code, found = check("simple_imaging_app", Path(EXAMPLES, "simple_imaging_app", "input"))

    assert code == 0
    assert found["outputs"] == "wrote 1 file (image/png), and no DICOM"


def test_an_application_that_turns_a_series_into_pictures(studies):
    """dicom_series_to_image_app writes a picture per slice."""
    code, found = check("dicom_series_to_image_app", studies / "ct")

    assert code == 0
    assert found["outputs"] == "wrote 16 files (image/png), and no DICOM"


@pytest.mark.parametrize(
    ("application", "models", "written"),
    [
        ("ai_spleen_seg_app", {"model": 2}, "1 DICOM instance (SEG)"),
        ("ai_pancreas_seg_app", {"model": 3}, "1 DICOM instance (SEG)"),
        ("ai_multi_ai_app", {"spleen_ct": 2, "pancreas_ct_dints": 3}, "2 DICOM instances (SEG)"),
        ("ai_livertumor_seg_app", {"model": 3}, "1 DICOM instance (SEG)"),
        ("ai_unetr_seg_app", {"model": 14}, "1 DICOM instance (SEG)"),
    ],
)
def test_an_application_that_segments(application, models, written, studies, tmp_path):
    """Each writes a segmentation that has the attributes of the study."""
    for name, n in models.items():
        segments(tmp_path / name, n)
    code, found = check(application, studies / "ct", "--models", tmp_path)

    assert code == 0, found
    assert found["outputs"].startswith(f"{written} with the study's attributes")


def test_an_application_that_classifies(studies, tmp_path):
    """breast_density_classifier_app writes a structured report that has the attributes of the study."""
    classes(tmp_path / "model", 4)
    code, found = check("breast_density_classifier_app", studies / "mg", "--models", tmp_path)

    assert code == 0, found
    assert found["outputs"].startswith("1 DICOM instance (SR) with the study's attributes")


def test_an_application_whose_result_belongs_to_nobody(tmp_path):
    """mednist_classifier_monaideploy writes a report of a picture, which has no patient: the check says so."""
    classes(tmp_path / "model", 6)
    program = "mednist_classifier_monaideploy/mednist_classifier_monaideploy.py"
    code, found = check(program, Path(EXAMPLES, "simple_imaging_app", "input"), "--models", tmp_path)

    assert code == 1
    assert found["study"].startswith("ran in ")
    assert "PatientID" in found["outputs"]
