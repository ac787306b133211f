"""A MAP, wherever it comes from: a folder of source, an unpacked MAP, or an image. One reader for all.

A folder of source is what the App SDK's examples are: `app.py` or `__main__.py` with one `Application`, `app.yaml`, and
the models beside them; a path may also name the one Python file. An unpacked MAP is what `extract` writes: `app/`,
`models/` and `config/` with `app.json` and `pkg.json`. An image has those in `/etc/holoscan` and `/opt/holoscan`, or,
made by App SDK 0.x, in `/etc/monai` and `/opt/monai`.

A version is known by the digest of its files. Of a folder these are all but hidden files, compiled Python and virtual
environments. Of one Python file they are that file, what it imports from its own folder as far as its import statements
tell, and what else is read of such a folder: `app.yaml`, `requirements.txt` and the models. Other files there do not
belong to it: the folder may be somebody's home.
"""

import ast
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from services.inference.package.engine import Engine, Inspected
from services.inference.package.manifests import BrokenMap, Manifests, Needs, read_app_yaml, read_manifests
from shared.config import Misconfigured

DIGEST_LENGTH = 32
CHUNK_BYTES = 1024 * 1024
ENTRIES = ("app.py", "__main__.py")
"""The files in which the `Application` is looked for, as in the examples of the App SDK."""
MODEL_FOLDERS = ("models", "model")
BESIDE = ("app.yaml", "requirements.txt", *MODEL_FOLDERS)
"""The files and folders that belong to a program of one file, beside what it imports."""
PYCACHE = "__pycache__"
VENV = "pyvenv.cfg"
"""The file in the root of every virtual environment (PEP 405)."""
MOST_FILES, MOST_BYTES = 10_000, 100 << 30
"""The most that a MAP may hold; a larger folder is probably another one than was meant, and would be read for hours."""
CONFIG_FOLDERS = ("config", "etc", ".")
"""The folders in which an unpacked MAP may have its manifests."""
FAMILIES = ("holoscan", "monai")
"""Names of the folders and variables of a MAP: those of today, and those of App SDK 0.x."""
VARIABLES = {
    "holoscan": ("HOLOSCAN_INPUT_PATH", "HOLOSCAN_OUTPUT_PATH", "HOLOSCAN_WORKDIR", "HOLOSCAN_MODEL_PATH"),
    "monai": ("MONAI_INPUTPATH", "MONAI_OUTPUTPATH", "MONAI_WORKDIR", "MONAI_MODELPATH"),
}


@dataclass(frozen=True, slots=True)
class Image:
    """The image that a MAP is, on this machine."""

    engine: Engine
    reference: str
    """The name by which the image was asked for."""
    id: str
    """The identifier that the image is run by: a tag may move while this MAP is in use."""
    inspected: Inspected


@dataclass(frozen=True, slots=True)
class Map:
    """One MAP that this worker can run. Paths are of this machine or, if there is an `image`, of that."""

    name: str
    place: Path | None
    """The folder, or the Python file, that its digest is of; None for an image."""
    digest: str
    """The digest of the folder's content, or of the image: another program or another model is another MAP."""
    application: str
    """The folder or the Python file of the program."""
    python: str = sys.executable
    """The interpreter that has what the program imports."""
    command: tuple[str, ...] = ()
    """The command line that runs the program once."""
    models: str | None = None
    """Folder with the models; a MAP may have none."""
    own_environment: Mapping[str, str] = field(default_factory=dict, hash=False)
    """The variables that its manifests ask for, and the path of its models: some programs read them on import."""
    needs: Needs = field(default_factory=Needs)
    image: Image | None = None
    manifests: Manifests | None = field(default=None, hash=False)
    """The manifests of an unpacked MAP or an image; a folder of source has none."""

    def environment(self, input_folder: str, output_folder: str, work_folder: str) -> dict[str, str]:
        """Return the variables that tell the program where a study is, in the names of both families."""
        values = (input_folder, output_folder, work_folder, self.models)
        found = dict(self.own_environment)
        for names in VARIABLES.values():
            found |= {name: value for name, value in zip(names, values, strict=True) if value is not None}
        return found

    def copied_to(self, folder: Path) -> "Map":
        """Copy its files into an empty folder, and return the MAP as it is there; an image's stay where they are.

        What lies beside them without being part of it is linked: a virtual environment may be needed.

        Raises:
            BrokenMap: there are far too many by now.
        """
        if self.place is None:
            return self
        root = self.place if self.place.is_dir() else self.place.parent
        for path in files_of(self.place):
            copy = folder / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)
        for other in root.iterdir():
            if other.name != PYCACHE and not os.path.lexists(folder / other.name):
                (folder / other.name).symlink_to(other)

        def moved(word: str) -> str:
            inside = word != self.python and Path(word).is_relative_to(root)
            return str(folder / Path(word).relative_to(root)) if inside else word

        return replace(
            self,
            place=folder / self.place.relative_to(root),
            application=moved(self.application),
            command=tuple(map(moved, self.command)),
            models=self.models and moved(self.models),
            own_environment={name: moved(value) for name, value in self.own_environment.items()},
        )

    def changed(self) -> bool:
        """Tell whether its files are others than when it was read; an image's never are. Reads all of them.

        Raises:
            BrokenMap: there are far too many by now.
        """
        return self.place is not None and _digest(self.place, self.models) != self.digest


