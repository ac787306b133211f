"""`radqueue map …`: check a MAP, build it into an image, run it by hand, look into it."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from cli import show
from cli.options import Json

BASE = "docker.io/library/python:3.12-slim-bookworm"
MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "error": "[bold red]error[/]"}

app = typer.Typer(no_args_is_help=True, help="Check a MAP, build it into an image, run it by hand, look into it.")
Source = Annotated[
    str, typer.Argument(help="A folder, a Python file, an unpacked MAP, or an image with its tag.", show_default=False)
]
Python = Annotated[str | None, typer.Option(help="The interpreter that has what a folder's program imports.")]
Models = Annotated[Path | None, typer.Option(help="Its models, where they do not lie beside it.")]
Isolation = Annotated[str, typer.Option(help="warm, or process: the MAP's own command in a process of its own.")]
Deadline = Annotated[float | None, typer.Option(min=0.001, help="Wall seconds for the study.")]
Log = Annotated[Path | None, typer.Option(help="Write what it prints to this file; it may name the patient.")]


@app.command()
def check(
    context: typer.Context,
    *,
    source: Source,
    study: Annotated[Path | None, typer.Option("--input", help="Run it on the files of this folder, too.")] = None,
    python: Python = None,
    models: Models = None,
    isolation: Isolation = "warm",
    deadline: Deadline = None,
    outputs: Annotated[
        list[str] | None,
        typer.Option(help="What it must write, as in maps.yaml: SEG=1; may be repeated; any: other files will do."),
    ] = None,
    log: Log = None,
    json: Json = False,
) -> None:
    """Tell whether a MAP will work here, and what to do where it will not; exit code 1 where it will not."""
    from cli.map import actions  # noqa: PLC0415 - each command loads what it needs

    findings = actions.check(
        context.obj,
        source,
        study,
        way=actions.way_of(context.obj, isolation, deadline),
        least=actions.least_of(outputs or []),
        log=log,
        say=show.progress,
        python=python,
        models=models,
    )
    failed = any(one.level == "error" for one in findings)
    if json:
        show.json({"source": source, "ok": not failed, "findings": [asdict(one) for one in findings]})
    else:
        for one in findings:
            show.out.print(f"{MARKS[one.level]} {one.check}: {escape(one.text)}")
            if one.level != "ok":
                show.out.print(f"   {escape(one.remedy)}")
    raise typer.Exit(1 if failed else 0)


@app.command()
def run(
    context: typer.Context,
    *,
    source: Source,
    study: Annotated[Path, typer.Option("--input", help="Folder with the files of the study.")],
    output: Annotated[Path, typer.Option(help="Folder that gets what it writes.")],
    python: Python = None,
    models: Models = None,
    isolation: Isolation = "warm",
    deadline: Deadline = None,
    log: Log = None,
    json: Json = False,
) -> None:
    """Run a MAP on one study, as the worker does; exit code 1 where it failed."""
    from cli.map import actions  # noqa: PLC0415

    way = actions.way_of(context.obj, isolation, deadline)
    told = actions.run(context.obj, source, study, output, way=way, log=log, python=python, models=models)
    if json:
        show.json(told)
    else:
        at = " ".join(part for part in (told["error_type"], told["where"]) if part)
        show.say(f"{told['outcome']} in {told['duration_s']:.1f} s on {told['device']}{f': {at}' if at else ''}")
        if told["why"]:
            show.say(f"  {told['why']}. {told['remedy']}")
            show.say(f"  What it printed: {log}" if log is not None else "  --log FILE writes what it prints.")
        show.paths(told["files"])
    raise typer.Exit(0 if told["outcome"] in {"ran", "no_matching_series"} else 1)


@app.command()
def build(
    context: typer.Context,
    *,
    folder: Annotated[Path, typer.Argument(help="The application's folder.")],
    tag: Annotated[str, typer.Option(help="Name and tag of the image.")],
    base: Annotated[str, typer.Option(help="Image with Python to build on.")] = BASE,
    models: Models = None,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds for a study, written to app.json.")] = 0,
    install: Annotated[bool, typer.Option(help="Install requirements.txt, or not, where the base has it all.")] = True,
    push: Annotated[bool, typer.Option("--push", help="Push the image to its registry.")] = False,
    build_context: Annotated[
        Path | None, typer.Option("--context", help="Keep what the image is built of in this new folder.")
    ] = None,
    json: Json = False,
) -> None:
    """Build a MAP image of an application folder, by docker, podman or buildah."""
    from cli.map import actions  # noqa: PLC0415

    told = actions.build(
        context.obj,
        folder,
        tag,
        base=base,
        models=models,
        timeout_s=timeout,
        install=install,
        context=build_context,
        push=push,
        say=show.progress,
    )
    if json:
        show.json(told)
    elif told["built"]:
        show.say(f"built {tag} on {told['base']}" + (f", pushed as {told['pushed']}" if push else ""))
    else:
        place = shlex.quote(told["context"])
        show.say(f"wrote what to build to {place}; where there is docker: docker build --tag {tag} {place}")


@app.command("show")
def show_(context: typer.Context, *, source: Source, json: Json = False) -> None:
    """Show what the manifests of a MAP say."""
    from cli.map import actions  # noqa: PLC0415

    told = actions.describe(context.obj, source)
    if json:
        show.json(told)
        return
    for label, value in described(told):
        show.say(f"{label:<18}{value}")


def described(told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what `map show` tells, for people: a label and a text each; what a MAP does not say is left out."""
    sizes = {name: told[f"{name}_bytes"] for name in ("memory", "gpu_memory", "shared_memory")}
    shown = {
        **{name: told[name] for name in ("digest", "application", "models")},
        "command": shlex.join(told["command"]),
        "timeout": f"{told['timeout_s']:g} s" if told["timeout_s"] else None,
        "processors": f"{told['cpu']:g}" if told["cpu"] else None,
        "GPUs": told["gpu"],
        **{name.replace("_", " "): f"{size / (1 << 30):.3g} GiB" for name, size in sizes.items() if size},
        "not understood": "; ".join(told["unknown"]),
        **{name: told.get(name) for name in ("image", "user")},
    }
    yield from ((label, str(value)) for label, value in shown.items() if value)
    yield from (("label", f"{name}={value}") for name, value in sorted(told.get("labels", {}).items()))


