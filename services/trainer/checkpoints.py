"""The checkpoints of a round in the making, so that another worker goes on in the middle of it.

Theory of operation. The training process saves a checkpoint now and then, and reports its path. The file is uploaded
under a name of its own; then a pointer, a small record that is changed by compare-and-swap alone, is moved to it, and
the checkpoint before it is deleted. So the pointer always names a checkpoint that exists, and a worker that is killed
loses only the work since that one. A checkpoint whose hash is wrong is not used, and the round begins anew.

The pointer carries the epoch of the lease under which it was moved. A worker that takes over writes its own epoch into
the pointer first. From then on a former owner, which may not know yet that it lost the lease, can neither move the
pointer nor delete a checkpoint that is still named.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from services.trainer.protocol import News, Saved
from shared.documents.document import Document, body_of
from shared.documents.training import StoredPartial
from shared.errors import Leased, Unavailable
from shared.keys import RoundKeys
from shared.log import get_logger
from shared.objects import ObjectMissing, ObjectStore
from shared.workfolder import sha256_of_file

log = get_logger()


@dataclass(slots=True)
class Checkpoints:
    """The checkpoints of one try at a round, while this worker has the lease."""

    objects: ObjectStore
    keys: RoundKeys
    number: int
    """The number of the try, from 0."""
    epoch: int
    """The epoch of this worker's lease."""
    pointer: StoredPartial | None = None
    """The newest stored checkpoint; None if there is none."""
    _etag: str = ""
    _newest: tuple[Path, int] | None = None
    """Path and step of the newest checkpoint that is saved and not stored yet."""
    _woken: asyncio.Event = field(default_factory=asyncio.Event)
    _ended: bool = False

    async def take(self) -> None:
        """Take the checkpoints over from the former owner. Raises `Leased` if a later worker has them already."""
        while (seen := await self._see()) is not None and seen.epoch < self.epoch:
            ours = seen.model_copy(update={"epoch": self.epoch})
            await self.objects.put_if_match(self._document.key, body_of(ours), self._etag)
        self.pointer = seen

    def reached(self) -> int:
        """Return the step of the last stored checkpoint; 0 if there is none."""
        return self.pointer.step if self.pointer is not None else 0

    async def download(self, path: Path) -> bool:
        """Fetch the last stored checkpoint; returns whether there is one and its hash is right."""
        if self.pointer is None:
            return False
        await self.objects.download(self.pointer.key, path)
        if await asyncio.to_thread(sha256_of_file, path) != self.pointer.sha256:
            log.warning("training.checkpoint_damaged", step=self.pointer.step)
            return False
        return True

    def told(self, news: News) -> None:
        """Take note of a checkpoint that the training process has saved."""
        if not isinstance(news, Saved):
            return
        if self._newest is not None:  # it comes faster than S3 takes it
            self._newest[0].unlink()
        self._newest = Path(news.checkpoint), news.step
        self._woken.set()

    @asynccontextmanager
    async def stored(self) -> AsyncIterator[None]:
        """Store checkpoints while the block runs; the last one is stored when the block ends, however it ends."""
        self._ended = False
        storing = asyncio.create_task(self._store())
        try:
            yield
        finally:
            self._ended = True
            self._woken.set()
            await storing

    async def delete(self) -> None:
        """Delete the checkpoints of all tries of the round, also those that a former owner left behind."""
        async for item in self.objects.list(self.keys.partials_prefix):
            await self.objects.delete(item.key)

    @property
    def _document(self) -> Document[StoredPartial]:
        return self.keys.partial(self.number)

    async def _store(self) -> None:
        while self._newest is not None or not self._ended:
            await self._woken.wait()
            self._woken.clear()
            if self._newest is not None:
                saved, self._newest = self._newest, None
                await self._store_one(*saved)

    async def _store_one(self, path: Path, step: int) -> None:
        key = self.keys.partial_checkpoint(self.number, self.epoch, step)
        sha256 = await asyncio.to_thread(sha256_of_file, path)
        pointer = StoredPartial(epoch=self.epoch, step=step, key=key, sha256=sha256)
        try:
            await self.objects.upload(path, pointer.key)
            await self._point_to(pointer)
        except Unavailable as error:  # also when the lease is lost: its keeper ends the work
            log.warning("training.checkpoint_not_stored", step=step, error=str(error))
        finally:
            await asyncio.to_thread(path.unlink)

    async def _point_to(self, pointer: StoredPartial) -> None:
        """Move the pointer, and delete the checkpoint that it named before."""
        left = self.pointer
        while await self._see() != pointer:
            if self._etag:
                await self.objects.put_if_match(self._document.key, body_of(pointer), self._etag)
            else:
                await self.objects.put_if_absent(self._document.key, body_of(pointer))
        self.pointer = pointer
        if left is not None and left.key != pointer.key:
            await self.objects.delete(left.key)

    async def _see(self) -> StoredPartial | None:
        """Read the pointer. Raises `Leased` if another worker took over."""
        try:
            body, self._etag = await self.objects.get_with_etag(self._document.key)
        except ObjectMissing:
            self._etag = ""
            return None
        seen = self._document.parse(body)
        if seen.epoch > self.epoch:
            raise Leased("another worker goes on with the round")
        return seen