def load(
    name: str,
    source: str | Path,
    *,
    relative_to: Path | None = None,
    python: str | None = None,
    models: Path | None = None,
    engine: Engine | None = None,
    file: str = "maps.yaml",
) -> Map:
    """Read the MAP that the routing table names; `file` is what messages call that.

    `source` is a path, relative to the folder `relative_to`, or the name of an image with its tag or digest, which has
    to be on this machine already. `python` is the MAP's own interpreter, `models` its models if they lie elsewhere.
    Without an `engine` the machine's own is used.

    Raises:
        Misconfigured: the source is not a MAP, or a broken one.
    """
    try:
        return read_source(name, source, relative_to=relative_to, python=python, models=models, engine=engine)
    except Misconfigured as problem:
        raise Misconfigured(f"{file}: {name}: {problem}") from None


def read_source(
    name: str,
    source: str | Path,
    *,
    relative_to: Path | None = None,
    python: str | None = None,
    models: Path | None = None,
    engine: Engine | None = None,
) -> Map:
    """Do as `load` does, for a source that is named elsewhere.

    Raises:
        BrokenMap: the source is not a MAP, or a broken one.
        EngineFailed: it is an image, and there is no container engine, or the engine does not have it.
    """
    path = (relative_to or Path()) / source
    if is_image(source, relative_to):
        return _of_image(name, str(source), engine or Engine.find())
    if not path.exists():
        raise BrokenMap(f"its source {path} does not exist. An image is named with its tag, as in name:1.0.")
    path = path.resolve()
    if python is not None:
        python = str((relative_to or Path()) / python)
        if not Path(python).is_file():
            raise BrokenMap(f"its interpreter {python} does not exist.")
    if path.is_dir() and (manifests := _manifests_in(path)) is not None:
        return _of_unpacked(name, path, manifests, python or sys.executable)
    return _of_source(name, path, python or sys.executable, models)


def is_image(source: str | Path, relative_to: Path | None = None) -> bool:
    """Tell whether a source names an image: nothing lies at that path, and it has a tag or a digest."""
    return isinstance(source, str) and ":" in source and not ((relative_to or Path()) / source).exists()


def entry_of(application: Path) -> Path | None:
    """Return the file that defines or imports the `Application`: the one that is named, or the one in the folder."""
    if application.is_file():
        return application
    named = next((application / entry for entry in ENTRIES if (application / entry).is_file()), None)
    if named is not None:
        return named
    candidates = [path for path in sorted(application.glob("*.py")) if _defines_application(path)]
    return candidates[0] if len(candidates) == 1 else None


def models_of(folder: Path) -> Path | None:
    """Return the folder with the MAP's models, for HOLOSCAN_MODEL_PATH; a MAP may have none."""
    return next((folder / name for name in MODEL_FOLDERS if (folder / name).is_dir()), None)


