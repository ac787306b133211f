"""What people ask for: results of a study, a training, a month's report."""

import json
import re
import secrets
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from cli.client import Client, Refused, WrongUsage, now
from cli.study.journey import outcome_of
from services.inference.records import result_prefix
from services.trainer import config
from services.trainer.jsconfig import read_config
from services.trainer.reasons import explained
from services.trainer.strategy.policy import METRICS
from shared.dicom import is_uid
from shared.messages import (
    EVENT_NAMESPACE,
    InferenceRequested,
    InferenceTask,
    Name,
    ReportRequest,
    ReportRequested,
    TrainingRequest,
    TrainingRequested,
)

POLL_S = 1.0
TENTHS = 10
Found = TypeVar("Found")
Value = int | float | str | bool
NAME: TypeAdapter[str] = TypeAdapter(Name)
RESULT = re.compile(r"results/[^/]+/(?P<series>[^/]+)/[^/]+/[^/@]+@[^/]+/(result|failure)\.json")
OF_MODEL = re.compile(
    r"(config|first_config)\.js|(completed|manifest|medigan)\.json|generator\.\w+|card\.md|(curves|interpolation)\.png"
    r"|images\.(\w+\.)?\w+|tensorboard/[\w.]+"
    r"|rounds/\d+/(evaluation\.json|(config|images)\.\d+\.\w+)"
)
"""What is fetched of a training: checkpoints and the trainer's own notes are left out."""


def name(text: str) -> str:
    """Return a name of a dataset, a class or a request. Raises `WrongUsage` where it is none."""
    try:
        return NAME.validate_python(text)
    except ValidationError:
        raise WrongUsage(f"{text} is no name: use letters, digits, '_', '.' and '-', at most 128") from None


# Results.


def fetch_results(client: Client, study_uid: str, out: Path) -> list[dict[str, Any]]:
    """Write the newest outputs of every MAP on every series of a study into `out/<series>/<map>/`.

    Of a MAP that failed since, that is `failure.json`, and `log.txt` with what it printed.

    Returns:
        What each result.json says, or failure.json as `journey.outcome_of` has it, with `files`, the paths written, and
        `warnings` of the series.

    Raises:
        Refused: the study has no results.
    """
    found = []
    for (series, name), result in newest_results(client, study_uid).items():
        folder = out / series / name
        folder.mkdir(parents=True, exist_ok=True)
        if result["outcome"] == "failed":
            files = [folder / "failure.json", *_download_log(client, result["log_key"], folder)]
            files[0].write_text(json.dumps(result, indent=1))
        else:
            files = list(_download(client, result["outputs"], folder))
            files += _download_files(client, result.get("files", []), folder)
            (folder / "result.json").write_text(json.dumps(result, indent=1))
        warnings = _revision(client, result).get("warnings", [])
        found.append(result | {"files": [str(path) for path in files], "warnings": warnings})
    return found


