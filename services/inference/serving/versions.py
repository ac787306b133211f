"""Which version of each MAP serves, and how a new one takes over: while the worker runs, and only if it is good.

Theory of operation. The routing table is read again every few seconds, and the MAPs' sources are looked at once a
minute: the digest that ECR has for a tag, the id that the engine has for an image of this machine, the files of a
folder. What changed is fetched beside the version that serves, and tried: it must start, and where the MAP has a golden
study, run on it and make outputs that can be pushed. Then it serves from the next study on; or it does not, the one
that served goes on, and `map.rejected` says so. Requests that were made for another version are asked for again under
the digest that serves (`handler.infer`), so no result names a version that did not make it.

A version that was rejected is remembered in S3: other workers do not try it. What the machine is to blame for, such as
memory that did not suffice, or a golden study that is not there, is no rejection: the version is tried again.

What serves is remembered as well. A worker that starts begins with that image, whatever its tag points at by now, and
tries the new one at its next look. Of a folder there is only what lies in it: what has not served yet is tried before
the first study, and where it was rejected, then or before, the worker refuses to start.

IAM: ecr:DescribeImages and ecr:GetAuthorizationToken; ecr:BatchGetImage and ecr:GetDownloadUrlForLayer to pull.
"""

import asyncio
import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from botocore.exceptions import BotoCoreError, ClientError
from pydantic import AwareDatetime
from pydicom.errors import InvalidDicomError

from services.inference import outputs
from services.inference.outputs import OutputRefused
from services.inference.package.engine import Engine, ecr_authorization, ecr_of, repository_of
from services.inference.package.maps import Map, files_of, is_image, load
from services.inference.records import Frozen
from services.inference.routing import Route, RoutingTable, read
from services.inference.serving.gpus import Share
from services.inference.serving.runner import MapRunner, Run, Serving, Study
from services.inference.targets.target import Targets
from shared import metrics as declared
from shared.child import ChildFailed
from shared.concurrency import all_of, temporary_folder
from shared.config import Misconfigured
from shared.errors import Unavailable
from shared.idempotency import store_once, stored
from shared.log import get_logger
from shared.messages import MapRejected, MapUpdated, RejectedMap, UpdatedMap
from shared.metrics import Metrics
from shared.objects import ObjectMissing, ObjectStore
from shared.queue import Publish

if TYPE_CHECKING:
    from types_aiobotocore_s3 import S3Client

TRANSFERS = 8
OF_ITS_PLACE = {"name", "source", "python", "isolation", "deadline_s"}
"""What of a route says which program runs, and how; the rest says on what, and where its results go."""

EcrClient = Callable[[str], AbstractAsyncContextManager[Any]]
"""Opens a client of ECR in a region."""
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


@dataclass(frozen=True, slots=True)
class Place:
    """A file or folder of this machine, or an object or prefix of S3, named as people do."""

    name: str
    s3: "S3Client"

    @property
    def folder(self) -> Path:
        """What paths in the file are relative to: its folder; the working directory, where it is in S3."""
        return Path() if self.name.startswith("s3://") else Path(self.name).parent

    @property
    def file(self) -> str:
        """What messages call the file: where it lies, whoever reads them knows."""
        return PurePosixPath(self.name).name

    async def text(self) -> str:
        """Read the file. Raises `Misconfigured` and `Unavailable`."""
        try:
            if not self.name.startswith("s3://"):
                return await asyncio.to_thread(Path(self.name).read_text, "utf-8")
            objects, key = self._in_s3()
            return (await objects.get(key)).decode()
        except (OSError, UnicodeDecodeError, ObjectMissing) as error:
            raise Misconfigured(f"RADQUEUE_MAPS_FILE: {self.name} cannot be read ({type(error).__name__}).") from None

    async def copy_to(self, folder: Path) -> int:
        """Copy all files that lie there; return how many. Raises `Unavailable`."""
        if not self.name.startswith("s3://"):
            files = sorted(path for path in Path(self.name).rglob("*") if path.is_file())
            for index, path in enumerate(files):
                await asyncio.to_thread(shutil.copyfile, path, folder / f"{index}-{path.name}")
            return len(files)
        objects, prefix = self._in_s3()
        keys = [item.key async for item in objects.list(prefix) if not item.key.endswith("/")]
        targets = [folder / f"{index}-{PurePosixPath(key).name}" for index, key in enumerate(keys)]
        pairs = zip(keys, targets, strict=True)
        await all_of((partial(objects.download, key, path) for key, path in pairs), at_once=TRANSFERS)
        return len(keys)

    def _in_s3(self) -> tuple[ObjectStore, str]:
        parts = urlsplit(self.name)
        return ObjectStore(self.s3, parts.netloc), parts.path.lstrip("/")


