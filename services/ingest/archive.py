"""A zip of a study to files: each member under a name of our own, within caps, one bad member never losing the rest."""

import errno
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from services.ingest.answers import Member
from services.ingest.reading import PREAMBLE_BYTES, is_dicomdir, looks_like_dicom
from shared.errors import Unprocessable

ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
"""A local file header, or the end of an empty archive (APPNOTE 4.3)."""
CHUNK_BYTES = 1024 * 1024
RATIO_FROM_BYTES = 16 * 1024 * 1024
"""Below this size a member is not asked for its ratio: a small image of one colour is no bomb."""
ENCRYPTED = 0x1
METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
JUNK_FOLDERS = {"__MACOSX"}
JUNK_NAMES = {"DICOMDIR", ".DS_STORE", "THUMBS.DB", "DESKTOP.INI", "VERSION", "LOCKFILE"}
JUNK_TEXTS = {".txt", ".md", ".html", ".htm", ".xml", ".json", ".pdf", ".rtf", ".doc", ".docx", ".csv", ".log", ".chm"}
JUNK_PICTURES = {".jpg", ".jpeg", ".png", ".gif", ".ico", ".css"}
JUNK_PROGRAMS = {".exe", ".dll", ".bat", ".jar", ".js", ".inf", ".ini"}
JUNK_SUFFIXES = JUNK_TEXTS | JUNK_PICTURES | JUNK_PROGRAMS
"""What PACS viewers and operating systems put beside the images of a study."""


@dataclass(frozen=True, slots=True)
class ZipCaps:
    """Limits of one archive."""

    entries: int
    unpacked_bytes: int
    """All members together."""
    ratio: float
    """Unpacked size over packed size of one member."""


DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO}
"""These are the machine's, not the zip's."""


def is_zip(head: bytes) -> bool:
    """Tell from the first bytes, whatever the name says."""
    return head[:4] in ZIP_MAGIC


def unpack(archive: Path, folder: Path, caps: ZipCaps) -> list[Member]:
    """Write the members of `archive` into `folder` as `<number>`; a name inside a zip never becomes a path.

    Raises:
        Unprocessable: `zip_damaged` or `zip_too_large`, where nothing of it can be used.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = [entry for entry in opened.infolist() if not entry.is_dir()]
            if len(entries) > caps.entries:
                raise Unprocessable("zip_too_large", "members")
            members, left = [], caps.unpacked_bytes
            for number, entry in enumerate(entries):
                member, written = _member(opened, entry, folder / str(number), left, caps.ratio)
                left -= written
                members.append(member)
            return members
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        if isinstance(error, Unprocessable) or getattr(error, "errno", None) in DISK_ERRORS:
            raise
        raise Unprocessable("zip_damaged") from None


def _member(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, left: int, ratio: float) -> tuple[Member, int]:
    """Write one member to `path`; return what became of it, and how many bytes it took of those that are left."""
    number = int(path.name)
    name = PurePosixPath(entry.filename.replace("\\", "/"))
    if entry.file_size == 0 or JUNK_FOLDERS & set(name.parts):
        return Member(number), 0
    if entry.flag_bits & ENCRYPTED:
        return Member(number, reason_code="zip_encrypted"), 0
    if entry.compress_type not in METHODS:
        return Member(number, reason_code="zip_unsupported"), 0
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


def _copy(stream: IO[bytes], file: IO[bytes], limit: int) -> int | None:
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
    with path.open("rb") as file:
        head = file.read(PREAMBLE_BYTES + 4)
    if is_zip(head):
        return Member(member.number, reason_code="zip_in_zip")
    if looks_like_dicom(head):
        try:
            return Member(member.number) if is_dicomdir(path.read_bytes()) else member
        except Unprocessable:  # reading it for good says what is wrong
            return member
    junk = name.name.upper() in JUNK_NAMES or name.name.startswith(".") or name.suffix.lower() in JUNK_SUFFIXES
    return Member(member.number) if junk else member
