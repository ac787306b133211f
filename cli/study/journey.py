"""Follows uploads to their results by what is in the bucket: the only state there is.

Theory of operation. An instance is stored under a key made of its UIDs and its hash, which are known before the upload.
A series has settled when a revision lists all that was uploaded of it; the newest such revision is followed, as older
ones are superseded. Inference writes `routing.json` beside its results: which MAPs run on that revision, none where no
route matches. A MAP has ended when its `result.json` or its `failure.json` is there. What ingest refused is found in
quarantine by its hash, if it was refused after this upload: an earlier refusal may have been of other limits. So
following needs no message, can begin at any time, and ends at once where all is there.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cli.client import Client
from cli.study.uploads import Instance, Upload, instances
from services.inference.reasons import explained
from shared import keys
from shared.documents.document import Document
from shared.documents.inference import Failure, Result, StudyRouting
from shared.documents.revisions import Revision
from shared.keys import ResultKeys
from shared.messages import InferenceOutput, SeriesRef
from shared.objects import ObjectSummary
from shared.operations.refused import Refused

POLL_S = 1.0
HINT_AFTER_S = 30.0
"""In one stage, before it is said where a person who waits may look."""
LOOKS_PER_LISTING = 5
"""A series that has settled may get a newer revision, which is looked for at every so many looks."""
STAGES = ("uploaded", "stored", "settled", "inferred", "pushed")
WAITS_FOR = {
    "uploaded": " (if its dataset is de-identified as it is stored, it has other UIDs now, and cannot be followed)",
    "settled": " (the log of the inference worker says what it waits for)",
    "inferred": " (the archive has not taken its results; the log of the inference worker says why)",
}
"""By stage, where a person who waits may look."""
ENDS = {"pushed", "skipped", "no_match", "failed", "rejected"}
"""Stages that nothing follows. `skipped`: no route leads to a MAP; `no_match`: the MAPs found no series to work on."""


OF_FAILURE = ("reason_code", "error_type", "where", "why", "remedy", "log")
"""What is told of a MAP that failed."""


class FailedRun(Failure):
    """What a `failure.json` says, for people too."""

    outcome: Literal["failed"] = "failed"
    why: str
    remedy: str
    log_key: str | None
    """Where what the MAP printed is in the bucket; None if it was not run, or the log is gone."""
    log: str | None
    """The same as a URL."""


Outcome = Result | FailedRun
"""What came of a request."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """An object that is in quarantine."""

    path: Path
    """The uploaded file, or the zip that it is in."""
    object_sha256: str
    reason_code: str
    place: str
    """An element, a member's number: where in the object; may be empty."""


@dataclass(slots=True)
class Series:
    """One uploaded series on its way."""

    study_uid: str
    series_uid: str
    modality: str
    dataset: str
    expected: dict[str, Instance]
    """By SOPInstanceUID."""
    spare: dict[str, list[Instance]] = field(default_factory=lambda: defaultdict(list))
    """By SOPInstanceUID, the other data sets under it: ingest takes one, and which one is not known before."""
    stage: str = "uploaded"
    digest: str | None = None
    maps: dict[str, Outcome] = field(default_factory=dict)
    """What came of each MAP, by its name."""
    rejections: list[Rejection] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Since the following began, when each stage was first seen."""
    revisions: dict[str, Revision] = field(default_factory=dict)
    routes: list[str] | None = None
    """The MAPs that run on the revision `routed_digest`."""
    study_routes: list[str] = field(default_factory=list)
    """The MAPs that are given the whole study with that revision."""
    routed_digest: str | None = None
    looks: int = 0

    @property
    def ended(self) -> bool:
        """Whether nothing more is going to happen."""
        return self.stage in ENDS

    @property
    def n_instances(self) -> int:
        """How many were uploaded and not refused."""
        return len(self.expected)

    @property
    def revision(self) -> Revision | None:
        """The revision that is followed."""
        return self.revisions.get(keys.revision(self.study_uid, self.series_uid, self.digest or "").key)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Codes of what was noticed in it; services/ingest/reasons.py says what each means."""
        return self.revision.warnings if self.revision else ()

    @property
    def verdict(self) -> str | None:
        """How its slices lie, in one word; None before it has settled, and for a series without images."""
        return self.revision.geometry.verdict if self.revision and self.revision.geometry else None

    @property
    def outputs(self) -> list[InferenceOutput]:
        """The instances that the MAPs made."""
        return [output for ended in self.maps.values() for output in outputs_of(ended)]

    def summary(self) -> dict[str, Any]:
        """Return what `--json` prints of it."""
        return {
            "study_uid": self.study_uid,
            "series_uid": self.series_uid,
            "modality": self.modality,
            "n_instances": self.n_instances,
            "stage": self.stage,
            "digest": self.digest,
            "geometry": self.verdict,
            "warnings": self.warnings,
            "results": [
                {
                    "map": called,
                    "outcome": ended.outcome,
                    **{name: getattr(ended, name, None) for name in (*OF_FAILURE, "duration_s")},
                    "outputs": [output.model_dump(mode="json") for output in outputs_of(ended)],
                }
                for called, ended in self.maps.items()
            ],
            "seconds": {stage: round(seconds, 2) for stage, seconds in self.seconds.items()},
        }


