import asyncio
import io
import json
import shutil
import uuid
import zipfile
from datetime import UTC, datetime

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from typer.testing import CliRunner

from cli.main import app
from services.trainer.config import DEFAULT_CONFIG
from services.trainer.progress import shown
from services.trainer.protocol import Losses, Saved
from services.trainer.run import Ports, Run
from shared.documents.training import StoredPlan
from shared.keys import TrainingKeys
from tests.trainer.trainers import WITHIN_S, document, put_series, requested

WINDOW = [-1000.0, 400.0]
OF_A_MODEL = {
    "generator.pt",
    "generator.json",
    "card.md",
    "medigan.json",
    "images.npy",
    "images.png",
    "images.png.zip",
    "images.dicom.zip",
    "interpolation.png",
    "curves.png",
}


@pytest.fixture
async def ct(objects) -> str:
    """Four patients of eight CT slices in one window, two classes."""
    name = f"ct-{uuid.uuid4().hex[:8]}"
    rng = np.random.default_rng(0)
    for number, patient in enumerate("abcd"):
        await put_series(objects, name, f"1.2.{number}", patient=patient, rng=rng)
        key = f"datasets/{name}/1.2.{number}.{'01' * 8}.c0ffee.json"
        sidecar = await document(objects, key) | {"modality": "CT", "window": WINDOW, "class": "ab"[number % 2]}
        await objects.put(key, json.dumps(sidecar).encode())
    return name


@pytest.fixture
def radqueue(local_aws, tmp_path):
    """Run a command in this process, beside the event loop, with the local AWS."""
    (tmp_path / "env").write_text("".join(f"{name}={value}\n" for name, value in local_aws.environ.items()))

    async def run(*arguments):
        words = ["--env", tmp_path / "env", *arguments]
        return await asyncio.to_thread(CliRunner().invoke, app, list(map(str, words)))

    return run


async def test_a_training_ends_in_products_of_which_more_can_be_made(objects, start, ct, radqueue, tmp_path):
    """All products are stored and agree, and `radqueue generate` makes the same images of the model, and others."""
    asked = requested(ct, max_rounds=1)
    folder = f"models/{asked.data.request_id}"
    await start(objects).handle(asked)
    stored = {item.key.removeprefix(f"{folder}/") async for item in objects.list(f"{folder}/")}
    described = await document(objects, f"{folder}/generator.json")
    completed = (await document(objects, f"{folder}/completed.json"))["told"]
    with zipfile.ZipFile(io.BytesIO(await objects.get(f"{folder}/images.dicom.zip"))) as archive:
        dicom = dcmread(io.BytesIO(archive.read("a-00001.dcm")))
    images = np.load(io.BytesIO(await objects.get(f"{folder}/images.npy")))

    assert stored >= OF_A_MODEL
    assert described["units"] == {"modality": "CT", "window": WINDOW}
    assert described["classes"] == ["a", "b"]
    assert described["evaluation"] == completed["evaluation"]
    assert described["data"]["n_training_patients"] + described["data"]["n_held_out_patients"] == 4
    assert (dicom.RescaleType, dicom.WindowWidth, dicom.SoftwareVersions) == ("HU", 1400, described["sha256"])

    card = (await objects.get(f"{folder}/card.md")).decode()
    assert described["sha256"] in card
    assert f"| relative distance | {completed['evaluation']['relative_fd']:.3f} | 1 |" in card
    assert "opies found" in card
    assert "held-out images only plain copies are found" in card
    (medigan,) = (await document(objects, f"{folder}/medigan.json")).values()
    assert set(medigan) == {"execution", "selection", "description"}
    assert medigan["execution"]["image_size"] == [16, 16]
    assert medigan["selection"]["performance"]["FID"] is None
    assert medigan["selection"]["performance"]["FD"] == completed["evaluation"]["distance"]

    # Elsewhere, of the bucket.
    same = await radqueue("generate", asked.data.request_id, "--n", 5, "--format", "npy", "--out", tmp_path / "same")
    one = await radqueue("generate", asked.data.request_id, "--n", 2, "--class", "b", "--seed", 5, "--format", "dicom",
                         "--out", tmp_path / "one", "--json")  # fmt: skip
    told = json.loads(one.stdout)
    first = dcmread(tmp_path / "one" / "b-00001.dcm")

    assert (same.exit_code, one.exit_code) == (0, 0)
    # Not bit by bit: sums are in another order with another number of threads.
    assert np.abs(np.load(tmp_path / "same" / "images.npy") - images).max() < 1e-5
    assert "not approved" in same.output
    assert (told["n"], told["seed"], told["class"], told["approved"]) == (2, 5, "b", False)
    assert (first.SeriesDescription, first.StudyInstanceUID) == ("Synthetic b", dicom.StudyInstanceUID)
    assert first.SeriesInstanceUID != dicom.SeriesInstanceUID

    # And of a folder.
    for name in ("generator.pt", "generator.json"):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_bytes(await objects.get(f"{folder}/{name}"))
    pngs = await radqueue("generate", tmp_path / "model", "--n", 5, "--out", tmp_path / "pngs")
    with Image.open(tmp_path / "pngs" / "b-00002.png") as png:
        assert np.abs(np.asarray(png) / 127.5 - 1 - images[1]).max() < 0.01
    assert pngs.exit_code == 0

    # And of nothing else.
    shutil.copytree(tmp_path / "model", tmp_path / "damaged")
    (tmp_path / "damaged" / "generator.json").write_text(json.dumps(described | {"units": {"window": "wide"}}))
    (tmp_path / "model" / "generator.pt").write_bytes(b"another model")
    refusals = {
        "sha256 differs": ("generate", tmp_path / "model", "--out", tmp_path / "x"),
        "no finished model": ("generate", "unheard-of", "--out", tmp_path / "x"),
        "does not know the class c": ("generate", asked.data.request_id, "--class", "c", "--out", tmp_path / "x"),
        "generator.json is damaged": ("generate", tmp_path / "damaged", "--out", tmp_path / "x"),
        "has no generator.json": ("generate", tmp_path / "pngs", "--out", tmp_path / "x"),
    }
    for why, words in refusals.items():
        refused = await radqueue(*words)

        assert refused.exit_code in {1, 2}
        assert why in " ".join(refused.output.split())
    assert not (tmp_path / "x").exists()


async def test_progress_is_stored_as_it_is_heard(objects, tmp_path):
    """What the process tells of its losses is in progress.json, counted from the round's start; checkpoints are not."""
    asked = requested("d").data
    ports = Ports(objects, None, None, None, lambda: datetime(2026, 1, 2, tzinfo=UTC))
    run = Run(asked, TrainingKeys(asked.request_id), 1, ports, tmp_path)
    text = DEFAULT_CONFIG.read_text(encoding="utf-8")
    plan = StoredPlan(round=2, number=0, rule="improving", changes={}, continue_from=1, until=500, config=text)
    losses = {"generator_loss": 0.7, "discriminator_loss": 0.6, "margin": 0.1, "told_apart": 0.0, "augmentation": 0.0}
    key = run.keys.progress.key
    async with shown(run, plan) as hear:
        hear(Saved("partial.300.pt", 300))
        hear(Losses(step=350, **losses))
        async with asyncio.timeout(WITHIN_S):
            while not await objects.exists(key):
                await asyncio.sleep(0.01)
    told = await document(objects, key)

    assert (told["round"], told["step"], told["of_steps"], told["images_seen"]) == (2, 100, 250, 350 * 16)
    assert (told["generator_loss"], told["discriminator_loss"]) == (0.7, 0.6)
