"""Objects on their way between S3 and the folder of a study, several at the same time."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from shared.concurrency import all_of
from shared.errors import Unprocessable
from shared.objects import ObjectMissing, ObjectStore

TRANSFERS = 8
"""Objects of one study that are downloaded or uploaded at the same time."""


async def download_all(wanted: Iterable[tuple[str, Path]], *, objects: ObjectStore) -> None:
    """Download the object under each key to its path.

    Raises:
        Unprocessable: `instance_missing`: one is gone.
    """
    try:
        await all_of((partial(objects.download, key, path) for key, path in wanted), at_once=TRANSFERS)
    except ObjectMissing:
        raise Unprocessable("instance_missing") from None
