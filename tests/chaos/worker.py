"""A service to be killed: real handlers on the real runtime, with a hook before and after all that it does.

It kills itself with SIGKILL at the boundary that it is told, `NAME:before:N` or `NAME:after:N` for the N-th time that
it comes there: a call of the SQS API, or an effect. `NAME:during:N` is killed while the call is under way.
"""

import asyncio
import logging
import os
import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import structlog

from shared.config import ServiceSettings
from shared.errors import Unavailable, Unprocessable
from shared.messages import ReportRequested
from shared.queue import Publisher, consume
from tests.queue.world import client_of, report

VISIBILITY_S = 3
LONG_JOB_S = 4.0
DURING_S = 0.1
"""How long after its begin a call is killed that is to be killed while it is under way."""

PLAIN, RETRIED, REFUSED, BUG, LONG, FOLLOWING = "2026-01", "2026-02", "2026-03", "2026-04", "2026-05", "2027-01"


@dataclass(frozen=True)
class Orders:
    """What one worker process is told."""

    url: str
    queue: str
    kill_at: str | None = None
    mutant: str | None = None
    record: str | None = None
    """A file that takes every boundary that it comes to."""


@dataclass
class Boundaries:
    """Counts boundaries, and dies at one of them."""

    orders: Orders
    passed: Counter[str] = field(default_factory=Counter)

    def at(self, name: str) -> None:
        """Pass a boundary, or die."""
        self.passed[name] += 1
        place = f"{name}:{self.passed[name]}"
        if self.orders.record is not None:
            with Path(self.orders.record).open("a") as file:
                file.write(f"{place}\n")
        if place == self.orders.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    async def around(self, name: str, doing: Any) -> Any:
        """Await `doing` between two boundaries."""
        self.at(f"{name}:before")
        task = asyncio.ensure_future(doing)
        self.passed[f"{name}:during"] += 1
        if self.orders.kill_at == f"{name}:during:{self.passed[f'{name}:during']}":
            await asyncio.sleep(DURING_S)
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            result = await task
        except asyncio.CancelledError:
            task.cancel()
            raise
        self.at(f"{name}:after")
        return result


class WatchedSqs:
    """An SQS client with a boundary around each call; a mutant changes what the runtime asks for."""

    def __init__(self, sqs: Any, boundaries: Boundaries) -> None:
        """Take the client that does the work."""
        self._sqs = sqs
        self._boundaries = boundaries

    def __getattr__(self, operation: str) -> Any:
        """Return the operation, watched."""

        async def call(**arguments: Any) -> Any:
            mutant = MUTANTS.get(self._boundaries.orders.mutant or "", _faithful)
            return await mutant(self, operation, arguments)

        return call

    async def call(self, operation: str, arguments: dict[str, Any]) -> Any:
        """Make one call between its boundaries."""
        return await self._boundaries.around(operation, getattr(self._sqs, operation)(**arguments))


async def _faithful(sqs: WatchedSqs, operation: str, arguments: dict[str, Any]) -> Any:
    return await sqs.call(operation, arguments)


async def _delete_first(sqs: WatchedSqs, operation: str, arguments: dict[str, Any]) -> Any:
    """Delete what was received before it is handled."""
    answer = await sqs.call(operation, arguments)
    if operation == "receive_message" and answer.get("Messages"):
        entries = [
            {"Id": str(i), "ReceiptHandle": message["ReceiptHandle"]} for i, message in enumerate(answer["Messages"])
        ]
        await sqs.call("delete_message_batch", {"QueueUrl": arguments["QueueUrl"], "Entries": entries})
    return answer


async def _acknowledge_on_error(sqs: WatchedSqs, operation: str, arguments: dict[str, Any]) -> Any:
    """Delete what is to be retried."""
    if operation == "change_message_visibility_batch":
        given_back = [entry for entry in arguments["Entries"] if entry["VisibilityTimeout"] < VISIBILITY_S]
        if given_back:
            entries = [{"Id": entry["Id"], "ReceiptHandle": entry["ReceiptHandle"]} for entry in given_back]
            return await sqs.call("delete_message_batch", {"QueueUrl": arguments["QueueUrl"], "Entries": entries})
    if operation == "send_message" and "receives" in arguments.get("MessageAttributes", {}):
        return {}  # what is to take the place of the message is never sent
    return await sqs.call(operation, arguments)


async def _never_extend(sqs: WatchedSqs, operation: str, arguments: dict[str, Any]) -> Any:
    """Say that leases were extended, and do not do it."""
    if operation == "change_message_visibility_batch":
        kept = [entry for entry in arguments["Entries"] if entry["VisibilityTimeout"] < VISIBILITY_S]
        if not kept:
            return {"Successful": [{"Id": entry["Id"]} for entry in arguments["Entries"]]}
    return await sqs.call(operation, arguments)


MUTANTS = {
    "delete_first": _delete_first,
    "acknowledge_on_error": _acknowledge_on_error,
    "never_extend": _never_extend,
}


def main(orders: Orders) -> None:
    """Work until SIGTERM, or until killed."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    asyncio.run(_work(orders))


async def _work(orders: Orders) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    boundaries = Boundaries(orders)
    settings = ServiceSettings(reporting_queue=orders.queue).model_copy(
        update={"visibility_s": VISIBILITY_S, "poll_s": 1, "grace_s": 1, "slots": 3, "retry_base_s": 0.1}
    )
    async with client_of(orders.url) as client, aiohttp.ClientSession() as http:
        sqs: Any = WatchedSqs(client, boundaries)
        publish = Publisher(sqs, settings)

        async def effect(key: str) -> bool:
            """Do something that must be done once; tells whether this was the first time."""

            async def put() -> int:
                async with http.put(f"{orders.url}/_fake/effects/{orders.queue}/{key}") as response:
                    return response.status

            return bool(await boundaries.around("effect", put()) == 201)

        async def handle(event: ReportRequested) -> None:
            month = event.data.month or ""
            boundaries.at("handler:begin")
            if month == REFUSED:
                raise Unprocessable("refused")
            if month == BUG:
                raise KeyError(month)
            if month == RETRIED and await effect(f"{month}/first try"):
                raise Unavailable("at the first time")
            if month == LONG:
                await asyncio.sleep(LONG_JOB_S)
            await effect(f"{month}/store")
            if month == PLAIN:
                await publish(report(FOLLOWING))
            await effect(f"{month}/tell")
            boundaries.at("handler:end")

        await consume({ReportRequested: handle}, sqs, orders.queue, settings=settings, stop=stop)