@dataclass(frozen=True, slots=True)
class Sources:
    """Where MAPs come from. Every method raises `Misconfigured` and `Unavailable`."""

    folder: Path
    """What their paths are relative to."""
    ecr: EcrClient
    engine: Callable[[], Engine] = Engine.find
    file: str = "maps.yaml"
    """What messages call the table that names them."""

    async def stamp(self, route: Route) -> str:
        """Return a text that is another one when the source is: the image's digest, or what a folder's listing says."""
        if not is_image(route.source, self.folder):
            places = [self.folder / route.source, *([self.folder / route.python] if route.python else [])]
            return await asyncio.to_thread(_listing_of, places)
        if ecr_of(route.source) is not None:
            return await self._ecr_digest(route.source)
        engine = await asyncio.to_thread(self.engine)
        inspected = await asyncio.to_thread(engine.inspect, route.source)
        return inspected.id if inspected else ""

    async def fetch(self, route: Route, reference: str | None = None) -> Map:
        """Return the MAP as its source is now, or the image `reference` instead; one that is in ECR is pulled."""
        place = ecr_of(route.source) if is_image(route.source, self.folder) else None
        if place is None:
            engine = await asyncio.to_thread(self.engine) if is_image(route.source, self.folder) else None
            read_it = partial(load, route.name, route.source, relative_to=self.folder, python=route.python)
            return await asyncio.to_thread(read_it, engine=engine, file=self.file)
        # By its digest: the tag may move between this look and the pull.
        pinned = reference or f"{repository_of(route.source)}@{await self._ecr_digest(route.source)}"
        engine = await asyncio.to_thread(self.engine)
        if await asyncio.to_thread(engine.inspect, pinned) is None:
            with _aws_errors():
                async with self.ecr(place[1]) as client:
                    authorization = await ecr_authorization(client)
            await asyncio.to_thread(engine.pull, pinned, authorization=authorization)
        return await asyncio.to_thread(load, route.name, pinned, engine=engine, file=self.file)

    async def _ecr_digest(self, reference: str) -> str:
        account, region = ecr_of(reference) or ("", "")
        name, _, digest = reference.partition("@")
        if digest:
            return digest
        repository, _, tag = name.partition("/")[2].partition(":")
        with _aws_errors():
            async with self.ecr(region) as client:
                answer = await client.describe_images(
                    registryId=account, repositoryName=repository, imageIds=[{"imageTag": tag or "latest"}]
                )
        return str(answer["imageDetails"][0]["imageDigest"])


