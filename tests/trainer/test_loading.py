import asyncio
import http.server
import io
import json
import os
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest

from services.trainer import rounds
from services.trainer.data import loading, sources
from services.trainer.data.cache import kept_copies, prepare
from services.trainer.data.images import load_images
from services.trainer.data.loading import loaded
from services.trainer.data.manifest import Manifest
from services.trainer.reasons import REASONS, CannotTrain, explained
from services.trainer.settings import TrainerSettings
from shared.config import Misconfigured
from shared.errors import Unavailable
from shared.messages import TrainingRequest
from shared.objects import ObjectStore
from shared.workfolder import sha256_of_file

ANYWHERE = "s3:// memory:// http://"


def made(n: int = 8, value: float = 0.0) -> bytes:
    """Return an array of n slices that differ from others' by their brightness."""
    buffer = io.BytesIO()
    np.save(buffer, np.full((n, 16, 16), value, np.float32))
    return buffer.getvalue()


def files_of(patients: str, *, start: float = 0.0, **sidecar) -> dict[str, bytes]:
    """Return arrays and sidecars by name, one series for each letter, which is its patient."""
    files = {}
    for number, patient in enumerate(patients):
        files[f"scan.{number}.axial.npy"] = made(value=start + number / 64)
        files[f"scan.{number}.axial.json"] = json.dumps({"patient_key": patient, **sidecar}).encode()
    return files


async def put(objects: ObjectStore, folder: str, files: dict[str, bytes]) -> None:
    for name, body in sorted(files.items()):
        await objects.put(f"{folder}/{name}", body)


@dataclass
class Machine:
    """A machine that loads datasets; what S3 is asked for is remembered."""

    objects: ObjectStore
    work_dir: Path
    fetched: list[str] = field(default_factory=list)

    def settings(self, **changes) -> TrainerSettings:
        return TrainerSettings(work_dir=self.work_dir, min_images=8, data_uris=ANYWHERE, **changes)

    def load(self, dataset: str, *, request_id: str | None = None, cache_bytes: int = 10**9, **asked):
        request = TrainingRequest(request_id=request_id or f"r-{uuid.uuid4().hex}", dataset=dataset, **asked)
        settings = self.settings(cache_bytes=cache_bytes)
        return loaded(request, f"models/{request.request_id}", settings, objects=self.objects)

    async def look(self, dataset: str, **asked):
        """Return what a training process is told, and the arrays themselves by side."""
        async with self.load(dataset, **asked) as told:
            return told, {side: load_images(told[side], 16)[0] for side in ("train", "held_out")}

    @property
    def copies(self) -> list[Path]:
        return sorted(self.work_dir.glob("datasets/*/*.npy"))


@pytest.fixture
async def objects(aws, local_aws) -> ObjectStore:
    return ObjectStore(aws.s3, local_aws.bucket)


@pytest.fixture
def machine(objects, tmp_path) -> Machine:
    machine = Machine(objects, tmp_path)
    objects.client.meta.events.register(
        "before-call.s3.GetObject", lambda params, **_: machine.fetched.append(params["url_path"])
    )
    return machine


@pytest.fixture
async def dataset(objects) -> str:
    """Four patients of eight slices."""
    name = f"d-{uuid.uuid4().hex[:8]}"
    await put(objects, f"datasets/{name}", files_of("abcd"))
    return name


@pytest.fixture
def memory() -> Iterator[str]:
    """An address in this process's memory, as fsspec has it."""
    folder = uuid.uuid4().hex
    yield f"memory://{folder}"
    files = fsspec.filesystem("memory")
    if files.exists(folder):
        files.rm(folder, recursive=True)


def write(uri: str, files: dict[str, bytes]) -> None:
    for name, body in files.items():
        with fsspec.open(f"{uri}/{name}", "wb") as file:
            file.write(body)


# Copies.


async def test_a_second_training_of_the_same_images_fetches_nothing(machine, dataset):
    """Neither arrays nor sidecars are asked for again, and both trainings see the same images, divided the same way."""
    first = await machine.look(dataset)
    in_datasets = [path for path in machine.fetched if f"/datasets/{dataset}/" in path]
    machine.fetched.clear()
    second = await machine.look(dataset, request_id="second")
    manifest = Manifest.model_validate_json(await machine.objects.get("models/second/manifest.json"))

    assert len(in_datasets) == len(set(in_datasets)) == 8
    assert [path for path in machine.fetched if "/datasets/" in path] == []
    assert second[0] == first[0]
    assert (second[1]["train"] == first[1]["train"]).all()
    assert [array.n for array in manifest.arrays] == [8] * 4
    assert {array.sha256 for array in manifest.arrays} == {
        sha256_of_file(path) for path in map(Path, first[0]["train"] + first[0]["held_out"])
    }
    assert {Path(path).parent.name for path in first[0]["train"]} == {manifest.listing_hash}
    assert machine.work_dir.joinpath("datasets").stat().st_mode & 0o77 == 0


