"""The window of a dataset where `datasets.yaml` names none: percentiles of its first series, stored once.

Slices of one dataset must be comparable, so a window may not depend on the series that it is applied to. The first
series of a Modality that has any grey values decides, `If-None-Match: *` keeps it, and all later arrays are made by it.
"""

import re
from collections.abc import Awaitable, Callable, Mapping

from services.ingest.protocol import ArrayConfig
from shared import keys
from shared.documents.arrays import DatasetWindow
from shared.documents.document import Document
from shared.idempotency import store_once, stored
from shared.objects import ObjectStore

OTHER = "other"
"""The word for a Modality that is missing or is not a code: it came from a file, and becomes part of a key."""

Measure = Callable[[], Awaitable[tuple[float, float] | None]]


def window_document(dataset: str, modality: object, config: ArrayConfig) -> Document[DatasetWindow]:
    """Return where the window lies that arrays of this configuration, which has none, are made by."""
    code = modality if isinstance(modality, str) and re.fullmatch(r"[A-Z]{2,16}", modality) else OTHER
    return keys.window(dataset, code, config.hash())


async def window_of(
    document: Document[DatasetWindow],
    config: ArrayConfig,
    source: Mapping[str, str],
    measure: Measure,
    *,
    objects: ObjectStore,
) -> tuple[float, float] | None:
    """Return the dataset's window; where there is none yet, store what `measure` finds. None where it finds none.

    Of two workers that measure at the same time one window is stored, and both get that one.

    Raises:
        Unprocessable: `invalid_record`: what lies under the key is no window.
        Unavailable: S3 does not answer.
    """
    found = await stored(document, objects=objects)
    if found is None:
        window = await measure()
        if window is None:
            return None
        found = DatasetWindow(window=window, config=config.described(), source=source)
        found = await store_once(document, found, objects=objects)
    return found.window
