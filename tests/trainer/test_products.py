import hashlib
import io
import json
import shutil
import subprocess
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydicom import dcmread
from pydicom.pixels.processing import apply_modality_lut

from services.ingest.protocol import Caps
from services.ingest.reading import normalise as read_by_ingest
from services.ingest.series import describe
from services.trainer.config import TrainingConfig
from services.trainer.gan.training import start, state_of
from services.trainer.jsconfig import modify_config, read_config
from services.trainer.products import curves, generation, tensorboard
from services.trainer.products.secondary_capture import Origin, instance
from shared.documents.arrays import Units
from shared.keys import is_uid

TINY = {"imageSize": 16, "width": 2, "latentDim": 4, "batchSize": 4, "steps": 3, "seed": 7}
pytestmark = pytest.mark.usefixtures("one_thread")
DCIODVFY = shutil.which("dciodvfy")
DCMTK = shutil.which("dcm2img") or shutil.which("dcmj2pnm")
CPU = torch.device("cpu")
CT = Units(modality="CT", window=(-1000.0, 400.0))
ORIGIN = Origin("ab" * 32, 3)
LOSSES = [
    {"step": 1, "generator_loss": 0.7, "discriminator_loss": 0.6},
    {"step": 2, "generator_loss": 0.5, "discriminator_loss": 0.8},
]
EVALUATION = {"relative_fd": 3.5, "distance": 7.0, "quality": {"precision": 0.5, "recall": 0.25, "coverage": 0.75}}
ROUNDS = [{"losses": LOSSES, "told": {"evaluation": EVALUATION, "config": {"steps": 2}}}]


def checkpoint(folder: Path, *, n_classes: int = 0) -> dict:
    """Write config.js and a checkpoint; returns what `generation.generate` is to be asked."""
    text = modify_config(Path("services/trainer/config.js").read_text("utf-8"), TINY)
    (folder / "config.js").write_text(text, "utf-8")
    torch.save(
        state_of(start(TrainingConfig.of(read_config(text)), CPU, n_classes=n_classes)), folder / "checkpoint.pt"
    )
    (folder / "rounds.json").write_text(json.dumps(ROUNDS))
    return {
        "config": str(folder / "config.js"),
        "checkpoint": str(folder / "checkpoint.pt"),
        "rounds": None,
        "n_images": 5,
        "units": {"modality": "CT", "window": [-1000, 400]},
        "classes": ["ill", "well"][:n_classes],
        "device": CPU,
        "tell": lambda _: None,
    }


def made(folder: Path, name: str = "out", **options) -> tuple[dict, Path]:
    out = folder / name
    out.mkdir()
    return generation.generate(**checkpoint(folder, **options), out=str(out)), out


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_products_are_of_one_set_of_images(tmp_path):
    """Array, PNG files, DICOM files and the grid show the same images, each to the precision of its format."""
    told, out = made(tmp_path)
    images = np.load(out / "images.npy")
    pngs = [np.asarray(Image.open(io.BytesIO(body))) for body in members(out / "images.png.zip").values()]
    dicoms = [dcmread(io.BytesIO(body)) for body in members(out / "images.dicom.zip").values()]
    values = [apply_modality_lut(one.pixel_array, one) for one in dicoms]

    assert sorted(told["files"]) == sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert images.shape == (5, 16, 16)
    assert list(members(out / "images.png.zip")) == [f"0000{number}.png" for number in range(1, 6)]
    assert np.abs(np.stack(pngs) / 127.5 - 1 - images).max() <= 0.51 / 127.5
    assert np.abs((np.stack(values) + 1000) / 700 - 1 - images).max() <= 0.51 * 2 / 4095
    with Image.open(out / "interpolation.png") as walks:
        assert walks.size == (10 * 17 - 1, 8 * 17 - 1)


def test_making_them_twice_makes_the_same(tmp_path):
    """The same checkpoint gives the same bytes in every file: UIDs, dates of members and noise are all fixed."""
    _, first = made(tmp_path, "first")
    _, second = made(tmp_path, "second")
    names = [path.name for path in first.iterdir() if path.is_file()]

    assert "images.dicom.zip" in names
    assert [name for name in names if (first / name).read_bytes() != (second / name).read_bytes()] == []


