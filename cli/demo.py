"""The demo: both journeys on this machine, with made-up patients or the user's own images, and a look at the results.

It runs radqueue in a folder of its own, is a client like any other, and checks what it shows: each finding that is not
as it should be is a sentence in `failures`, and there must be none.
"""

import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pydicom.data import get_testdata_file

from cli import pictures, reports, show
from cli.client import Client
from cli.study import uploads
from cli.study.journey import Journey, Series
from cli.training import requests
from cli.training.following import Training
from deploy.local.stack import Stack, StackFailed
from services.ingest.reasons import REASONS
from shared.config import Misconfigured
from shared.operations.refused import Refused
from shared.phantom import write_cohort

DATASET, SAMPLES = "demo", "samples"
"""Samples are kept out of the dataset that is trained on."""
PATIENTS, SLICES = 12, 24
BUNDLED = ("CT_small.dcm", "MR_small.dcm")
"""Images in pydicom's wheel: single slices, which no route leads to a MAP."""
BROKEN = b"This is no image. "
BROKEN_REASON = "not_dicom"
OVERLAYS = 3
REAL_ARRAYS = 8
"""Series that real images are taken from, to look at beside the generated ones."""
LEGENDS = {"ct_tissues": "labels are HU classes: contrast in vessels above 200 HU counts as bone"}
"""What to know of a MAP's labels before looking at them."""

TRAINING: dict[str, Any] = {"threshold": 2.6, "max_rounds": 5, "n_images": 64}
"""A strict threshold, so that the training is seen to be judged, changed and continued."""

INGEST_TIMEOUT_S = 600.0
TRAINING_TIMEOUT_S = 900.0
REPORT_TIMEOUT_S = 60.0
REPORTS = 5
"""Times that the report is asked for, until all that happened has reached it."""
SEGMENTATIONS = {"1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"}
"""SOP classes of Segmentation and of Label Map Segmentation, PS3.4 section B.5."""
TOO_LITTLE = {"no_data", "too_little_data", "images_too_small"}
"""Answers of the trainer that are right where a user brings one study."""
ENDED_WELL = {"pushed", "skipped", "no_match"}


