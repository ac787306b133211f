"""`radqueue quarantine`: the commands that show what ingest refused, and give it to ingest once more.

IAM, beyond `cli/client.py`: see `shared/operations/quarantine.py`.
"""

import asyncio
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from cli import names, show
from cli.bridge import Bucket
from cli.client import Client, now
from cli.options import Json
from services.ingest.reasons import REASONS
from shared.operations.quarantine import SHORT, Refusal, chosen, release
from shared.operations.refused import Refused, WrongUsage

app = typer.Typer(no_args_is_help=True, help="What was uploaded and refused.")


Hashes = Annotated[list[str], typer.Argument(help="Beginnings of hashes, as `list` shows them.", show_default=False)]
Reason = Annotated[str | None, typer.Option(help="Only what was refused for this reason.")]


def _known_reason(reason: str | None) -> str | None:
    if reason is not None and reason not in REASONS:
        raise WrongUsage(f"--reason: there is no {reason}; there are {', '.join(REASONS)}")
    return reason


@app.command("list")
def list_(
    context: typer.Context,
    *,
    reason: Reason = None,
    dataset: Annotated[str | None, typer.Option(help="Only of this dataset.")] = None,
    released: Annotated[bool, typer.Option("--released", help="Also what was released.")] = False,
    json: Json = False,
) -> None:
    """Show what is in quarantine and why."""
    objects = Bucket(Client(context.obj))
    reason = _known_reason(reason)
    found = asyncio.run(chosen([], reason=reason, dataset=dataset, released=released, objects=objects))
    if json:
        show.json({"refused": [asdict(refusal) for refusal in found]})
    elif found:
        show.out.print(table(found))
    else:
        show.say("nothing is in quarantine")


@app.command("show")
def show_(context: typer.Context, *, hashes: Hashes, json: Json = False) -> None:
    """Show why objects were refused, and what can be done."""
    found = asyncio.run(chosen(hashes, released=True, objects=Bucket(Client(context.obj))))
    if json:
        show.json({"refused": [asdict(refusal) | {"meaning": _meaning(refusal)} for refusal in found]})
        return
    for refusal in found:
        told: dict[str, Any] = asdict(refusal) | {"meaning": _meaning(refusal)}
        for name, value in told.items():
            show.say(f"{name.replace('_', ' ')}: {'-' if value in (None, '') else value}")


@app.command("release")
def release_(
    context: typer.Context,
    *,
    hashes: Annotated[list[str] | None, typer.Argument(help="Beginnings of hashes, as `list` shows them.")] = None,
    reason: Reason = None,
    dataset: Annotated[str | None, typer.Option(help="Take them into this dataset instead of their own.")] = None,
    json: Json = False,
) -> None:
    """Give objects to ingest once more: those named, or all that were refused for a reason.

    What would be refused for the same reason is in quarantine again soon: change the limit or the rule before.
    """
    if bool(hashes) == (reason is not None):
        raise WrongUsage("name hashes, or a reason with --reason")
    client = Client(context.obj)
    to = None if dataset is None else names.name(dataset)
    reason = _known_reason(reason)
    given, gone = asyncio.run(_released(hashes or [], reason, to, objects=Bucket(client)))
    if json:
        show.json({"released": given, "not_released": gone})
    else:
        show.paths(client.url(key) for key in given.values())
        show.say(f"released {len(given)} objects")
    if gone:
        raise Refused("; ".join(gone.values()))


async def _released(
    hashes: list[str], reason: str | None, to: str | None, *, objects: Bucket
) -> tuple[dict[str, str], dict[str, str]]:
    """Release what is meant; returns the new keys, and what is gone with the reason, both by hash."""
    given, gone = {}, {}
    for refusal in await chosen(hashes, reason=reason, released=bool(hashes), objects=objects):
        try:
            given[refusal.sha256] = await release(refusal, dataset=to, objects=objects, now=now())
        except Refused as error:  # the others are not to wait for it
            gone[refusal.sha256] = str(error)
    return given, gone


def table(found: list[Refusal]) -> Table:
    """Make the table of what is in quarantine."""
    made = Table(title="Quarantine", title_justify="left")
    for column in ("object", "reason", "at", "dataset", "time", "bytes", "released"):
        made.add_column(column, justify="right" if column == "bytes" else "left", overflow="fold")
    for refusal in found:
        size = "in incoming/" if refusal.bytes is None else str(refusal.bytes)
        cells = refusal.sha256[:SHORT], refusal.reason_code, refusal.place, refusal.dataset, refusal.time
        made.add_row(*map(escape, cells), size, refusal.released or "")
    return made


def _meaning(refusal: Refusal) -> str:
    return REASONS.get(refusal.reason_code, "")
