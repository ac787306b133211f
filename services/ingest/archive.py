"""A zip or a tar of a study to files: each member under a name of our own, within caps; a bad one loses no other.

A gzipped tar is inflated to the disk first, as far as the caps allow and no further.
"""

import errno
import gzip
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from services.ingest.protocol import Member, ZipCaps
from services.ingest.reading import PREAMBLE_BYTES, is_dicomdir, looks_like_dicom
from shared.errors import Unprocessable

ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
"""A local file header, or the end of an empty archive (APPNOTE 4.3)."""
GZIP_MAGIC = b"\x1f\x8b"
TAR_MAGIC, TAR_MAGIC_AT = b"ustar", 257
"""The mark of a tar, by POSIX and by GNU, and its offset; the format before 1988 has none, and is not recognised."""
TAR_BLOCK = 512
HEAD_BYTES = TAR_BLOCK
CHUNK_BYTES = 1024 * 1024
RATIO_FROM_BYTES = 16 * 1024 * 1024
"""Below this size a member is not asked for its ratio: a small image of one colour is no bomb."""
ENCRYPTED = 0x1
UNIX_SYSTEMS, UNIX_MODE_BITS = {3, 19}, 16
"""A zip made on Unix, or on OS X, has a file's mode in the upper half of its attributes."""
DOS_FOLDER = 0x10
"""The bit of a folder in the lower half of a zip member's external attributes."""
METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
JUNK_FOLDERS = {"__MACOSX"}
JUNK_NAMES = {"DICOMDIR", "ICON\r", ".DS_STORE", "THUMBS.DB", "DESKTOP.INI", "VERSION", "LOCKFILE"}
JUNK_TEXTS = {".txt", ".md", ".html", ".htm", ".xml", ".json", ".pdf", ".rtf", ".doc", ".docx", ".csv", ".log", ".chm"}
JUNK_PICTURES = {".jpg", ".jpeg", ".png", ".gif", ".ico", ".css"}
JUNK_PROGRAMS = {".exe", ".dll", ".bat", ".jar", ".js", ".inf", ".ini"}
JUNK_SUFFIXES = JUNK_TEXTS | JUNK_PICTURES | JUNK_PROGRAMS
"""What PACS viewers and operating systems put beside the images of a study."""


DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO}
"""Errors that are the machine's fault, not the archive's."""


def is_zip(head: bytes) -> bool:
    """Tell from the first bytes, whatever the name says."""
    return head[:4] in ZIP_MAGIC


def is_tar(head: bytes) -> bool:
    """Tell from the first block, whatever the name says."""
    return head[TAR_MAGIC_AT : TAR_MAGIC_AT + len(TAR_MAGIC)] == TAR_MAGIC and not looks_like_dicom(head)


def unpack(archive: Path, folder: Path, caps: ZipCaps) -> list[Member] | None:
    """Write the members of `archive` into `folder` as `<number>`; None where it is no archive.

    A name inside an archive never becomes a path.

    Raises:
        Unprocessable: `zip_damaged`, `zip_too_large`, `zip_ratio`, where nothing of it can be used.
    """
    head = _head(archive)
    with _damage_is_told():
        if is_zip(head):
            return _unzip(archive, folder, caps)
        if is_tar(head):
            return _untar(archive, folder, caps)
        if head[:2] == GZIP_MAGIC:
            inflated = folder / "tar"
            _gunzip(archive, inflated, caps)
            members = _untar(inflated, folder, caps) if is_tar(_head(inflated)) else None
            inflated.unlink()
            return members
    return None


@contextmanager
def _damage_is_told() -> Iterator[None]:
    try:
        yield
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        zlib.error,
        EOFError,
        NotImplementedError,
        OSError,
        ValueError,
    ) as error:
        if isinstance(error, Unprocessable) or getattr(error, "errno", None) in DISK_ERRORS:
            raise
        raise Unprocessable("zip_damaged") from None


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def _unzip(archive: Path, folder: Path, caps: ZipCaps) -> list[Member]:
    with zipfile.ZipFile(archive) as opened:
        entries = [entry for entry in opened.infolist() if not entry.is_dir()]
        if len(entries) > caps.entries:
            raise Unprocessable("zip_too_large", "members")
        members, left = [], caps.unpacked_bytes
        for number, entry in enumerate(entries):
            member, written = _unzip_member(opened, entry, folder / str(number), left, caps.ratio)
            left -= written
            members.append(member)
        return members


def _unzip_member(
    opened: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, left: int, ratio: float
) -> tuple[Member, int]:
    """Write one member to `path`; return what became of it, and how many bytes it took of those that are left."""
    number = int(path.name)
    name = PurePosixPath(entry.filename.replace("\\", "/"))
    if _is_folder(entry) or JUNK_FOLDERS & set(name.parts):
        return Member(number), 0
    refusal = _refusal(entry)
    if refusal is not None:
        return Member(number, reason_code=refusal), 0
    limit = max(RATIO_FROM_BYTES, int(entry.compress_size * ratio))
    try:
        with opened.open(entry) as stream, path.open("wb") as file:
            written = _copy(stream, file, min(limit, left))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError):
        path.unlink(missing_ok=True)
        return Member(number, reason_code="zip_damaged"), 0
    if written is None:
        path.unlink()
        if limit >= left:
            raise Unprocessable("zip_too_large", "bytes")
        return Member(number, reason_code="zip_ratio"), limit
    return _sorted_out(Member(number, str(path)), path, name), written


