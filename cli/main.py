"""`radqueue`: the command line, put together of the commands that its subfolders hold.

See EXIT_CODES.
"""

import io
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cli import dlq, on_this_machine, recent_events, reports, show
from cli.client import Client
from cli.exits import EXIT_CODES, EXIT_FAILED, EXIT_USAGE, end
from cli.map import commands as map_commands
from cli.options import Json
from cli.study import commands as study_commands
from cli.study import ingest_check, quarantine
from cli.training import commands as training_commands
from deploy.local.stack import StackFailed, StackMisconfigured, read_env
from shared.config import Misconfigured
from shared.operations.refused import Refused, WrongUsage


class _Group(TyperGroup):
    """Tells expected failures in one sentence, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a path may have bytes that are no text
        try:
            return super().invoke(ctx)
        except (WrongUsage, Misconfigured, StackMisconfigured) as error:
            end(str(error), EXIT_USAGE)
        except (Refused, StackFailed) as error:
            end(str(error), EXIT_FAILED)
        except OSError as error:
            if error.filename is None:
                raise
            end(f"{error.filename}: {error.strerror}", EXIT_FAILED)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Uploaded medical images become AI results, training requests become evaluated models.",
    epilog=EXIT_CODES,
)


def _version(asked: bool) -> None:  # noqa: FBT001 - typer calls it so
    if asked:
        show.say(version("radqueue"))
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    *,
    env: Annotated[
        Path | None, typer.Option(help="Read the environment from this file, such as .radqueue/local.env.")
    ] = None,
    version: Annotated[  # noqa: ARG001 - its callback answers
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    environ = dict(os.environ)
    if env is not None:
        try:
            environ |= read_env(env)
        except (OSError, UnicodeDecodeError) as error:
            end(f"cannot read {env} ({type(error).__name__}); `radqueue up` writes it", EXIT_USAGE)
    context.obj = environ


def status(context: typer.Context, *, json: Json = False) -> None:
    """Show the queues, and what was done lately."""
    found = recent_events.status(Client(context.obj))
    if json:
        show.json(found)
    else:
        show.status(found)


app.command()(on_this_machine.up)
app.command()(status)
app.command()(study_commands.upload)
app.command()(study_commands.results)
app.command()(study_commands.retry)
app.command()(training_commands.train)
app.command()(training_commands.generate)
app.command()(reports.report)
app.command()(on_this_machine.demo)
app.add_typer(map_commands.app, name="map")
app.add_typer(quarantine.app, name="quarantine")
app.add_typer(dlq.app, name="dlq")
app.command()(dlq.redrive)
app.command("ingest-check")(ingest_check.command)


if __name__ == "__main__":
    app(prog_name="radqueue")
