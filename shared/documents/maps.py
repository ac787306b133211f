"""What is stored of the versions of MAPs."""

from pydantic import AwareDatetime

from shared.documents.document import Stored


class Rejection(Stored):
    """`maps/<map>/rejected/<digest>.json`: a version that no worker is to try again."""

    reason_code: str
    time: AwareDatetime


class Served(Stored):
    """`maps/<map>/serving.json`: the version that took over last, or with which the first worker began."""

    map_digest: str
    source: str
    """The source of the version: a folder, or an image by its digest."""
    since: AwareDatetime | None = None
