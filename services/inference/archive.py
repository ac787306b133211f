"""Where results go: HealthImaging, or another archive that speaks DICOMweb.

IAM: medical-imaging:StoreDICOM and medical-imaging:SearchImageSets on the data store.
"""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from botocore.exceptions import BotoCoreError, ClientError

from shared.dicomweb import MAX_STORE_BYTES, DicomWeb, DicomWebError, StoreRejected, StoreTooLarge
from shared.errors import Unavailable
from shared.log import get_logger

if TYPE_CHECKING:
    from types_aiobotocore_medical_imaging import HealthImagingClient

BATCH_BYTES = MAX_STORE_BYTES * 9 // 10
"""Instances in one STOW-RS request; the rest is for its multipart headers."""
OURS = {401, 403, 404, 408}
"""HTTP statuses that speak about our permission or our address, not about the instances."""
SEARCHES = 5
SEARCH_PAUSE_S = 0.2
"""A new image set may take a moment until it is found; the pause doubles with each search."""

log = get_logger()


class PushRejected(ValueError):  # noqa: N818 - it states a fact about the instances
    """The archive does not take the instances as they should be, and will not when asked again.

    `reason_code` is `push_rejected`, or `not_primary`: it took them, but DICOMweb does not show them.
    """

    def __init__(self, reason_code: str = "push_rejected") -> None:
        """State the reason."""
        super().__init__(reason_code)
        self.reason_code = reason_code


class Archive:
    """Takes instances in, and knows under which image set they are found."""

    def __init__(
        self, web: DicomWeb, *, healthimaging: "HealthImagingClient | None" = None, datastore_id: str = ""
    ) -> None:
        """Take a DICOMweb client, and HealthImaging's own API where the archive is HealthImaging."""
        self._web = web
        self._healthimaging = healthimaging
        self._datastore_id = datastore_id

    async def push(self, instances: Sequence[Path]) -> None:
        """Store the instances; storing them again changes nothing.

        Raises:
            PushRejected: the archive refuses them.
            Unavailable: it does not answer, or does not know us.
        """
        for batch in _batches(instances):
            try:
                await self._web.store(batch)
            except StoreRejected as rejected:
                log.warning("push.rejected", failures=len(rejected.result.failures), reasons=str(rejected))
                raise PushRejected from None
            except StoreTooLarge:
                raise PushRejected from None
            except DicomWebError as error:
                if error.status in OURS:
                    raise Unavailable(str(error)) from None
                raise PushRejected from None

    async def image_set_of(self, series_uid: str) -> str | None:
        """Return the id of the primary image set of a series that was pushed; None in an archive that has none.

        Raises:
            PushRejected: `not_primary`: the series conflicts with what the archive has of this study.
            Unavailable: HealthImaging does not answer, or does not have the series, so that it should be pushed again.
        """
        if self._healthimaging is None:
            return None
        for attempt in range(SEARCHES):
            try:
                answer = await self._healthimaging.search_image_sets(
                    datastoreId=self._datastore_id,
                    searchCriteria={
                        "filters": [{"operator": "EQUAL", "values": [{"DICOMSeriesInstanceUID": series_uid}]}]
                    },
                )
            except (BotoCoreError, ClientError, OSError, TimeoutError) as error:
                raise Unavailable(f"HealthImaging: {type(error).__name__}") from None
            found = answer["imageSetsMetadataSummaries"]
            if found:
                newest = max(found, key=lambda one: (one.get("isPrimary", True), one["updatedAt"]))
                if not newest.get("isPrimary", True):
                    log.warning("push.not_primary", series=series_uid)
                    raise PushRejected("not_primary")
                return newest["imageSetId"]
            await asyncio.sleep(SEARCH_PAUSE_S * 2**attempt)
        log.warning("push.no_image_set", series=series_uid)
        raise Unavailable("HealthImaging: no image set of a series that was pushed")


def _batches(instances: Iterable[Path]) -> Iterator[list[Path]]:
    batch: list[Path] = []
    size = 0
    for path in instances:
        if batch and size + path.stat().st_size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(path)
        size += path.stat().st_size
    if batch:
        yield batch