@dataclass(slots=True)
class Demo:
    """A run of the demo, and what it found."""

    stack: Stack
    own: Path | None
    """The user's images; None makes phantoms."""
    started: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall seconds of each stage."""
    failures: list[str] = field(default_factory=list)
    cohort: list[uploads.Upload] = field(default_factory=list)
    journey: Journey | None = None
    training: Training | None = None
    report: dict[str, Any] = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)
    pages: list[Path] = field(default_factory=list)
    done: bool = False

    @property
    def out(self) -> Path:
        """Where to look."""
        return self.stack.directory / "show"

    def run(self) -> None:
        """Do everything; what goes wrong becomes a failure. The stack is left running."""
        try:
            with ThreadPoolExecutor(1) as pool:
                making = pool.submit(self._make_images)
                with self._stage("start"):
                    self.stack.start()
                    self.stack.wait_ready()
                client = Client(self.stack.client_environ)
                self._upload(client, making)
            self._follow(client)
            self._train(client)
            self._report(client)
            self._check(client)
            self._draw(client)
        except (Refused, StackFailed, Misconfigured, OSError, pictures.Mismatch) as failed:
            self.failures.append(str(failed))
        self.done = True
        self.seconds["total"] = round(time.monotonic() - self.started, 2)

    @property
    def verdict(self) -> str:
        """Say in one sentence how it went."""
        if self.failures:
            return "Not everything ran as it should."
        if self.training is not None and self.training.completion is None:
            return f"The images ran as they should; they cannot be trained on: {self.training.why}"
        return "Both journeys ran as they should."

    def summary(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        journey = self.journey.summary() if self.journey else {"series": [], "rejections": []}
        return {
            "ok": not self.failures,
            "failures": self.failures,
            "directory": str(self.stack.directory),
            **journey,
            "skipped": [found["series_uid"] for found in journey["series"] if found["stage"] == "skipped"],
            "training": self.training.summary() if self.training else None,
            "report": {"month": self.report.get("month"), "paths": [str(path) for path in self.pages]},
            "pictures": [str(path) for path in self.pictures],
            "seconds": self.seconds,
        }

    # The stages.

    def _make_images(self) -> Path:
        """Make the cohort, one patient as a zip, and return its folder; runs while the services start."""
        folder = self.stack.directory / "images"
        if self.own is None:
            with self._stage("make_images"):
                *series, last = write_cohort(folder, patients=PATIENTS + 1, slices=SLICES)
                del series
                _zip(last, folder / "study.zip")
        return folder

    def _upload(self, client: Client, making: "Future[Path]") -> None:
        folder = making.result()
        with self._stage("upload"):
            broken = self.stack.directory / "broken.dcm"
            broken.write_bytes(BROKEN * 100)
            self.cohort = uploads.collect([self.own or folder], DATASET)
            samples = uploads.collect([*_bundled(), broken], SAMPLES)
            both = self.cohort + samples
            with show.bytes_progress(sum(upload.size for upload in both), f"{len(both)} files") as told:
                uploads.send(client, both, told)
            self.journey = Journey(client, both)

    def _follow(self, client: Client) -> None:
        journey = _known(self.journey)
        with self._stage("inference"), self._live(client) as seen:
            journey.wait(INGEST_TIMEOUT_S, lambda _: seen())

    def _train(self, client: Client) -> None:
        request = requests.training_request(DATASET, **TRAINING)
        self.training = Training(client, request)
        with self._stage("training"), self._live(client) as seen:
            requests.send_training(client, request)
            self.training.wait(TRAINING_TIMEOUT_S, lambda _: seen())

    def _report(self, client: Client) -> None:
        """Ask for the report until it tells of everything: events may still be on their way to the reporter."""
        with self._stage("report"):
            for _ in range(REPORTS):
                self.report = reports.make_report(client, reports.month_of(None), timeout_s=REPORT_TIMEOUT_S)
                missing = self._missing_in_report()
                if not missing:
                    break
            self.failures += missing
            self.pages = reports.save_report(client, self.report["month"], self.out)

    def _draw(self, client: Client) -> None:
        """Draw the first results over their images, and fetch the generated ones."""
        journey, training = _known(self.journey), _known(self.training)
        with self._stage("pictures"):
            pushed = [series for series in journey.series if _is_segmented(series)]
            for number, series in enumerate(pushed[:OVERLAYS], start=1):
                self.pictures.append(_overlay(client, series, self.out / f"segmentation-{number}.png"))
            if training.completion is not None:
                self.pictures.append(_real_and_generated(client, training, self.out))

    # What must be true.

    def _check(self, client: Client) -> None:
        journey, training = _known(self.journey), _known(self.training)
        with self._stage("check"):
            self.failures += list(_check_series(client, journey, phantoms=self.own is None, cohort=self.cohort))
            if BROKEN_REASON not in {rejection.reason_code for rejection in journey.rejections}:
                self.failures.append("the broken file was not refused")
            for name, counts in client.queue_counts().items():
                if counts["dead"]:
                    self.failures.append(f"{counts['dead']} dead letters of the {name} queue")
            if training.completion is None and not (self.own and training.reason_code in TOO_LITTLE):
                self.failures.append(f"the training failed: {training.reason_code}")

    def _missing_in_report(self) -> list[str]:
        journey, training = _known(self.journey), _known(self.training)
        completed = sum(found["outcomes"].get("completed", 0) for found in self.report["inference"])
        pushed = sum(len(series.maps) for series in journey.series if series.stage == "pushed")
        told = {found["request_id"]: found for found in self.report["training"]}
        ends = {
            f"{pushed} completed runs of MAPs": completed >= pushed,
            f"{len(journey.series)} series": self.report["series"]["n_series"] >= len(journey.series),
            "the refused file": BROKEN_REASON in self.report["rejections_by_reason"],
            "the training": told.get(training.request_id, {}).get("status", "running") != "running",
        }
        return [f"the report does not tell of {what}" for what, found in ends.items() if not found]

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        show.progress(f"{name.replace('_', ' ')} …")
        try:
            yield
        finally:
            self.seconds[name] = round(time.monotonic() - began, 2)
            self.stack.check()

    @contextmanager
    def _live(self, client: Client) -> Iterator[Any]:
        def table() -> Any:
            return show.demo_table(self.journey, self.training, client.queue_counts())

        def lines() -> list[str]:
            return show.demo_lines(self.journey, self.training)

        with show.live(table, lines) as seen:

            def seen_and_checked() -> None:
                self.stack.check()
                seen()

            yield seen_and_checked


def fresh_folder() -> Path:
    """Make a folder of its own for a run, below the current one."""
    parent = Path(".radqueue")
    try:
        parent.mkdir(exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"demo-{datetime.now().astimezone():%Y%m%d-%H%M%S}-", dir=parent))
    except OSError as error:
        raise Refused(f"cannot write to {parent.absolute()}: {error.strerror}; name another folder by --dir") from None


def _known(value: Any) -> Any:
    """Return what an earlier stage made."""
    if value is None:
        raise Refused("an earlier stage did not get so far")
    return value


def _bundled() -> list[Path]:
    """Return those of pydicom's images that came with its wheel; none is downloaded."""
    found = (get_testdata_file(name, download=False) for name in BUNDLED)
    return [Path(path) for path in found if path is not None]


