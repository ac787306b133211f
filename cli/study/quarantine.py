"""`radqueue quarantine`: what ingest refused, why, and giving it to ingest once more.

To release an object is to copy it to `incoming/<dataset>/released/<sha256>`, where ingest finds it like any upload:
with other limits or other rules it may take it now. If it refuses it again, the object is in quarantine again, under
the same hash with the new reason. Nothing is deleted: `released.json` says which refusal was answered, and what is
released is not listed any more. An object that was too large to be moved into quarantine is found where it was
uploaded.

IAM, beyond `cli/client.py`: s3:GetObject and s3:PutObject on `quarantine/*`.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from cli import orders, show
from cli.client import Client, Refused, WrongUsage, now
from services.ingest.reasons import REASONS
from shared import keys
from shared.documents.uploads import StoredRelease
from shared.keys import QUARANTINE, Quarantined

SHORT = 12
"""Digits of a hash that people are shown, and more than enough to name one."""

app = typer.Typer(no_args_is_help=True, help="What was uploaded and refused.")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


@dataclass(frozen=True, slots=True)
class Refusal:
    """One object in quarantine."""

    sha256: str
    reason_code: str
    place: str
    dataset: str
    upload_key_sha256: str
    time: str
    bytes: int | None
    """None where the object is still where it was uploaded."""
    released: str | None
    """When this refusal was answered by a release."""


def refusals(client: Client, prefix: str = "") -> Iterator[Refusal]:
    """Yield what is in quarantine, by hash, which begins with `prefix`."""
    sizes = {stored.key: stored.size for stored in client.stored(f"{QUARANTINE}{prefix}")}
    for sha256 in dict.fromkeys(key.removeprefix(QUARANTINE).partition("/")[0] for key in sizes):
        place = Quarantined(sha256)
        reason = client.read(place.reason) if place.reason.key in sizes else None
        if reason is None:
            continue
        answered = client.read(place.released) if place.released.key in sizes else None
        yield Refusal(
            sha256=sha256,
            reason_code=reason.reason_code,
            place=reason.place,
            dataset=reason.dataset,
            upload_key_sha256=reason.upload_key_sha256,
            time=reason.time.isoformat(),
            bytes=sizes.get(place.object),
            released=answered.time.isoformat() if answered and answered.reason == reason else None,
        )


def chosen(
    client: Client, hashes: list[str], *, reason: str | None, dataset: str | None, released: bool
) -> list[Refusal]:
    """Return what is meant: hashes or their beginnings, or else all with the reason and of the dataset.

    Raises:
        Refused: nothing is in quarantine under a hash.
    """
    found = [refusal for prefix in hashes or [""] for refusal in _under(client, prefix)]
    return [
        refusal
        for refusal in found
        if reason in {None, refusal.reason_code}
        and dataset in {None, refusal.dataset}
        and (released or refusal.released is None)
    ]


def _under(client: Client, prefix: str) -> list[Refusal]:
    if not re.fullmatch(r"[0-9a-f]{0,64}", prefix):
        raise WrongUsage("a hash is made of the digits 0 to 9 and a to f; `radqueue quarantine list` shows them")
    found = list(refusals(client, prefix))
    if prefix and len(found) != 1:
        raise Refused(f"{len(found) or 'no'} objects in quarantine begin with {prefix}")
    return found


def release(client: Client, refusal: Refusal, dataset: str | None = None) -> str:
    """Give the object to ingest once more; returns the key that it has now.

    Raises:
        Refused: the object is gone.
    """
    place = Quarantined(refusal.sha256)
    source = place.object if refusal.bytes is not None else _uploaded(client, refusal)
    to = keys.released(dataset or refusal.dataset, refusal.sha256)
    # Before the copy: a refusal that comes of it is younger, and no answer to it is there.
    if (reason := client.read(place.reason)) is not None:
        client.store(place.released, StoredRelease(time=now(), reason=reason))
    client.copy(source, to)
    return to


def _uploaded(client: Client, refusal: Refusal) -> str:
    """Find the object that stayed where it was: only the hash of its key is known."""
    for stored in client.stored(keys.INCOMING):
        if hashlib.sha256(stored.key.encode()).hexdigest() == refusal.upload_key_sha256:
            return stored.key
    raise Refused(f"the object {refusal.sha256[:SHORT]} stayed where it was uploaded, and is gone from there")


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
    found = chosen(Client(context.obj), [], reason=_known_reason(reason), dataset=dataset, released=released)
    if json:
        show.json({"refused": [asdict(refusal) for refusal in found]})
    elif found:
        show.out.print(table(found))
    else:
        show.say("nothing is in quarantine")


@app.command("show")
def show_(context: typer.Context, *, hashes: Hashes, json: Json = False) -> None:
    """Show why objects were refused, and what can be done."""
    found = chosen(Client(context.obj), hashes, reason=None, dataset=None, released=True)
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
    to = None if dataset is None else orders.name(dataset)
    found = chosen(client, hashes or [], reason=_known_reason(reason), dataset=None, released=bool(hashes))
    given, gone = {}, {}
    for refusal in found:
        try:
            given[refusal.sha256] = release(client, refusal, to)
        except Refused as error:  # the others are not to wait for it
            gone[refusal.sha256] = str(error)
    if json:
        show.json({"released": given, "not_released": gone})
    else:
        show.paths(client.url(key) for key in given.values())
        show.say(f"released {len(given)} objects")
    if gone:
        raise Refused("; ".join(gone.values()))


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
