"""`radqueue report`: the report of a month, asked for and fetched."""

import tempfile
import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from cli import show
from cli.client import Client, now
from cli.options import Json
from cli.waiting import until
from shared import keys
from shared.documents.reports import Report
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
    page = client.url(keys.report_page(asked))
    if out or open_:
        page = str(save_report(client, asked, out or Path(tempfile.mkdtemp(prefix="radqueue-")))[-1].resolve())
    if json:
        show.json(made.model_dump(mode="json") | {"page": page})
    else:
        show.report(made)
        show.say(f"Page: {page}")
    if open_ and not webbrowser.open(Path(page).as_uri()):
        show.progress("there is no browser here to open it in")


def make_report(client: Client, month: str, *, timeout_s: float) -> Report:
    """Ask for the report of a month, and return it when it is there. Raises `Refused` when time is up."""
    request = ReportRequest(month=month)
    document = keys.report(month)
    before = client.read(document)
    client.send(ReportRequested.of(month, request, time=now()))

    def newer() -> Report | None:
        found = client.read(document)
        return found if found is not None and (before is None or found.generated_at != before.generated_at) else None

    why = f"the report of {month} was not made; is the reporter running? (`radqueue status`)"
    return until(newer, timeout_s, lambda: why)


def save_report(client: Client, month: str, out: Path) -> list[Path]:
    """Write a report's numbers and its page, which links to them, into `out`, and return the paths."""
    paths = {key: out / Path(key).name for key in (keys.report(month).key, keys.report_page(month))}
    for key, path in paths.items():
        client.download(key, path)
    return list(paths.values())


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
