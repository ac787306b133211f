"""Runs MAPs: one warm child process or container per MAP, one of them computing at a time."""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import replace

from services.inference.package.maps import Map
from services.inference.serving.host import Bounds, GpuLost, Host, MapChanged, Outcome, Run, Serving, WorkerUnfit
from services.inference.serving.study import LOG_TAIL_BYTES, Study
from shared.child import BROKEN_PROTOCOL, ChildFailed
from shared.errors import Unavailable
from shared.log import get_logger

__all__ = [
    "LOG_TAIL_BYTES",
    "Bounds",
    "GpuLost",
    "MapChanged",
    "MapRunner",
    "Outcome",
    "Run",
    "Serving",
    "Study",
    "WorkerUnfit",
]

TRIED_AGAIN = {"crashed", "out_of_memory", "gpu_out_of_memory"}
"""Outcomes that the earlier studies of a process may have caused."""


log = get_logger()


class MapRunner:
    """The processes of all MAPs of a worker."""

    def __init__(
        self, maps: Iterable[Map] = (), *, serving: Mapping[str, Serving] | None = None, bounds: Bounds | None = None
    ) -> None:
        """Remember how to run; a process starts at its first use."""
        self._bounds = bounds or Bounds()
        self._hosts = {one.name: Host(one, (serving or {}).get(one.name, Serving()), self._bounds) for one in maps}
        self._tried: dict[str, Host] = {}
        """The processes of versions that were tried and do not serve yet, by the MAP's name."""
        self._permit = asyncio.Semaphore(1)
        self.unfit: WorkerUnfit | None = None
        """The reason why this worker must end; None if it need not."""

    def use(self, gpus: tuple[str, ...]) -> None:
        """Let the MAPs that come from now on use these devices; those that are there keep what they have."""
        self._bounds = replace(self._bounds, gpus=gpus)

    async def start(self, name: str) -> str:
        """Start the MAP's process if it does not run, and return the device that it will use.

        Raises:
            ChildFailed: the MAP cannot be imported.
            MapChanged: its folder holds another version, and this one was not started before.
            WorkerUnfit: its GPU is gone.
        """
        host = self._hosts[name]
        await self._start(host)
        return host.device

    async def run(self, name: str, study: Study, *, digest: str | None = None) -> Run:
        """Run the MAP on a study that lies in its folder; waits until no other MAP computes.

        Being cancelled kills the process. After any failure it is replaced, as after many studies and when its memory
        has grown. Where earlier studies of the process may be the cause of a failure, or something else answered in its
        place, a fresh one tries again.

        Raises:
            WorkerUnfit, MapChanged: as above.
            Unavailable: the MAP, which could be started once, cannot be started now, cannot be copied, or serves in
                another version than that of `digest` by now.
        """
        # Run, and again in a fresh process if the one that ran it may be to blame.
        async with self._permit:
            host = self._hosts.get(name)
            if host is None or digest not in {None, host.map.digest}:
                raise Unavailable("the MAP was replaced meanwhile")
            run = await self._run(host, study)
            if run.outcome in TRIED_AGAIN and (not run.was_first or run.error_type == BROKEN_PROTOCOL):
                log.warning("map.tried_again", map=name, outcome=run.outcome, error_type=run.error_type)
                await asyncio.to_thread(study.clear)
                run = await self._run(host, study)
        if run.outcome == "gpu_lost":
            self.unfit = GpuLost()
            raise self.unfit
        return run

    async def try_out(self, found: Map, study: Study | None, serving: Serving | None = None) -> Run | None:
        """Run another version of a MAP on a study, beside the one that serves; waits until no other MAP computes.

        Without a study it is started, and there is no run.

        Raises:
            ChildFailed: it cannot be imported.
        """
        await self.forget_tried(found.name)
        host = self._tried[found.name] = Host(found, serving or Serving(), self._bounds)
        async with self._permit:
            await host.start()
            if study is None:
                return None
            run = await host.run(study)
            if host.is_spent(run):
                await host.stop(kill=True)
        return run

    async def install(self, found: Map, serving: Serving | None = None) -> None:
        """Let this MAP serve under its name from the next study on; one that was tried is warm already."""
        tried = self._tried.pop(found.name, None)
        if tried is not None and tried.map.digest != found.digest:
            await tried.end(kill=True)
            tried = None
        async with self._permit:
            before = self._hosts.get(found.name)
            self._hosts[found.name] = tried or Host(found, serving or Serving(), self._bounds)
        if before is not None:
            await before.end()

    async def remove(self, name: str) -> None:
        """Let the MAP of this name serve no more; waits until none computes."""
        async with self._permit:
            host = self._hosts.pop(name, None)
        if host is not None:
            await host.end()

    async def forget_tried(self, name: str) -> None:
        """End the process of a version that was tried and is not wanted."""
        tried = self._tried.pop(name, None)
        if tried is not None:
            await tried.end(kill=True)

    async def stop(self) -> None:
        """End all processes."""
        await asyncio.gather(*(host.end() for host in [*self._hosts.values(), *self._tried.values()]))

    def pid(self, name: str) -> int | None:
        """Return the MAP's process id, if its process runs."""
        child = self._hosts[name].child
        return child.pid if child is not None else None

    async def _start(self, host: Host) -> None:
        try:
            await host.start()
        except WorkerUnfit as unfit:
            self.unfit = unfit
            await host.stop(kill=True)
            raise

    async def _run(self, host: Host, study: Study) -> Run:
        try:
            await self._start(host)
        except ChildFailed as failed:
            log.error("map.not_started", map=host.map.name, reason=str(failed))  # noqa: TRY400 - the child's, not ours
            raise Unavailable("the MAP does not start") from None
        log.info("map.running", map=host.map.name)
        run = replace(await host.run(study), was_first=host.studies == 1)
        if host.is_spent(run):
            await host.stop(kill=run.outcome != "ran")
        return run