def test_classes_are_made_in_turn_and_each_is_a_series(tmp_path):
    """A generator that knows classes shows all of them, files and series are named after them."""
    _, out = made(tmp_path, n_classes=2)
    names = list(members(out / "images.dicom.zip"))
    dicoms = [dcmread(io.BytesIO(body)) for body in members(out / "images.dicom.zip").values()]

    assert names == ["ill-00001.dcm", "well-00002.dcm", "ill-00003.dcm", "well-00004.dcm", "ill-00005.dcm"]
    assert [one.SeriesDescription for one in dicoms[:2]] == ["Synthetic ill", "Synthetic well"]
    assert len({one.SeriesInstanceUID for one in dicoms}) == 2
    assert len({one.StudyInstanceUID for one in dicoms}) == 1


def test_generator_is_read_as_tensors_and_only_as_described(tmp_path):
    """What was written is read back with the same weights; a file with another hash or other parameters is refused."""
    told, out = made(tmp_path, n_classes=2)
    config = read_config((tmp_path / "config.js").read_text("utf-8"))
    generator = generation.load_generator(out / "generator.pt", told["sha256"], config)
    labels = generation.labels_of(generator, 5)
    images = generation.draw(generator, 5, labels, seed=told["seed"], device=CPU)

    assert np.array_equal(images[:, 0].numpy(), np.load(out / "images.npy"))
    with pytest.raises(generation.WrongModel, match="sha256"):
        generation.load_generator(out / "generator.pt", "0" * 64, config)
    with pytest.raises(generation.WrongModel, match="does not fit"):
        generation.load_generator(out / "generator.pt", told["sha256"], config | {"width": 3})
    with pytest.raises(generation.WrongModel, match="does not fit"):
        generation.load_generator(out / "generator.pt", told["sha256"], {})
    (out / "generator.pt").write_bytes(b"")
    with pytest.raises(generation.WrongModel, match="does not fit"):
        generation.load_generator(out / "generator.pt", hashlib.sha256(b"").hexdigest(), config)


def test_interpolation_walks_from_one_image_to_another_on_the_sphere(tmp_path):
    """A row begins and ends at two noise vectors, and all of it has about their length, unlike a straight line."""
    checkpoint(tmp_path)
    text = modify_config((tmp_path / "config.js").read_text("utf-8"), {"latentDim": 512})
    generator = start(TrainingConfig.of(read_config(text)), CPU).gan.average
    seen = []
    generator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    generation.interpolation(generator, seed=1, device=CPU)
    lengths = seen[0].norm(dim=1).reshape(generation.WALKS, generation.STEPS)
    ends = torch.randn(2, generation.WALKS, 512, generator=torch.Generator().manual_seed(1))

    assert torch.allclose(seen[0][:: generation.STEPS], ends[0], atol=1e-4)
    assert torch.allclose(seen[0][generation.STEPS - 1 :: generation.STEPS], ends[1], atol=1e-4)
    assert ((lengths / 512**0.5 - 1).abs() < 0.15).all()


