"""What the commands `radqueue map …` do; `cli.map.commands` says what they are called."""

import asyncio
import logging
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import boto3
import pydicom
from pydicom.errors import InvalidDicomError

from cli.map import build as image
from services.inference import preflight
from services.inference.package.engine import Engine, EngineFailed, ecr_of
from services.inference.package.manifests import BrokenMap
from services.inference.package.maps import Map, is_image, read_source
from services.inference.preflight import Finding, Way
from services.inference.reasons import explained
from services.inference.settings import InferenceSettings
from shared.aws_errors import AWS_ERRORS, code_of
from shared.child import ChildFailed
from shared.config import load
from shared.dicom import silence
from shared.errors import Unavailable
from shared.log import setup
from shared.operations.refused import Refused, WrongUsage

NAME = "map"
Environ = Mapping[str, str]
Say = Callable[[str], None]


@contextmanager
def _engine_told() -> Iterator[None]:
    """Tell a container engine that fails as something that cannot be had: the settings may well be right."""
    try:
        yield
    except EngineFailed as failed:
        raise Refused(str(failed)) from None


def check(
    environ: Environ,
    source: str,
    study: Path | None,
    *,
    way: Way,
    least: Mapping[str, int] | None,
    log: Path | None,
    say: Say,
    **where: Any,
) -> list[Finding]:
    """Return what was found of a MAP, and of a run on the files of `study`; `where` is as for `read`.

    `least` is what it must write, as `outputs` of `maps.yaml`.
    """
    if study is not None:
        require_study(study)
    try:
        found = read(environ, source, **where)
    except (BrokenMap, EngineFailed) as problem:
        return [Finding("manifests", "error", str(problem), "docs/maps.md says what a MAP is.")]
    _be_quiet()
    findings = preflight.examine(found, way=way, say=say)
    if study is None:
        return findings
    if any(one.level == "error" for one in findings):
        return [*findings, Finding("study", "warning", "it was not run", "Mend the errors above first.")]
    if not preflight.dicom_in(study):
        remedy = "Give a DICOM study: a worker gives a MAP nothing else."
        findings.append(Finding("study", "warning", f"there is no DICOM file in {study}", remedy))
    say("running it")
    return findings + asyncio.run(preflight.check_study(found, study, way=way, least=least, log=log))


@_engine_told()
def run(
    environ: Environ, source: str, study: Path, output: Path, *, way: Way, log: Path | None, **where: Any
) -> dict[str, Any]:
    """Run a MAP on the files of `study`, write what it makes to `output`, and tell what came of it."""
    require_study(study)
    found = read(environ, source, **where)
    _be_quiet()
    trying = preflight.try_study(found, study, output, way=way, log=log)
    try:
        tried = asyncio.run(trying)
    except ChildFailed as failed:
        raise Refused(f"it does not start: {failed}; `radqueue map check {source}` says more") from None
    except Unavailable as reason:
        raise Refused(str(reason)) from None
    told = {key: value for key, value in asdict(tried.run).items() if key not in {"rss_bytes", "was_first"}}
    if tried.run.outcome == "ran" and not tried.files:
        told["outcome"] = "no_output"
    told["why"], told["remedy"] = {"ran": ("", ""), "no_matching_series": preflight.NO_SERIES}.get(
        told["outcome"], explained(told["outcome"])
    )
    return told | {"map_digest": found.digest, "files": [str(output / path) for path in tried.files]}


@_engine_told()
def build(
    environ: Environ, folder: Path, tag: str, *, models: Path | None, push: bool, say: Say, **how: Any
) -> dict[str, Any]:
    """Build an image and push it, and tell what there is now; `how` is as for `cli.map.build.build`."""
    settings = load(InferenceSettings, environ)
    if how["context"] is not None and how["context"].exists():
        raise WrongUsage(f"--context: {how['context']} exists")
    try:
        engine = Engine.find(settings.container_engine, settings.engine_arguments)
    except EngineFailed as failed:
        if settings.container_engine is not None or push:
            raise
        engine = None
        say(str(failed))
    models = models.resolve() if models is not None else None
    how |= {"arguments": shlex.split(settings.container_engine_build_args), "environ": environ}
    built = image.build(folder.resolve(), tag, engine=engine, models=models, say=say, **how)
    pushed = None
    if push and engine is not None:
        say(f"pushing {tag}")
        pushed = engine.push(tag, authorization=_authorization(tag, environ))
    return {
        "tag": tag,
        "base": built.base,
        "context": str(built.context) if built.context is not None else None,
        "built": built.done,
        "digest": read(environ, tag).digest if built.image is not None else None,
        "pushed": pushed,
    }