@pytest.mark.parametrize("damage", ["truncated", "changed", "deleted"])
async def test_a_damaged_copy_is_fetched_again_and_no_other(machine, dataset, damage):
    """A copy that does not have the hash of the manifest is never used."""
    told, images = await machine.look(dataset)
    victim = Path(told["train"][1])
    body = victim.read_bytes()
    if damage == "deleted":
        victim.unlink()
    else:
        victim.write_bytes(body[:-5] if damage == "truncated" else body[:-1] + b"\x01")
    machine.fetched.clear()
    again = await machine.look(dataset)

    assert len([path for path in machine.fetched if path.endswith(".npy")]) == 1
    assert victim.read_bytes() == body
    assert (again[1]["train"] == images["train"]).all()


async def test_a_training_goes_on_with_the_images_it_began_with(machine, dataset, tmp_path):
    """On a machine without copies, after more patients came, the stored manifest decides; a new request sees them."""
    told, _ = await machine.look(dataset, request_id=f"{dataset}-1")
    await put(machine.objects, f"datasets/{dataset}", files_of("xxxxxy"))
    other = Machine(machine.objects, tmp_path / "other")
    again = await other.look(dataset, request_id=f"{dataset}-1")
    more, _ = await other.look(dataset)

    assert [Path(path).name for path in again[0]["train"]] == [Path(path).name for path in told["train"]]
    assert len(more["train"] + more["held_out"]) == 6


async def test_an_array_that_was_replaced_or_deleted_ends_the_training(machine, dataset, tmp_path):
    """A training never goes on with other images than it began with, and a new request takes those that there are."""
    await machine.look(dataset, request_id=f"{dataset}-1")
    other = Machine(machine.objects, tmp_path / "other")
    key = f"datasets/{dataset}/scan.1.axial"
    await machine.objects.put(f"{key}.npy", made(value=0.9))
    with pytest.raises(CannotTrain, match="array_changed"):
        await other.look(dataset, request_id=f"{dataset}-1")
    await machine.objects.delete(f"{key}.npy")
    with pytest.raises(CannotTrain, match="array_gone"):
        await other.look(dataset, request_id=f"{dataset}-1")
    told, _ = await machine.look(dataset)

    assert len(told["train"] + told["held_out"]) == 3


async def test_the_oldest_copies_go_first_and_those_in_use_stay(machine, dataset):
    """Above the limit the dataset used least lately is removed, one that a training uses is not, whoever asks."""
    names = [dataset, f"{dataset}-2", f"{dataset}-3"]
    for name in names[1:]:
        await put(machine.objects, f"datasets/{name}", files_of("abcd", start=0.5))
    async with machine.load(names[0], cache_bytes=0) as used:
        await machine.look(names[1])
        in_second = set(machine.copies) - set(map(Path, used["train"] + used["held_out"]))
        one_dataset = sum(file.stat().st_size for file in next(iter(in_second)).parent.iterdir())
        await machine.look(names[2], cache_bytes=2 * one_dataset + 100)

        assert len(machine.copies) == 8
        assert not in_second & set(machine.copies)
        assert load_images(used["train"], 16)[0].shape[0] == 24
    assert machine.copies == []


async def test_what_is_not_a_copy_is_left_alone(tmp_path):
    """Files and folders of others stay, even where no copy is kept; an unusable place is told by its setting."""
    (tmp_path / "of-another").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    async with kept_copies(tmp_path, "0" * 64, limit_bytes=0) as folder:
        (folder / "copy").write_bytes(b"x")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "of-another"]
    with pytest.raises(Unavailable, match="RADQUEUE_CACHE_DIR: ENOTDIR"):
        async with kept_copies(tmp_path / "file" / "x", "0" * 64, limit_bytes=0):
            pass


async def test_trainers_that_load_the_same_dataset_at_once_do_not_disturb_each_other(machine, dataset):
    """Several at a time, each with copies of its own making, all see whole arrays."""
    loads = [machine.look(dataset) for _ in range(4)]
    seen = await asyncio.gather(*loads)

    assert len({tuple(told["train"]) for told, _ in seen}) == 1
    assert all((images["train"] == seen[0][1]["train"]).all() for _, images in seen)
    assert len(machine.copies) == 4


