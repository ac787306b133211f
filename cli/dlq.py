"""`radqueue dlq list` and `redrive`: the dead-letter queues, shown to people and sent back to work.

IAM, beyond `cli/client.py`: see `shared/operations/dead_letters.py`.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from cli import show
from cli.bridge import sqs_of
from cli.client import QUEUES, Client
from cli.options import Json
from shared.config import Misconfigured
from shared.operations import dead_letters
from shared.operations.dead_letters import Place, Redrive

app = typer.Typer(no_args_is_help=True, help="What could not be handled, and why.")


@app.command("list")
def list_(
    context: typer.Context,
    queue: Annotated[str | None, typer.Argument(help="ingest, inference, training or reporting; all, without.")] = None,
    *,
    json: Json = False,
) -> None:
    """Show what is in the dead-letter queues, by reason; everything stays there."""
    found = listed(Client(context.obj), [queue] if queue else QUEUES)
    if json:
        show.json({"queues": found})
        return
    for one in found:
        show.out.print(table(one) if one["reasons"] else f"{one['dead_letter_queue']}: no messages")


def redrive(
    context: typer.Context,
    *,
    queue: Annotated[str, typer.Argument(help="ingest, inference, training or reporting.")],
    reason: Annotated[str | None, typer.Option(help="Only messages with this reason.")] = None,
    at_most: Annotated[int | None, typer.Option("--max", min=1, help="Move no more than this many.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would be moved, and move nothing.")] = False,
    json: Json = False,
) -> None:
    """Send the messages of a dead-letter queue back to their queue."""
    moved = moved_back(Client(context.obj), queue, reason=reason, at_most=at_most, dry_run=dry_run, tell=show.progress)
    show.json(moved.summary()) if json else show.say(moved.verdict)


def listed(client: Client, roles: Sequence[str]) -> list[dict[str, Any]]:
    """Tell what is in the dead-letter queues of `roles`, by reason, and leave it there."""

    async def one_by_one() -> list[dict[str, Any]]:
        with sqs_of(client) as sqs:
            return [await dead_letters.listed(await _place(client, role, sqs=sqs), sqs=sqs) for role in roles]

    return asyncio.run(one_by_one())


def moved_back(
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
    """Find a queue and its dead-letter queue. Raises `Refused`, and `Misconfigured` if there is no such role."""

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
