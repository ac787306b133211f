"""What a compressed frame says of itself: size and depth, read from its first bytes, before anything is decoded.

A codestream of 924 bytes can claim 1.6 GB, so a decoder is only asked when the claim is what the data set says.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

SCAN = 0xDA
JPEG_LS_FRAME = 0xF7
"""Start of a JPEG-LS frame (ISO 14495-1 C.1.1)."""
LOSSLESS_FRAMES = {0xC3, 0xC7, 0xCB, 0xCF}
START_OF_FRAME = {*range(0xC0, 0xD0), JPEG_LS_FRAME} - {0xC4, 0xC8, 0xCC}
"""ISO 10918-1 table B.1 without DHT, JPG and DAC."""
WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
START_OF_IMAGE, END_OF_IMAGE = b"\xff\xd8", b"\xff\xd9"
SIZ = b"\xff\x4f\xff\x51"
"""Start of codestream and its size marker (ISO 15444-1 A.5.1)."""
COD = 0xFF52
JP2 = b"\0\0\0\x0cjP  "
"""Signature box of a JP2 file (ISO 15444-1 I.5.1)."""
JXL = b"\0\0\0\x0cJXL "
"""Signature box of a JPEG XL file (ISO 18181-2)."""
JXL_CODESTREAM = b"\xff\x0a"


class Damaged(ValueError):  # noqa: N818 - it states a fact about the bytes
    """The bytes are no such codestream."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a codestream says of itself."""

    rows: int
    columns: int
    samples: int | None
    """The number of samples per pixel; None if the first bits of the header do not say it."""
    precision: int
    lossy: bool
    """Whether decoding gives other values than were coded; a JPEG XL may be of either kind, and counts as lossy."""


def jpeg(frame: bytes) -> Header:
    """Walk the marker segments up to the first scan (ISO 10918-1 B.1, ISO 14495-1 C.2).

    Raises:
        Damaged: it is no JPEG, or has no end: decoders fill what is missing with grey, and say nothing.
    """
    frames, at = [], 0
    try:
        for marker, at in _segments(frame):
            if marker in START_OF_FRAME:
                frames.append((marker, *struct.unpack_from(">BHHB", frame, at + 2)))
        near = frame[at + 3 + 2 * frame[at + 2]]  # NEAR of a JPEG-LS scan
    except (struct.error, IndexError):
        raise Damaged from None
    if len(frames) != 1 or frame.find(END_OF_IMAGE, at) < 0:  # of two frames, decoders disagree on which one counts
        raise Damaged
    ((marker, precision, rows, columns, samples),) = frames
    lossy = near > 0 if marker == JPEG_LS_FRAME else marker not in LOSSLESS_FRAMES
    return Header(rows, columns, samples, precision, lossy)


def _segments(frame: bytes) -> Iterator[tuple[int, int]]:
    """Yield each marker and where its length stands, up to the first scan."""
    if frame[:2] != b"\xff\xd8":
        raise Damaged
    at, marker = 2, 0
    while marker != SCAN:
        if frame[at] != 0xFF:  # noqa: PLR2004 - every marker starts with it
            raise Damaged
        marker = frame[at + 1]
        if marker == 0xFF:  # noqa: PLR2004 - fill byte
            at += 1
            continue
        at += 2
        if marker not in WITHOUT_LENGTH:
            yield marker, at
            at += struct.unpack_from(">H", frame, at)[0]


