"""`radqueue train` and `generate`: a model, and images of it."""

from pathlib import Path
from typing import Annotated

import typer

from cli import show
from cli.client import Client
from cli.exits import EXIT_FAILED, EXIT_USAGE, end
from cli.options import Json
from cli.training import requests
from cli.training.following import Training
from cli.training.generate import Format, opened
from cli.training.generate import generate as generated

MAX_SEED = 2**63 - 1


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
        end("--out needs --wait: there is nothing to write before the end", EXIT_USAGE)
    request = requests.training_request(
        dataset,
        request_id=request_id,
        threshold=threshold,
        max_rounds=max_rounds,
        n_images=images,
        overrides=dict(map(requests.parse_override, overrides or [])),
        data_uri=data_uri,
        classes=requests.parse_classes(classes or []),
        metric=metric,
        min_coverage=min_coverage,
        strategy=strategy,
    )
    client = Client(context.obj)
    requests.check(client, request)
    if out:
        out.mkdir(parents=True, exist_ok=True)  # what cannot be written to is better told now than after hours
    training = Training(client, request)
    requests.send_training(client, request)
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
