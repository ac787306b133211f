"""What a target of results is, and which one takes those of a MAP: a data store, a PACS, or S3 alone.

A target that took instances has not necessarily kept them where they can be found: HealthImaging puts what conflicts
with the study into a non-primary image set, which DICOMweb does not show, and an import job says COMPLETED whatever
became of its files. So each instance that is pushed is looked for afterwards: it is shown, or the push failed.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from services.inference.routing import Route, TargetName
from shared.config import Misconfigured
from shared.errors import Unavailable
from shared.log import get_logger

LOOKS = 5
LOOK_PAUSE_S = 0.2
"""Seconds before the second look: a stored instance may take a moment to be found. The pause doubles with each look."""
LONGEST_PAUSE_S = 30.0
NEEDED: dict[TargetName, str] = {
    "healthimaging": "RADQUEUE_DATASTORE_ID",
    "healthimaging-import": "RADQUEUE_DATASTORE_ID and RADQUEUE_IMPORT_ROLE_ARN",
    "dicomweb": "RADQUEUE_DICOMWEB_URL",
}
"""The settings without which a target cannot be had."""

log = get_logger()


class PushRejected(ValueError):  # noqa: N818 - it states a fact about the instances
    """The target does not take the instances as they should be, and will not when asked again.

    `reason_code` is `push_rejected`, or `not_primary`: it took them, but DICOMweb does not show them. `where` names the
    attributes that conflict, by keyword, or the failure reasons of PS3.18 table I.2-2; never a value.
    """

    def __init__(self, reason_code: str = "push_rejected", where: Iterable[str] = ()) -> None:
        """State the reason and the attributes."""
        super().__init__(reason_code)
        self.reason_code = reason_code
        self.where = ",".join(sorted(set(where)))


@dataclass(frozen=True, slots=True)
class Instance:
    """One instance to push."""

    path: Path
    study_uid: str
    series_uid: str
    sop_instance_uid: str


class Target(Protocol):
    """Takes instances in. Every method raises `Unavailable` if the target does not answer, or does not know us."""

    name: TargetName

    async def shown(self, study_uid: str, series_uid: str) -> set[str] | None:
        """Return the SOPInstanceUIDs of a series that the target shows; None if nothing is to be pushed."""

    async def push(self, instances: Sequence[Instance]) -> dict[str, str | None]:
        """Store the instances, see that each is shown, and return the image set of each series.

        Storing them again changes nothing.

        Raises:
            PushRejected: the target refuses them, or does not show them.
        """


@dataclass(frozen=True, slots=True)
class Targets:
    """The targets that a worker can push to."""

    by_name: Mapping[TargetName, Target]
    default: TargetName
    originals: bool = False
    """True if the series that a MAP read is pushed before its results; the MAP's own route goes before this."""

    def require(self, routes: Iterable[Route], file: str) -> None:
        """See that each route's target is there; `file` is what messages call the table.

        Raises:
            Misconfigured: a target is not there.
        """
        for route in routes:
            if route.push is not None and route.push not in self.by_name:
                raise Misconfigured(f"{file}: {route.name}: push: {route.push} needs {NEEDED[route.push]}.")

    def of(self, route: Route | None) -> tuple[Target, bool]:
        """Return the target of a MAP's results, and whether its inputs go there as well."""
        name = route.push if route and route.push else self.default
        originals = self.originals if route is None or route.originals is None else route.originals
        return self.by_name[name], originals


def pauses(n: int = LOOKS) -> list[float]:
    """Return the seconds to wait before each of `n` looks: none before the first, then twice as many each time."""
    return [0.0, *(min(LONGEST_PAUSE_S, LOOK_PAUSE_S * 2**look) for look in range(n - 1))]


def not_shown(series_uid: str) -> Unavailable:
    """Log that a series which was pushed is not found, and return what gives its message back."""
    log.warning("push.not_shown", series=series_uid)
    return Unavailable("the target does not show a series that was pushed")


def by_series(instances: Iterable[Instance]) -> dict[tuple[str, str], set[str]]:
    """Return the SOPInstanceUIDs of the instances by study and series."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for one in instances:
        found[one.study_uid, one.series_uid].add(one.sop_instance_uid)
    return found
