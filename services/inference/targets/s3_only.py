"""S3 alone: results stay where they are stored."""

from collections.abc import Sequence

from services.inference.routing import TargetName
from services.inference.targets.target import Instance


class S3Only:
    """The target that pushes nothing: results stay where they are stored."""

    name: TargetName = "s3"

    async def shown(self, study_uid: str, series_uid: str) -> set[str] | None:
        """Return None: nothing is to be pushed."""
        del study_uid, series_uid
        return None

    async def push(self, instances: Sequence[Instance]) -> dict[str, str | None]:
        """Push nothing."""
        return {one.series_uid: None for one in instances}
