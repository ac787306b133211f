"""Where a routing table or a golden study lies: on this machine or in S3, and read the same way."""

import asyncio
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from services.inference.transfers import TRANSFERS
from shared.concurrency import all_of
from shared.config import Misconfigured
from shared.objects import ObjectMissing, ObjectStore

if TYPE_CHECKING:
    from types_aiobotocore_s3 import S3Client


@dataclass(frozen=True, slots=True)
class Place:
    """A file or folder of this machine, or an object or prefix of S3, named as people do."""

    name: str
    s3: "S3Client"

    @property
    def folder(self) -> Path:
        """The folder that paths in the file are relative to: its own, or the working directory if it is in S3."""
        return Path() if self.name.startswith("s3://") else Path(self.name).parent

    @property
    def file(self) -> str:
        """The name by which messages call the file, without its folder."""
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
