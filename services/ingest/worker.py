"""The child that reads what people upload: `python -m services.ingest.worker`, started by `decoder.Decoder`.

Files go in and out by path. Limits of memory and processor time are set by the parent.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import Dataset, dcmread

from services.ingest import arrays
from services.ingest.archive import ZipCaps, is_zip, unpack
from services.ingest.reading import Caps, normalise
from services.ingest.series import describe, patient_key
from shared.child import Json, Progress, serve
from shared.dicom import silence

DEFER_BYTES = 4096


def answer(request: Json, progress: Progress) -> Any:
    """Do what `request["op"]` says."""
    del progress
    return OPERATIONS[request["op"]](request)


def _unpack(request: Json) -> Json:
    """`path` and `folder` to `members` of a zip; None where the file is none."""
    archive = Path(request["path"])
    with archive.open("rb") as file:
        if not is_zip(file.read(4)):
            return {"members": None}
    members = unpack(archive, Path(request["folder"]), ZipCaps(**request["caps"]))
    return {"members": [asdict(member) for member in members]}


def _normalise(request: Json) -> Json:
    """`path` of an upload to UIDs, sha and warnings; the normalised instance is written to `out`."""
    instance, body = normalise(Path(request["path"]).read_bytes(), Caps(**request["caps"]))
    Path(request["out"]).write_bytes(body)
    return asdict(instance)


def _describe(request: Json) -> Json:
    """`paths` of normalised instances to the attributes, geometry and warnings of their series."""
    headers = _headers(request["paths"])
    found = describe(headers)
    return {
        "attributes": found.attributes,
        "geometry": found.geometry and found.geometry.model_dump(mode="json"),
        "warnings": found.warnings,
        "n_grey": sum(arrays.is_grey(headers[placed.instance]) for placed in found.order),
    }


def _assemble(request: Json) -> Json:
    """`paths` of normalised instances to their training array, written to `out` (npy)."""
    config = arrays.ArrayConfig(
        size=request["size"],
        window=request["window"] and (request["window"][0], request["window"][1]),
        percentiles=(request["percentiles"][0], request["percentiles"][1]),
    )
    headers = _headers(request["paths"])
    order = describe(headers).order
    grey = [placed for placed in order if arrays.is_grey(headers[placed.instance])]
    warnings = ["colour_skipped"] if len(grey) < len(order) else []
    instances = sorted({placed.instance for placed in grey})
    rank = {(placed.instance, placed.frame): index for index, placed in enumerate(grey)}
    spacings = {(placed.instance, placed.frame): placed.slice.pixel_spacing for placed in grey}
    n_pixels = sum(placed.slice.rows * placed.slice.columns for placed in grey)

    def frames() -> Iterator[arrays.Slices]:
        for index in instances:
            yield from arrays.modality_values(dcmread(request["paths"][index]))

    window = arrays.window_of(frames, n_pixels, config)
    array = np.empty((len(grey), config.size, config.size), np.float32)
    for index in instances:
        dataset = dcmread(request["paths"][index])
        inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
        for number, frame in enumerate(arrays.modality_values(dataset)):
            if not np.isfinite(frame).all() and "array_values_invalid" not in warnings:
                warnings.append("array_values_invalid")
            place = (index, number)
            array[rank[place]] = arrays.shrink(frame, window, config.size, spacings[place], inverted=inverted)
    np.save(request["out"], array)
    return {
        "shape": list(array.shape),
        "window": list(window),
        "patient_key": patient_key(headers[0], request["patient_secret"]),
        "warnings": warnings,
    }


def _headers(paths: list[str]) -> list[Dataset]:
    """Read everything, but leave values as long as pixel data on the disk."""
    return [dcmread(path, defer_size=DEFER_BYTES) for path in paths]


OPERATIONS = {"unpack": _unpack, "normalise": _normalise, "describe": _describe, "assemble": _assemble}


if __name__ == "__main__":
    silence()
    serve(answer)