def digest_of(*places: Path) -> str:
    """Return the hash of all files of a MAP, as `files_of` has them, by relative path and content.

    Raises:
        BrokenMap: there are too many.
    """
    digest = hashlib.sha256()
    for root, paths in [(place if place.is_dir() else place.parent, files_of(place)) for place in places]:
        for path in paths:
            relative = path.relative_to(root).as_posix()
            # The lengths tell where a path and a content end; otherwise two folders could read as the same bytes.
            digest.update(f"{len(relative)} {relative} {path.stat().st_size} ".encode())
            with path.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
    return digest.hexdigest()[:DIGEST_LENGTH]


def files_of(place: Path) -> list[Path]:
    """Return the files that a MAP at this place consists of, sorted; this file's head says which they are.

    Raises:
        BrokenMap: there are too many.
    """
    if place.is_dir():
        paths = _within(place)
    elif place.suffix == ".py":
        beside = [place.parent / name for name in BESIDE]
        paths = chain(_imported(place), *([one] if one.is_file() else _within(one) for one in beside if one.exists()))
    else:
        paths = iter([place])
    found, n_bytes = set(), 0
    for path in paths:
        found.add(path)
        n_bytes += path.stat().st_size
        if len(found) > MOST_FILES or n_bytes > MOST_BYTES:
            raise BrokenMap(
                f"{place} holds more than a MAP should, over {MOST_FILES} files or {MOST_BYTES >> 30} GiB. "
                "Name the folder of the application alone, and keep data out of it."
            )
    return sorted(found)


def left_out(folder: Path, name: str) -> bool:
    """Tell whether a file or folder in `folder` is not part of a MAP."""
    return name.startswith(".") or name == PYCACHE or (folder / name / VENV).is_file()


def _within(root: Path) -> Iterator[Path]:
    """Yield what lies in a folder and below; links are followed, to each folder once."""
    seen = set()
    for place, folders, names in os.walk(root, followlinks=True):
        folder = Path(place)
        if (real := folder.resolve()) in seen:
            folders[:] = []
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not left_out(folder, name))
        yield from (folder / name for name in names if not left_out(folder, name) and (folder / name).is_file())


def _imported(program: Path) -> Iterator[Path]:
    """Yield a program, and all modules and packages of its folder that it imports, directly or not."""
    root, waiting, seen = program.parent, [program], {program}
    while waiting:
        path = waiting.pop()
        yield path
        if path.suffix != ".py":
            continue
        for name in _import_names(path):
            module, package = root / f"{name}.py", root / name
            found = [module] if module.is_file() else list(_within(package)) if package.is_dir() else []
            waiting += [one for one in found if one not in seen]
            seen.update(found)


