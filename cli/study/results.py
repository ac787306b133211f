"""Results of a study: fetching them, and asking once more for what failed."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.bridge import Bucket, publish_of
from cli.client import Client, now
from cli.study.journey import FailedRun, Outcome, outcome
from cli.waiting import until
from shared import keys
from shared.documents.inference import Failure
from shared.messages import InferenceOutput, OutputFile
from shared.operations import studies


@dataclass(frozen=True, slots=True)
class Fetched:
    """What came of a MAP, and where it was written to."""

    outcome: Outcome
    paths: tuple[Path, ...]
    warnings: tuple[str, ...]
    """Of the series."""

    def summary(self) -> dict[str, Any]:
        """Return what `--json` prints of it."""
        files = {"files": [str(path) for path in self.paths]}
        return self.outcome.model_dump(mode="json") | files | {"warnings": self.warnings}


def fetch_results(client: Client, study_uid: str, out: Path) -> list[Fetched]:
    """Write the newest outputs of every MAP on every series of a study into `out/<series>/<map>/`.

    Of a MAP that failed since, that is `failure.json`, and `log.txt` with what it printed.

    Raises:
        Refused: the study has no results.
    """
    found = []
    for (series, name), ended in asyncio.run(studies.newest(study_uid, objects=Bucket(client))).items():
        told = outcome(client, ended.place, ended.record)
        folder = out / series / name
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(told, FailedRun):
            paths = [folder / "failure.json", *_download_log(client, told.log_key, folder)]
            paths[0].write_text(told.model_dump_json(indent=1))
        else:
            paths = list(_download(client, told.outputs, folder))
            paths += _download_files(client, told.files, folder)
            (folder / "result.json").write_text(told.model_dump_json(indent=1))
        revision = client.read(keys.revision_of(told.inputs[0]))
        found.append(Fetched(told, tuple(paths), revision.warnings if revision else ()))
    return found


def retry(client: Client, study_uid: str) -> dict[tuple[str, str], Failure]:
    """Ask again for what failed of a study, and return those failures. Raises `Refused` where nothing failed."""
    return asyncio.run(studies.retry(study_uid, objects=Bucket(client), publish=publish_of(client), now=now()))


def wait_retried(
    client: Client, study_uid: str, failed: Mapping[tuple[str, str], Failure], timeout_s: float
) -> list[Outcome]:
    """Wait until something came after each of these failures, and return that. Raises `Refused` when time is up."""

    def came() -> list[Outcome] | None:
        # A failure is not there while its MAP runs again.
        newest = asyncio.run(studies.newest_of(study_uid, objects=Bucket(client)))
        later = [newest[one] for one, told in failed.items() if one in newest and newest[one].record.time > told.time]
        return [outcome(client, one.place, one.record) for one in later] if len(later) == len(failed) else None

    return until(came, timeout_s, lambda: "it goes on; `radqueue results` tells what comes of it")


def _download_log(client: Client, key: str | None, folder: Path) -> Iterator[Path]:
    if key is not None:
        client.download(key, folder / "log.txt")
        yield folder / "log.txt"


def _download(client: Client, outputs: Sequence[InferenceOutput], folder: Path) -> Iterator[Path]:
    for output in outputs:
        path = folder / f"{output.sop_instance_uid}.dcm"
        client.download(output.key, path)
        yield path


def _download_files(client: Client, files: Sequence[OutputFile], folder: Path) -> Iterator[Path]:
    """Fetch what is no DICOM, each under the number and the name that its key ends in."""
    for file in files:
        path = folder.joinpath(*Path(file.key).parts[-2:])
        client.download(file.key, path)
        yield path
