"""The parent's side of the children that read files: what a child does not survive is a reason to refuse a file."""

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from services.ingest.datasets import Deidentification
from services.ingest.protocol import Caps, Instance, Member, Normalise, Unpack, ZipCaps
from services.ingest.settings import IngestSettings
from shared.child import Child, ChildFailed, Limits, Request
from shared.errors import Unavailable, Unprocessable

REASON_OF_FAILURE = {
    "deadline": "deadline",
    "cpu_limit": "deadline",
    "out_of_memory": "too_large",
    "crashed": "decoder_crashed",
    "raised": "unreadable",
}
"""Code of `ChildFailed` to code of `reasons.REASONS`."""
CALLS_OF_A_CHILD = 2000
"""A child is replaced after so many calls: memory that its libraries do not give back never adds up to its limit."""
Reply = TypeVar("Reply")


class Rejected(Exception):  # noqa: N818 - it states what became of a file
    """A file is refused, with a code of `reasons.REASONS`."""

    def __init__(self, reason_code: str, place: str = "") -> None:
        """State the reason, and the place: an element's keyword, a member's number."""
        super().__init__(reason_code)
        self.reason_code = reason_code
        self.place = place


class Decoder:
    """Children that take turns: some read files, as many read series, which takes longer and has limits of its own.

    A child starts at its first call, and one that died at its next turn.
    """

    def __init__(self, settings: IngestSettings) -> None:
        """Remember how many, and their limits."""
        self._settings = settings
        self._files = _Children(settings, settings.decode_cpu_s)
        self._series = _Children(settings, settings.series_cpu_s)

    async def stop(self) -> None:
        """End the children."""
        await asyncio.gather(self._files.stop(), self._series.stop())

    async def unpack(self, archive: Path, folder: Path) -> Sequence[Member] | None:
        """Unpack a zip or a tar into `folder`; None where `archive` is none. Raises `Rejected`."""
        settings = self._settings
        caps = ZipCaps(settings.max_zip_entries, settings.max_zip_bytes, settings.max_zip_ratio)
        return (await self._file_call(Unpack(str(archive), str(folder), caps))).members

    async def normalise(self, path: Path, out: Path, rules: Deidentification | None = None) -> Instance:
        """Read the DICOM file `path`, and write the normalised instance to `out`. Raises `Rejected`.

        With `rules` it is de-identified before it is written, and what is returned tells nothing else.
        """
        settings = self._settings
        caps = Caps(settings.max_inflated_bytes, settings.max_pixel_bytes, settings.max_frames)
        secret = settings.patient_secret.get_secret_value() if rules else ""
        return await self._file_call(Normalise(str(path), str(out), caps, rules, secret))

    async def series_call(self, request: Request[Reply]) -> Reply:
        """Describe, measure or assemble a series. Raises `ChildFailed`."""
        deadline_s = self._settings.series_deadline_s
        async with self._series.one() as child:
            try:
                return await child.call(request, deadline_s=deadline_s)
            except ChildFailed as failed:
                if not failed.broke_protocol:
                    raise
            return await child.call(request, deadline_s=deadline_s)

    async def _file_call(self, request: Request[Reply], *, again: bool = True) -> Reply:
        async with self._files.one() as child:
            try:
                return await child.call(request, deadline_s=self._settings.decode_deadline_s)
            except Unprocessable as error:
                raise Rejected(error.reason_code, error.detail) from None
            except ChildFailed as failed:
                # What the machine did to the child, a full disk for instance, says nothing about the file.
                if failed.error_type == "OSError":
                    raise Unavailable("this machine: OSError in a decoder") from None
                # Nor does memory that other files left behind.
                short_of_memory = failed.reason_code == "out_of_memory"
                crowded = short_of_memory and child.calls > 1
                if short_of_memory:
                    await child.stop(kill=True)
                if not again or not (crowded or failed.broke_protocol or failed.error_type == "SIGKILL"):
                    raise Rejected(REASON_OF_FAILURE[failed.reason_code], failed.where) from None
        return await self._file_call(request, again=False)


class _Children:
    def __init__(self, settings: IngestSettings, cpu_s: int) -> None:
        limits = Limits(memory_bytes=settings.decode_memory_bytes, cpu_s=cpu_s)
        # BLAS reserves address space per thread, and nothing here gains from its threads.
        env = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        argv = [sys.executable, "-m", "services.ingest.worker"]
        self.all = [Child(argv, limits=limits, env=env) for _ in range(settings.decoders)]
        # The last one that was used is the next: it may have read the headers of the series already.
        self._free: asyncio.Queue[Child] = asyncio.LifoQueue()
        for child in self.all:
            self._free.put_nowait(child)

    async def stop(self) -> None:
        await asyncio.gather(*(child.stop(kill=True) for child in self.all))

    @asynccontextmanager
    async def one(self) -> AsyncIterator[Child]:
        """Wait for a child that is free."""
        child = await self._free.get()
        try:
            if child.calls >= CALLS_OF_A_CHILD:
                await child.stop(kill=True)
            yield child
        finally:
            self._free.put_nowait(child)