def newest_results(client: Client, study_uid: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Return what came last of each MAP on each series of a study, by series (or `study`) and MAP.

    Raises:
        Refused: the study has no results.
    """
    if not is_uid(study_uid):
        raise WrongUsage(f"{study_uid} is no StudyInstanceUID")
    newest = _newest(client, study_uid)
    if not newest:
        known = "has no results yet" if client.stored(f"studies/{study_uid}/", at_most=1) else "is not known"
        raise Refused(f"study {study_uid} {known}")
    return newest


def _newest(client: Client, study_uid: str) -> dict[tuple[str, str], dict[str, Any]]:
    found = sorted(_results(client, study_uid), key=lambda one: _age(client, one[1]))
    return {(series, result["map"]): result for series, result in found}


def retry(client: Client, study_uid: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Ask again for what failed of a study, where nothing came after it, and return those failures.

    The request that failed would only be answered by its failure, so this is another event. It is made of the failed
    attempt: asked for several times, the MAP runs once.

    Raises:
        Refused: nothing of the study failed.
    """
    failed = {one: told for one, told in newest_results(client, study_uid).items() if told["outcome"] == "failed"}
    if not failed:
        raise Refused(f"nothing of study {study_uid} failed")
    for failure in failed.values():
        task = InferenceTask.model_validate({name: failure[name] for name in InferenceTask.model_fields})
        event = InferenceRequested.of(result_prefix(task), task, time=now())
        client.send(event.model_copy(update={"id": str(uuid.uuid5(EVENT_NAMESPACE, f"retry {failure['attempt']}"))}))
    return failed


def wait_retried(
    client: Client, study_uid: str, failed: Mapping[tuple[str, str], dict[str, Any]], timeout_s: float
) -> list[dict[str, Any]]:
    """Wait until something came after each of these failures, and return that. Raises `Refused` when time is up."""

    def came() -> list[dict[str, Any]] | None:
        newest = _newest(client, study_uid)  # a failure is not there while its MAP runs again
        found = [newest[one] for one, told in failed.items() if one in newest and newest[one]["time"] > told["time"]]
        return found if len(found) == len(failed) else None

    return until(came, timeout_s, lambda: "it goes on; `radqueue results` tells what comes of it")


def _results(client: Client, study_uid: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the part of the key that names the series, and the result or the failure."""
    found = {stored.key: RESULT.fullmatch(stored.key) for stored in client.stored(f"results/{study_uid}/")}
    for key, match in found.items():
        # A failure may stay behind when another request succeeds.
        mended = key.endswith("/failure.json") and key.replace("/failure.json", "/result.json") in found
        if match is not None and not mended and (told := outcome_of(client, key)):
            yield match["series"], told


def _age(client: Client, result: dict[str, Any]) -> tuple[str, str]:
    """Order results by their revisions: one of an older revision may have been finished later."""
    return _revision(client, result).get("created", ""), result["time"]


def _revision(client: Client, result: dict[str, Any]) -> dict[str, Any]:
    return client.get_json(result["inputs"][0]["revision_key"]) or {}


def _download_log(client: Client, key: str | None, folder: Path) -> Iterator[Path]:
    if key is not None:
        client.download(key, folder / "log.txt")
        yield folder / "log.txt"


def _download(client: Client, outputs: Sequence[dict[str, Any]], folder: Path) -> Iterator[Path]:
    for output in outputs:
        path = folder / f"{Path(output['sop_instance_uid']).name}.dcm"
        client.download(output["key"], path)
        yield path


def _download_files(client: Client, files: Sequence[dict[str, Any]], folder: Path) -> Iterator[Path]:
    """Fetch what is no DICOM, each under the number and the name that its key ends in."""
    for file in files:
        path = folder.joinpath(*Path(file["key"]).parts[-2:])
        client.download(file["key"], path)
        yield path


# Trainings.


def training_request(
    dataset: str,
    *,
    request_id: str | None = None,
    threshold: float | None = None,
    max_rounds: int | None = None,
    n_images: int | None = None,
    overrides: dict[str, Value] | None = None,
    data_uri: str | None = None,
    classes: dict[str, str] | None = None,
    metric: str | None = None,
    min_coverage: float | None = None,
    strategy: str | None = None,
) -> TrainingRequest:
    """Make a request; what is None is left to the contract's defaults.

    Raises:
        WrongUsage: a value is not allowed.
    """
    for named in (dataset, request_id, *(classes or {}), *(classes or {}).values()):
        if named is not None:
            name(named)
    if metric not in {None, "relative_fd"} and threshold is None:
        raise WrongUsage(f"--metric {metric} needs --threshold: without one, it is that of relative_fd")
    if overrides:
        _check_overrides(overrides)
    identity = request_id or f"{dataset}-{now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    asked: dict[str, object] = {"threshold": threshold, "max_rounds": max_rounds, "n_images": n_images}
    asked |= {"overrides": overrides, "data_uri": data_uri, "classes": classes}
    asked |= {"metric": metric, "min_coverage": min_coverage, "strategy": strategy}
    given = {name: value for name, value in asked.items() if value is not None}
    try:
        return TrainingRequest.model_validate({"request_id": identity, "dataset": dataset, **given})
    except ValidationError as error:
        reasons = (f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors())
        raise WrongUsage("; ".join(reasons)) from None


def _check_overrides(overrides: dict[str, Value]) -> None:
    """Check them as the trainer will, on top of the shipped config.js. Raises `WrongUsage`."""
    shipped = read_config(config.DEFAULT_CONFIG.read_text("utf-8"))
    try:
        config.TrainingConfig.of(shipped | overrides)
    except config.InvalidConfig as error:
        known = ", ".join(f"{name}={json.dumps(value)}" for name, value in shipped.items())
        raise WrongUsage(f"--set {error}. The parameters and their defaults: {known}") from None


def parse_override(text: str) -> tuple[str, Value]:
    """Read `name=value`: a number, true or false, or text. Raises `WrongUsage`."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise WrongUsage(f"--set {text}: write name=value, such as --set steps=800")
    try:
        parsed = json.loads(value)
    except ValueError:
        return name, value
    return name, parsed if isinstance(parsed, int | float | bool | str) else value


def parse_classes(texts: Iterable[str]) -> dict[str, str]:
    """Read `name=dataset`, or a name alone, which is both. Raises `WrongUsage` where a class is given twice."""
    classes: dict[str, str] = {}
    for text in texts:
        name, _, dataset = text.partition("=")
        if name in classes:
            raise WrongUsage(f"--class {name} is given twice; a class has one dataset")
        classes[name] = dataset or name
    return classes


def require_data(client: Client, request: TrainingRequest) -> None:
    """Make sure that there is something to train on, where this machine can tell. Raises `Refused`."""
    if request.data_uri is not None:
        return
    for dataset in request.classes.values() or [request.dataset]:
        if not client.stored(f"datasets/{dataset}/", at_most=1):
            raise Refused(f"there is no training data in the dataset {dataset}: upload images to it first")


def require_same(client: Client, request: TrainingRequest) -> None:
    """Make sure that an id which was used before was this very request's. Raises `Refused`."""
    taken = client.get_json(f"models/{request.request_id}/options.json")
    if taken is None:
        return
    asked, before = request.model_dump(mode="json"), taken["request"]
    if differing := [name for name, value in asked.items() if name in before and before[name] != value]:
        raise Refused(
            f"the request {request.request_id} was made before, with another {', '.join(differing)}: ask as before to "
            "go on with it, or with another --request-id for a new training"
        )


def send_training(client: Client, request: TrainingRequest) -> None:
    """Send a training request."""
    client.send(TrainingRequested.of(request.request_id, request, time=now()))


class Training:
    """A training being followed, by what is under `models/<request id>/`."""

    def __init__(self, client: Client, request: TrainingRequest) -> None:
        """Begin, before the request is sent: a failure that is there now is an earlier try's, and is passed over."""
        self._client = client
        self._folder = f"models/{request.request_id}"
        self._earlier_failure = client.get_json(f"{self._folder}/failure.json")
        self.request, self.request_id = request, request.request_id
        self.state = "requested"
        """requested, training, approved, rounds used up, failed"""
        self.rounds: list[dict[str, Any]] = []
        """What each round's evaluation.json tells, and `rule`: why it had the parameters that it had."""
        self.progress: dict[str, Any] | None = None
        """What progress.json tells of the round that runs: round, step, of_steps, images_seen, losses, time."""
        self.noted: dict[tuple[int, int], dict[str, Any]] = {}
        """The first progress that was seen in each tenth of a round."""
        self.completion: dict[str, Any] | None = None
        self.reason_code: str | None = None
        """Why it failed."""
        self.why = ""
        """The same for people, with what to do."""

    @property
    def goal(self) -> str:
        """What approves a model."""
        return f"to be approved at a {METRICS[self.request.metric]} of {self.request.threshold:g}"

    @property
    def ended(self) -> bool:
        """Whether nothing more is going to happen."""
        return self.completion is not None or self.reason_code is not None

    @property
    def approved(self) -> bool:
        """Whether the model that was kept is good enough."""
        return self.completion is not None and bool(self.completion["approved"])

    @property
    def keys(self) -> list[str]:
        """What was made, in the bucket."""
        if self.completion is None:
            return []
        return [self.completion[name] for name in ("generator_key", "images_key", "images_array_key")]

    def look(self) -> None:
        """Bring everything up to date. Raises `Refused` where the id turns out to be another request's."""
        if self.state == "requested":  # somebody else's request of this id may have been there before ours
            require_same(self._client, self.request)
        while (done := self._client.get_json(self._round_key(len(self.rounds) + 1))) is not None:
            self.rounds.append(done["told"])
        self._look_into_the_round()
        if (completed := self._client.get_json(f"{self._folder}/completed.json")) is not None:
            self.completion = completed["told"]
            self.state = "approved" if self.approved else "rounds used up"
            self.why = self.completion.get("why_not", "")
            return
        failed = self._client.get_json(f"{self._folder}/failure.json")
        if failed is not None and failed != self._earlier_failure:
            code = self.reason_code = failed["told"]["reason_code"]
            self.state = f"failed: {code}"
            self.why = explained(code, failed["told"]["numbers"])
        elif self.rounds or self._client.exists(f"{self._folder}/options.json"):
            self.state = "training"

    def _look_into_the_round(self) -> None:
        told = self._client.get_json(f"{self._folder}/progress.json")
        if told is None or told["round"] <= len(self.rounds):  # of a round that ended
            self.progress = None
            return
        self.progress = told
        self.noted.setdefault((told["round"], TENTHS * told["step"] // max(1, told["of_steps"])), told)

    def wait(self, timeout_s: float, seen: Callable[["Training"], None] = lambda _: None) -> None:
        """Look until it ended; `seen` is called after each look. Raises `Refused` when time is up."""

        def look() -> bool | None:
            self.look()
            seen(self)
            return self.ended or None

        until(
            look,
            timeout_s,
            lambda: (
                f"training {self.request_id} is {self.state}, {len(self.rounds)} rounds done; it goes on, and the "
                f"same command with --request-id {self.request_id} waits again"
            ),
        )

    def fetch(self, out: Path) -> list[Path]:
        """Write the model, its images and its rounds below `out`, and return the paths."""
        names = (stored.key.removeprefix(f"{self._folder}/") for stored in self._client.stored(f"{self._folder}/"))
        paths = [out / name for name in names if OF_MODEL.fullmatch(name)]
        for path in paths:
            self._client.download(f"{self._folder}/{path.relative_to(out)}", path)
        return paths

    def summary(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "request_id": self.request_id,
            "state": self.state,
            "approved": self.approved,
            "reason_code": self.reason_code,
            "why": self.why,
            "rounds": [
                {
                    "round": done["round"],
                    "steps": done["steps"],
                    "rule": done["rule"],
                    "approved": done["approved"],
                    "duration_s": done["duration_s"],
                    "why_not": done.get("why_not", ""),
                    **done["evaluation"],
                }
                for done in self.rounds
            ],
            "progress": None if self.ended else self.progress,
            "keys": self.keys,
        }

    def _round_key(self, number: int) -> str:
        return f"{self._folder}/rounds/{number}/evaluation.json"


# Reports.


def make_report(client: Client, month: str, *, timeout_s: float) -> dict[str, Any]:
    """Ask for the report of a month, and return it when it is there. Raises `Refused` when time is up."""
    request = ReportRequest(month=month)
    key = f"reports/{month}.json"
    before = (client.get_json(key) or {}).get("generated_at")
    client.send(ReportRequested.of(month, request, time=now()))

    def newer() -> dict[str, Any] | None:
        found = client.get_json(key)
        return found if found is not None and found["generated_at"] != before else None

    why = f"the report of {month} was not made; is the reporter running? (`radqueue status`)"
    return until(newer, timeout_s, lambda: why)


def save_report(client: Client, month: str, out: Path) -> list[Path]:
    """Write a report's numbers and its page, which links to them, into `out`, and return the paths."""
    paths = [out / f"{month}.{ending}" for ending in ("json", "html")]
    for path in paths:
        client.download(f"reports/{path.name}", path)
    return paths


def month(text: str | None) -> str:
    """Return the month, YYYY-MM; without one, this month in UTC. Raises `WrongUsage`."""
    this = f"{now():%Y-%m}"
    try:
        asked = ReportRequest(month=text).month or this
    except ValidationError:
        raise WrongUsage(f"{text} is no month: write YYYY-MM") from None
    if asked > this:
        raise WrongUsage(f"{asked} has not begun")
    return asked


def until(look: Callable[[], Found | None], timeout_s: float, why: Callable[[], str]) -> Found:
    """Look until there is something, and return it. Raises `Refused` with what `why` says when time is up."""
    end = time.monotonic() + timeout_s
    while (found := look()) is None:
        if time.monotonic() > end:
            raise Refused(f"after {timeout_s:.0f} s, {why()}")
        time.sleep(POLL_S)
    return found
