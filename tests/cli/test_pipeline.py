import importlib.util
import json
from pathlib import Path

import boto3
import numpy as np
import pytest
import torch

from radqueue import pipeline
from services.trainer.jsconfig import modify_config, read_config
from shared.phantom import Patient, write_ct_series

EXAMPLE = Path("docs/examples/gan_pipeline.py")
SHIPPED = Path("services/trainer/config.js").read_text(encoding="utf-8")
TINY = {"width": 2, "latentDim": 4, "batchSize": 4, "steps": 4}
NAMES = [
    "load_dicom_images",
    "preprocess_images",
    "upload_to_s3",
    "modify_config_file",
    "build_gan_model",
    "train_gan",
    "generate_images",
    "calculate_fid",
    "generate_report",
]
"""In the order of their first calls in the example."""
BESIDE = ["DEFAULT_CONFIG", "Distance", "Picture", "Round", "read_config"]
"""What they take and return, and how a configuration is begun and read."""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path):
    """Eight patients of four slices, and a file that is none."""
    for number in range(8):
        patient = Patient(f"PHANTOM^{number}", f"P{number}")
        write_ct_series(tmp_path / "dicom" / str(number), seed=number, slices=4, size=32, patient=patient)
    (tmp_path / "dicom" / "notes.txt").write_text("no image")
    return tmp_path / "dicom"


@pytest.fixture
def example():
    """The example, as a module."""
    spec = importlib.util.spec_from_file_location("gan_pipeline", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def in_s3(local_aws, monkeypatch):
    for name, value in local_aws.environ.items():
        monkeypatch.setenv(name, value)
    return boto3.client("s3")


@pytest.mark.filterwarnings("ignore:files left out. 1 not_dicom")
def test_the_example_runs_the_nine_steps_in_order(folder, tmp_path, local_aws, in_s3, example):
    """From a folder of DICOM files to a report: every function is called, in the order of the names, with real work."""
    called = []
    for name in NAMES:
        function = getattr(example, name)

        def noted(*given, name=name, function=function, **named):
            called.append(name)
            return function(*given, **named)

        setattr(example, name, noted)
    config = tmp_path / "tiny.js"
    config.write_text(modify_config(SHIPPED, TINY), encoding="utf-8")
    out = tmp_path / "study"
    asked = [folder, "--bucket", local_aws.bucket, "--out", out, "--config", config, "--size", 16, "--rounds", 2]
    page = example.main([*map(str, asked), "--threshold", "1e-9", "--images", "5"])
    report = json.loads((out / "report.json").read_text())
    (training,) = report["training"]
    stored = in_s3.get_object(Bucket=local_aws.bucket, Key="notebook/images.npy")["Body"].read()

    assert list(dict.fromkeys(called)) == NAMES
    assert [done["round"] for done in training["rounds"]] == [1, 2]
    assert training["rounds"][0]["config"] == read_config((out / "config.1.js").read_text()) | {"imageSize": 16}
    assert training["status"] == "rounds_used_up"
    assert training["rounds"][0]["evaluation"]["relative_fd"] > 0
    assert stored == (out / "images.npy").read_bytes()
    assert np.load(out / "images.npy").shape == (32, 16, 16)
    assert np.load(out / "generated.npy").shape == (5, 16, 16)
    assert b"data:image/png" in page.read_bytes()


def test_images_are_read_as_ingest_reads_them(folder):
    """Frames come in HU with whose they are; what is no image is left out, and a warning says so by its reason."""
    with pytest.warns(UserWarning, match="files left out: 1 not_dicom"):
        pictures = pipeline.load_dicom_images(folder)
    images = pipeline.preprocess_images(pictures, size=16, window=(-1000, 400))

    assert len(pictures) == 32
    assert len({picture.patient for picture in pictures}) == 8
    assert {picture.modality for picture in pictures} == {"CT"}
    assert min(picture.values.min() for picture in pictures) == pytest.approx(-1024, abs=1)
    assert not any("P" in picture.patient for picture in pictures)
    assert images.shape == (32, 16, 16)
    assert images.min() == -1
    assert 0 < images.max() <= 1


def test_a_model_that_is_trained_again_goes_on(folder, tmp_path):
    """Two trainings of four steps are eight, and change what is generated; the same seed shows the same noise."""
    config = tmp_path / "config.js"
    config.write_text(modify_config(SHIPPED, TINY | {"imageSize": 16}), encoding="utf-8")
    images = np.tanh(np.random.default_rng(0).normal(size=(8, 16, 16))).astype(np.float32)
    model = pipeline.build_gan_model(config)
    pipeline.train_gan(model, images, config)
    first = pipeline.generate_images(model, 3, seed=2)
    again = pipeline.generate_images(model, 3, seed=2)
    pipeline.train_gan(model, images, config)

    assert model.step == 8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, pipeline.generate_images(model, 3, seed=2))


def test_the_nine_names_are_what_the_module_offers():
    """`from radqueue.pipeline import *` gives the nine functions, and beside them what they need."""
    assert sorted(pipeline.__all__) == sorted(NAMES + BESIDE)
    assert all(callable(getattr(pipeline, name)) for name in NAMES)
