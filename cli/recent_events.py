"""What was done lately, read from the event log in the bucket: its newest objects, and no more than READ of them."""

import json
from datetime import datetime, timedelta
from operator import itemgetter
from typing import Any

from cli.client import Client, now
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
        for title, row_of in ROWS.get(event.get("type", ""), ()):
            found[title].append(row_of(event))
    return {title: rows[:SHOWN] for title, rows in found.items()}


def _events(client: Client) -> list[dict[str, Any]]:
    """Return the events of the log's newest objects, the newest first, each once."""
    objects: list[ObjectSummary] = []
    for day in range(DAYS):
        date = (now() - timedelta(days=day)).date()
        objects += client.stored(f"events/date={date}/", at_most=LISTED)
    newest = sorted(objects, key=lambda stored: stored.last_modified, reverse=True)[:READ]
    events: dict[str, dict[str, Any]] = {}
    for stored in newest:
        for line in (client.get(stored.key) or b"").splitlines():
            event = json.loads(line)
            events[event["id"]] = event
    return sorted(events.values(), key=itemgetter("time"), reverse=True)


def _second(time: str) -> str:
    """Return the time without fractions of a second."""
    return datetime.fromisoformat(time).isoformat(sep=" ", timespec="seconds")


def _result(event: dict[str, Any]) -> dict[str, Any]:
    run = event["data"]
    return {
        "time": _second(event["time"]),
        "map": run["map"],
        "outcome": run.get("outcome") or f"failed: {run['reason_code']}",
        "study": run["inputs"][0]["study_uid"],
        "outputs": len(run.get("outputs", [])),
        "seconds": run.get("duration_s"),
    }


def _rejection(event: dict[str, Any]) -> dict[str, Any]:
    told = event["data"]
    return {
        "time": _second(event["time"]),
        "dataset": told["dataset"],
        "reason": told["reason_code"],
        "object_sha256": told["object_sha256"],
    }


def _training(event: dict[str, Any]) -> dict[str, Any]:
    told = event["data"]
    evaluation = told.get("evaluation") or {}
    return {
        "time": _second(event["time"]),
        "request": told["request_id"],
        "dataset": told["dataset"],
        "outcome": f"failed: {told['reason_code']}" if "reason_code" in told else OUTCOME[told["approved"]],
        "rounds": told.get("rounds"),
        "relative_fd": evaluation.get("relative_fd"),
    }


OUTCOME = {True: "approved", False: "rounds used up"}
ROWS = {
    "radqueue.inference.completed.v1": (("results", _result),),
    "radqueue.inference.failed.v1": (("results", _result),),
    "radqueue.upload.rejected.v1": (("rejections", _rejection),),
    "radqueue.training.completed.v1": (("trainings", _training),),
    "radqueue.training.failed.v1": (("trainings", _training),),
}
