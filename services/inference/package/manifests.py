"""The manifests of a MAP: `app.json` and `pkg.json` of an image, `app.yaml` of a folder. Text in, values out.

The specification of the MONAI Application Package leaves room, and packagers used more of it than there is: a command
is a list, a shell line, or a JSON list inside a string; models are an object or a list; keys are written
`workingDirectory` or, by App SDK 0.x, `working-directory`; what is not known is null, 0 or missing.
"""

import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from shared.config import Misconfigured

BINARY, DECIMAL = 1024, 1000
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[kmgt]?)(?P<binary>i?)b?", re.IGNORECASE)
_CPU_MILLI = re.compile(r"(\d+)m")


RESOURCES = ("cpu", "gpu", "memory", "gpuMemory", "sharedMemory")
KEYS = {
    "app.json": (
        *("apiVersion", "command", "environment", "input", "liveness", "output", "readiness", "sdk", "sdkVersion"),
        *("timeout", "version", "workingDirectory"),
    ),
    "pkg.json": (
        *("apiVersion", "applicationRoot", "modelRoot", "models", "platform", "platformConfig", "resources"),
        *("sdkVersion", "version"),
    ),
    "resources": RESOURCES,
}
"""The keys that the specification and the packagers write, by file. An `app.yaml` holds the application's own
settings as well."""


class BrokenMap(Misconfigured):
    """A source that is not a MAP, or a MAP that cannot be used; the text says what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a MAP asks for. None: its manifests do not say."""

    timeout_s: float | None = None
    """Wall seconds that the MAP asks for per study."""
    cpu: float | None = None
    memory_bytes: int | None = None
    gpu: int = 0
    """The number of GPUs that the MAP asks for."""
    gpu_memory_bytes: int | None = None
    shared_memory_bytes: int | None = None
    """The size of /dev/shm."""
    unknown: tuple[str, ...] = field(default=(), compare=False)
    """Keys of its manifests that mean nothing here, each with its file."""


@dataclass(frozen=True, slots=True)
class Manifests:
    """What `app.json` and `pkg.json` say; every path is one of the image."""

    family: str
    """`holoscan`, or `monai` of App SDK 0.x: what folders and variables are called."""
    command: tuple[str, ...]
    """The program and its arguments."""
    application: str
    """The folder that the program lies in."""
    model_root: str
    models: Mapping[str, str] = field(default_factory=dict)
    """The path of each model, by its name."""
    working_directory: str = ""
    input: str = ""
    """The path at which a study is mounted; absolute, or relative to the working directory."""
    output: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: Needs = field(default_factory=Needs)


def read_manifests(app: bytes, pkg: bytes | None, *, family: str = "holoscan") -> Manifests:
    """Read `app.json` and, if there is one, `pkg.json`; `family` is `holoscan`, or `monai` of App SDK 0.x.

    Raises:
        BrokenMap: naming the file, the key, and what was expected there.
    """
    said = _document("app.json", app)
    package = _document("pkg.json", pkg) if pkg is not None else {}
    command = _command(said.get("command"))
    root = str(package.get("applicationroot") or "").rstrip("/")
    # App SDK 0.x names the working directory there.
    if not root or not any(word.startswith(root) for word in command):
        root = f"/opt/{family}/app"
    return Manifests(
        command=command,
        family=family,
        application=root,
        model_root=str(package.get("modelroot") or f"/opt/{family}/models").rstrip("/"),
        models=_models(package.get("models")),
        working_directory=str(said.get("workingdirectory") or f"/var/{family}").rstrip("/"),
        input=_path("input", said.get("input")),
        output=_path("output", said.get("output")),
        environment=_environment(said.get("environment")),
        needs=_needs(
            "pkg.json",
            package.get("resources"),
            _timeout("app.json", said.get("timeout")),
            unknown=(*_unknown("app.json", "app.json", said), *_unknown("pkg.json", "pkg.json", package)),
        ),
    )


def read_app_yaml(text: bytes) -> tuple[Needs, Mapping[str, Any]]:
    """Read the `app.yaml` of an application folder: its resources, and its section `application` as it is.

    Raises:
        BrokenMap: naming the key, and what was expected there.
    """
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise BrokenMap(f"app.yaml{where}: is not YAML.") from None
    document = found if found is not None else {}
    if not isinstance(document, dict):
        raise BrokenMap("app.yaml: expected sections such as `application:` and `resources:`.")
    application = document.get("application") or {}
    if not isinstance(application, dict):
        raise BrokenMap("app.yaml: application: expected keys such as `title:` and `version:`.")
    timeout_s = _timeout("app.yaml: application", application.get("timeout"))
    return _needs("app.yaml", document.get("resources"), timeout_s), application


