"""The kill sweep: a worker is killed at every boundary and restarted until all work is done, and the log is judged.

The judge knows nothing of the worker. It reads the log of the fake SQS, which holds the effects too.
"""

import contextlib
import http.client
import json
import multiprocessing
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.chaos.worker import BUG, FOLLOWING, LONG, PLAIN, REFUSED, RETRIED, Orders, main
from tests.queue.world import report

ROOT = Path(__file__).parent.parent.parent
AT_ONCE = 12
"""Scenarios at the same time; most of each is waiting."""
LOOK_S = 0.2
DRAIN_S = 20.0
KILLED, HUNG = -9, -1
POISON = "no json"

DONE = {
    PLAIN: {"store", "tell"},
    RETRIED: {"first try", "store", "tell"},
    LONG: {"store", "tell"},
    FOLLOWING: {"store", "tell"},
}
"""Effects that each message must have had, exactly once, before it is deleted."""
DEAD = {report(REFUSED).body(): "refused", report(BUG).body(): "bug", POISON: "not_json"}
"""Bodies that must be in the dead-letter queue before they are deleted, and why."""
RECEIVES = {PLAIN: 1, RETRIED: 2, LONG: 1, FOLLOWING: 1, REFUSED: 1, BUG: 3, POISON: 1}
"""How often each is received where nobody is killed."""


@dataclass(frozen=True)
class Scenario:
    """Workers one after the other; each but the last is killed at its boundary."""

    kills: tuple[str, ...] = ()
    mutant: str | None = None
    patience_s: float = 45.0
    """How long each worker gets."""


@dataclass(frozen=True)
class Verdict:
    """What the judge found."""

    scenario: Scenario
    kills: int
    wrong: tuple[str, ...]


@dataclass
class Arena:
    """A fake SQS in a process of its own, and the server that forks workers."""

    url: str
    scenarios: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        """Let workers be forked from a process that has imported all they need."""
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(["tests.chaos.worker"])

    def run_all(self, scenarios: Sequence[Scenario]) -> list[Verdict]:
        """Run scenarios side by side."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self.run, scenarios))

    def run(self, scenario: Scenario, record: str | None = None) -> Verdict:
        """Run one scenario on queues of its own, and judge it."""
        with self.lock:
            self.scenarios += 1
            queue = f"q{self.scenarios}."
        self._prepare(queue)
        kills, wrong = 0, []
        for kill_at in (*scenario.kills, None):
            orders = Orders(self.url, queue, kill_at, scenario.mutant, record)
            exit_code, empty = self._work(orders, scenario.patience_s)
            kills += exit_code == KILLED
            if exit_code not in (0, KILLED):
                wrong.append(f"the worker ended with {exit_code}")
            if empty and exit_code == 0:
                break
        log = json.loads(self._ask("GET", f"/_fake/log?about={quote(queue)}"))
        return Verdict(scenario, kills, (*wrong, *judge(log, queue, kills)))

    def _prepare(self, queue: str) -> None:
        self._call("CreateQueue", QueueName=f"{queue}-dlq")
        arn = self._call("GetQueueAttributes", QueueUrl=f"{queue}-dlq", AttributeNames=["QueueArn"])
        policy = json.dumps({"deadLetterTargetArn": arn["Attributes"]["QueueArn"], "maxReceiveCount": 50})
        self._call("CreateQueue", QueueName=queue, Attributes={"RedrivePolicy": policy})
        bodies = [POISON, *(report(month).body() for month in (PLAIN, RETRIED, REFUSED, BUG, LONG))]
        for body in bodies:
            self._call("SendMessage", QueueUrl=queue, MessageBody=body)

    def _work(self, orders: Orders, patience_s: float) -> tuple[int, bool]:
        """Let one worker work until it dies or nothing is left; return how it ended, and whether anything is left."""
        with self.lock:
            worker = self.processes.Process(target=main, args=(orders,))
            worker.start()
        deadline = time.monotonic() + patience_s
        empty = False
        while self._ended(worker) is None and not empty and time.monotonic() < deadline:
            time.sleep(LOOK_S)
            empty = json.loads(self._ask("GET", f"/_fake/counts?queue={quote(orders.queue)}")) == [0, 0]
        if self._ended(worker) is None:
            worker.terminate()
        while self._ended(worker) is None and time.monotonic() < deadline + DRAIN_S:
            time.sleep(LOOK_S)
        if self._ended(worker) is None:
            worker.kill()
            return HUNG, empty
        return self._ended(worker) or 0, empty

    def _ended(self, worker: Any) -> int | None:
        """Return the exit code. One thread at a time may ask: starting a process asks for all others' too."""
        with self.lock:
            code: int | None = worker.exitcode
        return code

    def _call(self, operation: str, **arguments: Any) -> Any:
        return json.loads(self._ask("POST", "/", json.dumps(arguments), {"X-Amz-Target": f"AmazonSQS.{operation}"}))

    def _ask(self, method: str, path: str, body: str | None = None, headers: dict[str, str] | None = None) -> str:
        with contextlib.closing(http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=30)) as connection:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            text = response.read().decode()
        if response.status != 200:
            raise RuntimeError(f"the fake answered {response.status}: {text[:200]}")
        return text


