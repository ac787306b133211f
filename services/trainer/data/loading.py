"""The images of a training: which arrays, how they are split, and the cache of them.

Theory of operation. A listing says which arrays there are, in which version; its hash names their folder in the cache.
The arrays are fetched there, several at once, and hashed as they come; then they are split. The manifest records the
arrays and their split. It is stored beside the model, so that a training that goes on, on any machine, sees the data it
began with; and in the cache, so that another training of the same listing fetches nothing. A cached array is used only
if it has the hash that the manifest names; otherwise it is fetched again.
"""

import asyncio
import contextlib
import hashlib
import json
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from services.trainer.data.cache import PART, kept_copies
from services.trainer.data.manifest import (
    NotNormalised,
    newest_revisions,
    opened,
    series_of,
    split,
    summary_of,
)
from services.trainer.data.sources import Source, source_of
from services.trainer.reasons import CannotTrain
from services.trainer.settings import TrainerSettings
from shared.child import Json
from shared.concurrency import all_of
from shared.documents.arrays import Sidecar
from shared.documents.document import Document
from shared.documents.training import Array, Manifest
from shared.errors import Unavailable
from shared.idempotency import store_once, stored
from shared.keys import ARRAY_SUFFIX, sidecar
from shared.log import get_logger
from shared.messages import TrainingRequest
from shared.objects import ObjectMissing, ObjectStore
from shared.workfolder import sha256_of_file

DOWNLOADS = 8
"""Arrays, or sidecars, that are fetched at the same time."""
MANIFEST = "manifest.json"
"""The name of the manifest's file in the cache."""
METHOD = 1
"""The version of the code below: it is raised when the same listing leads to another manifest."""

log = get_logger()


@asynccontextmanager
async def loaded(
    request: TrainingRequest, document: Document[Manifest], settings: TrainerSettings, *, objects: ObjectStore
) -> AsyncIterator[Json]:
    """Fetch the images of a training into the cache, and keep them there while the block runs.

    Afterwards `document`, their manifest, is stored. This may run twice, also at the same time on one machine.

    Yields:
        The fields of `protocol.Images`: the lists `train` and `held_out` of paths. If there are classes, also their
        names, `classes`, and the class of each array by its place there, `train_labels` and
        `held_out_labels`.

    Raises:
        CannotTrain: with a code of `reasons.REASONS`.
        Unavailable: the source of the arrays does not answer.
    """
    # List.
    source, prefix = await source_of(request, settings, objects=objects)
    begun_with = await stored(document, objects=objects)
    listed: list[_Listed] = []
    if begun_with is None:
        listed = await _listing(request, source, prefix)
        listing_hash = _hash_of([METHOD, request.dataset, request.data_uri, request.classes, listed])
    else:
        told = begun_with.model_dump(mode="json", exclude={"schema_version"})  # that of the first trainers had none
        listing_hash = begun_with.listing_hash or _hash_of(told)

    # Fetch and split.
    async with kept_copies(settings.copies, listing_hash, limit_bytes=settings.cache_bytes) as copies:
        manifest = begun_with or _kept(copies)
        if manifest is None:
            arrays = await _described(listed, source)
            arrays = await _fetched(arrays, copies, source)
            manifest = await asyncio.to_thread(_divided, request, arrays, copies)
            manifest = manifest.model_copy(update={"source": request.data_uri, "listing_hash": listing_hash})
            _keep(manifest, copies)
        else:
            await _fetched(manifest.arrays, copies, source)

        # Check, then store.
        if begun_with is None:
            _check(manifest, settings.min_images)
            if await store_once(document, manifest, objects=objects) != manifest:
                raise Unavailable("another worker began this training with other data")
        yield _told(manifest, copies)


# What there is.


_Listed = tuple[str, str, str, str | None]
"""An array: its key, its version, its sidecar's version, and the class that the request names for its folder."""


async def _listing(request: TrainingRequest, source: Source, prefix: str) -> list[_Listed]:
    """List the newest array of each series. Ingest stores a sidecar before its array."""
    folders: dict[str | None, str] = {name: f"{prefix}{dataset}/" for name, dataset in request.classes.items()}
    if not folders:
        folders = {None: prefix if request.data_uri else f"{prefix}{request.dataset}/"}
    listed: list[_Listed] = []
    for class_name, below in folders.items():
        found = {item.key: item async for item in source.list(below)}
        arrays = {key: item.last_modified for key, item in found.items() if key.endswith(ARRAY_SUFFIX)}
        for key in newest_revisions(arrays):
            beside = found.get(sidecar(key).key)
            if beside is None:
                log.warning("training.array_without_sidecar", array_sha256=_hash_of(key))
                continue
            listed.append((key, found[key].etag, beside.etag, class_name))
    if not listed:
        raise CannotTrain("no_data")
    return listed


def _hash_of(told: object) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