@dataclass(slots=True)
class Fleet:
    """The MAPs of a worker. `maps` is what handlers are given; it changes in place."""

    table: Place
    sources: Sources
    targets: Targets
    objects: ObjectStore
    publish: Publish
    metrics: Metrics
    clock: Callable[[], datetime]
    gpus: Share
    maps: dict[str, InstalledMap] = field(default_factory=dict)
    _text: str = ""
    _refusal_told: str = ""
    """What was wrong with the table at the last look."""
    _wanted: dict[str, Route] = field(default_factory=dict)
    _looked_at: dict[str, Route] = field(default_factory=dict)
    _stamps: dict[str, str] = field(default_factory=dict)
    """Of each MAP, the source that was followed last: it serves, or was rejected."""

    async def begin(self) -> None:
        """Read the table and the MAPs that it names, for a worker that starts.

        Raises:
            Misconfigured: the table or a source cannot be had or used, or the only version there is was rejected.
        """
        place = f"RADQUEUE_MAPS_FILE: {self.table.name}"
        try:
            self._text = await self.table.text()
            self._wanted = {route.name: route for route in self._read(self._text).maps}
            for name, route in self._wanted.items():
                place = f"{self.table.file}: {name}"
                self._looked_at[name] = route
                self.maps[name] = InstalledMap(await self._first(route), route)
        except Unavailable as error:
            raise Misconfigured(f"{place}: {error}.") from None

    async def start(self, runner: MapRunner) -> None:
        """Start every MAP now, and remember what serves; what another version served before is tried first.

        Raises:
            Misconfigured: a MAP cannot be imported, or fails its trial: a mistake of the deployment, not of a study.
            Unavailable: S3 does not answer, or the machine is to blame for a trial that failed.
            MapChanged: a MAP's folder changed meanwhile.
            WorkerUnfit: its GPU is gone.
        """
        for name, (found, route) in {name: (one.map, one.route) for name, one in self.maps.items()}.items():
            served = await self._served(name)
            if served is not None and served.map_digest != found.digest:
                reason_code = await self._take_over(found, route, runner, served.map_digest)
                if reason_code is not None:
                    raise Misconfigured(self._refusal(found, reason_code))
            try:
                device = await runner.start(name)
            except ChildFailed as failed:
                raise Misconfigured(f"{self.table.file}: {name}: cannot be imported ({failed}).") from None
            log.info("map.ready", map=name, map_digest=found.digest, device=device)
            await store_once(self.objects, _serving_key(name), self._serves_now(found, route))

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
        await self._read_again()
        for name in self._looked_at.keys() - self._wanted.keys():
            # Put back, it is looked at as one that is new.
            del self._looked_at[name]
            self._stamps.pop(name, None)
            if self.maps.pop(name, None) is not None:
                await runner.remove(name)
                await self._reserve(runner)
                log.info("map.removed", map=name)
        for name, route in self._wanted.items():
            installed = self.maps.get(name)
            if installed is not None and installed.route != route and _same_program(installed.route, route):
                self.maps[name] = InstalledMap(installed.map, route)
                log.info("map.rerouted", map=name)
            before = self._looked_at.get(name)
            if not sources and before is not None and _same_program(before, route):
                continue
            try:
                await self._follow(route, runner)
            except (Misconfigured, Unavailable, OSError) as error:
                # Whatever is the matter with a source or its registry, what serves goes on: also while files of a
                # folder come and go, because somebody copies a new version into it.
                # Not the text of an OSError: it may name a file of the golden study.
                why = [] if isinstance(error, OSError) else str(error).splitlines()
                log.error("map.source_failed", map=name, reason=type(error).__name__, why=why)  # noqa: TRY400 - not a bug
                self.metrics.put(declared.MAP_SOURCE_FAILURES, 1, Map=name)

    async def _read_again(self) -> None:
        """Take the table as it is now; one that cannot be used changes nothing, and is told once."""
        try:
            text = await self.table.text()
        except (Misconfigured, Unavailable) as error:
            self._refused_table(str(error))
            return
        if text == self._text:
            self._refusal_told = ""
            return
        self._text = text
        try:
            self._wanted = {route.name: route for route in self._read(text).maps}
        except Misconfigured as error:
            self._refused_table(str(error))
            return
        log.info("maps.read", maps=sorted(self._wanted))

    def _refused_table(self, why: str) -> None:
        if why == self._refusal_told:
            return
        self._refusal_told = why
        log.error("maps.refused", why=why.splitlines())
        self.metrics.put(declared.ROUTING_TABLES_REFUSED, 1)

    def _read(self, text: str) -> RoutingTable:
        table = read(text, self.table.file)
        self.targets.require(table.maps, self.table.file)
        return table

    async def _first(self, route: Route) -> Map:
        """Return the version that a worker begins with: of an image that served, the same.

        Where that one cannot be had any more, and for a folder or an image that is only on this machine, it is what
        there is now; `start` tries it.
        """
        stamp = await self.sources.stamp(route)
        served = await self._served(route.name)
        if served is not None and _is_another_image(served.source, route.source, stamp):
            try:
                found = await self.sources.fetch(route, served.source)
                if await self._rejection(found) is None:
                    log.warning("map.begins_with_served", map=route.name, map_digest=served.map_digest)
                    self._stamps[route.name] = ""  # so the next look tries what the tag points at
                    return found
            except (Misconfigured, Unavailable):
                log.warning("map.served_is_gone", map=route.name, map_digest=served.map_digest)
        found = await self.sources.fetch(route)
        rejection = await self._rejection(found)
        if rejection is not None:
            raise Misconfigured(self._refusal(found, rejection.reason_code))
        self._stamps[route.name] = stamp
        return found

    async def _follow(self, route: Route, runner: MapRunner) -> None:
        """Bring in the source of one MAP, if it changed since it was followed last."""
        name = route.name
        before = self._looked_at.get(name)
        if before is None or not _same_program(before, route):
            self._looked_at[name] = route
            self._stamps.pop(name, None)
        stamp = await self.sources.stamp(route)
        if stamp == self._stamps.get(name):
            return
        found = await self.sources.fetch(route)
        installed = self.maps.get(name)
        if not installed or found.digest != installed.map.digest or not _same_program(installed.route, route):
            if await self._rejection(found) is not None:
                log.warning("map.rejected_before", map=name, map_digest=found.digest)
            else:
                await self._take_over(found, route, runner, installed.map.digest if installed else None)
        # Not before: what could not be tried to its end is tried again.
        self._stamps[name] = stamp

    async def _take_over(self, found: Map, route: Route, runner: MapRunner, previous: str | None) -> str | None:
        """Try a version, and let it serve, or reject it and return why; `previous` is the digest that served before.

        Raises `Unavailable` where the trial says nothing about the version.
        """
        try:
            await self._reserve(runner, found)
            reason_code = await self._tried(found, route, runner)
        except (Misconfigured, Unavailable, OSError):
            await runner.forget_tried(route.name)
            await self._reserve(runner)
            raise
        if reason_code is not None:
            await runner.forget_tried(route.name)
            await self._reserve(runner)
            await self._reject(found, route, reason_code, previous)
            return reason_code
        await runner.install(found, serving_of(route))
        self.maps[route.name] = InstalledMap(found, route)
        await self._tell_updated(found, route, previous)
        return None

    async def _reserve(self, runner: MapRunner, found: Map | None = None) -> None:
        """Have as much of the GPUs as what serves asks for, with `found` instead of the version that serves.

        Raises:
            Unavailable: there is no room for it now.
            Misconfigured: there never is.
        """
        wanted = {name: one.map for name, one in self.maps.items()} | ({found.name: found} if found else {})
        if not await asyncio.to_thread(self.gpus.cover, [one.needs for one in wanted.values()]):
            raise Unavailable("the GPUs have no room for it beside what serves")
        runner.use(self.gpus.devices)

    async def _tried(self, found: Map, route: Route, runner: MapRunner) -> str | None:
        """Try a version; return why it is not good, or None. Raises `Unavailable` where that cannot be said."""
        async with temporary_folder("golden-") as folder:
            study = Study.make(folder)
            if route.golden is not None:
                place = Place(self._golden(route.golden), self.objects.client)
                await place.copy_to(study.input)
                if not await asyncio.to_thread(_only_dicom, study.input):
                    raise _undecided(found, "no_golden_study")
            log.info("map.trying", map=route.name, map_digest=found.digest, golden=route.golden is not None)
            try:
                run = await runner.try_out(found, study if route.golden is not None else None, serving_of(route))
            except ChildFailed as failed:
                if failed.reason_code == "crashed" and failed.error_type == "SIGKILL":
                    raise _undecided(found, "crashed") from None
                log.warning("map.not_started", map=route.name, reason=str(failed))
                return "not_started"
            if run is None:
                return None
            if _is_of_the_machine(run):
                raise _undecided(found, run.outcome)
            if run.outcome != "ran":
                log.warning("map.trial_failed", map=route.name, error_type=run.error_type, where=run.where)
                return run.outcome
            sources = sorted(study.input.iterdir())
            try:
                await asyncio.to_thread(outputs.check, study.output, sources, route.outputs)
            except OutputRefused as refused:
                log.warning("map.trial_refused", map=route.name, reason=refused.reason_code, where=refused.where)
                return refused.reason_code
            except InvalidDicomError:
                raise _undecided(found, "golden_study_unreadable") from None
        return None

    def _refusal(self, found: Map, reason_code: str) -> str:
        return (
            f"{self.table.file}: {found.name}: this version was rejected ({reason_code}); mend it, or remove "
            f"{_rejection_key(found)} from the bucket."
        )

    def _golden(self, golden: str) -> str:
        return golden if golden.startswith("s3://") else str(self.sources.folder / golden)

    async def _rejection(self, found: Map) -> Rejection | None:
        return await stored(self.objects, _rejection_key(found), Rejection)

    async def _served(self, name: str) -> Served | None:
        return await stored(self.objects, _serving_key(name), Served)

    def _serves_now(self, found: Map, route: Route) -> Served:
        return Served(map_digest=found.digest, source=_source_of(found, route), since=self.clock())

    async def _reject(self, found: Map, route: Route, reason_code: str, previous: str | None) -> None:
        made = Rejection(reason_code=reason_code, time=self.clock())
        rejection = await store_once(self.objects, _rejection_key(found), made)
        log.error("map.rejected", map=route.name, map_digest=found.digest, reason=reason_code)
        told = RejectedMap(
            map=route.name,
            map_digest=found.digest,
            source=_source_of(found, route),
            reason_code=rejection.reason_code,
            serving_digest=previous,
            since=rejection.time,
        )
        await self.publish(MapRejected.of(route.name, told, time=rejection.time))

    async def _tell_updated(self, found: Map, route: Route, previous: str | None) -> None:
        log.info("map.updated", map=route.name, map_digest=found.digest, previous_digest=previous)
        made = self._serves_now(found, route)
        served = await store_once(self.objects, _serving_key(route.name), made)
        if served.map_digest != made.map_digest:
            served = made
            await self.objects.put(_serving_key(route.name), made.model_dump_json(indent=1).encode())
        # The time of the record makes all workers tell the same event, and another one when a version comes back.
        told = UpdatedMap(
            map=route.name,
            map_digest=found.digest,
            source=made.source,
            previous_digest=previous,
            since=served.since,
        )
        await self.publish(MapUpdated.of(route.name, told, time=served.since or self.clock()))