def _import_names(path: Path) -> Iterator[str]:
    """Yield the first part of each name that a module imports."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # the import itself will report it
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (one.name.partition(".")[0] for one in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def _of_source(name: str, path: Path, python: str, models: Path | None) -> Map:
    folder = path if path.is_dir() else path.parent
    entry = entry_of(path)
    if entry is None:
        raise BrokenMap(
            f"{folder} holds neither {' nor '.join(ENTRIES)}, nor one Python file that defines an Application."
        )
    if entry.suffix != ".py":
        raise BrokenMap(f"{entry} is no Python file.")
    if models is not None and not models.exists():
        raise BrokenMap(f"its models {models} do not exist.")
    found = models.resolve() if models is not None else models_of(folder)
    config = folder / "app.yaml"
    needs, _ = read_app_yaml(config.read_bytes()) if config.is_file() else (Needs(), {})
    started = folder / "__main__.py" if path.is_dir() and (folder / "__main__.py").is_file() else entry
    return Map(
        name=name,
        place=path,
        digest=_digest(path, str(found) if found else None),
        application=str(path),
        python=python,
        command=(python, str(started)),
        models=str(found) if found is not None else None,
        own_environment=_models_at(found) | ({"HOLOSCAN_CONFIG_PATH": str(config)} if config.is_file() else {}),
        needs=needs,
    )


def _of_unpacked(name: str, folder: Path, manifests: Manifests, python: str) -> Map:
    def local(path: str) -> str:
        """Return where a path of the image lies now; other paths and words are as they are."""
        for root, place in ((manifests.application, application), (manifests.model_root, models)):
            if path == root or path.startswith(f"{root}/"):
                return str(place) + path[len(root) :]
        return path

    application, models = folder / "app", folder / "models"
    if not application.is_dir():
        raise BrokenMap(f"{folder} has manifests, but no folder app.")
    config = next(
        (folder / place / "app.yaml" for place in CONFIG_FOLDERS if (folder / place / "app.yaml").is_file()), None
    )
    environment = _others(manifests.environment) | _models_at(models if models.is_dir() else None)
    if config is not None:
        environment["HOLOSCAN_CONFIG_PATH"] = str(config)
    words = [local(word) for word in manifests.command]
    program = next((Path(word) for word in words if word.startswith(str(application))), application)
    if entry_of(program) is None:
        raise BrokenMap(f"app.json: command: starts {program}, where there is no Python program.")
    return Map(
        name=name,
        place=folder,
        digest=digest_of(folder),
        application=str(program),
        python=python,
        command=(python, *words[1:]) if _is_python(words[0]) else tuple(words),
        models=str(models) if models.is_dir() else None,
        own_environment=environment,
        needs=manifests.needs,
        manifests=manifests,
    )


def _of_image(name: str, reference: str, engine: Engine) -> Map:
    inspected = engine.inspect(reference)
    if inspected is None:
        raise BrokenMap(f"the image {reference} is not on this machine; `{engine.kind} pull {reference}` gets it.")
    files = engine.read_all(
        inspected.id, [f"/etc/{family}/{file}.json" for family in FAMILIES for file in ("app", "pkg")]
    )
    family = next((one for one in FAMILIES if f"/etc/{one}/app.json" in files), None)
    if family is None:
        raise BrokenMap(
            f"the image {reference} is no MAP: it has neither /etc/holoscan/app.json nor /etc/monai/app.json."
        )
    manifests = read_manifests(files[f"/etc/{family}/app.json"], files.get(f"/etc/{family}/pkg.json"), family=family)
    python = manifests.command[0] if _is_python(manifests.command[0]) else "python3"
    program = next(
        (word for word in manifests.command if word.startswith(manifests.application)), manifests.application
    )
    return Map(
        name=name,
        place=None,
        digest=_image_digest(reference, inspected),
        application=program,
        python=python,
        command=manifests.command,
        models=manifests.model_root,
        own_environment=_others(manifests.environment) | _models_at(manifests.model_root),
        needs=manifests.needs,
        image=Image(engine, reference, inspected.id, inspected),
        manifests=manifests,
    )


def _image_digest(reference: str, inspected: Inspected) -> str:
    """Return the start of the digest that the image's registry knows it by; an image that was in none has its id."""
    pinned = inspected.pinned(reference)
    return (pinned.rpartition(":")[2] if pinned is not None else inspected.id)[:DIGEST_LENGTH]


def _manifests_in(folder: Path) -> Manifests | None:
    for place in CONFIG_FOLDERS:
        app, pkg = folder / place / "app.json", folder / place / "pkg.json"
        if app.is_file():
            text = app.read_bytes()
            family = "monai" if b"/opt/monai" in text else "holoscan"
            return read_manifests(text, pkg.read_bytes() if pkg.is_file() else None, family=family)
    return None


def _digest(place: Path, models: str | None) -> str:
    held = [place] if place.is_dir() else [place.parent / name for name in MODEL_FOLDERS]
    elsewhere = [Path(one) for one in (models,) if one and not any(Path(one).is_relative_to(each) for each in held)]
    return digest_of(place, *elsewhere)


def _is_python(word: str) -> bool:
    return word.rpartition("/")[2].startswith("python")


def _models_at(models: str | Path | None) -> dict[str, str]:
    return {names[-1]: str(models) for names in VARIABLES.values() if models is not None}


def _others(variables: Mapping[str, str]) -> dict[str, str]:
    """Return those that do not name a place in the image."""
    return {key: value for key, value in variables.items() if not key.startswith(("HOLOSCAN_", "MONAI_"))}


def _defines_application(path: Path) -> bool:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return False
    return any(name == "Application" for node in ast.walk(tree) for name in _bases(node))


def _bases(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.ClassDef):
        for base in node.bases:
            yield base.id if isinstance(base, ast.Name) else getattr(base, "attr", "")