def _mode(entry: zipfile.ZipInfo) -> int:
    return entry.external_attr >> UNIX_MODE_BITS if entry.create_system in UNIX_SYSTEMS else 0


def _is_folder(entry: zipfile.ZipInfo) -> bool:
    """Tell of an entry whose name lacks the slash of a folder, as some writers leave it out."""
    said = entry.external_attr & DOS_FOLDER or stat.S_ISDIR(_mode(entry)) or entry.filename.endswith("\\")
    return entry.file_size == 0 and bool(said)


def _refusal(entry: zipfile.ZipInfo) -> str | None:
    """Return why a member is not even opened."""
    if stat.S_IFMT(_mode(entry)) not in {0, stat.S_IFREG}:
        return "zip_link"
    if entry.flag_bits & ENCRYPTED:
        return "zip_encrypted"
    return None if entry.compress_type in METHODS else "zip_unsupported"


def _gunzip(archive: Path, inflated: Path, caps: ZipCaps) -> None:
    limit = max(RATIO_FROM_BYTES, int(archive.stat().st_size * caps.ratio))
    headers = 4 * TAR_BLOCK * caps.entries + tarfile.RECORDSIZE  # and padding, of members and at the end
    most = min(limit, caps.unpacked_bytes + headers)
    with gzip.open(archive) as stream, inflated.open("wb") as file:
        if _copy(stream, file, most) is None:
            raise Unprocessable("zip_ratio" if most == limit else "zip_too_large")


def _untar(archive: Path, folder: Path, caps: ZipCaps) -> list[Member]:
    members: list[Member] = []
    left = caps.unpacked_bytes
    with archive.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as opened:
        for number, entry in enumerate(_tar_entries(opened)):
            if number == caps.entries:
                raise Unprocessable("zip_too_large", "members")
            member, written = _untar_member(opened, entry, folder / str(number), left)
            left -= written
            members.append(member)
        file.seek(opened.offset)
        told = bool(members) and members[-1].reason_code == "zip_damaged"
        if not told and not _is_end(file):
            members.append(Member(len(members), reason_code="zip_damaged"))
    return members


def _is_end(file: IO[bytes]) -> bool:
    """Tell whether the archive ends here, in zeros: for tarfile it does at a damaged header, and before another tar."""
    if file.read(TAR_BLOCK) != bytes(TAR_BLOCK):
        return False
    return not any(chunk.strip(b"\0") for chunk in iter(partial(file.read, CHUNK_BYTES), b""))


def _tar_entries(opened: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    with suppress(tarfile.ReadError):  # one that cannot be passed over ends them
        yield from opened


def _untar_member(opened: tarfile.TarFile, entry: tarfile.TarInfo, path: Path, left: int) -> tuple[Member, int]:
    number, name = int(path.name), PurePosixPath(entry.name)
    if entry.isdir():
        return Member(number), 0
    if not entry.isfile():
        return Member(number, reason_code="zip_link"), 0
    if entry.issparse():
        return Member(number, reason_code="zip_unsupported"), 0
    if JUNK_FOLDERS & set(name.parts):
        return Member(number), 0
    stream = opened.extractfile(entry)
    try:
        with path.open("wb") as file:
            written = _copy(stream, file, left) if stream else 0
    except tarfile.ReadError:
        path.unlink(missing_ok=True)
        return Member(number, reason_code="zip_damaged"), 0
    if written is None:
        raise Unprocessable("zip_too_large", "bytes")
    return _sorted_out(Member(number, str(path)), path, name), written


def _copy(stream: IO[bytes] | gzip.GzipFile, file: IO[bytes], limit: int) -> int | None:
    """Copy at most `limit` bytes, whatever size the archive declares; None where there are more."""
    written = 0
    while chunk := stream.read(CHUNK_BYTES):
        written += len(chunk)
        if written > limit:
            return None
        file.write(chunk)
    return written


def _sorted_out(member: Member, path: Path, name: PurePosixPath) -> Member:
    """Tell images from what lies beside them: the content decides, and the name only where it is not DICOM."""
    head = _head(path)
    if looks_like_dicom(head[: PREAMBLE_BYTES + 4]):
        try:
            return Member(member.number) if is_dicomdir(path.read_bytes()) else member
        except Unprocessable:  # reading it for good says what is wrong
            return member
    if name.name.upper() in JUNK_NAMES or name.name.startswith(".") or name.suffix.lower() in JUNK_SUFFIXES:
        return Member(member.number)
    if is_zip(head) or is_tar(head) or head[:2] == GZIP_MAGIC:
        return Member(member.number, reason_code="zip_in_zip")
    return member