@contextlib.contextmanager
def arena() -> Iterator[Arena]:
    """Start the fake as a process, and stop it at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.queue.fakesqs"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        word, _, url = (process.stdout.readline() if process.stdout else "").strip().partition(" ")
        if word != "ready":
            raise RuntimeError("the fake SQS did not start")
        yield Arena(url)
    finally:
        process.terminate()
        process.communicate(timeout=30)


def boundaries(here: Arena) -> list[str]:
    """Return every boundary that a worker comes to when nobody kills it, from a run that is judged too."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "boundaries"
        verdict = here.run(Scenario(), record=str(file))
        if verdict.wrong:
            raise RuntimeError(f"without a kill: {verdict.wrong}")
        places = sorted(set(file.read_text().split("\n")) - {""})
    during = [place.replace(":before:", ":during:") for place in places if ":before:" in place]
    return places + during


def every_kill(places: Sequence[str]) -> list[Scenario]:
    """Return a scenario for each boundary."""
    return [Scenario((place,)) for place in places]


def sampled(places: Sequence[str], singles: int, pairs: int, seed: int = 0) -> list[Scenario]:
    """Choose kills, at least one of each kind, and pairs of kills, by a seed."""
    chance = random.Random(seed)  # noqa: S311 - a sample
    shuffled = list(places)
    chance.shuffle(shuffled)
    kinds: dict[str, str] = {}
    for place in shuffled:
        kinds.setdefault(place.rsplit(":", 1)[0], place)
    first = list(kinds.values())
    rest = [place for place in shuffled if place not in first]
    chosen = every_kill((first + rest)[: max(singles, len(first))])
    return chosen + [Scenario((chance.choice(places), chance.choice(places))) for _ in range(pairs)]


def judge(log: Sequence[dict[str, Any]], queue: str, kills: int) -> list[str]:
    """Return what was lost, done twice, or done without need, in words."""
    seen = _read(log, queue)
    wrong = list(seen.too_early)
    wrong += [f"{key} was done {times} times" for key, times in seen.effects.items() if times > 1]
    wrong += [f"{key} was never done" for month in DONE for key in _keys_of(month) if not seen.effects[key]]
    wrong += [f"{_name(body)} was not dead-lettered as {why}" for body, why in DEAD.items() if seen.dead[body] != {why}]
    wrong += [f"{_name(body)} was dead-lettered" for body in seen.dead if seen.dead[body] and body not in DEAD]
    wrong += [f"{_name(body)} is still there" for body, copies in seen.copies.items() if copies]
    following = {json.loads(body)["id"] for body in seen.bodies.values() if _name(body) == FOLLOWING}
    if len(following) != 1:
        wrong.append(f"the following event had {len(following)} ids")
    sent = Counter(_name(body) for body in seen.bodies.values())
    for name, times in seen.receives.items():
        allowed = (RECEIVES[name] + kills) * sent[name]
        if times > allowed:
            wrong.append(f"{name} was received {times} times, {allowed} would do")
    return wrong


@dataclass
class Seen:
    """What the log tells."""

    effects: Counter[str] = field(default_factory=Counter)
    dead: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Bodies in the dead-letter queue, and for which reasons."""
    bodies: dict[str, str] = field(default_factory=dict)
    """By message id."""
    receives: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    """Messages of each body in the queue: one that is sent again is there twice until the old one is deleted."""
    too_early: list[str] = field(default_factory=list)


def _read(log: Sequence[dict[str, Any]], queue: str) -> Seen:
    seen = Seen()
    for entry in log:
        what, details = entry["what"], entry["details"]
        body = seen.bodies.get(entry["message_id"], "")
        if what == "effect":
            seen.effects[details["key"].removeprefix(f"{queue}/")] += 1
        elif what == "sent" and entry["queue"] == f"{queue}-dlq":
            seen.dead[details["body"]].add(details["attributes"].get("reason_code", ""))
        elif what == "sent":
            seen.bodies[entry["message_id"]] = details["body"]
            seen.copies[details["body"]] += 1
        elif what == "received":
            seen.receives[_name(body)] += 1
        elif what == "deleted":
            seen.copies[body] -= 1
            if seen.copies[body]:
                continue
            missing = [key for key in _keys_of(_name(body)) if not seen.effects[key]]
            missing += ["its dead letter"] if body in DEAD and not seen.dead[body] else []
            seen.too_early += [f"{_name(body)} was deleted before {thing}" for thing in missing]
    return seen


def _name(body: str) -> str:
    return POISON if body == POISON else json.loads(body)["data"]["month"]


def _keys_of(month: str) -> list[str]:
    return [f"{month}/{effect}" for effect in sorted(DONE.get(month, ()))]
