"""The child that reads what people upload: `python -m services.ingest.worker`, started by `decoder.Decoder`.

Files go in and out by path. Limits of memory and processor time are set by the parent.
"""

import resource
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from services.ingest.archive import ZipCaps, unpack
from services.ingest.arrays import ArrayConfig, is_grey
from services.ingest.assembly import Series, assemble, measure
from services.ingest.datasets import BlankRule, Deidentification
from services.ingest.protection import is_protected, protect
from services.ingest.reading import Caps, normalise
from shared.child import Json, Progress, serve
from shared.pydicom_silence import silence


def answer(request: Json, progress: Progress) -> Any:
    """Do what `request["op"]` says."""
    del progress
    return OPERATIONS[request["op"]](request)


def _unpack(request: Json) -> Json:
    """`path` and `folder` to `members` of an archive; None where the file is none."""
    members = unpack(Path(request["path"]), Path(request["folder"]), ZipCaps(**request["caps"]))
    return {"members": members and [asdict(member) for member in members]}


def _normalise(request: Json) -> Json:
    """`path` of an upload to UIDs, sha and warnings; the normalised instance is written to `out`.

    With `deidentify`, rules and secret, all of them are those of the de-identified instance.
    """
    instance, body = normalise(Path(request["path"]).read_bytes(), Caps(**request["caps"]))
    if request["deidentify"] is not None:
        instance, body = protect(instance, body, Deidentification(**request["deidentify"]), request["secret"])
    Path(request["out"]).write_bytes(body)
    return asdict(instance)


@lru_cache(maxsize=1)
def _series(paths: tuple[str, ...]) -> Series:
    """What is asked of one series comes in turn, and its headers are read once."""
    return Series.read(paths)


def _describe(request: Json) -> Json:
    """`paths` of normalised instances to the attributes, geometry and warnings of their series."""
    series = _series(tuple(request["paths"]))
    found = series.description
    return {
        "attributes": found.attributes,
        "geometry": found.geometry and found.geometry.model_dump(mode="json"),
        "warnings": found.warnings,
        "n_grey": sum(is_grey(series.headers[placed.instance]) for placed in found.order),
        "deidentified": all(map(is_protected, series.headers)),
    }


def _slices(request: Json) -> Json:
    """`path` of a normalised instance to where its frames lie, `geometry.Slice`, and the modality."""
    found = Series.read([request["path"]]).description
    return {
        "slices": [asdict(placed.slice) for placed in found.order],
        "modality": found.attributes.get("Modality"),
    }


def _measure(request: Json) -> tuple[float, float] | None:
    """`paths` of normalised instances to the window that their percentiles give, or None."""
    return measure(_series(tuple(request["paths"])), ArrayConfig(**request["config"]), _blank_rules(request))


def _assemble(request: Json) -> Json:
    """`paths` of normalised instances to their training array, written to `out` (npy); the series is done then."""
    series = _series(tuple(request["paths"]))
    config, blank = ArrayConfig(**request["config"]), _blank_rules(request)
    try:
        return assemble(series, request["out"], config, request["secret"], blank)
    finally:
        _series.cache_clear()


def _blank_rules(request: Json) -> list[BlankRule]:
    return [BlankRule(**rule) for rule in request["blank"]]


OPERATIONS = {
    "unpack": _unpack,
    "normalise": _normalise,
    "describe": _describe,
    "slices": _slices,
    "measure": _measure,
    "assemble": _assemble,
}


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the memory of a crashed decoder holds a patient's image
    silence()
    serve(answer)
