"""Results of a study: fetching them, and asking once more for what failed."""

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cli.bridge import Bucket, publish_of
from cli.client import Client, now
from cli.study.journey import outcome
from cli.waiting import until
from shared.operations import studies


def fetch_results(client: Client, study_uid: str, out: Path) -> list[dict[str, Any]]:
    """Write the newest outputs of every MAP on every series of a study into `out/<series>/<map>/`.

    Of a MAP that failed since, that is `failure.json`, and `log.txt` with what it printed.

    Returns:
        What each result.json says, or failure.json as `journey.outcome_of` has it, with `files`, the paths written, and
        `warnings` of the series.

    Raises:
        Refused: the study has no results.
    """
    found = []
    for (series, name), ended in asyncio.run(studies.newest(study_uid, objects=Bucket(client))).items():
        result = outcome(client, ended.key, ended.record)
        folder = out / series / name
        folder.mkdir(parents=True, exist_ok=True)
        if result["outcome"] == "failed":
            files = [folder / "failure.json", *_download_log(client, result["log_key"], folder)]
            files[0].write_text(json.dumps(result, indent=1))
        else:
            files = list(_download(client, result["outputs"], folder))
            files += _download_files(client, result.get("files", []), folder)
            (folder / "result.json").write_text(json.dumps(result, indent=1))
        warnings = _revision(client, result).get("warnings", [])
        found.append(result | {"files": [str(path) for path in files], "warnings": warnings})
    return found


def retry(client: Client, study_uid: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Ask again for what failed of a study, and return those failures. Raises `Refused` where nothing failed."""
    failed = asyncio.run(studies.retry(study_uid, objects=Bucket(client), publish=publish_of(client), now=now()))
    return {one: ended.record for one, ended in failed.items()}


def wait_retried(
    client: Client, study_uid: str, failed: Mapping[tuple[str, str], dict[str, Any]], timeout_s: float
) -> list[dict[str, Any]]:
    """Wait until something came after each of these failures, and return that. Raises `Refused` when time is up."""

    def came() -> list[dict[str, Any]] | None:
        # A failure is not there while its MAP runs again.
        newest = asyncio.run(studies.newest_of(study_uid, objects=Bucket(client)))
        later = [
            newest[one] for one, told in failed.items() if one in newest and newest[one].record["time"] > told["time"]
        ]
        return [outcome(client, ended.key, ended.record) for ended in later] if len(later) == len(failed) else None

    return until(came, timeout_s, lambda: "it goes on; `radqueue results` tells what comes of it")


def _revision(client: Client, result: dict[str, Any]) -> dict[str, Any]:
    return client.get_json(result["inputs"][0]["revision_key"]) or {}


def _download_log(client: Client, key: str | None, folder: Path) -> Iterator[Path]:
    if key is not None:
        client.download(key, folder / "log.txt")
        yield folder / "log.txt"


def _download(client: Client, outputs: Sequence[dict[str, Any]], folder: Path) -> Iterator[Path]:
    for output in outputs:
        path = folder / f"{Path(output['sop_instance_uid']).name}.dcm"
        client.download(output["key"], path)
        yield path


def _download_files(client: Client, files: Sequence[dict[str, Any]], folder: Path) -> Iterator[Path]:
    """Fetch what is no DICOM, each under the number and the name that its key ends in."""
    for file in files:
        path = folder.joinpath(*Path(file["key"]).parts[-2:])
        client.download(file["key"], path)
        yield path
