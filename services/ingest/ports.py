"""What the journey reaches the world through."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from services.ingest.datasets import Datasets
from services.ingest.decoder import Decoder
from services.ingest.settings import IngestSettings
from shared.concurrency import KeyedLocks
from shared.objects import ObjectStore
from shared.queue import Publish

LAG_WINDOW = timedelta(seconds=60)


class Lag:
    """How long uploads took lately, from S3's event to their place in `studies/`.

    While this grows, the next instance of a series may lie in the queue for longer than the quiet period, so a series
    counts as quiet only when its newest instance is older than both together.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self._seen: deque[tuple[datetime, float]] = deque()

    def note(self, now: datetime, uploaded: datetime) -> None:
        """Note an upload of that time that is stored now."""
        self._seen.append((now, (now - uploaded).total_seconds()))
        while self._seen[0][0] < now - LAG_WINDOW:
            self._seen.popleft()

    def recent_s(self, now: datetime) -> float:
        """Return the longest lag of the last minute, in seconds."""
        return max((lag_s for then, lag_s in self._seen if then >= now - LAG_WINDOW), default=0.0)


@dataclass(frozen=True, slots=True)
class Ports:
    """The collaborators of the handlers, made in the composition root."""

    objects: ObjectStore
    publish: Publish
    decoder: Decoder
    settings: IngestSettings
    clock: Callable[[], datetime]
    """Now, with a time zone."""
    datasets: Datasets = field(default_factory=Datasets)
    lag: Lag = field(default_factory=Lag)
    settling: KeyedLocks = field(default_factory=KeyedLocks)
    """Locks by series: two attempts in this process to complete one series wait for each other."""
    storing: KeyedLocks = field(default_factory=KeyedLocks)
    """Locks by SOPInstanceUID: if two data sets come under one UID at the same moment, the first one stays."""
    markers: KeyedLocks = field(default_factory=KeyedLocks)
    """Locks by marker: instances of one series that come at the same moment send one message."""
