"""`radqueue`: the command line.

See EXIT_CODES.
"""

import io
import os
import shlex
import signal
import sys
import tempfile
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Never

import typer
from typer.core import TyperGroup

from cli import orders, show
from cli.client import QUEUES, Client, Refused, WrongUsage
from cli.map import commands
from cli.study import ingest_check, quarantine
from cli.training.generate import Format, opened
from cli.training.generate import generate as generated
from deploy.local.stack import SERVICES, Stack, StackFailed, StackMisconfigured, read_env
from services.inference.reasons import several
from shared.config import Misconfigured

EXIT_FAILED, EXIT_USAGE, EXIT_SIGNAL = 1, 2, 128
MAX_SEED = 2**63 - 1
EXIT_CODES = (
    "Exit codes: 0 done; 1 it could not be had, and the text says why (also: one file of many was refused, a MAP "
    "failed, a training was not approved); 2 wrong usage or settings; 130 and 143 ended by a signal."
)


class _Group(TyperGroup):
    """Tells expected failures in one sentence, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a path may have bytes that are no text
        try:
            return super().invoke(ctx)
        except (WrongUsage, Misconfigured, StackMisconfigured) as error:
            _end(str(error), EXIT_USAGE)
        except (Refused, StackFailed) as error:
            _end(str(error), EXIT_FAILED)
        except OSError as error:
            if error.filename is None:
                raise
            _end(f"{error.filename}: {error.strerror}", EXIT_FAILED)


def _end(why: str, code: int) -> Never:
    show.fail(why)
    raise typer.Exit(code)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Uploaded medical images become AI results, training requests become evaluated models.",
    epilog=EXIT_CODES,
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


def _version(asked: bool) -> None:  # noqa: FBT001 - typer calls it so
    if asked:
        show.say(version("radqueue"))
        raise typer.Exit


def _quoted(path: Path) -> str:
    """Return a path as it can be pasted into a shell anywhere."""
    return shlex.quote(str(path.resolve()))


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
            _end(f"cannot read {env} ({type(error).__name__}); `radqueue up` writes it", EXIT_USAGE)
    context.obj = environ


@app.command()
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
        _end(f"--service: no such service: {', '.join(sorted(unknown))}; there are {', '.join(SERVICES)}", EXIT_USAGE)
    stack = Stack(directory, port=port, services=services, environ=context.obj, say=show.progress)
    try:
        with signals_end(stack), stack:
            show.say(f"ready {stack.endpoint_url}")
            show.say(f"To use it from another terminal:\n  set -a; . {_quoted(directory / 'local.env')}; set +a")
            show.say(f"Logs: {stack.logs}. ^C ends everything; buckets and queues are in memory and end with it.")
            stack.wait_end()
            stack.check()
    except Signalled:
        raise typer.Exit(0) from None


@app.command()
def status(context: typer.Context, *, json: Json = False) -> None:
    """Show the queues, and what was done lately."""
    from cli import recent_events  # noqa: PLC0415 - each command loads what it needs

    found = recent_events.status(Client(context.obj))
    if json:
        show.json(found)
    else:
        show.status(found)


@app.command()
def upload(
    context: typer.Context,
    *,
    paths: Annotated[
        list[Path], typer.Argument(help="Files, zips, folders without their hidden files.", show_default=False)
    ],
    dataset: Annotated[str, typer.Option(help="What the images belong to; trainings are of a dataset.")] = "default",
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the results.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait.")] = 3600,
    json: Json = False,
) -> None:
    """Upload images; what is there already is no harm, and its results are found at once."""
    from cli.study import journey, uploads  # noqa: PLC0415

    found = uploads.collect(paths, orders.name(dataset))
    client = Client(context.obj)
    with show.bytes_progress(sum(upload.size for upload in found), several(len(found), "file")) as told:
        uploads.send(client, found, told)
    told_by_upload: dict[str, Any] = {
        "dataset": dataset,
        "uploads": [{"path": str(upload.path), "key": upload.key, "bytes": upload.size} for upload in found],
    }
    ok, unfinished = True, None
    if wait:
        followed = journey.Journey(client, found)
        with show.live(lambda: show.journey_table(followed), lambda: show.journey_lines(followed)) as seen:
            try:
                followed.wait(timeout, lambda _: seen())
            except Refused as error:  # what came to an end is told nevertheless
                unfinished = error
        told_by_upload |= followed.summary()
        ok = not followed.all_rejections and not any(series.stage == "failed" for series in followed.series)
    if json:
        show.json(told_by_upload)
    elif wait:
        show.journey(followed)
        ended = {series.study_uid: series.stage for series in followed.series if series.stage in {"pushed", "failed"}}
        if studies := sorted(ended):
            logs = ", and the logs of what failed" if "failed" in ended.values() else ""
            show.say(f"To fetch the results{logs}:")
            show.paths(f"radqueue results {study} --out ./out" for study in studies)
    else:
        sent = several(len(found), "file")
        show.say(f"uploaded {sent} to dataset {dataset}; `radqueue status` shows what becomes of them")
    if unfinished is not None:
        raise unfinished
    if not ok:
        _end("not everything came to a result", EXIT_FAILED)


@app.command()
def results(
    context: typer.Context,
    *,
    study: Annotated[str, typer.Argument(help="Its StudyInstanceUID.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    json: Json = False,
) -> None:
    """Fetch what the MAPs made of a study: the newest outputs on each of its series, or why there are none."""
    found = orders.fetch_results(Client(context.obj), study, out)
    failed = [result for result in found if result["outcome"] == "failed"]
    if json:
        show.json(found)
    else:
        for result in found:
            noticed = f", warnings: {', '.join(result['warnings'])}" if result["warnings"] else ""
            show.say(f"{result['map']}: {result['outcome']}, {several(len(result['files']), 'file')}{noticed}")
            show.paths(result["files"])
        show.warnings(code for result in found for code in result["warnings"])
        show.failures(failed)
    if failed:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def retry(
    context: typer.Context,
    *,
    study: Annotated[str, typer.Argument(help="Its StudyInstanceUID.")],
    wait: Annotated[bool, typer.Option("--wait", help="Wait for what comes of it.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait.")] = 3600,
    json: Json = False,
) -> None:
    """Run what failed of a study again, by the versions of the MAPs that serve now; what came to a result stays."""
    client = Client(context.obj)
    failed = orders.retry(client, study)
    came = orders.wait_retried(client, study, failed, timeout) if wait else []
    again = [one for one in came if one["outcome"] == "failed"]
    if json:
        asked = [{"series": series, "map": name} for series, name in failed]
        show.json({"asked": asked, "results": came})
    else:
        for series, name in failed:
            show.say(f"asked for {name} again on {series}")
        for one in came:
            show.say(f"{one['map']}: {one['outcome']}")
        show.failures(again)
        show.say("To fetch what comes of it:")
        show.paths([f"radqueue results {study} --out ./out"])
    if again:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def train(
    context: typer.Context,
    *,
    dataset: Annotated[str, typer.Option(help="Which images to learn from.")],
    threshold: Annotated[
        float | None, typer.Option(help="Approved at or below this relative distance, 2 without it, or --metric.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Of the threshold: relative_fd, distance (FD, or FID) or kid.")
    ] = None,
    min_coverage: Annotated[
        float | None, typer.Option(help="Approved only with this share of the coverage of other real images.")
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="What chooses the parameters of a further round: rules, or optuna.")
    ] = None,
    max_rounds: Annotated[int | None, typer.Option(help="Give up after so many rounds.")] = None,
    images: Annotated[int | None, typer.Option(help="How many images to generate.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="A parameter of config.js to start with, as name=value.")
    ] = None,
    data_uri: Annotated[
        str | None, typer.Option(help="Where the arrays lie, if not in the bucket: s3://… or gs://bucket/folder.")
    ] = None,
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="A class and the dataset that has its images, as name=dataset.")
    ] = None,
    request_id: Annotated[str | None, typer.Option(help="The same id again is the same training, resumed.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its end.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="With --wait: a folder to write the model, its images and its rounds to.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait.")] = 24 * 3600,
    json: Json = False,
) -> None:
    """Train a generative model on a dataset, round after round, until its images are good enough."""
    if out and not wait:
        _end("--out needs --wait: there is nothing to write before the end", EXIT_USAGE)
    request = orders.training_request(
        dataset,
        request_id=request_id,
        threshold=threshold,
        max_rounds=max_rounds,
        n_images=images,
        overrides=dict(map(orders.parse_override, overrides or [])),
        data_uri=data_uri,
        classes=orders.parse_classes(classes or []),
        metric=metric,
        min_coverage=min_coverage,
        strategy=strategy,
    )
    client = Client(context.obj)
    orders.require_same(client, request)
    orders.require_data(client, request)
    if out:
        out.mkdir(parents=True, exist_ok=True)  # what cannot be written to is better told now than after hours
    training = orders.Training(client, request)
    orders.send_training(client, request)
    if not wait:
        asked = {"request_id": request.request_id, "state": "requested"}
        show.json(asked) if json else show.say(f"requested {request.request_id}")
        return
    with show.live(lambda: show.training_table(training), lambda: show.training_lines(training)) as seen:
        training.wait(timeout, lambda _: seen())
    places = [str(path) for path in training.fetch(out)] if out else [client.url(key) for key in training.keys]
    if json:
        show.json(training.summary() | {"places": places})
    else:
        show.training(training)
        show.paths(places)
    raise typer.Exit(0 if training.approved else EXIT_FAILED)


@app.command()
def generate(
    context: typer.Context,
    *,
    model: Annotated[str, typer.Argument(help="The id of a training's request, or a folder that train --out wrote.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    n: Annotated[int, typer.Option("--n", min=1, max=10_000, help="How many images.")] = 16,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=MAX_SEED, help="Of the noise; without it, that of the training's own images."),
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="A PNG or DICOM file per image, or one array.")] = Format.PNG,
    class_name: Annotated[str | None, typer.Option("--class", help="Only images of this class.")] = None,
    json: Json = False,
) -> None:
    """Make images of a finished model, on this machine."""
    with (
        opened(model, context.obj) as folder,
        show.count_progress(2 * n, f"{n} images: generated, written") as told,
    ):
        made = generated(folder, out, n=n, seed=seed, form=form, class_name=class_name, told=told)
    if json:
        show.json(made)
        return
    if not made["approved"]:
        show.progress("this model was not approved: read its card.md before you use the images")
    show.say(f"{n} images of {made['model']}, seed {made['seed']}: {out}")


@app.command()
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
    asked = orders.month(month)
    client = Client(context.obj)
    made = orders.make_report(client, asked, timeout_s=timeout)
    page = client.url(f"reports/{asked}.html")
    if out or open_:
        page = str(orders.save_report(client, asked, out or Path(tempfile.mkdtemp(prefix="radqueue-")))[-1].resolve())
    if json:
        show.json(made | {"page": page})
    else:
        show.report(made)
        show.say(f"Page: {page}")
    if open_ and not webbrowser.open(Path(page).as_uri()):
        show.progress("there is no browser here to open it in")


@app.command()
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
        _end(f"--data: {data} does not exist", EXIT_USAGE)
    stack = Stack(directory or fresh_folder(), environ=context.obj, say=show.progress)
    ran = Demo(stack, data)
    try:
        with signals_end(stack):
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


app.add_typer(commands.app, name="map")
app.add_typer(quarantine.app, name="quarantine")
dlq_app = typer.Typer(no_args_is_help=True, help="What could not be handled, and why.")
app.add_typer(dlq_app, name="dlq")


@dlq_app.command("list")
def dlq_list(
    context: typer.Context,
    queue: Annotated[str | None, typer.Argument(help="ingest, inference, training or reporting; all, without.")] = None,
    *,
    json: Json = False,
) -> None:
    """Show what is in the dead-letter queues, by reason; everything stays there."""
    from cli import dlq  # noqa: PLC0415

    found = dlq.listed(Client(context.obj), [queue] if queue else QUEUES)
    if json:
        show.json({"queues": found})
        return
    for one in found:
        show.out.print(dlq.table(one) if one["reasons"] else f"{one['dead_letter_queue']}: no messages")


@app.command()
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
    from cli import dlq  # noqa: PLC0415

    client = Client(context.obj)
    moving = dlq.Redrive(client, dlq.place_of(client, queue), reason, at_most, dry_run, show.progress)
    moving.run()
    show.json(moving.summary()) if json else show.say(moving.verdict)


app.command("ingest-check")(ingest_check.command)


class Signalled(BaseException):
    """SIGINT, SIGTERM or SIGHUP came."""

    def __init__(self, number: int) -> None:
        """Remember which."""
        super().__init__(number)
        self.exit_code = EXIT_SIGNAL + number


@contextmanager
def signals_end(stack: Stack) -> Iterator[None]:
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


if __name__ == "__main__":
    app(prog_name="radqueue")