def serving_of(route: Route) -> Serving:
    """Return how a MAP is to be run, as `maps.yaml` says it."""
    return Serving(isolation=route.isolation, deadline_s=route.deadline_s)


def _same_program(one: Route, other: Route) -> bool:
    return one.model_dump(include=OF_ITS_PLACE) == other.model_dump(include=OF_ITS_PLACE)


def _is_of_the_machine(run: Run) -> bool:
    """Tell whether a trial's end says more about the machine, or what else runs on it, than about the version."""
    return (
        run.outcome in {"gpu_lost", "gpu_out_of_memory"}
        or (run.outcome == "out_of_memory" and run.where == "kernel")
        or (run.outcome == "crashed" and run.error_type == "SIGKILL")
    )


def _undecided(found: Map, reason: str) -> Unavailable:
    """Tell that a version must be tried again, and why."""
    log.error("map.trial_undecided", map=found.name, map_digest=found.digest, reason=reason)
    return Unavailable(f"the trial tells nothing of the version ({reason})")


def _only_dicom(folder: Path) -> bool:
    """Remove what is no DICOM, as routing would not give it to a MAP either; tell whether anything is left."""
    for path in folder.iterdir():
        if not outputs.claims_dicom(path):
            path.unlink()
    return any(folder.iterdir())


def _is_another_image(served: str, source: str, stamp: str) -> bool:
    """Tell whether what served is a registry's image of the same repository, other than the one there now."""
    pinned, _, digest = served.partition("@")
    return ecr_of(source) is not None and bool(digest) and pinned == repository_of(source) and digest != stamp


def _serving_key(name: str) -> str:
    return f"maps/{name}/serving.json"


def _rejection_key(found: Map) -> str:
    return f"maps/{found.name}/rejected/{found.digest}.json"


def _source_of(found: Map, route: Route) -> str:
    return found.image.reference if found.image else route.source


def _listing_of(places: list[Path]) -> str:
    """Return the hash of what a MAP's files are called, how large they are, and when they were written."""
    digest = hashlib.sha256()
    for path in (path for place in places if place.exists() for path in files_of(place)):
        status = path.stat()
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


@contextmanager
def _aws_errors() -> Iterator[None]:
    try:
        yield
    except (BotoCoreError, ClientError, OSError) as error:
        code = error.response["Error"]["Code"] if isinstance(error, ClientError) else type(error).__name__
        raise Unavailable(f"ECR: {code}") from None