def _zip(folder: Path, archive: Path) -> None:
    """Move the files of a folder into a zip."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as made:
        for path in sorted(folder.iterdir()):
            made.write(path, path.name)
            path.unlink()
    folder.rmdir()


def _check_series(
    client: Client, journey: Journey, *, phantoms: bool, cohort: Sequence[uploads.Upload]
) -> Iterator[str]:
    """Say which series did not end as they should; results must be in HealthImaging."""
    ours = {upload.sha256 for upload in cohort}
    n_pushed = 0
    for series in journey.series:
        mine = any(instance.upload_sha256 in ours for instance in series.expected.values())
        if series.stage not in ENDED_WELL or (phantoms and mine and series.stage != "pushed"):
            yield f"series {series.series_uid} ended as {series.stage}"
        if series.stage == "pushed":
            n_pushed += 1
            yield from _check_outputs(client, series)
    if not n_pushed:
        yield "no series has a result"
    refused = {rejection.path: rejection.reason_code for rejection in journey.all_rejections}
    codes = {refused.get(upload.path) for upload in cohort}
    if None not in codes:
        why = " ".join(f"{code}: {REASONS.get(code or '', '')}" for code in codes)
        yield f"all {len(cohort)} of the files were refused: {why}"


def _check_outputs(client: Client, series: Series) -> Iterator[str]:
    if not series.outputs:
        yield f"series {series.series_uid} has a result without outputs"
    for output in series.outputs:
        image_set = client.image_set(output["image_set_id"]) if output["image_set_id"] else None
        if image_set is None:
            yield f"output {output['sop_instance_uid']} is not in HealthImaging"
        elif not image_set["isPrimary"]:
            yield f"output {output['sop_instance_uid']} is in a non-primary image set"


def _is_segmented(series: Series) -> bool:
    return any(output["sop_class_uid"] in SEGMENTATIONS for output in series.outputs)


def _overlay(client: Client, series: Series, out: Path) -> Path:
    """Fetch a series and its segmentation, and draw them."""
    made = next(output for output in series.outputs if output["sop_class_uid"] in SEGMENTATIONS)
    folder = out.parent / "dicom" / out.stem
    slices = []
    for instance in _known(series.revision).instances:
        slices.append(folder / f"{instance.sop_instance_uid}.dcm")
        client.download(instance.key, slices[-1])
    segmentation = folder / "segmentation.dcm"
    client.download(made["key"], segmentation)
    legend = "; ".join(LEGENDS[name] for name in series.maps if name in LEGENDS)
    return pictures.overlay(slices, segmentation, out, note=f"series …{series.series_uid[-12:]}   {legend}")


def _real_and_generated(client: Client, training: Training, out: Path) -> Path:
    """Draw slices of the dataset beside generated ones."""
    keys = [stored.key for stored in client.stored(f"datasets/{DATASET}/") if stored.key.endswith(".npy")]
    real = []
    for number, key in enumerate(keys[:REAL_ARRAYS]):
        real.append(out / "arrays" / f"real-{number}.npy")
        client.download(key, real[-1])
    generated = out / "arrays" / "generated.npy"
    client.download(_known(training.completion)["images_array_key"], generated)
    return pictures.side_by_side(real, generated, out / "generated.png")
