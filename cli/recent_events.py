"""What was done lately, read from the event log in the bucket: its newest objects, and no more than READ of them."""

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from cli.client import Client, now
from shared import keys
from shared.errors import Unprocessable
from shared.messages import (
    CompletedInference,
    Event,
    FailedTraining,
    InferenceCompleted,
    InferenceFailed,
    TrainingCompleted,
    TrainingFailed,
    UploadRejected,
    decode,
)
from shared.objects import ObjectSummary

DAYS = 2
LISTED = 5_000
"""Objects of a day's event log that are listed; keys are random, so the newest are found by listing."""
READ = 40
SHOWN = 10


def status(client: Client) -> dict[str, Any]:
    """Return `{"queues": {name: counts}, "recent": {"results": [...], "rejections": [...], "trainings": [...]}}`."""
    return {"queues": client.queue_counts(), "recent": recent(client)}


def recent(client: Client) -> dict[str, list[dict[str, Any]]]:
    """Return the newest results, rejections and trainings, the newest first, at most SHOWN of each."""
    found: dict[str, list[dict[str, Any]]] = {"results": [], "rejections": [], "trainings": []}
    for event in _events(client):
        for title, row_of in ROWS.get(type(event), ()):
            found[title].append(row_of(event))
    return {title: rows[:SHOWN] for title, rows in found.items()}


def _events(client: Client) -> list[Event]:
    """Return the events of the log's newest objects, the newest first, each once."""
    objects: list[ObjectSummary] = []
    for day in range(DAYS):
        date = (now() - timedelta(days=day)).date()
        objects += client.stored(keys.events_of_day(f"{date}"), at_most=LISTED)
    newest = sorted(objects, key=lambda stored: stored.last_modified, reverse=True)[:READ]
    events = {event.id: event for stored in newest for event in _read(client.get(stored.key) or b"")}
    return sorted(events.values(), key=lambda event: event.time, reverse=True)


def _read(lines: bytes) -> Iterator[Event]:
    """Yield the events of some lines of the log; those of a newer version are passed over."""
    for line in lines.splitlines():
        with contextlib.suppress(Unprocessable):
            event = decode(line.decode())
            if isinstance(event, Event):
                yield event


def _second(event: Event) -> str:
    """Return the time without fractions of a second."""
    return event.time.isoformat(sep=" ", timespec="seconds")


def _result(event: InferenceCompleted | InferenceFailed) -> dict[str, Any]:
    run = event.data
    completed = run if isinstance(run, CompletedInference) else None
    return {
        "time": _second(event),
        "map": run.map,
        "outcome": run.outcome if isinstance(run, CompletedInference) else f"failed: {run.reason_code}",
        "study": run.inputs[0].study_uid,
        "outputs": len(completed.outputs) if completed else 0,
        "seconds": completed.duration_s if completed else None,
    }


def _rejection(event: UploadRejected) -> dict[str, Any]:
    told = event.data
    return {
        "time": _second(event),
        "dataset": told.dataset,
        "reason": told.reason_code,
        "object_sha256": told.object_sha256,
    }


def _training(event: TrainingCompleted | TrainingFailed) -> dict[str, Any]:
    told = event.data
    row = {"time": _second(event), "request": told.request_id, "dataset": told.dataset}
    if isinstance(told, FailedTraining):
        return {**row, "outcome": f"failed: {told.reason_code}", "rounds": None, "relative_fd": None}
    outcome = "approved" if told.approved else "rounds used up"
    return {**row, "outcome": outcome, "rounds": told.rounds, "relative_fd": told.evaluation.relative_fd}


ROWS: dict[type[Event], tuple[tuple[str, Callable[[Any], dict[str, Any]]], ...]] = {
    InferenceCompleted: (("results", _result),),
    InferenceFailed: (("results", _result),),
    UploadRejected: (("rejections", _rejection),),
    TrainingCompleted: (("trainings", _training),),
    TrainingFailed: (("trainings", _training),),
}
