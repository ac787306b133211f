"""The child that reads what people upload: `python -m services.ingest.worker`, started by `decoder.Decoder`.

Files go in and out by path. Limits of memory and processor time are set by the parent.
"""

import resource
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from services.ingest.archive import unpack
from services.ingest.arrays import is_grey
from services.ingest.assembly import Series, assemble, measure
from services.ingest.protection import is_protected, protect
from services.ingest.protocol import (
    AnyRequest,
    Assemble,
    Assembled,
    Describe,
    Described,
    Instance,
    Locate,
    Located,
    Measure,
    Measured,
    Normalise,
    Unpack,
    Unpacked,
    read,
)
from services.ingest.reading import normalise
from shared.child import Message, Progress, serve
from shared.pydicom_silence import silence


def answer(request: AnyRequest, progress: Progress) -> Message:
    """Do what is asked."""
    del progress
    return OPERATIONS[type(request)](request)


def _unpack(asked: Unpack) -> Unpacked:
    return Unpacked(unpack(Path(asked.path), Path(asked.folder), asked.caps))


def _normalise(asked: Normalise) -> Instance:
    instance, body = normalise(Path(asked.path).read_bytes(), asked.caps)
    if asked.deidentify is not None:
        instance, body = protect(instance, body, asked.deidentify, asked.secret)
    Path(asked.out).write_bytes(body)
    return instance


@lru_cache(maxsize=1)
def _series(paths: tuple[str, ...]) -> Series:
    """What is asked of one series comes in turn, and its headers are read once."""
    return Series.read(paths)


def _describe(asked: Describe) -> Described:
    series = _series(tuple(asked.paths))
    found = series.description
    return Described(
        attributes=found.attributes,
        geometry=found.geometry,
        warnings=found.warnings,
        n_grey=sum(is_grey(series.headers[placed.instance]) for placed in found.order),
        deidentified=all(map(is_protected, series.headers)),
    )


def _locate(asked: Locate) -> Located:
    found = Series.read([asked.path]).description
    modality = found.attributes.get("Modality")
    return Located([placed.slice for placed in found.order], modality if isinstance(modality, str) else None)


def _measure(asked: Measure) -> Measured:
    return Measured(measure(_series(tuple(asked.paths)), asked.config, asked.blank))


def _assemble(asked: Assemble) -> Assembled:
    try:
        return assemble(_series(tuple(asked.paths)), asked.out, asked.config, asked.secret, asked.blank)
    finally:
        _series.cache_clear()


OPERATIONS: dict[type, Callable[[Any], Message]] = {
    Unpack: _unpack,
    Normalise: _normalise,
    Describe: _describe,
    Locate: _locate,
    Measure: _measure,
    Assemble: _assemble,
}


def main() -> None:
    """Answer calls until standard input closes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the memory of a crashed decoder holds a patient's image
    silence()
    serve(answer, read)


if __name__ == "__main__":
    main()
