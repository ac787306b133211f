"""From paths to uploads: what is sent, under which key, and which DICOM instances are in it.

A key is made of the dataset and the hash of the content: it holds no file name, which may hold a patient's, the same
file is the same object, and no two files meet.
"""

import contextlib
import hashlib
import io
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cli.client import Client
from shared import keys
from shared.documents.revisions import sha_of
from shared.keys import COMPLETE, is_uid
from shared.operations.refused import Refused
from shared.pydicom_silence import silence

CHUNK_BYTES = 1024 * 1024
AT_ONCE = 4
"""Files that are uploaded at the same time."""
ZIP_MAGIC, GZIP_MAGIC = b"PK\x03\x04", b"\x1f\x8b"
TAR_MAGIC, TAR_MAGIC_AT = b"ustar", 257
DICOM_MAGIC = b"DICM"
PREAMBLE_BYTES = 132
GROUP_LENGTH_BYTES = 12
"""The element (0002,0000) itself, which its value does not count."""
HEADER_TAGS = ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "Modality"]


@dataclass(frozen=True, slots=True)
class Upload:
    """One file to send."""

    path: Path
    key: str
    size: int
    sha256: str
    """Of the whole file: what it is called in quarantine."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One DICOM instance in an upload: the file itself, or a member of an archive."""

    study_uid: str
    series_uid: str
    sop_instance_uid: str
    sha: str | None
    """As in the instance's key in `studies/`; None if the file is not Part 10, so it cannot be told from outside."""
    modality: str
    object_sha256: str
    upload_sha256: str
    """Of the archive, for a member."""
    member: int | None = None
    """Its number in the archive, as ingest counts."""


def collect(paths: Sequence[Path], dataset: str) -> list[Upload]:
    """Return every file under `paths`, folders being searched, hidden files left out; the same content once.

    Raises:
        Refused: a path cannot be read, or there is nothing to send.
    """
    uploads: dict[str, Upload] = {}
    for path in (found for given in paths for found in files(given)):
        try:
            digest = _sha256(path)
            size = path.stat().st_size
        except OSError as error:
            raise Refused(f"cannot read {path}: {error.strerror}") from None
        uploads.setdefault(digest, Upload(path, keys.upload(dataset, f"{digest}{_suffix(path)}"), size, digest))
    if not uploads:
        raise Refused(f"there is no file in {', '.join(map(str, paths))}")
    return list(uploads.values())


def send(client: Client, uploads: Sequence[Upload], told: Callable[[int], None]) -> None:
    """Upload all of them, several at a time; `told` is called with the bytes that went, from any thread."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for done in [pool.submit(client.upload, upload.path, upload.key, told) for upload in uploads]:
            done.result()


def instances(upload: Upload) -> tuple[list[Instance], set[str]]:
    """Read the headers of what is in an upload: the instances, and the hashes of what is none and may be refused."""
    silence()
    found, others = [], {upload.sha256}
    for member, body in _bodies(upload.path):
        object_sha256 = hashlib.sha256(body).hexdigest()
        instance = _instance(body, object_sha256, upload.sha256, member)
        if instance is None:
            others.add(object_sha256)
        else:
            found.append(instance)
    return found, others - {instance.object_sha256 for instance in found}


def files(given: Path) -> Iterator[Path]:
    """Yield a file, or the files in a folder and below; hidden ones and markers are left out."""
    if given.is_dir():
        found: list[Path] = []
        for folder, folders, names in os.walk(given, onerror=_unreadable):
            folders[:] = [name for name in folders if not name.startswith(".")]  # these need not be readable
            # A key of ours is in no folder, so that a marker says nothing.
            found += [Path(folder, name) for name in names if not name.startswith(".") and name != COMPLETE]
        yield from (path for path in sorted(found) if path.is_file())
    elif given.exists():
        yield given
    else:
        raise Refused(f"{given} does not exist")


def _unreadable(error: OSError) -> None:
    raise Refused(f"cannot read {error.filename}: {error.strerror}") from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z]{1,5}", suffix) else ""


def _bodies(path: Path) -> Iterator[tuple[int | None, bytes]]:
    """Yield the file's content, or that of each member of a zip or a tar that can be read, and its number."""
    with path.open("rb") as file:
        head = file.read(TAR_MAGIC_AT + len(TAR_MAGIC))
    is_dicom = head[:PREAMBLE_BYTES].endswith(DICOM_MAGIC)
    if head.startswith(ZIP_MAGIC):
        yield from _unzipped(path)
    elif head.startswith(GZIP_MAGIC) or (head[TAR_MAGIC_AT:] == TAR_MAGIC and not is_dicom):
        yield from _untarred(path)
    else:
        yield None, path.read_bytes()


# Encrypted, damaged, of an unknown method: ingest says which, here nothing is expected of it.
def _unzipped(path: Path) -> Iterator[tuple[int, bytes]]:
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        for number, entry in enumerate(entry for entry in archive.infolist() if not entry.is_dir()):
            with contextlib.suppress(Exception):
                yield number, archive.read(entry)


def _untarred(path: Path) -> Iterator[tuple[int, bytes]]:
    with contextlib.suppress(Exception), tarfile.open(path) as archive:
        for number, entry in enumerate(archive):
            if entry.isfile() and (stream := archive.extractfile(entry)) is not None:
                yield number, stream.read()


def _instance(body: bytes, object_sha256: str, upload_sha256: str, member: int | None) -> Instance | None:
    from pydicom import dcmread  # noqa: PLC0415 - only whoever waits for results needs it

    from services.ingest.reading import looks_like_dicom  # noqa: PLC0415

    if not looks_like_dicom(body[:PREAMBLE_BYTES]):  # 200 MB of zeros take pydicom minutes
        return None
    try:
        header = dcmread(io.BytesIO(body), stop_before_pixels=True, force=True, specific_tags=HEADER_TAGS)
        uids = [str(header.get(name, "")) for name in HEADER_TAGS[:3]]
        modality = str(header.get("Modality", ""))
        group_length = header.file_meta.get("FileMetaInformationGroupLength")
    except Exception:  # noqa: BLE001 - whatever a damaged file makes pydicom raise
        return None
    if not all(uid and is_uid(uid) for uid in uids):
        return None
    sha = None
    if body[:PREAMBLE_BYTES].endswith(DICOM_MAGIC) and isinstance(group_length, int):
        sha = sha_of(body[PREAMBLE_BYTES + GROUP_LENGTH_BYTES + group_length :])
    return Instance(uids[0], uids[1], uids[2], sha, modality, object_sha256, upload_sha256, member)