@_engine_told()
def describe(environ: Environ, source: str) -> dict[str, Any]:
    """Return what the manifests of a MAP say."""
    found = read(environ, source)
    told = {
        "digest": found.digest,
        "application": found.application,
        "models": found.models,
        "command": list(found.command),
        **asdict(found.needs),
    }
    if found.image is not None:
        inspected = found.image.inspected
        told |= {"image": found.image.id, "user": inspected.user, "labels": dict(inspected.labels)}
    return told


@_engine_told()
def variables(environ: Environ, source: str) -> dict[str, str]:
    """Return the environment that a MAP's program gets, with words for the folders of a study."""
    found = read(environ, source)
    of_image = dict(found.image.inspected.environment) if found.image is not None else {}
    return of_image | found.environment("INPUT", "OUTPUT", "WORK")


@_engine_told()
def extract(environ: Environ, image: str, out: Path) -> list[str]:
    """Copy what a MAP image holds to the new folder `out`, without running it; return what was written."""
    if out.exists():
        raise WrongUsage(f"--out: {out} exists")
    found = read(environ, image)
    if found.image is None or found.manifests is None:
        raise WrongUsage(f"{image} is no image")
    engine, family = found.image.engine, found.manifests.family
    folders = {
        found.manifests.application: out / "app",
        found.manifests.model_root: out / "models",
        f"/opt/{family}/docs": out / "docs",
        f"/etc/{family}": out / "config",
    }
    engine.extract(found.image.id, folders)
    config = found.image.inspected.environment.get("HOLOSCAN_CONFIG_PATH")
    text = engine.read(found.image.id, config) if config else None
    if text is not None:
        target = out / "config" / "app.yaml"
        target.parent.mkdir(exist_ok=True)
        target.unlink(missing_ok=True)  # it may be a link of the image's
        with target.open("xb") as file:
            file.write(text)
    return sorted(str(path) for path in out.iterdir())


def read(environ: Environ, source: str, *, python: str | None = None, models: Path | None = None) -> Map:
    """Read a MAP by the service's reader."""
    settings = load(InferenceSettings, environ)
    engine = Engine.find(settings.container_engine, settings.engine_arguments) if is_image(source) else None
    return read_source(NAME, source, python=python, models=models, engine=engine)


def way_of(environ: Environ, isolation: str, deadline_s: float | None) -> Way:
    """Return how it is to be run."""
    match isolation:
        case "warm" | "process":
            return Way(load(InferenceSettings, environ), isolation, deadline_s)
        case _:
            raise WrongUsage("--isolation: warm or process")


def _be_quiet() -> None:
    """Keep the answer free of the log of what is run, and of pydicom's remarks, which repeat values."""
    setup("map", level=logging.WARNING)
    silence()


def require_study(study: Path) -> None:
    """See that `--input` names one study, or files that are no DICOM. Raises `WrongUsage`."""
    if not study.exists():
        raise WrongUsage(f"--input: {study} does not exist")
    if study.is_dir() and not any(path.is_file() for path in study.rglob("*")):
        raise WrongUsage(f"--input: there is no file in {study}")
    uids = {uid for path in preflight.dicom_in(study) if (uid := _study_of(path)) is not None}
    if len(uids) > 1:
        raise WrongUsage(f"--input: {study} holds {len(uids)} studies, and a MAP is given one; name the folder of one")


def _study_of(path: Path) -> str | None:
    try:
        return str(pydicom.dcmread(path, specific_tags=["StudyInstanceUID"]).StudyInstanceUID)
    except (InvalidDicomError, AttributeError, OSError, EOFError, ValueError):
        return None


def least_of(outputs: Sequence[str]) -> dict[str, int] | None:
    """Return what `--outputs` means: `SEG=1`, repeated, or `any`. Raises `WrongUsage`."""
    if not outputs:
        return None
    if list(outputs) == ["any"]:
        return {}
    pairs = [one.partition("=") for one in outputs]
    if not all(modality and least.isdecimal() and int(least) for modality, _, least in pairs):
        raise WrongUsage("--outputs: write MODALITY=NUMBER, such as SEG=1, or any")
    return {modality: int(least) for modality, _, least in pairs}


def _authorization(tag: str, environ: Environ) -> str | None:
    """Return what signs in to the image's registry, if that is ECR's; to others one signs in by the engine's login."""
    place = ecr_of(tag)
    if place is None:
        return None
    ecr = boto3.client("ecr", region_name=place[1], endpoint_url=environ.get("AWS_ENDPOINT_URL"))
    try:
        return str(ecr.get_authorization_token()["authorizationData"][0]["authorizationToken"])
    except AWS_ERRORS as error:
        raise Refused(f"ECR gives no authorization ({code_of(error)})") from None
