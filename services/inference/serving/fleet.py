"""Which version of each MAP serves, and how a new one takes over: while the worker runs, and only if it is good.

Theory of operation. The routing table is read again every few seconds, and the MAPs' sources are looked at once a
minute: the digest that ECR has for a tag, the id that the engine has for an image of this machine, the files of a
folder. What changed is fetched beside the version that serves, and tried (`trial`). Then it serves from the next study
on; or it is rejected, `map.rejected` says so, and the version that served goes on. Requests that were made for another
version are asked for again under the digest that serves (`handler.infer`), so no result names a version that did not
make it.

What serves and what was rejected is remembered in S3 (`versions`). A worker that starts begins with the image that
served, whatever its tag points at by now, and tries the new one at its next look. Of a folder there is only what lies
in it: what has not served yet is tried before the first study, and if it was rejected, then or before, the worker
refuses to start.
"""

import asyncio
from dataclasses import dataclass, field

from services.inference.package.maps import Map
from services.inference.routing import Route
from services.inference.serving.bounds import serving_of
from services.inference.serving.gpus import Share
from services.inference.serving.place import Place
from services.inference.serving.runner import MapRunner
from services.inference.serving.sources import Sources, is_another_image
from services.inference.serving.table import WatchedTable
from services.inference.serving.trial import try_version
from services.inference.serving.versions import InstalledMap, Versions, rejection_of
from shared import metrics as declared
from shared.child import ChildFailed
from shared.config import Misconfigured
from shared.errors import Unavailable
from shared.log import get_logger
from shared.metrics import Metrics

OF_ITS_PLACE = {"name", "source", "python", "isolation", "deadline_s"}
"""The keys of a route that say which program runs, and how; the others say on what, and where its results go."""
log = get_logger()