class Journey:
    """A set of uploads being followed."""

    def __init__(self, client: Client, uploads: Iterable[Upload]) -> None:
        """Read what is in the uploads; the clock of `Series.seconds` starts here."""
        self._client = client
        self._started = time.monotonic()
        self.series: list[Series] = []
        self.rejections: list[Rejection] = []
        """Of objects that belong to no series."""
        self.waiting_for: set[str] = set()
        """Hashes of objects that are no DICOM: only a rejection can come of them."""
        self._beside: dict[str, str] = {}
        """Upload, by hash, of what may be refused and need not be: what lies in archives beside instances."""
        self._decisions: dict[str, StudyRouting] = {}
        """What was decided for whole studies, by key."""
        self._uploads = {upload.sha256: upload for upload in uploads}
        by_uid: dict[tuple[str, str], Series] = {}
        for upload in self._uploads.values():
            found, others = instances(upload)
            if not found:
                self.waiting_for.add(upload.sha256)
            else:
                self._beside |= dict.fromkeys(others, upload.sha256)
            for instance in found:
                uids = instance.study_uid, instance.series_uid
                if uids not in by_uid:
                    by_uid[uids] = Series(*uids, instance.modality, keys.dataset_of(upload.key), {})
                    self.series.append(by_uid[uids])
                other = by_uid[uids].expected.setdefault(instance.sop_instance_uid, instance)
                if other != instance:
                    by_uid[uids].spare[instance.sop_instance_uid].append(instance)
                    self._beside[instance.object_sha256] = instance.upload_sha256
        for sha256 in self._uploads.keys() & self._beside:  # what is uploaded for itself was refused for itself
            self._beside[sha256] = sha256

    @property
    def ended(self) -> bool:
        """Whether everything came to an end, good or bad."""
        return not self.waiting_for and all(series.ended for series in self.series)

    @property
    def all_rejections(self) -> list[Rejection]:
        """Everything that was refused."""
        of_series = (rejection for series in self.series for rejection in series.rejections)
        return list(dict.fromkeys([*self.rejections, *of_series]))

    def look(self) -> None:
        """Bring everything up to date."""
        for sha256 in sorted(self.waiting_for):
            if (rejection := self._rejection(sha256, sha256)) is not None:
                self.rejections.append(rejection)
                self.waiting_for.discard(sha256)
        for series in self.series:
            if not series.ended:
                self._look_at(series)
                self._reached(series)
        if self.ended:  # ingest refuses what is in an archive before it announces its series
            found = (self._rejection(*one) for one in self._beside.items())
            self.rejections += [rejection for rejection in found if rejection is not None]
            self._beside.clear()

    def wait(self, timeout_s: float, seen: Callable[["Journey"], None] = lambda _: None) -> None:
        """Look until everything came to an end; `seen` is called after each look. Raises `Refused` when time is up."""
        until = time.monotonic() + timeout_s
        while True:
            self.look()
            seen(self)
            if self.ended:
                return
            if time.monotonic() > until:
                raise Refused(
                    f"not finished after {timeout_s:.0f} s; the work goes on, and the same command waits again: "
                    f"{self.unfinished()}"
                )
            time.sleep(POLL_S)

    def unfinished(self) -> str:
        """Say what has not come to an end, for people."""
        parts = [
            f"series {series.series_uid} is {series.stage}{WAITS_FOR.get(series.stage, '')}"
            for series in self.series
            if not series.ended
        ]
        parts += [f"{self._uploads[one].path} was neither taken nor refused" for one in sorted(self.waiting_for)]
        return "; ".join(parts[:5]) + (f"; and {len(parts) - 5} more" if len(parts) > 5 else "")  # noqa: PLR2004

    def hints(self) -> list[str]:
        """Say of series that have waited for long where to look."""
        waited_s = time.monotonic() - self._started - HINT_AFTER_S
        return [
            f"series {series.series_uid} is still {series.stage}{WAITS_FOR[series.stage]}"
            for series in self.series
            if series.stage in WAITS_FOR and waited_s > series.seconds.get(series.stage, waited_s)
        ]

    def summary(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "series": [series.summary() for series in self.series],
            "rejections": [asdict(rejection) | {"path": str(rejection.path)} for rejection in self.all_rejections],
        }

    def _reached(self, series: Series) -> None:
        elapsed = time.monotonic() - self._started
        passed = STAGES[: STAGES.index(series.stage) + 1] if series.stage in STAGES else (series.stage,)
        for stage in passed:
            series.seconds.setdefault(stage, elapsed)

    def _look_at(self, series: Series) -> None:
        series.looks += 1
        if series.digest is None or series.looks % LOOKS_PER_LISTING == 0:
            self._find_revision(series)
        if series.digest is not None:
            self._find_results(series, series.digest)

    def _find_revision(self, series: Series) -> None:
        found = self._client.stored(keys.series_prefix(series.study_uid, series.series_uid))
        self._find_missing(series, found)
        if not series.expected:
            series.stage = "rejected"
            return
        revision = self._newest_revision(series, found)
        if revision is not None and revision.digest != series.digest:
            series.stage, series.digest, series.maps = "settled", revision.digest, {}

    def _find_missing(self, series: Series, found: Sequence[ObjectSummary]) -> None:
        """Look for each instance that is not stored among the refused ones."""
        listed = map(keys.stored_instance, _keys(found))
        stored = {(item.sop_instance_uid, item.sha) for item in listed if item is not None}
        stored_uids = {sop_instance_uid for sop_instance_uid, _ in stored}
        missing = [
            instance
            for uid, instance in series.expected.items()
            if (uid not in stored_uids if instance.sha is None else (uid, instance.sha) not in stored)
        ]
        for instance in missing:
            rejection = self._rejection(instance.object_sha256, instance.upload_sha256)
            if rejection is None and instance.member is not None:
                rejection = self._rejection(instance.upload_sha256, instance.upload_sha256)
                if rejection is not None and not _is_about(rejection, instance.member):
                    rejection = None
            if rejection is None:
                return  # the others are probably on their way too, and are looked for next time
            series.rejections.append(rejection)
            uid = instance.sop_instance_uid
            if series.spare[uid]:
                series.expected[uid] = series.spare[uid].pop()
            else:
                del series.expected[uid]
        if series.expected and series.digest is None:
            series.stage = "stored"

    def _newest_revision(self, series: Series, found: Sequence[ObjectSummary]) -> Revision | None:
        """Return the newest revision that holds everything uploaded."""
        expected = {(uid, instance.sha) for uid, instance in series.expected.items()}
        for stored in sorted(found, key=lambda item: item.last_modified, reverse=True):
            document = keys.stored_revision(stored.key)
            if document is None:
                continue
            revision = series.revisions.get(stored.key) or self._client.read(document)
            if revision is None:
                continue
            series.revisions[stored.key] = revision
            held = {(item.sop_instance_uid, item.sha) for item in revision.instances}
            uids = {uid for uid, _ in held}
            if all((uid, sha) in held if sha else uid in uids for uid, sha in expected):
                return revision
        return None

    def _find_results(self, series: Series, digest: str) -> None:
        revision = keys.revision(series.study_uid, series.series_uid, digest)
        ref = SeriesRef(
            study_uid=series.study_uid, series_uid=series.series_uid, digest=digest, revision_key=revision.key
        )
        prefix, document = keys.revision_results_prefix(ref), keys.routing(ref)
        found = _keys(self._client.stored(prefix))
        if document.key not in found:
            return
        if series.routes is None or series.routed_digest != digest:
            routing = self._client.read(document)
            if routing is None:
                return
            series.routes, series.routed_digest = [route.map for route in routing.maps], digest
            series.study_routes = list(routing.study_maps)
        starts = {name: keys.map_results_prefix(prefix, name) for name in series.routes}
        if series.study_routes:
            given = self._study_results(series)
            if given is None:
                return  # the study has not settled yet
            starts |= given
            found += [key for start in given.values() for key in _keys(self._client.stored(start))]
        for name, start in starts.items():
            place = _ended(found, start) if name not in series.maps else None
            # A failure may be gone again: its MAP runs once more.
            if place is not None and (record := self._client.read(place.result) or self._client.read(place.failure)):
                series.maps[name] = outcome(self._client, place, record)
        series.stage = _stage_of(series, starts, found)

    def _study_results(self, series: Series) -> dict[str, str] | None:
        """Return where each MAP's results of the whole study are, by the newest decision that has this revision.

        None: nothing was decided yet. A MAP that another worker's table had, and the deciding one's has not, is left
        out.
        """
        listed = map(keys.stored_study_routing, _keys(self._client.stored(keys.study_results_prefix(series.study_uid))))
        decided = [routing for document in listed if document and (routing := self._decision(document))]
        uids = series.series_uid, series.digest
        fitting = [one for one in decided if uids in [(ref.series_uid, ref.digest) for ref in one.series]]
        if not fitting:
            return None
        newest = max(fitting, key=lambda one: one.time)
        tasks = [task for task in newest.tasks if task.map in series.study_routes]
        return {task.map: ResultKeys.of(task).of_any_version for task in tasks}

    def _decision(self, document: Document[StudyRouting]) -> StudyRouting | None:
        """Read what was decided for a study, once: it never changes."""
        routing = self._decisions.get(document.key) or self._client.read(document)
        if routing is not None:
            self._decisions[document.key] = routing
        return routing

    def _rejection(self, sha256: str, upload_sha256: str) -> Rejection | None:
        upload = self._uploads[upload_sha256]
        document = keys.Quarantined(sha256).reason
        reason = self._client.read(document)
        if reason is None or self._is_older(document.key, upload.key):
            return None
        return Rejection(upload.path, sha256, reason.reason_code, reason.place)

    def _is_older(self, key: str, than: str) -> bool:
        """Compare when two objects were written, by S3's own clock; False if one is gone."""
        written, other = self._client.modified(key), self._client.modified(than)
        return written is not None and other is not None and written < other


