"""`radqueue upload`, `results` and `retry`: a study on its way in, and what came of it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cli import show
from cli.client import Client
from cli.exits import EXIT_FAILED, end
from cli.names import name
from cli.options import Json
from cli.study import journey, uploads
from cli.study import results as fetched
from services.inference.reasons import several
from shared.operations.refused import Refused


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
    found = uploads.collect(paths, name(dataset))
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
        end("not everything came to a result", EXIT_FAILED)


def results(
    context: typer.Context,
    *,
    study: Annotated[str, typer.Argument(help="Its StudyInstanceUID.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    json: Json = False,
) -> None:
    """Fetch what the MAPs made of a study: the newest outputs on each of its series, or why there are none."""
    found = fetched.fetch_results(Client(context.obj), study, out)
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
    failed = fetched.retry(client, study)
    came = fetched.wait_retried(client, study, failed, timeout) if wait else []
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
