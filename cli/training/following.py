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
from shared.documents.training import StoredProgress
from shared.keys import TrainingKeys
from shared.messages import CompletedTraining, TrainingRequest, TrainingRound
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
        self._keys = TrainingKeys(request.request_id)
        self._earlier_failure = client.read(self._keys.failure)
        self.request, self.request_id = request, request.request_id
        self.state = "requested"
        """requested, training, approved, rounds used up, failed"""
        self.rounds: list[TrainingRound] = []
        """Those that are completed."""
        self.progress: StoredProgress | None = None
        """How far the round that runs is."""
        self.noted: dict[tuple[int, int], StoredProgress] = {}
        """The first progress that was seen in each tenth of a round."""
        self.completion: CompletedTraining | None = None
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
        return self.completion is not None and self.completion.approved

    @property
    def keys(self) -> list[str]:
        """What was made, in the bucket."""
        if self.completion is None:
            return []
        return [self.completion.generator_key, self.completion.images_key, self.completion.images_array_key]

    def look(self) -> None:
        """Bring everything up to date. Raises `Refused` if the id turns out to be another request's."""
        if self.state == "requested":  # somebody else's request of this id may have been there before ours
            asyncio.run(trainings.require_same(self.request, objects=Bucket(self._client)))
        while (done := self._client.read(self._keys.round(len(self.rounds) + 1).evaluation)) is not None:
            self.rounds.append(done.told)
        self._look_into_the_round()
        if (completed := self._client.read(self._keys.completed)) is not None:
            self.completion = completed.told
            self.state = "approved" if self.approved else "rounds used up"
            self.why = self.completion.why_not
            return
        failed = self._client.read(self._keys.failure)
        if failed is not None and failed != self._earlier_failure:
            code = self.reason_code = failed.told.reason_code
            self.state = f"failed: {code}"
            self.why = explained(code, failed.told.numbers)
        elif self.rounds or self._client.exists(self._keys.options.key):
            self.state = "training"

    def _look_into_the_round(self) -> None:
        told = self._client.read(self._keys.progress)
        if told is None or told.round <= len(self.rounds):  # of a round that ended
            self.progress = None
            return
        self.progress = told
        self.noted.setdefault((told.round, TENTHS * told.step // max(1, told.of_steps)), told)

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
        names = (stored.key.removeprefix(self._keys.prefix) for stored in self._client.stored(self._keys.prefix))
        paths = [out / name for name in names if OF_MODEL.fullmatch(name)]
        for path in paths:
            self._client.download(self._keys.product(str(path.relative_to(out))), path)
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
                    "round": done.round,
                    "steps": done.steps,
                    "rule": done.rule,
                    "approved": done.approved,
                    "duration_s": done.duration_s,
                    "why_not": done.why_not,
                    **done.evaluation.model_dump(mode="json"),
                }
                for done in self.rounds
            ],
            "progress": None if self.ended or self.progress is None else self.progress.model_dump(mode="json"),
            "keys": self.keys,
        }