def outcome(client: Client, place: ResultKeys, record: Result | Failure) -> Outcome:
    """Return the `record` of a result as it is; that of a failure with what people want to know."""
    if isinstance(record, Result):
        return record
    # What was pushed, and refused, another attempt may have made.
    made = client.read(place.outputs)
    logs = [place.log(one.attempt) for one in (record, made) if one is not None]
    log = next((log for log in logs if client.exists(log)), None)
    why, remedy = explained(record.reason_code)
    url = client.url(log) if log is not None else None
    return FailedRun(**record.model_dump(), why=why, remedy=remedy, log_key=log, log=url)


def outputs_of(ended: Outcome) -> tuple[InferenceOutput, ...]:
    """Return the instances that came of a request."""
    return ended.outputs if isinstance(ended, Result) else ()


def _is_about(rejection: Rejection, member: int) -> bool:
    """Tell whether an archive's refusal is about a member: the others are taken; of very many only some are named."""
    withheld = rejection.place.startswith("#")
    return not withheld or f"#{member}:" in rejection.place or rejection.place.endswith("…")


def _places(found: Iterable[str], start: str) -> list[ResultKeys]:
    """Return a MAP's results; their versions are left open, as a worker with a newer MAP answers under its own."""
    listed = (keys.stored_result(key) for key in found if key.startswith(start))
    return list(dict.fromkeys(one[1] for one in listed if one is not None))


def _ended(found: Sequence[str], start: str) -> ResultKeys | None:
    places = _places(found, start)
    with_result = (place for place in places if place.result.key in found)
    with_failure = (place for place in places if place.failure.key in found)
    return next(with_result, None) or next(with_failure, None)


def _stage_of(series: Series, starts: dict[str, str], found: Sequence[str]) -> str:
    if not starts:
        return "skipped"
    if starts.keys() <= series.maps.keys():
        return _end_of(series.maps.values())
    inferred = all(any(place.outputs.key in found for place in _places(found, start)) for start in starts.values())
    return "inferred" if inferred else series.stage


def _end_of(outcomes: Iterable[Outcome]) -> str:
    ends = {ended.outcome for ended in outcomes}
    if "failed" in ends:
        return "failed"
    return "pushed" if "completed" in ends else "no_match"


def _keys(found: Iterable[ObjectSummary]) -> list[str]:
    return [stored.key for stored in found]
