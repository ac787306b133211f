"""`radqueue map route`: which MAPs would take which series of a study, and what keeps the others away; runs nothing."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.markup import escape
from rich.table import Table

from cli import show
from cli.client import Client
from services.inference.reasons import several
from services.inference.routing import RoutingTable, read
from services.inference.settings import InferenceSettings
from services.ingest.check import described
from shared.config import load
from shared.dicom import Revision, is_uid
from shared.operations.refused import Refused, WrongUsage


def route(environ: Mapping[str, str], study: str, maps: str | None) -> dict[str, Any]:
    """Return what `routed` does of a study, by the routing table `maps` or else the settings'.

    Raises:
        Refused: there is no such study or table.
        Misconfigured: the table is broken.
    """
    local = Path(study).is_dir()
    if not local and not is_uid(study):
        raise WrongUsage(f"{study} is neither a folder nor a StudyInstanceUID")
    place = maps or load(InferenceSettings, environ).maps_file
    table = read(_text(place, environ), place.rpartition("/")[2])
    return routed(table, _local(Path(study)) if local else _stored(Client(environ), study))


def show_routes(found: Mapping[str, Any]) -> None:
    """Print it for people."""
    for series in found["series"]:
        show.out.print(_table(series))
    for name, taken in found["studies"].items():
        once = f"{len(taken)} series in one run, once the study has settled"
        show.say(f"{name}: {once if taken else 'takes no series of the study'}")


def routed(table: RoutingTable, revisions: Iterable[Revision]) -> dict[str, Any]:
    """Return what `--json` prints: each series with what each MAP says to it, and what each study-level MAP gets."""
    series = []
    studies: dict[str, list[str]] = {one.name: [] for one in table.maps if one.level == "study"}
    for revision in sorted(revisions, key=lambda one: one.series_uid):
        answers = []
        for one in table.maps:
            unmet = one.unmet(revision)
            wanted = one.model_dump(mode="json", exclude_none=True)["when"]
            failed = {name: {"wanted": wanted[name], "has": has} for name, has in unmet.items()}
            answers.append({"map": one.name, "level": one.level, "takes": not unmet, "unmet": failed})
            if one.level == "study" and not unmet:
                studies[one.name].append(revision.series_uid)
        told = {"series_uid": revision.series_uid, "modality": revision.attributes.get("Modality")}
        series.append({**told, "n_instances": len(revision.instances), "maps": answers})
    return {"series": series, "studies": studies}


def _text(place: str, environ: Mapping[str, str]) -> str:
    if place.startswith("s3://"):
        parts = urlsplit(place)
        body = Client({**environ, "RADQUEUE_BUCKET": parts.netloc}).get(parts.path.lstrip("/"))
        if body is None:
            raise Refused(f"there is no {place}")
        return body.decode()
    try:
        return Path(place).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WrongUsage(f"--maps: cannot read {place} ({type(error).__name__})") from None


def _stored(client: Client, study_uid: str) -> list[Revision]:
    """Return the newest revision of each series of a study that ingest has stored."""
    newest: dict[str, Revision] = {}
    for item in client.stored(f"studies/{study_uid}/"):
        if "/revisions/" in item.key:
            revision = Revision.parse(client.get(item.key) or b"")
            before = newest.get(revision.series_uid, revision)
            newest[revision.series_uid] = max(before, revision, key=lambda one: one.created)
    if not newest:
        raise Refused("no series of this study has settled here")
    return list(newest.values())


def _local(folder: Path) -> list[Revision]:
    """Describe the series in a folder as ingest would."""
    revisions = described(folder)
    if not revisions:
        raise Refused(f"there is no DICOM file in {folder}")
    if len({revision.study_uid for revision in revisions}) > 1:
        raise WrongUsage(f"{folder} holds more than one study")
    return revisions


def _table(series: Mapping[str, Any]) -> Table:
    n_instances = several(series["n_instances"], "instance")
    title = f"series {series['series_uid']} ({series['modality'] or 'no modality'}, {n_instances})"
    table = Table("MAP", "takes it", "what is not met", title=title, title_justify="left")
    for answer in series["maps"]:
        unmet = [f"{name}: wants {_wish(one['wanted'])}, {_fact(one['has'])}" for name, one in answer["unmet"].items()]
        table.add_row(escape(answer["map"]), "yes" if answer["takes"] else "no", escape("\n".join(unmet)))
    return table


def _wish(condition: Any) -> str:
    """Return a condition in words."""
    if isinstance(condition, list):
        return " or ".join(map(str, condition))
    if not isinstance(condition, dict):
        return str(condition)
    if "missing" in condition:
        return "none" if condition["missing"] else "any value"
    words = {"regex": "a match of {}", "min": "at least {:g}", "max": "at most {:g}"}
    return " and ".join(words[name].format(value) for name, value in condition.items())


def _fact(value: Any) -> str:
    """Return what a series has, in words."""
    if value is None or value in ("", []):
        return "missing"
    return f"has {', '.join(map(str, value))}" if isinstance(value, list) else f"has {value}"
