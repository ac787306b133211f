"""`radqueue up` and `demo`: the local AWS and the services, run here until a signal ends them."""

import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from cli import show
from cli.exits import EXIT_FAILED, EXIT_SIGNAL, EXIT_USAGE, end
from cli.options import Json
from deploy.local.stack import SERVICES, Stack


def up(
    context: typer.Context,
    directory: Annotated[Path, typer.Option("--dir", help="Where local.env, logs and results are kept.")] = Path(
        ".radqueue"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the local AWS; 0 takes any free one.")] = 4566,
    service: Annotated[list[str] | None, typer.Option(help="Run only this service; may be repeated.")] = None,
) -> None:
    """Run radqueue on this machine: the local AWS and the four services, until ^C."""
    services = tuple(dict.fromkeys(service or SERVICES))
    if unknown := set(services) - set(SERVICES):
        end(f"--service: no such service: {', '.join(sorted(unknown))}; there are {', '.join(SERVICES)}", EXIT_USAGE)
    stack = Stack(directory, port=port, services=services, environ=context.obj, say=show.progress)
    try:
        with signalsend(stack), stack:
            show.say(f"ready {stack.endpoint_url}")
            show.say(f"To use it from another terminal:\n  set -a; . {_quoted(directory / 'local.env')}; set +a")
            show.say(f"Logs: {stack.logs}. ^C ends everything; buckets and queues are in memory and end with it.")
            stack.wait_end()
            stack.check()
    except Signalled:
        raise typer.Exit(0) from None


def demo(
    context: typer.Context,
    *,
    data: Annotated[Path | None, typer.Option(help="Your own images, instead of made-up patients.")] = None,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where to run; without it, a new folder in .radqueue.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep radqueue running at the end, until ^C.")] = False,
    json: Json = False,
) -> None:
    """Run both journeys on this machine, upload to result and training to model, and show what came of them."""
    from cli.demo import Demo, fresh_folder  # noqa: PLC0415

    if data is not None and not data.exists():
        end(f"--data: {data} does not exist", EXIT_USAGE)
    stack = Stack(directory or fresh_folder(), environ=context.obj, say=show.progress)
    ran = Demo(stack, data)
    try:
        with signalsend(stack):
            try:
                ran.run()
                show.json(ran.summary()) if json else show.demo(ran)
                if keep and not stack.failure:
                    env = _quoted(stack.directory / "local.env")
                    show.progress(f"still running: radqueue --env {env} status; ^C ends it")
                    stack.wait_end()
            finally:
                stack.stop()
    except Signalled as signalled:
        raise typer.Exit(0 if keep and ran.done else signalled.exit_code) from None
    raise typer.Exit(EXIT_FAILED if ran.failures else 0)


class Signalled(BaseException):
    """SIGINT, SIGTERM or SIGHUP came."""

    def __init__(self, number: int) -> None:
        """Remember which."""
        super().__init__(number)
        self.exit_code = EXIT_SIGNAL + number


@contextmanager
def signalsend(stack: Stack) -> Iterator[None]:
    """Raise `Signalled` at the first signal that asks to end; at the second, end the processes without their grace."""
    came: list[int] = []

    def on_signal(number: int, _: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            stack.kill()
            return
        show.progress("ending; once more ends at once")
        raise Signalled(number)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _quoted(path: Path) -> str:
    """Return a path as it can be pasted into a shell anywhere."""
    return shlex.quote(str(path.resolve()))
