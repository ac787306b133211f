"""A MAP as a folder of source: `app.py` or `__main__.py` with one `Application`, and the models beside it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from shared.config import Misconfigured

DIGEST_LENGTH = 32
CHUNK_BYTES = 1024 * 1024
ENTRIES = ("app.py", "__main__.py")
"""Where the `Application` is looked for, as in the examples of the App SDK."""
MODEL_FOLDERS = ("models", "model")


@dataclass(frozen=True, slots=True)
class Map:
    """One MAP that this worker can run."""

    name: str
    folder: Path
    digest: str
    """Of the folder's content: another program or another model is another MAP."""


def load(name: str, folder: Path) -> Map:
    """Find the MAP in `folder`.

    Raises:
        Misconfigured: there is none.
    """
    if not folder.is_dir():
        raise Misconfigured(f"maps.yaml: {name}: its source {folder} is no folder.")
    if entry_of(folder) is None:
        raise Misconfigured(f"maps.yaml: {name}: {folder} holds neither {' nor '.join(ENTRIES)}.")
    return Map(name, folder.resolve(), digest_of(folder))


def entry_of(folder: Path) -> Path | None:
    """Return the file that defines or imports the `Application`."""
    return next((folder / entry for entry in ENTRIES if (folder / entry).is_file()), None)


def models_of(folder: Path) -> Path | None:
    """Return the folder with the MAP's models, for HOLOSCAN_MODEL_PATH; a MAP may have none."""
    return next((folder / name for name in MODEL_FOLDERS if (folder / name).is_dir()), None)


def digest_of(folder: Path) -> str:
    """Return the hash of all files, by sorted relative path and content, without hidden files and compiled Python."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") or part == "__pycache__" for part in relative.parts):
            continue
        # The lengths tell where a path and a content end; otherwise two folders could read as the same bytes.
        digest.update(f"{len(relative.as_posix())} {relative.as_posix()} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()[:DIGEST_LENGTH]