async def _described(listed: Sequence[_Listed], source: Source) -> list[Array]:
    """Read the sidecars; returns what they say of their arrays."""

    async def read(key: str, etag: str, class_name: str | None) -> Array:
        described = Sidecar.model_validate_json(await source.get(sidecar(key).key))
        series = described.series_uid or series_of(key)
        return Array(
            key=key,
            etag=etag,
            series_uid=series,
            group=described.patient_key or series,
            class_name=class_name or described.class_name,
            modality=described.modality,
            window=described.window,
        )

    try:
        return await all_of((partial(read, key, etag, name) for key, etag, _, name in listed), at_once=DOWNLOADS)
    except ValidationError:
        raise CannotTrain("invalid_sidecar") from None
    except ObjectMissing:
        raise CannotTrain("array_gone") from None


# The cache.


async def _fetched(arrays: Sequence[Array], copies: Path, source: Source) -> list[Array]:
    """Fetch the arrays that the cache does not hold, or holds damaged; returns all with their hashes.

    An array gets its final name once it is whole, so another process may fetch it at the same time.
    """
    n_fetched = 0

    async def fetch(array: Array) -> Array:
        path = _copy_of(array, copies)
        if array.sha256 and path.exists() and await asyncio.to_thread(sha256_of_file, path) == array.sha256:
            return array
        part = path.with_suffix(f".{uuid.uuid4().hex}{PART}")
        await source.download(array.key, part)
        sha256 = await asyncio.to_thread(sha256_of_file, part)
        if array.sha256 not in {"", sha256}:
            (copies / MANIFEST).unlink(missing_ok=True)  # the next training of this listing looks anew
            raise CannotTrain("array_changed")
        part.replace(path)
        nonlocal n_fetched
        n_fetched += 1
        return array.model_copy(update={"sha256": sha256})

    try:
        hashed = await all_of((partial(fetch, array) for array in arrays), at_once=DOWNLOADS)
    except ObjectMissing:
        raise CannotTrain("array_gone") from None
    log.info("training.arrays_ready", arrays=len(arrays), fetched=n_fetched)
    return hashed


def _copy_of(array: Array, copies: Path) -> Path:
    return copies / f"{_hash_of(array.key)}.npy"


def _kept(copies: Path) -> Manifest | None:
    """Return the manifest that an earlier training left in the cache; None if there is no readable one."""
    with contextlib.suppress(FileNotFoundError, ValidationError):
        return Manifest.model_validate_json((copies / MANIFEST).read_bytes())
    return None


def _keep(manifest: Manifest, copies: Path) -> None:
    part = copies / f"{uuid.uuid4().hex}{PART}"
    part.write_text(manifest.model_dump_json(), encoding="utf-8")
    part.replace(copies / MANIFEST)


# The split.


def _divided(request: TrainingRequest, arrays: Sequence[Array], copies: Path) -> Manifest:
    """Split the arrays, which are in the cache."""
    n_without = sum(array.class_name is None for array in arrays)
    if 0 < n_without < len(arrays):
        raise CannotTrain("class_missing", n_without=n_without, n_arrays=len(arrays))
    counted, summaries = [], {}
    try:
        for array in arrays:
            slices = opened(_copy_of(array, copies))
            summaries[array.key] = summary_of(slices)
            counted.append(array.model_copy(update={"n": len(slices)}))
    except NotNormalised:
        raise CannotTrain("not_normalised") from None
    except ValueError:
        raise CannotTrain("invalid_array") from None
    manifest = split(request.dataset, counted, summaries)
    classes = sorted({array.class_name for array in arrays if array.class_name})
    return manifest.model_copy(update={"classes": tuple(classes) if len(classes) > 1 else ()})


def _check(manifest: Manifest, min_images: int) -> None:
    """Raise `CannotTrain` if there are too few images, or too few of a class, to train on and to evaluate with."""
    n_training, n_held_out = manifest.n_images(held_out=False), manifest.n_images(held_out=True)
    if min(n_training, n_held_out) < min_images:
        n_patients = len({array.group for array in manifest.arrays})
        found = {"n_training": n_training, "n_held_out": n_held_out, "n_patients": n_patients}
        raise CannotTrain("too_little_data", **found, min_images=min_images)
    for number, class_name in enumerate(manifest.classes, 1):
        of_class = [array for array in manifest.arrays if array.class_name == class_name]
        if len({array.held_out for array in of_class}) == 1:
            n_patients = len({array.group for array in of_class})
            raise CannotTrain(
                "class_on_one_side", class_number=number, n_classes=len(manifest.classes), n_patients=n_patients
            )


def _told(manifest: Manifest, copies: Path) -> Json:
    """Return what `loaded` yields."""
    told: Json = {"train": [], "held_out": []}
    for array in manifest.arrays:
        told["held_out" if array.held_out else "train"].append(str(_copy_of(array, copies)))
    if manifest.classes:
        told |= {
            "classes": list(manifest.classes),
            "train_labels": manifest.labels(held_out=False),
            "held_out_labels": manifest.labels(held_out=True),
        }
    return told