def test_tensorboard_reads_the_log(tmp_path):
    """TensorBoard's own reader finds losses, distance, quality and parameters at their steps."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    name = tensorboard.write(ROUNDS, tmp_path)
    found = accumulator.EventAccumulator(str((tmp_path / name).parent)).Reload()
    scalars = {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}

    assert scalars["loss/generator_loss"] == [(1, pytest.approx(0.7)), (2, pytest.approx(0.5))]
    assert scalars["evaluation/relative_fd"] == [(2, 3.5)]
    assert scalars["quality/coverage"] == [(2, 0.75)]
    assert scalars["parameters/steps"] == [(2, 2)]


def test_curves_show_what_was_stored():
    """Each value moves its line alone: another distance changes the middle panel, another loss the first."""
    before = np.asarray(curves.draw(ROUNDS, 2.0))
    farther, worse = json.loads(json.dumps([ROUNDS, ROUNDS]))
    farther[0]["told"]["evaluation"]["relative_fd"] = 30.0
    worse[0]["losses"][0]["generator_loss"] = 3.0
    changed = [
        [bool((panel != other).any()) for panel, other in zip(np.split(before, 3), np.split(after, 3), strict=True)]
        for after in (np.asarray(curves.draw(farther, 2.0)), np.asarray(curves.draw(worse, 2.0)))
    ]

    assert changed == [[False, True, False], [True, False, False]]


# DICOM.


def image(seed: int = 0, size: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (size, size)).astype(np.float32)


def test_dicom_says_in_every_place_that_it_is_synthetic():
    """Who opens one alone learns that nobody was scanned, which model made it, and that it is no primary image."""
    found = dcmread(io.BytesIO(instance(image(), 0, CT, ORIGIN)))
    (equipment,) = found.ContributingEquipmentSequence

    assert found.SyntheticData == "YES"
    assert found.ConversionType == "SYN"
    assert list(found.ImageType) == ["DERIVED", "SECONDARY"]
    assert (equipment.Manufacturer, equipment.SoftwareVersions) == ("radqueue", "ab" * 32)
    assert "no such patient" in equipment.ContributionDescription
    assert str(found.PatientName) == "SYNTHETIC^GENERATED"
    assert found.PatientID == f"SYNTHETIC-{'ab' * 8}"
    assert (found.PatientBirthDate, found.PatientSex, found.StudyDate) == ("", "", "")


def test_dicom_restores_the_window():
    """In CT the values are HU again, and the window that viewers open with is the one that the model saw."""
    found = dcmread(io.BytesIO(instance(np.array([[-1, 0, 1]]), 0, CT, ORIGIN)))
    hu = apply_modality_lut(found.pixel_array, found)

    assert hu[0] == pytest.approx([-1000, -300, 400], abs=0.2)
    assert found.RescaleType == "HU"
    assert (found.WindowCenter, found.WindowWidth) == (-300, 1400)


def test_dicom_without_a_common_window_has_no_unit():
    """Where the arrays of a dataset differ, the values are 0 to 4095 of no unit, not another series' HU."""
    units = Units.common([CT, Units(modality="CT", window=(-160.0, 240.0))])
    found = dcmread(io.BytesIO(instance(np.array([[-1, 1]]), 0, units, ORIGIN)))

    assert apply_modality_lut(found.pixel_array, found)[0] == pytest.approx([0, 4095])
    assert (found.Modality, found.RescaleType) == ("CT", "US")
    assert Units.common([CT, Units(modality="MR", window=CT.window)]) == Units()
    assert Units.common([CT, CT]) == CT


def test_dicom_uids_are_of_content_and_origin():
    """Equal images of equal origin are equal files; another image, place, seed, class or model is another instance."""
    first = instance(image(), 0, CT, ORIGIN)
    others = [
        instance(image(1), 0, CT, ORIGIN),
        instance(image(), 1, CT, ORIGIN),
        instance(image(), 0, CT, Origin("ab" * 32, 4)),
        instance(image(), 0, CT, Origin("ab" * 32, 3, "ill")),
        instance(image(), 0, CT, Origin("cd" * 32, 3)),
    ]
    uids = [dcmread(io.BytesIO(body)).SOPInstanceUID for body in (first, *others)]

    assert instance(image(), 0, CT, ORIGIN) == first
    assert len(set(uids)) == 6
    assert all(map(is_uid, uids))


def test_ingest_takes_the_dicom_in():
    """Our own ingest reads a generated image without a warning, and finds one picture of the modality."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        read, stored = read_by_ingest(instance(image(), 0, CT, ORIGIN), Caps(inflated=2**24, pixels=2**24))
    described = describe([dcmread(io.BytesIO(stored))])

    assert read.warnings == ()
    assert described.attributes["Modality"] == "CT"
    assert described.geometry.n_slices == 1


@pytest.mark.skipif(DCIODVFY is None, reason="needs dicom3tools")
def test_dicom_is_a_valid_secondary_capture(tmp_path):
    """dicom3tools finds no error, but for Synthetic Data, which is younger (2023) than its release."""
    (tmp_path / "image.dcm").write_bytes(instance(image(), 0, CT, ORIGIN))
    told = subprocess.run([DCIODVFY, tmp_path / "image.dcm"], capture_output=True, text=True, check=False).stderr
    errors = [line for line in told.splitlines() if line.startswith("Error") and "(0x0008,0x001c)" not in line]

    assert "SCImage" in told
    assert errors == []


@pytest.mark.skipif(DCMTK is None, reason="needs dcmtk")
def test_another_reader_sees_the_same_picture(tmp_path):
    """What dcmtk draws with the stored window is the grey values that the PNG has."""
    picture = image()
    (tmp_path / "image.dcm").write_bytes(instance(picture, 0, CT, ORIGIN))
    subprocess.run([DCMTK, "+on", "+Wi", "1", tmp_path / "image.dcm", tmp_path / "image.png"], check=True)
    with Image.open(tmp_path / "image.png") as drawn:
        seen = np.asarray(drawn).astype(float)

    assert np.abs(seen - (picture + 1) * 127.5).max() <= 1.5