async def test_what_a_killed_trainer_was_fetching_is_removed_when_nobody_fetches(tmp_path):
    """A part of a file goes at the next start, unless another trainer may be writing it."""
    enter = partial(kept_copies, tmp_path, "0" * 64, limit_bytes=10**9)
    async with enter() as folder, AsyncExitStack() as others:
        part = folder / "x.part"
        part.write_bytes(b"x")
        await others.enter_async_context(enter())

        assert part.exists()
    async with enter():
        assert not part.exists()


# Where from.


async def test_folders_of_an_address_are_classes(machine, memory):
    """Arrays at an fsspec address, a folder for each class, become labels; the manifest says where from."""
    write(f"{memory}/healthy", files_of("abcd"))
    write(f"{memory}/ill", files_of("efgh", start=0.5))
    told, images = await machine.look(
        "d", request_id=memory[-32:], data_uri=memory, classes={"normal": "healthy", "covid": "ill"}
    )
    manifest = Manifest.model_validate_json(await machine.objects.get(f"models/{memory[-32:]}/manifest.json"))
    _, labels = load_images(told["train"], 16, told["train_labels"])

    assert told["classes"] == ["covid", "normal"]
    assert sorted(told["train_labels"]) == [0, 0, 0, 1, 1, 1]
    assert sorted(told["held_out_labels"]) == [0, 1]
    assert ((images["train"].mean((1, 2, 3)) >= 0.5).long() == 1 - labels).all()
    assert (manifest.source, manifest.classes) == (memory, ("covid", "normal"))


async def test_sidecars_name_classes_and_datasets_do(machine, objects):
    """`class` in the sidecars of one dataset, and a dataset for each class, come to the same; one class is none."""
    name = f"d-{uuid.uuid4().hex[:8]}"
    await put(objects, f"datasets/{name}", files_of("abcd", **{"class": "x"}))
    alone, _ = await machine.look(name)
    await put(objects, f"datasets/{name}/more", files_of("efgh", start=0.5, **{"class": "y"}))
    await put(objects, f"datasets/{name}-y", files_of("efgh", start=0.5))
    by_sidecar, _ = await machine.look(name)
    await put(objects, f"datasets/{name}-x", files_of("abcd"))
    by_dataset, _ = await machine.look(name, classes={"x": f"{name}-x", "y": f"{name}-y"})

    assert "classes" not in alone
    assert by_sidecar["classes"] == by_dataset["classes"] == ["x", "y"]
    assert sorted(by_sidecar["train_labels"]) == sorted(by_dataset["train_labels"])


async def test_another_bucket_is_read_with_the_same_rights(machine, objects):
    """An s3:// address is a bucket and a prefix; one that is not there is told so."""
    bucket = f"research-{uuid.uuid4().hex[:8]}"
    await objects.client.create_bucket(Bucket=bucket)
    await put(ObjectStore(objects.client, bucket), "brains/t1", files_of("abcd"))
    told, _ = await machine.look("d", data_uri=f"s3://{bucket}/brains/t1")

    assert len(told["train"]) == 3
    with pytest.raises(CannotTrain, match="data_uri_unreadable"):
        await machine.look("d", data_uri=f"s3://{bucket}-2/brains/t1")
    with pytest.raises(CannotTrain, match="no_data"):
        await machine.look("d", data_uri=f"s3://{bucket}/brains/t")


def test_a_cache_that_cannot_be_written_is_told_at_the_start(tmp_path):
    """The folder is made where it can be; otherwise the setting is named, and no path."""
    prepare(tmp_path / "new" / "cache")
    (tmp_path / "file").touch()
    with pytest.raises(Misconfigured, match=r"RADQUEUE_CACHE_DIR: .* \(ENOTDIR\)") as told:
        prepare(tmp_path / "file" / "x")

    assert list((tmp_path / "new" / "cache").iterdir()) == []
    assert str(tmp_path) not in str(told.value)


async def test_an_http_server_is_read_where_it_is_allowed(machine, tmp_path):
    """Arrays behind a real server are found, fetched once, and fetched again when the server says they changed."""
    site = tmp_path / "site"
    site.mkdir()
    for name, body in files_of("abcd").items():
        (site / name).write_bytes(body)
    asked: list[str] = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(f"{self.command} {self.path}")

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        try:
            told, _ = await machine.look("d", data_uri=uri)
            asked.clear()
            await machine.look("d", data_uri=uri)
            again = [line for line in asked if line.startswith("GET") and "scan" in line]
            changed = site / "scan.0.axial.npy"
            changed.write_bytes(made(value=-0.5)[:-1] + b"\xbf")
            later = changed.stat().st_mtime + 10
            os.utime(changed, (later, later))  # HTTP tells it in seconds
            _, images = await machine.look("d", data_uri=uri)
        finally:
            server.shutdown()

    assert (len(told["train"]), len(told["held_out"])) == (3, 1)
    assert again == []
    assert len(images["train"]) + len(images["held_out"]) == 32
    assert (images["train"] == -0.5).any() or (images["held_out"] == -0.5).any()
    with pytest.raises(Unavailable, match="data_uri: Client"):
        await machine.look("d", data_uri=uri)


