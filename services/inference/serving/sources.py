"""Where MAPs come from: folders, images of this machine, repositories of ECR.

IAM: ecr:DescribeImages and ecr:GetAuthorizationToken; ecr:BatchGetImage and ecr:GetDownloadUrlForLayer to pull.
"""

import asyncio
import hashlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from services.inference.package.engine import Engine, ecr_authorization, ecr_of, repository_of
from services.inference.package.maps import Map, files_of, is_image, load
from services.inference.routing import Route
from shared.aws_errors import answering

EcrClient = Callable[[str], AbstractAsyncContextManager[Any]]
"""Opens a client of ECR in a region."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where MAPs come from. Every method raises `Misconfigured` and `Unavailable`."""

    folder: Path
    """The folder that paths in the table are relative to."""
    ecr: EcrClient
    engine: Callable[[], Engine] = Engine.find
    file: str = "maps.yaml"
    """The name by which messages call the routing table."""

    async def stamp(self, route: Route) -> str:
        """Return a text that changes with the source: the image's digest, or what a folder's listing says."""
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
            with answering("ECR"):
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
        with answering("ECR"):
            async with self.ecr(region) as client:
                answer = await client.describe_images(
                    registryId=account, repositoryName=repository, imageIds=[{"imageTag": tag or "latest"}]
                )
        return str(answer["imageDetails"][0]["imageDigest"])


def is_another_image(served: str, source: str, stamp: str) -> bool:
    """Tell whether what served is a registry's image of the same repository, other than the one there now."""
    pinned, _, digest = served.partition("@")
    return ecr_of(source) is not None and bool(digest) and pinned == repository_of(source) and digest != stamp


def _listing_of(places: list[Path]) -> str:
    """Return the hash of what a MAP's files are called, how large they are, and when they were written."""
    digest = hashlib.sha256()
    for path in (path for place in places if place.exists() for path in files_of(place)):
        status = path.stat()
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