@app.command()
def env(context: typer.Context, *, source: Source, json: Json = False) -> None:
    """Show the environment that a MAP's program gets."""
    from cli.map import actions  # noqa: PLC0415

    variables = actions.variables(context.obj, source)
    if json:
        show.json(variables)
        return
    for name, value in sorted(variables.items()):
        show.say(f"{name}={value}")


@app.command()
def extract(
    context: typer.Context,
    *,
    image: Annotated[str, typer.Argument(help="An image with its tag.")],
    out: Annotated[Path, typer.Option(help="New folder for app, models, config and docs.")],
    json: Json = False,
) -> None:
    """Unpack a MAP image, without running it; the folder is a source like the image."""
    from cli.map import actions  # noqa: PLC0415

    written = actions.extract(context.obj, image, out)
    show.json({"written": written}) if json else show.paths(written)


@app.command()
def route(
    context: typer.Context,
    *,
    study: Annotated[str, typer.Argument(help="A StudyInstanceUID that is stored, or a folder of DICOM files.")],
    maps: Annotated[str | None, typer.Option(help="The routing table: a file, or s3://bucket/key.")] = None,
    json: Json = False,
) -> None:
    """Tell which MAPs would take which series of a study; nothing is run."""
    from cli.map import route  # noqa: PLC0415 - each command loads what it needs

    found = route.route(context.obj, study, maps)
    show.json(found) if json else route.show_routes(found)
