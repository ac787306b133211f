"""`radqueue map build`: an application folder becomes a MAP image.

The image follows the MONAI Application Package specification in the way of the Holoscan packager, so that other
runners take it as well: manifests in `/etc/holoscan`, program and models in `/opt/holoscan`, work in `/var/holoscan`.

Theory of operation. Everything goes into a build context of our own making: the files of the folder, the manifests,
the entrypoint and a Dockerfile. All of them get the same date and one of two modes, the base is named by its digest,
and the builder is told to date the layers the same, so that the same folder on the same base is the same image, byte
for byte. What `requirements.txt` does not pin is not part of that promise.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.map import entrypoint
from services.inference.package.engine import PULL_S, Engine, EngineFailed, run
from services.inference.package.manifests import BrokenMap, Needs, read_app_yaml
from services.inference.package.maps import Map, digest_of, entry_of, left_out, models_of, read_source

DATE = 315_532_800
"""1980-01-01, of all files where SOURCE_DATE_EPOCH does not name another second."""
UID = 1000
APP, MODELS, WORK = "/opt/holoscan/app", "/opt/holoscan/models", "/var/holoscan"
CONFIG = f"{WORK}/app.yaml"
LINES, COLUMNS = 6, 240
"""The most of a failed build's output that is shown; its log has all of it."""
_TELLING = re.compile(r"error|fail|denied|not found|no such|cannot|unable|invalid", re.IGNORECASE)
"""Lines that tell why a build failed."""
ENVIRONMENT = {
    "HOLOSCAN_APPLICATION": APP,
    "HOLOSCAN_INPUT_PATH": f"{WORK}/input",
    "HOLOSCAN_OUTPUT_PATH": f"{WORK}/output",
    "HOLOSCAN_WORKDIR": WORK,
    "HOLOSCAN_MODEL_PATH": MODELS,
    "HOLOSCAN_CONFIG_PATH": CONFIG,
    "HOLOSCAN_DOCS_PATH": "/opt/holoscan/docs",
    "HOLOSCAN_LOGS_PATH": f"{WORK}/logs",
    "HOLOSCAN_APP_MANIFEST_PATH": "/etc/holoscan/app.json",
    "HOLOSCAN_PKG_MANIFEST_PATH": "/etc/holoscan/pkg.json",
}
CUDA_RUNTIME = (
    "import pathlib, site; "
    'found = [p for s in site.getsitepackages() for p in sorted(pathlib.Path(s).glob("nvidia/*/lib/libcudart.so.*"))]; '
    'pathlib.Path("/etc/ld.so.conf.d/map.conf").write_text("".join(f"{p.parent}\\n" for p in found))'
)
"""The SDK is linked to the CUDA runtime, also where there is no GPU; its package does not tell the linker of it."""
_LOCAL = re.compile(r"^\s*(\.|file:|-[rcfe]\b|--(requirement|constraint|find-links|editable)\b)", re.MULTILINE)
"""Requirements that are other files of the application."""
_PIN = re.compile(r"monai-deploy-app-sdk\s*==\s*(?P<version>[\w.]+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Built:
    """What came of a build: an image, or, where nothing can build one, a context."""

    context: Path | None
    """The folder that the image was built from; None if it was temporary."""
    base: str
    done: bool
    """False: nothing here can build, and only the context was written."""
    image: Map | None = None


def build(
    folder: Path,
    tag: str,
    *,
    engine: Engine | None,
    base: str,
    models: Path | None = None,
    timeout_s: float = 0,
    install: bool = True,
    context: Path | None = None,
    arguments: Sequence[str] = (),
    say: Callable[[str], None],
    environ: Mapping[str, str],
) -> Built:
    """Build the MAP image `tag` of an application folder, on the image `base`.

    What `requirements.txt` names is installed, unless the base has it and `install` is not set. `timeout_s` goes before
    the one in `app.yaml`. `context` keeps the build context; it must not exist. Without an `engine`, buildah builds,
    and without that nothing does. `arguments` are more of its `build`.

    Raises:
        BrokenMap: the folder is no application.
        EngineFailed: the build failed.
    """
    entry = entry_of(folder) if folder.is_dir() else None
    if entry is None:
        raise BrokenMap(f"{folder} is no application: it holds neither app.py nor __main__.py.")
    date = int(environ.get("SOURCE_DATE_EPOCH") or DATE)
    if install and not (folder / "requirements.txt").is_file():
        say(f"there is no requirements.txt in {folder}: nothing is installed, and the program has what {base} has")
    buildah = shutil.which("buildah") if engine is None else None
    with tempfile.TemporaryDirectory(prefix="radqueue-map-") as temporary:
        place = context or Path(temporary, "context")
        pinned = _pinned(base, engine, buildah, say)
        write_context(
            place, folder, entry, tag, base=pinned, models=models, timeout_s=timeout_s, install=install, date=date
        )
        if engine is None and buildah is None:
            if context is None:
                raise EngineFailed(
                    "there is no docker, podman or buildah to build with; --context FOLDER writes what to build."
                )
            return Built(context, pinned, done=False)
        say(f"building {tag} on {pinned}")
        if engine is not None:
            _build_with(engine, place, tag, date, arguments)
            made = read_source("built", tag, engine=engine)
        else:
            _run_builder([str(buildah), "build", *_podman_arguments(tag, date), *arguments, str(place)], {})
            made = None
    return Built(context, pinned, done=True, image=made)


def write_context(
    context: Path,
    folder: Path,
    entry: Path,
    tag: str,
    *,
    base: str,
    models: Path | None,
    timeout_s: float,
    install: bool,
    date: int,
) -> None:
    """Write all that an image is built of, with the `Dockerfile`, into a new folder; `entry` starts the program."""
    found = models or models_of(folder)
    source_digest = digest_of(folder, *([found] if found is not None and not found.is_relative_to(folder) else []))
    config = folder / "app.yaml"
    needs, application = read_app_yaml(config.read_bytes()) if config.is_file() else (Needs(), {})
    requirements = folder / "requirements.txt"

    # Lay out what goes where.
    context.mkdir(parents=True)
    inside = found if found is not None and found.is_relative_to(folder) else None
    _copy(folder, context / "app", without=inside)
    if found is not None:
        _copy(found, context / "models" / found.stem if found.is_file() else context / "models", without=None)
    else:
        (context / "models").mkdir()
    if inside is not None:  # so that a program that looks for its models beside itself finds them
        (context / "app" / inside.relative_to(folder)).symlink_to(MODELS)
    if config.is_file():
        shutil.copyfile(config, context / "app.yaml")
    else:
        (context / "app.yaml").write_text("application: {}\n", "utf-8")
    shutil.copyfile(entrypoint.__file__, context / "tools")
    if (folder / "README.md").is_file():
        _copy(folder / "README.md", context / "docs", without=None)
    else:
        (context / "docs").mkdir()

    # Describe it.
    started = APP if (folder / "__main__.py").is_file() else f"{APP}/{entry.name}"
    required = requirements.read_text("utf-8") if requirements.is_file() else ""
    pin = _PIN.search(required)
    sdk_version = pin["version"] if pin else None
    version = str(application.get("version") or "0.0.0")
    title = str(application.get("title") or folder.resolve().name)
    timeout_s = timeout_s or needs.timeout_s or 0
    _write_json(context / "app.json", app_manifest(started, version, sdk_version, timeout_s))
    _write_json(context / "pkg.json", pkg_manifest(needs, version, context / "models"))
    labels = {
        "base": base,
        "tag": tag,
        "org.opencontainers.image.title": title,
        "org.opencontainers.image.version": version,
        "org.opencontainers.image.base.name": base.partition("@")[0],
        "org.opencontainers.image.base.digest": base.partition("@")[2],
        "org.monai.deploy.app-sdk": sdk_version or "",
        "io.radqueue.source-digest": source_digest,
    }
    environment = ENVIRONMENT | {"HOLOSCAN_TIMEOUT": f"{timeout_s:g}"}
    text = dockerfile(base, labels, environment, requirements=required if install else "")
    (context / "Dockerfile").write_text(text, "utf-8")
    _date(context, date)


def app_manifest(started: str, version: str, sdk_version: str | None, timeout_s: float) -> dict[str, Any]:
    """Return `app.json`; the command is a list in a string, as the Holoscan packager writes it."""
    return {
        "apiVersion": "1.0.0",
        "command": json.dumps(["python3", started]),
        "environment": ENVIRONMENT,
        "input": {"path": "input/", "formats": None},
        "output": {"path": "output/", "formats": None},
        "liveness": None,
        "readiness": None,
        "sdk": "monai-deploy",
        "sdkVersion": sdk_version,
        "timeout": timeout_s,
        "version": version,
        "workingDirectory": WORK,
    }


def pkg_manifest(needs: Needs, version: str, models: Path) -> dict[str, Any]:
    """Return `pkg.json`; sizes are written in Mi, rounded up."""
    sizes = {
        "memory": needs.memory_bytes,
        "gpuMemory": needs.gpu_memory_bytes,
        "sharedMemory": needs.shared_memory_bytes,
    }
    folders = sorted(path.name for path in models.iterdir() if path.is_dir())
    named = {name: f"{MODELS}/{name}" for name in folders}
    return {
        "apiVersion": "1.0.0",
        "applicationRoot": APP,
        "modelRoot": MODELS,
        "models": named or ({"model": MODELS} if any(models.iterdir()) else {}),
        "resources": {
            "cpu": needs.cpu,
            "gpu": needs.gpu,
            **{key: f"{-(-size // 2**20)}Mi" for key, size in sizes.items() if size is not None},
        },
        "version": version,
    }


def dockerfile(base: str, labels: Mapping[str, str], environment: Mapping[str, str], *, requirements: str) -> str:
    """Return the text of the Dockerfile. What changes least comes first, so that its layers are kept between builds.

    `requirements` are those that are to be installed.
    """
    local = _LOCAL.search(requirements)
    install = f"""\
COPY {"app" if local else "app/requirements.txt"} {APP}/
RUN cd {APP} && PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -r requirements.txt \\
    --no-cache-dir --no-compile --disable-pip-version-check --root-user-action=ignore
"""
    # Some libraries look the user up, and whoever runs the image as somebody else must be able to write results, too.
    prepare = f"""\
RUN python3 -c '{CUDA_RUNTIME}' && ldconfig && rm -f /var/cache/ldconfig/aux-cache && \\
    (cut -d: -f3 /etc/passwd | grep -qx {UID} || echo 'map:x:{UID}:{UID}::{WORK}:/bin/false' >> /etc/passwd) && \\
    mkdir -p {WORK}/input {WORK}/output {WORK}/logs && chmod -R 1777 {WORK}
"""
    described = [f"LABEL {name}={json.dumps(value)}" for name, value in sorted(labels.items()) if value]
    described += [f"ENV {name}={json.dumps(value)}" for name, value in sorted(environment.items())]
    contents = f"""
COPY docs {environment["HOLOSCAN_DOCS_PATH"]}
COPY models {MODELS}
COPY app.json pkg.json /etc/holoscan/
COPY app.yaml {CONFIG}
COPY tools {WORK}/
COPY app {APP}
USER {UID}:{UID}
WORKDIR {WORK}
ENTRYPOINT ["{WORK}/tools"]
"""
    return f"FROM {base}\n" + (install if requirements else "") + prepare + "\n".join(described) + contents


def _pinned(base: str, engine: Engine | None, buildah: str | None, say: Callable[[str], None]) -> str:
    """Return the base by its digest, so that the context means the same image tomorrow."""
    if "@" in base:
        return base
    pinned = None
    if engine is not None:
        if engine.inspect(base) is None:
            say(f"pulling {base}")
            engine.pull(base)
        found = engine.inspect(base)
        pinned = found.pinned(base) if found is not None else None
    elif buildah is not None:
        inspect = [buildah, "inspect", "--type", "image", base]
        if run(inspect, check=False).returncode != 0:
            say(f"pulling {base}")
            run([buildah, "pull", base], timeout_s=PULL_S)
        answer = json.loads(run(inspect).stdout)
        if answer.get("FromImageDigest"):
            pinned = f"{answer['FromImage'].rpartition(':')[0]}@{answer['FromImageDigest']}"
    if pinned is None:
        say(f"{base} has no digest here, so the context names it by its tag")
    return pinned or base


def _build_with(engine: Engine, context: Path, tag: str, date: int, arguments: Sequence[str]) -> None:
    if engine.kind == "podman":
        _run_builder([engine.program, "build", *_podman_arguments(tag, date), *arguments, str(context)], {})
        return
    output = f"type=docker,name={tag},rewrite-timestamp=true"
    dated = ["--build-arg", f"SOURCE_DATE_EPOCH={date}", "--output", output]
    _run_builder([engine.program, "build", *dated, *arguments, str(context)], {"DOCKER_BUILDKIT": "1"})


def _podman_arguments(tag: str, date: int) -> list[str]:
    return ["--tag", tag, "--timestamp", str(date), "--format", "oci", "--pull=never"]


def _run_builder(argv: list[str], environ: Mapping[str, str]) -> None:
    done = run(argv, check=False, timeout_s=PULL_S, environ=environ)
    if done.returncode == 0:
        return
    printed = done.stdout + done.stderr
    with tempfile.NamedTemporaryFile(prefix="radqueue-build-", suffix=".log", delete=False) as log:
        log.write(printed)
    lines = [line.strip()[:COLUMNS] for line in printed.decode(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if _TELLING.search(line)] or lines
    raise EngineFailed("\n  ".join(["the build failed:", *telling[-LINES:], f"All that it printed is in {log.name}"]))


def _copy(source: Path, target: Path, *, without: Path | None) -> None:
    """Copy a folder's content, or a file, without what is no part of a MAP and the folder `without`."""
    if source.is_file():
        target.mkdir(parents=True)
        shutil.copyfile(source, target / source.name)
        return

    def ignored(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if left_out(Path(folder), name) or Path(folder, name) == without]

    shutil.copytree(source, target, ignore=ignored, ignore_dangling_symlinks=True)


def _date(context: Path, date: int) -> None:
    """Give all files one date and one of two modes: those of the checkout say nothing about the application."""
    for path in (*sorted(context.rglob("*")), context):
        if not path.is_symlink():
            executable = path.is_dir() or path == context / "tools"
            path.chmod(0o755 if executable else 0o644)
        with suppress(NotImplementedError):
            os.utime(path, (date, date), follow_symlinks=False)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