@pytest.mark.parametrize(
    ("uri", "allowed"),
    [
        ("file:///etc", ""),
        ("local:///etc", ""),
        ("memory://x", ""),
        ("http://169.254.169.254/latest", ""),
        ("https://intranet/x", ""),
        ("gs://x::file:///etc", ""),
        ("s3://ours/public/../private", ""),
        ("s3://theirs/x", "s3://ours/ gs://"),
        ("s3://ours-not/x", "s3://ours/ gs://"),
    ],
)
async def test_a_message_cannot_make_the_trainer_read_elsewhere(uri, allowed):
    """Local files, addresses inside the network, chains and detours are refused before anything is opened."""
    settings = TrainerSettings(**({"data_uris": allowed} if allowed else {}))
    request = TrainingRequest(request_id="r", dataset="d", data_uri=uri)
    with pytest.raises(CannotTrain, match="data_uri_not_allowed"):
        await sources.source_of(request, settings, objects=None)


async def test_an_address_without_its_library_is_told_so():
    """A scheme that is allowed and whose library is not there is refused, with what to install."""
    request = TrainingRequest(request_id="r", dataset="d", data_uri="nosuchscheme://x/y")
    with pytest.raises(CannotTrain, match="data_uri_not_installed"):
        await sources.source_of(request, TrainerSettings(data_uris="nosuchscheme://"), objects=None)


# What cannot be trained on.


async def test_what_cannot_be_trained_on_is_refused_with_numbers(machine, memory):
    """Each kind of unusable data has a code, the numbers that explain it, and a sentence that says what to do."""
    unusable = [
        ({}, "no_data", {}),
        ({"a.npy": made()}, "no_data", {}),
        (files_of("a"), "too_little_data", {"n_training": 0, "n_held_out": 8, "n_patients": 1, "min_images": 8}),
        (files_of("ab") | {"scan.0.axial.npy": b""}, "invalid_array", {}),
        (files_of("ab") | {"scan.0.axial.npy": made()[:-1]}, "invalid_array", {}),
        (files_of("ab") | {"scan.0.axial.npy": made(value=1.5)}, "not_normalised", {}),
        (files_of("ab") | {"scan.0.axial.json": b"[]"}, "invalid_sidecar", {}),
        (files_of("ab") | {"scan.0.axial.json": b'{"window": [0, 1e999]}'}, "invalid_sidecar", {}),
        (files_of("ab") | {"scan.0.axial.json": b'{"window": [5, 5]}'}, "invalid_sidecar", {}),
        (files_of("ab") | {"scan.0.axial.json": b'{"class": "DOE^JANE"}'}, "invalid_sidecar", {}),
        (files_of("abc") | {"scan.0.axial.json": b'{"class": "x"}'}, "class_missing", {"n_without": 2, "n_arrays": 3}),
        (
            files_of("abcd", **{"class": "x"}) | {"scan.0.axial.json": b'{"class": "y"}'},
            "class_on_one_side",
            {"class_number": 2, "n_classes": 2, "n_patients": 1},
        ),
    ]
    for case, (files, reason_code, numbers) in enumerate(unusable):
        write(f"{memory}/{case}", files)
        with pytest.raises(CannotTrain) as refused:
            await machine.look("d", data_uri=f"{memory}/{case}")
        told = explained(reason_code, refused.value.numbers)

        assert (refused.value.reason_code, refused.value.numbers) == (reason_code, numbers)
        assert told != reason_code
        assert all(str(number) in told for number in numbers.values())


def test_every_reason_is_explained():
    """Each code that the trainer's own code gives has a text; an unknown one, or one of other numbers, stays a code."""
    written = "".join(Path(module.__file__).read_text() for module in (loading, sources, rounds))
    codes = set(re.findall(r'CannotTrain\(\s*"(\w+)"', written))

    assert len(codes) > 10
    assert codes <= REASONS.keys()
    assert explained("unheard_of", {}) == "unheard_of"
    assert explained("too_little_data", {}) == "too_little_data"