def jpeg_2000(frame: bytes) -> Header:
    """Read SIZ and COD of the main header (ISO 15444-1 A.5.1, A.6.1); `frame` is the bare codestream.

    Raises:
        Damaged: it is none, or its components are of several sizes.
    """
    if frame[:4] != SIZ:
        raise Damaged
    try:
        length, _, x1, y1, x0, y0 = struct.unpack_from(">2H4I", frame, 4)
        samples, *components = struct.unpack_from(">H", frame, 40) + tuple(frame[42 : 4 + length])
        depths, steps = components[::3], components[1::3] + components[2::3]
        at = 4 + length
        while (marker := struct.unpack_from(">H", frame, at)[0]) != COD:
            if not 0xFF50 <= marker < 0xFF70:  # noqa: PLR2004 - marker segments of the main header
                raise Damaged
            at += 2 + struct.unpack_from(">H", frame, at + 2)[0]
        irreversible = frame[at + 13] == 0
    except (struct.error, IndexError, ValueError):
        raise Damaged from None
    if len(depths) != samples or set(steps) != {1}:
        raise Damaged
    return Header(y1 - y0, x1 - x0, samples, max(depth & 0x7F for depth in depths) + 1, irreversible)


def bare_jpeg_2000(frame: bytes) -> bytes:
    """Return the codestream of a frame, which should be bare and is in a JP2 file sometimes (PS3.5 A.4.4)."""
    return _box(frame, b"jp2c") if frame.startswith(JP2) else frame


def _box(file: bytes, kind: bytes) -> bytes:
    """Return what is in the first box of a kind (ISO 15444-1 I.4)."""
    at = 0
    while at + 8 <= len(file):
        length, found = struct.unpack_from(">I4s", file, at)
        header = 8
        if length == 1 and at + 16 <= len(file):
            (length,), header = struct.unpack_from(">Q", file, at + 8), 16
        end = at + length if length else len(file)
        if found == kind:
            return file[at + header : end]
        if length < header and length:
            break
        at = end
    raise Damaged


class _Bits:
    """Bits of a JPEG XL header, the lowest of each byte first (ISO 18181-1 annex B)."""

    def __init__(self, octets: bytes) -> None:
        self._left, self._n_left = int.from_bytes(octets, "little"), 8 * len(octets)

    def u(self, n: int) -> int:
        if n > self._n_left:
            raise Damaged
        value, self._left = self._left & ((1 << n) - 1), self._left >> n
        self._n_left -= n
        return value

    def u32(self, *choices: tuple[int, int]) -> int:
        """Read a number as two bits that choose an offset and a count of further bits."""
        offset, n = choices[self.u(2)]
        return offset + self.u(n)


JXL_HEADER_BYTES = 64
"""More bytes than size and depth can take."""
JXL_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}
"""Columns to rows (ISO 18181-1 table D.2)."""
JXL_SIZES = ((1, 9), (1, 13), (1, 18), (1, 30))
JXL_DEPTHS = ((8, 0), (10, 0), (12, 0), (1, 6))


def jpeg_xl(frame: bytes) -> Header:
    """Read the size header and the depth of the image metadata (ISO 18181-1 D.2, D.3).

    Raises:
        Damaged: it is no JPEG XL, or no plain picture: turned, animated, with a preview, or of floating point.
    """
    if frame.startswith(JXL):
        try:
            frame = _box(frame, b"jxlc")
        except Damaged:
            frame = _box(frame, b"jxlp")[4:]  # in parts, each of which is numbered
    if not frame.startswith(JXL_CODESTREAM):
        raise Damaged
    bits = _Bits(frame[2 : 2 + JXL_HEADER_BYTES])
    small = bits.u(1)
    rows = 8 * (bits.u(5) + 1) if small else bits.u32(*JXL_SIZES)
    ratio = bits.u(3)
    if ratio:
        across, down = JXL_RATIOS[ratio]
        columns = rows * across // down
    else:
        columns = 8 * (bits.u(5) + 1) if small else bits.u32(*JXL_SIZES)
    if bits.u(1):  # all metadata is as it is mostly: 8 bits, lossy
        return Header(rows, columns, None, 8, lossy=True)
    if bits.u(1):  # extra fields
        orientation, other_size, preview, animation = bits.u(3), bits.u(1), bits.u(1), bits.u(1)
        if orientation or other_size or preview or animation:
            raise Damaged
    if bits.u(1):  # floating point
        raise Damaged
    return Header(rows, columns, None, bits.u32(*JXL_DEPTHS), lossy=True)
