"""A PACS, or another server that takes STOW-RS and answers QIDO-RS (PS3.18)."""

import asyncio
from collections.abc import Sequence

from services.inference.routing import TargetName
from services.inference.targets.stow import stow
from services.inference.targets.target import Instance, by_series, not_shown, pauses
from shared.dicomweb import DicomWeb, DicomWebError
from shared.errors import Unavailable

QIDO_PAGE = 1000


class DicomWebTarget:
    """A server that takes STOW-RS and answers QIDO-RS."""

    name: TargetName = "dicomweb"

    def __init__(self, web: DicomWeb) -> None:
        """Take a DICOMweb client."""
        self._web = web

    async def shown(self, study_uid: str, series_uid: str) -> set[str]:
        """Search for the instances of the series, page by page."""
        found: set[str] = set()
        try:
            while True:
                page = await self._web.search_instances(study_uid, series_uid, limit=QIDO_PAGE, offset=len(found))
                new = {uid for one in page for uid in one.get("00080018", {}).get("Value", [])} - found
                found |= new
                if len(page) < QIDO_PAGE or not new:  # a server may not know `offset`
                    return found
        except DicomWebError as error:
            raise Unavailable(str(error)) from None

    async def push(self, instances: Sequence[Instance]) -> dict[str, str | None]:
        """Store the instances, and search for each of them."""
        await stow(self._web, instances)
        for (study_uid, series_uid), wanted in by_series(instances).items():
            for pause_s in pauses():
                await asyncio.sleep(pause_s)
                if wanted <= await self.shown(study_uid, series_uid):
                    break
            else:
                raise not_shown(series_uid)
        return {one.series_uid: None for one in instances}
