"""`radqueue dlq list` and `redrive`: the dead-letter queues, for people.

IAM, beyond `cli/client.py`: see `shared/operations/dead_letters.py`.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from cli.bridge import sqs_of
from cli.client import QUEUES, Client
from shared.config import Misconfigured
from shared.operations import dead_letters
from shared.operations.dead_letters import Place, Redrive


def listed(client: Client, roles: Sequence[str]) -> list[dict[str, Any]]:
    """Tell what is in the dead-letter queues of `roles`, by reason, and leave it there."""

    async def one_by_one() -> list[dict[str, Any]]:
        with sqs_of(client) as sqs:
            return [await dead_letters.listed(await _place(client, role, sqs=sqs), sqs=sqs) for role in roles]

    return asyncio.run(one_by_one())


def redrive(
    client: Client, role: str, *, reason: str | None, at_most: int | None, dry_run: bool, tell: Callable[[str], None]
) -> Redrive:
    """Send the dead letters of a queue back to it, and return what became of them. Raises `Refused`."""

    async def moved() -> Redrive:
        with sqs_of(client) as sqs:
            place = await _place(client, role, sqs=sqs)
            moving = Redrive(place=place, sqs=sqs, reason=reason, at_most=at_most, dry_run=dry_run, tell=tell)
            await moving.run()
        return moving

    return asyncio.run(moved())


def place_of(client: Client, role: str) -> Place:
    """Find a queue and its dead-letter queue. Raises `Refused`, and `Misconfigured` where there is no such role."""

    async def found() -> Place:
        with sqs_of(client) as sqs:
            return await _place(client, role, sqs=sqs)

    return asyncio.run(found())


async def _place(client: Client, role: str, *, sqs: Any) -> Place:
    if role not in QUEUES:
        raise Misconfigured(f"there is no queue {role}; there are {', '.join(QUEUES)}")
    return await dead_letters.place_of(role, client.queue_names[role], sqs=sqs)


def table(found: dict[str, Any]) -> Table:
    """Make the table of one dead-letter queue."""
    counted = f"{found['messages']} messages"
    if not found["complete"]:
        counted = f"about {counted}, of which {found['looked_at']} were looked at"
    shown = Table(title=escape(f"{found['dead_letter_queue']}: {counted}"), title_justify="left")
    for name in ("reason", "count", "oldest", "where", "event type", "message id", "sent"):
        shown.add_column(name, justify="right" if name == "count" else "left", overflow="fold")
    for row in found["reasons"]:
        where = "\n".join(f"{one['place']} ({one['count']})" for one in row["where"])
        sample = row["sample"]
        cells = row["reason"], str(row["count"]), row["oldest"], where, sample["event_type"], sample["message_id"]
        shown.add_row(*map(escape, cells), sample["sent"])
    return shown