def size_of(value: Any) -> int | None:
    """Return the bytes that `"32Gi"`, `"500 MB"` or a number stands for; None for null, 0 and an empty text.

    Raises:
        ValueError: it stands for none.
    """
    if value in (None, "", 0):
        return None
    match = _SIZE.fullmatch(str(value).strip())
    if match is None:
        raise ValueError("no size")
    power = "kmgt".find(match["unit"].lower()) + 1 if match["unit"] else 0
    return round(_finite(match["number"]) * (BINARY if match["binary"] else DECIMAL) ** power) or None


def _document(file: str, text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text.decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise BrokenMap(f"{file}{where}: is not JSON.") from None
    if not isinstance(found, dict):
        raise BrokenMap(f"{file}: expected an object.")
    return {_plain(key): value for key, value in found.items()}


def _plain(key: str) -> str:
    return key.replace("-", "").replace("_", "").lower()


def _command(value: Any) -> tuple[str, ...]:
    words = value
    if isinstance(value, str):
        try:
            words = json.loads(value)
        except json.JSONDecodeError:
            words = _shell_words(value)
        if not isinstance(words, list):
            words = _shell_words(value)
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
        raise BrokenMap('app.json: command: expected the program and its arguments, such as ["python3", "/opt/…/app"].')
    return tuple(words)


def _shell_words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:
        raise BrokenMap("app.json: command: has a quote that does not end.") from None


def _path(key: str, value: Any) -> str:
    """Return the folder that `input` or `output` names: an object with a path, the path alone, or nothing."""
    path = value.get("path") if isinstance(value, dict) else value
    if path is not None and not isinstance(path, str):
        raise BrokenMap(f"app.json: {key}.path: expected a path.")
    return (path or key).rstrip("/")


def _environment(value: Any) -> dict[str, str]:
    if value is not None and not isinstance(value, dict):
        raise BrokenMap("app.json: environment: expected an object of names and values.")
    return {str(name): str(text) for name, text in (value or {}).items() if text is not None}


def _models(value: Any) -> dict[str, str]:
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list) and all(isinstance(one, dict) for one in value):
        pairs = {one.get("name"): one.get("path") for one in value}.items()
    elif value is None:
        return {}
    else:
        raise BrokenMap("pkg.json: models: expected an object of names and paths.")
    if not all(isinstance(name, str) and isinstance(path, str) for name, path in pairs):
        raise BrokenMap("pkg.json: models: expected a name and a path for each.")
    return dict(pairs)


def _unknown(file: str, kind: str, said: Mapping[str, Any]) -> tuple[str, ...]:
    known = {_plain(key) for key in KEYS[kind]}
    return tuple(f"{file}: {key}" for key in said if _plain(str(key)) not in known)


def _timeout(place: str, value: Any) -> float | None:
    try:
        return _finite(value or 0) or None
    except (TypeError, ValueError):
        text = f"{place}.timeout: expected seconds, 0 or more."
        raise BrokenMap(text.replace("app.json.", "app.json: ")) from None


def _needs(file: str, resources: Any, timeout_s: float | None, *, unknown: tuple[str, ...] = ()) -> Needs:
    if resources is not None and not isinstance(resources, dict):
        raise BrokenMap(f"{file}: resources: expected keys such as `cpu`, `gpu` and `memory`.")
    said = {_plain(str(key)): value for key, value in (resources or {}).items()}

    def size(key: str) -> int | None:
        try:
            return size_of(said.get(_plain(key)))
        except ValueError:
            raise BrokenMap(f"{file}: resources.{key}: expected a size such as 4Gi or 500Mi.") from None

    gpu = _count(file, "gpu", said.get("gpu")) or 0
    if gpu != int(gpu):
        raise BrokenMap(f"{file}: resources.gpu: expected a whole number of devices.")
    return Needs(
        timeout_s=timeout_s,
        cpu=_count(file, "cpu", said.get("cpu")),
        memory_bytes=size("memory"),
        gpu=int(gpu),
        gpu_memory_bytes=size("gpuMemory"),
        shared_memory_bytes=size("sharedMemory"),
        unknown=(*unknown, *_unknown(f"{file}: resources", "resources", resources or {})),
    )


def _count(file: str, key: str, value: Any) -> float | None:
    """Return a number of processors or GPUs; Kubernetes writes half a processor as 500m."""
    milli = _CPU_MILLI.fullmatch(str(value))
    try:
        return int(milli[1]) / 1000 if milli else _finite(value or 0) or None
    except (TypeError, ValueError):
        raise BrokenMap(f"{file}: resources.{key}: expected a number, 0 or more.") from None


def _finite(value: Any) -> float:
    """Return a number that is neither negative nor infinite. Raises `ValueError` and `TypeError`."""
    number = float(value)
    if isinstance(value, bool) or not 0 <= number < math.inf:
        raise ValueError("not a finite number, 0 or more")
    return number