@dataclass(slots=True, kw_only=True)
class Fleet:
    """The MAPs of a worker. `maps` is what handlers are given; it changes in place."""

    table: WatchedTable
    sources: Sources
    versions: Versions
    gpus: Share
    metrics: Metrics
    maps: dict[str, InstalledMap] = field(default_factory=dict)
    _looked_at: dict[str, Route] = field(default_factory=dict)
    _stamps: dict[str, str] = field(default_factory=dict)
    """The stamp of each MAP's source that was followed last: it serves, or was rejected."""

    # At the start.

    async def begin(self) -> None:
        """Read the table and the MAPs that it names, for a worker that starts.

        Raises:
            Misconfigured: the table or a source cannot be had or used, or the only version there is was rejected.
        """
        place = f"RADQUEUE_MAPS_FILE: {self.table.place.name}"
        try:
            await self.table.read()
            for name, route in self.table.routes.items():
                place = f"{self.table.place.file}: {name}"
                self._looked_at[name] = route
                self.maps[name] = InstalledMap(await self._first(route), route)
        except Unavailable as error:
            raise Misconfigured(f"{place}: {error}.") from None

    async def start(self, runner: MapRunner) -> None:
        """Start every MAP now, and remember what serves; a version that has not served yet is tried first.

        Raises:
            Misconfigured: a MAP cannot be imported, or fails its trial: a mistake of the deployment, not of a study.
            Unavailable: S3 does not answer, or the machine is to blame for a trial that failed.
            MapChanged: a MAP's folder changed meanwhile.
            WorkerUnfit: its GPU is gone.
        """
        for name, (found, route) in {name: (one.map, one.route) for name, one in self.maps.items()}.items():
            # Try what has not served yet.
            served = await self.versions.served(name)
            if served is not None and served.map_digest != found.digest:
                reason_code = await self._take_over(found, route, runner, served.map_digest)
                if reason_code is not None:
                    raise Misconfigured(self._refusal(found, reason_code))
            # Start it.
            try:
                device = await runner.start(name)
            except ChildFailed as failed:
                message = f"{self.table.place.file}: {name}: cannot be imported ({failed})."
                raise Misconfigured(message) from None
            log.info("map.ready", map=name, map_digest=found.digest, device=device)
            # Remember it.
            await self.versions.began(found, route)

    async def _first(self, route: Route) -> Map:
        """Return the version that a worker begins with: of an image that served, the same.

        If that one cannot be had any more, and for a folder or an image that is only on this machine, it is what there
        is now; `start` tries it.
        """
        # What served, if it is another image than there is now.
        stamp = await self.sources.stamp(route)
        served = await self.versions.served(route.name)
        if served is not None and is_another_image(served.source, route.source, stamp):
            try:
                found = await self.sources.fetch(route, served.source)
                if await self.versions.rejection(found) is None:
                    log.warning("map.begins_with_served", map=route.name, map_digest=served.map_digest)
                    self._stamps[route.name] = ""  # so the next look tries what the tag points at
                    return found
            except (Misconfigured, Unavailable):
                log.warning("map.served_is_gone", map=route.name, map_digest=served.map_digest)

        # What there is.
        found = await self.sources.fetch(route)
        rejection = await self.versions.rejection(found)
        if rejection is not None:
            raise Misconfigured(self._refusal(found, rejection.reason_code))
        self._stamps[route.name] = stamp
        return found

    # While the worker runs.

    async def keep_current(self, runner: MapRunner, *, table_s: float, sources_s: float) -> None:
        """Look at the table every `table_s` seconds, and at the sources every `sources_s`, until it is cancelled."""
        loop = asyncio.get_running_loop()
        due = loop.time() + sources_s
        while True:
            await asyncio.sleep(table_s)
            await self.look(runner, sources=loop.time() >= due)
            if loop.time() >= due:
                due = loop.time() + sources_s

    async def look(self, runner: MapRunner, *, sources: bool = True) -> None:
        """Look at the table, and at the sources of what it names or only of what is new there; follow what changed."""
        await self.table.read_again()
        # Remove what the table names no more.
        for name in self._looked_at.keys() - self.table.routes.keys():
            await self._remove(name, runner)
        # Serve what it names by the newest route, and from the newest source that is good.
        for name, route in self.table.routes.items():
            self._reroute(name, route)
            before = self._looked_at.get(name)
            if sources or before is None or not _same_program(before, route):
                await self._follow_if_possible(route, runner)

    async def _remove(self, name: str, runner: MapRunner) -> None:
        # Put back, it is looked at as one that is new.
        del self._looked_at[name]
        self._stamps.pop(name, None)
        if self.maps.pop(name, None) is not None:
            await runner.remove(name)
            await self._reserve(runner)
            log.info("map.removed", map=name)

    def _reroute(self, name: str, route: Route) -> None:
        """Have the version that serves take what the new route says, if that names the same program."""
        installed = self.maps.get(name)
        if installed is not None and installed.route != route and _same_program(installed.route, route):
            self.maps[name] = InstalledMap(installed.map, route)
            log.info("map.rerouted", map=name)

    async def _follow_if_possible(self, route: Route, runner: MapRunner) -> None:
        """Follow one source; whatever is the matter with it or its registry, what serves goes on.

        That holds also while files of a folder come and go, because a new version is being copied into it.
        """
        try:
            await self._follow(route, runner)
        except (Misconfigured, Unavailable, OSError) as error:
            # Not the text of an OSError: it may name a file of the golden study.
            why = [] if isinstance(error, OSError) else str(error).splitlines()
            log.error("map.source_failed", map=route.name, reason=type(error).__name__, why=why)  # noqa: TRY400 - not a bug
            self.metrics.put(declared.MAP_SOURCE_FAILURES, 1, Map=route.name)

    async def _follow(self, route: Route, runner: MapRunner) -> None:
        """Bring in the source of one MAP, if it changed since it was followed last."""
        # Look: has it changed?
        name = route.name
        before = self._looked_at.get(name)
        if before is None or not _same_program(before, route):
            self._looked_at[name] = route
            self._stamps.pop(name, None)
        stamp = await self.sources.stamp(route)
        if stamp == self._stamps.get(name):
            return

        # Fetch: is it another version, and one that was not rejected?
        found = await self.sources.fetch(route)
        installed = self.maps.get(name)
        if not installed or found.digest != installed.map.digest or not _same_program(installed.route, route):
            if await self.versions.rejection(found) is not None:
                log.warning("map.rejected_before", map=name, map_digest=found.digest)
            else:
                await self._take_over(found, route, runner, installed.map.digest if installed else None)

        # Remember it, and not before: what could not be tried to its end is tried again.
        self._stamps[name] = stamp

    # A new version.

    async def _take_over(self, found: Map, route: Route, runner: MapRunner, previous: str | None) -> str | None:
        """Try a version, and let it serve, or reject it and return why; `previous` is the digest that served before.

        Raises `Unavailable` if the trial says nothing about the version.
        """
        # Try it, beside the one that serves.
        try:
            await self._reserve(runner, found)
            reason_code = await try_version(found, route, runner=runner, golden=self._golden(route))
        except (Misconfigured, Unavailable, OSError):
            await self._forget(route.name, runner)
            raise

        # Reject it.
        if reason_code is not None:
            await self._forget(route.name, runner)
            await self.versions.reject(found, route, reason_code, previous)
            return reason_code

        # Or let it serve.
        await runner.install(found, serving_of(route))
        self.maps[route.name] = InstalledMap(found, route)
        await self.versions.update(found, route, previous)
        return None

    async def _forget(self, name: str, runner: MapRunner) -> None:
        """Give back what a version that was tried had."""
        await runner.forget_tried(name)
        await self._reserve(runner)

    async def _reserve(self, runner: MapRunner, found: Map | None = None) -> None:
        """Have as much of the GPUs as what serves asks for, with `found` instead of the version that serves.

        Raises:
            Unavailable: the GPUs have no room for it now.
            Misconfigured: it asks for more than the GPUs have.
        """
        wanted = {name: one.map for name, one in self.maps.items()} | ({found.name: found} if found else {})
        if not await asyncio.to_thread(self.gpus.cover, [one.needs for one in wanted.values()]):
            raise Unavailable("the GPUs have no room for it beside what serves")
        runner.use(self.gpus.devices)

    def _golden(self, route: Route) -> Place | None:
        if route.golden is None:
            return None
        in_s3 = route.golden.startswith("s3://")
        name = route.golden if in_s3 else str(self.sources.folder / route.golden)
        return Place(name, self.table.place.s3)

    def _refusal(self, found: Map, reason_code: str) -> str:
        return (
            f"{self.table.place.file}: {found.name}: this version was rejected ({reason_code}); mend it, or remove "
            f"{rejection_of(found).key} from the bucket."
        )


def _same_program(one: Route, other: Route) -> bool:
    return one.model_dump(include=OF_ITS_PLACE) == other.model_dump(include=OF_ITS_PLACE)
