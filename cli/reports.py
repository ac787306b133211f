"""`radqueue report`: the report of a month, asked for and fetched."""

import tempfile
import webbrowser
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from cli import show
from cli.client import Client, now
from cli.options import Json
from cli.waiting import until
from shared.messages import ReportRequest, ReportRequested
from shared.operations.refused import WrongUsage


def report(
    context: typer.Context,
    *,
    month: Annotated[str | None, typer.Argument(help="YYYY-MM, in UTC; without it, this month so far.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write the page and its numbers to.")] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait.")] = 120,
    json: Json = False,
) -> None:
    """Make the report of a month and show it."""
    asked = month_of(month)
    client = Client(context.obj)
    made = make_report(client, asked, timeout_s=timeout)
    page = client.url(f"reports/{asked}.html")
    if out or open_:
        page = str(save_report(client, asked, out or Path(tempfile.mkdtemp(prefix="radqueue-")))[-1].resolve())
    if json:
        show.json(made | {"page": page})
    else:
        show.report(made)
        show.say(f"Page: {page}")
    if open_ and not webbrowser.open(Path(page).as_uri()):
        show.progress("there is no browser here to open it in")


def make_report(client: Client, month: str, *, timeout_s: float) -> dict[str, Any]:
    """Ask for the report of a month, and return it when it is there. Raises `Refused` when time is up."""
    request = ReportRequest(month=month)
    key = f"reports/{month}.json"
    before = (client.get_json(key) or {}).get("generated_at")
    client.send(ReportRequested.of(month, request, time=now()))

    def newer() -> dict[str, Any] | None:
        found = client.get_json(key)
        return found if found is not None and found["generated_at"] != before else None

    why = f"the report of {month} was not made; is the reporter running? (`radqueue status`)"
    return until(newer, timeout_s, lambda: why)


def save_report(client: Client, month: str, out: Path) -> list[Path]:
    """Write a report's numbers and its page, which links to them, into `out`, and return the paths."""
    paths = [out / f"{month}.{ending}" for ending in ("json", "html")]
    for path in paths:
        client.download(f"reports/{path.name}", path)
    return paths


def month_of(text: str | None) -> str:
    """Return the month, YYYY-MM; without one, this month in UTC. Raises `WrongUsage`."""
    this = f"{now():%Y-%m}"
    try:
        asked = ReportRequest(month=text).month or this
    except ValidationError:
        raise WrongUsage(f"{text} is no month: write YYYY-MM") from None
    if asked > this:
        raise WrongUsage(f"{asked} has not begun")
    return asked
