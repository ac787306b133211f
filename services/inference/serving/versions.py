"""What is remembered in S3 of the versions of each MAP, and announced: which one serves, and which ones were rejected.

A version that was rejected is remembered, so that other workers do not try it. What serves is remembered as well: a
worker that starts begins with it, whatever the MAP's tag points at by now.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from pydantic import AwareDatetime

from services.inference.package.maps import Map
from services.inference.records import Frozen
from services.inference.routing import Route
from shared.idempotency import store_once, stored
from shared.log import get_logger
from shared.messages import MapRejected, MapUpdated, RejectedMap, UpdatedMap
from shared.objects import ObjectStore
from shared.queue import Publish

log = get_logger()


@dataclass(frozen=True, slots=True)
class InstalledMap:
    """A MAP of this worker in the version that serves, and the series that it takes."""

    map: Map
    route: Route


class Rejection(Frozen):
    """`maps/<map>/rejected/<digest>.json`: a version that no worker is to try again."""

    reason_code: str
    time: AwareDatetime


class Served(Frozen):
    """`maps/<map>/serving.json`: the version that took over last, or with which the first worker began."""

    map_digest: str
    source: str
    """A folder, or an image by its digest."""
    since: AwareDatetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """The memory of all workers. Every method raises `Unavailable` if S3 or SQS does not answer."""

    objects: ObjectStore
    publish: Publish
    clock: Callable[[], datetime]

    async def rejection(self, found: Map) -> Rejection | None:
        """Return why this version was rejected, if it was."""
        return await stored(rejection_key(found), Rejection, objects=self.objects)

    async def served(self, name: str) -> Served | None:
        """Return the version of the MAP that took over last."""
        return await stored(_serving_key(name), Served, objects=self.objects)

    async def began(self, found: Map, route: Route) -> None:
        """Remember what the first worker begins with."""
        await store_once(_serving_key(route.name), self._serves_now(found, route), objects=self.objects)

    async def reject(self, found: Map, route: Route, reason_code: str, previous: str | None) -> None:
        """Remember and announce that a version is not to be tried again; `previous` is the digest that goes on."""
        made = Rejection(reason_code=reason_code, time=self.clock())
        rejection = await store_once(rejection_key(found), made, objects=self.objects)
        log.error("map.rejected", map=route.name, map_digest=found.digest, reason=reason_code)
        rejected = RejectedMap(
            map=route.name,
            map_digest=found.digest,
            source=_source_of(found, route),
            reason_code=rejection.reason_code,
            serving_digest=previous,
            since=rejection.time,
        )
        await self.publish(MapRejected.of(route.name, rejected, time=rejection.time))

    async def update(self, found: Map, route: Route, previous: str | None) -> None:
        """Remember and announce that a version took over from `previous`."""
        log.info("map.updated", map=route.name, map_digest=found.digest, previous_digest=previous)
        made = self._serves_now(found, route)
        served = await store_once(_serving_key(route.name), made, objects=self.objects)
        if served.map_digest != made.map_digest:
            served = made
            await self.objects.put(_serving_key(route.name), made.model_dump_json(indent=1).encode())
        # The time of the record makes all workers tell the same event, and another one when a version comes back.
        updated = UpdatedMap(
            map=route.name,
            map_digest=found.digest,
            source=made.source,
            previous_digest=previous,
            since=served.since,
        )
        await self.publish(MapUpdated.of(route.name, updated, time=served.since or self.clock()))

    def _serves_now(self, found: Map, route: Route) -> Served:
        return Served(map_digest=found.digest, source=_source_of(found, route), since=self.clock())


def _serving_key(name: str) -> str:
    return f"maps/{name}/serving.json"


def rejection_key(found: Map) -> str:
    """Return the key of what is remembered of a version that was rejected."""
    return f"maps/{found.name}/rejected/{found.digest}.json"


def _source_of(found: Map, route: Route) -> str:
    return found.image.reference if found.image else route.source
