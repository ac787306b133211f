"""A training that was asked for, followed round by round until it ended."""

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cli.bridge import Bucket
from cli.client import Client
from cli.waiting import until
from services.trainer.reasons import METRICS, explained
from shared.messages import TrainingRequest
from shared.operations import trainings

TENTHS = 10
OF_MODEL = re.compile(
    r"(config|first_config)\.js|(completed|manifest|medigan)\.json|generator\.\w+|card\.md|(curves|interpolation)\.png"
    r"|images\.(\w+\.)?\w+|tensorboard/[\w.]+"
    r"|rounds/\d+/(evaluation\.json|(config|images)\.\d+\.\w+)"
)
"""What is fetched of a training: checkpoints and the trainer's own notes are left out."""


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
            asyncio.run(trainings.require_same(self.request, objects=Bucket(self._client)))
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
