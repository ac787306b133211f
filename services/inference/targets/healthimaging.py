"""AWS HealthImaging: STOW-RS stores, its own API says what became of it.

IAM: medical-imaging:StoreDICOM, SearchImageSets and GetImageSetMetadata on the data store.
"""

import asyncio
import gzip
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from services.inference.routing import TargetName
from services.inference.targets.stow import stow
from services.inference.targets.target import Instance, PushRejected, by_series, not_shown, pauses
from shared.aws_errors import answering
from shared.dicomweb import DicomWeb
from shared.log import get_logger

if TYPE_CHECKING:
    from types_aiobotocore_medical_imaging import HealthImagingClient

STUDY_TAGS = {
    "PatientID": "DICOMPatientId",
    "StudyDate": "DICOMStudyDate",
    "AccessionNumber": "DICOMAccessionNumber",
    "StudyID": "DICOMStudyId",
}
"""The attributes that all image sets of a study must agree on to be primary, with their names in SearchImageSets."""

log = get_logger()


class HealthImaging:
    """AWS HealthImaging, by STOW-RS."""

    name: TargetName = "healthimaging"

    def __init__(self, web: DicomWeb, client: "HealthImagingClient", datastore_id: str) -> None:
        """Take the data store's DICOMweb side and its API."""
        self._web = web
        self._client = client
        self._datastore_id = datastore_id

    async def shown(self, study_uid: str, series_uid: str) -> set[str]:
        """Read the metadata of the primary image sets of the series."""
        primary, _ = await self._image_sets(study_uid, series_uid)
        return {uid for image_set in primary for uid in await self._instances(image_set)}

    async def push(self, instances: Sequence[Instance]) -> dict[str, str | None]:
        """Store the instances, and find each of them in a primary image set."""
        if not instances:
            return {}
        await self._store(instances)
        found: dict[str, str | None] = {}
        for (study_uid, series_uid), wanted in by_series(instances).items():
            found[series_uid] = await self._primary(study_uid, series_uid, wanted)
        return found

    async def _store(self, instances: Sequence[Instance]) -> None:
        await stow(self._web, instances)

    async def _primary(self, study_uid: str, series_uid: str, wanted: set[str]) -> str:
        """Return the newest primary image set of a series, all of whose `wanted` instances are primary."""
        others: list[Any] = []
        missing = wanted
        for pause_s in pauses():
            await asyncio.sleep(pause_s)
            primary, others = await self._image_sets(study_uid, series_uid)
            missing = wanted - {uid for image_set in primary for uid in await self._instances(image_set)}
            if not missing:
                newest: str = max(primary, key=lambda one: one["updatedAt"])["imageSetId"]
                return newest
        # An older push may have left its non-primary image set behind: it means something only after the last look.
        for image_set in others:
            if missing & await self._instances(image_set):
                keywords = await self._conflicts(study_uid, image_set)
                log.warning("push.not_primary", series=series_uid, conflicts=keywords)
                raise PushRejected("not_primary", keywords)
        raise not_shown(series_uid)

    async def _image_sets(self, study_uid: str, series_uid: str) -> tuple[list[Any], list[Any]]:
        """Return the primary image sets of a series, and those that are not, or are of another study."""
        found = await self._search({"DICOMSeriesInstanceUID": series_uid})
        primary = [one for one in found if _is_primary(one) and _tag(one, "DICOMStudyInstanceUID") == study_uid]
        return primary, [one for one in found if one not in primary]

    async def _conflicts(self, study_uid: str, image_set: Any) -> list[str]:
        """Return the keywords in which an image set differs from what is primary of its study, or of its series."""
        series_uid = _tag(image_set, "DICOMSeriesInstanceUID")
        for one in await self._search({"DICOMSeriesInstanceUID": series_uid}):
            if _is_primary(one) and _tag(one, "DICOMStudyInstanceUID") != study_uid:
                return ["SeriesInstanceUID"]
        primary = [one for one in await self._search({"DICOMStudyInstanceUID": study_uid}) if _is_primary(one)]
        return [
            keyword
            for keyword, name in STUDY_TAGS.items()
            if any(_tag(one, name) != _tag(image_set, name) for one in primary)
        ]

    async def _search(self, value: dict[str, str]) -> list[Any]:
        criteria: Any = {"filters": [{"operator": "EQUAL", "values": [value]}]}
        found: list[Any] = []
        with answering("HealthImaging"):
            pages = self._client.get_paginator("search_image_sets").paginate(
                datastoreId=self._datastore_id, searchCriteria=criteria
            )
            async for page in pages:
                found += page["imageSetsMetadataSummaries"]
        return found

    async def _instances(self, image_set: Any) -> set[str]:
        """Return the SOPInstanceUIDs in an image set's metadata."""
        with answering("HealthImaging"):
            answer = await self._client.get_image_set_metadata(
                datastoreId=self._datastore_id, imageSetId=image_set["imageSetId"]
            )
            content = await answer["imageSetMetadataBlob"].read()
        return await asyncio.to_thread(_instances_of, content)


def _is_primary(image_set: Any) -> bool:
    return bool(image_set.get("isPrimary", True))


def _tag(image_set: Any, name: str) -> str:
    return str(image_set["DICOMTags"].get(name) or "")


def _instances_of(metadata: bytes) -> set[str]:
    document = json.loads(gzip.decompress(metadata))
    return {uid for series in document["Study"]["Series"].values() for uid in series["Instances"]}
