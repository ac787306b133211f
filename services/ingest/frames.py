"""One compressed frame to its samples: JPEG, JPEG-LS, JPEG 2000, HTJ2K, JPEG XL and RLE.

A codestream is asked for its size before it is decoded: one of 924 bytes can claim 1.6 GB.
"""

import struct
from dataclasses import dataclass

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from rle.utils import decode_frame as decode_rle  # type: ignore[attr-defined]

from shared.errors import Unprocessable

JPEG = {
    "1.2.840.10008.1.2.4.50",  # baseline
    "1.2.840.10008.1.2.4.51",  # extended, 12 bit
    "1.2.840.10008.1.2.4.53",  # spectral selection, retired
    "1.2.840.10008.1.2.4.55",  # full progression, retired
}
JPEG_LOSSLESS = {"1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"}
JPEG_LS = {"1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"}
JPEG_2000 = {"1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"}
HTJ2K = {"1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202", "1.2.840.10008.1.2.4.203"}
JPEG_XL = {"1.2.840.10008.1.2.4.110", "1.2.840.10008.1.2.4.111", "1.2.840.10008.1.2.4.112"}
RLE = {"1.2.840.10008.1.2.5"}
SUPPORTED = JPEG | JPEG_LOSSLESS | JPEG_LS | JPEG_2000 | HTJ2K | JPEG_XL | RLE

START_OF_FRAME = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
"""ISO 10918-1 table B.1 without DHT, JPG and DAC; 0xF7 is JPEG-LS (ISO 14495-1)."""
WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
SIZ = b"\xff\x4f\xff\x51"
"""Start of codestream and its size marker (ISO 15444-1 A.5.1)."""
COD = b"\xff\x52"
RLE_HEADER_BYTES = 64

METHODS = {
    **dict.fromkeys(JPEG, "ISO_10918_1"),
    **dict.fromkeys(JPEG_LS, "ISO_14495_1"),
    **dict.fromkeys(JPEG_2000, "ISO_15444_1"),
    **dict.fromkeys(HTJ2K, "ISO_15444_15"),
    **dict.fromkeys(JPEG_XL, "ISO_18181_1"),
}
"""LossyImageCompressionMethod (PS3.3 C.7.6.1.1.5.1)."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a codestream says of itself."""

    rows: int
    columns: int
    samples: int
    precision: int
    lossy: bool


@dataclass(frozen=True, slots=True)
class Expected:
    """What the data set says of its frames."""

    rows: int
    columns: int
    samples: int
    bits_allocated: int
    bits_stored: int
    signed: bool
    photometric: str


@dataclass(frozen=True, slots=True)
class Decoded:
    """`samples : (rows, columns) or (rows, columns, samples)`, of the allocated width, and what changed by decoding."""

    samples: NDArray[np.generic]
    precision: int
    lossy: bool
    photometric: str


def decode(codestream: bytes, transfer_syntax_uid: str, expected: Expected) -> Decoded:
    """Decode one frame.

    Raises:
        Unprocessable: `frame_mismatch`, `frame_damaged` or `unsupported_transfer_syntax`.
    """
    if transfer_syntax_uid not in SUPPORTED:
        raise Unprocessable("unsupported_transfer_syntax")
    if transfer_syntax_uid in RLE:
        return _rle(codestream, expected)
    header = header_of(codestream, transfer_syntax_uid)
    if header is not None:
        told = (header.rows, header.columns, header.samples)
        if told != (expected.rows, expected.columns, expected.samples) or header.precision > expected.bits_allocated:
            raise Unprocessable("frame_mismatch")
    try:
        samples = _decode(codestream, transfer_syntax_uid, expected)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - each codec has its own error, and says what it read in it
        raise Unprocessable("frame_damaged") from None
    shape = (expected.rows, expected.columns) + ((expected.samples,) if expected.samples > 1 else ())
    if samples.shape != shape:
        raise Unprocessable("frame_mismatch")
    precision = header.precision if header is not None else expected.bits_stored
    if samples.dtype.kind not in "iu" or samples.dtype.itemsize * 8 > max(expected.bits_allocated, 8):
        raise Unprocessable("frame_mismatch")
    lossy = header.lossy if header is not None else transfer_syntax_uid.endswith(".112")
    return Decoded(
        _fit(samples, precision, expected), precision, lossy, _photometric(transfer_syntax_uid, expected.photometric)
    )


def header_of(codestream: bytes, transfer_syntax_uid: str) -> Header | None:
    """Read size and depth of a codestream; None for JPEG XL, which is bounded by the limits of the process alone."""
    if transfer_syntax_uid in JPEG_XL:
        return None
    try:
        if transfer_syntax_uid in JPEG_2000 | HTJ2K:
            return _jpeg_2000_header(codestream)
        return _jpeg_header(codestream)
    except (struct.error, IndexError, ValueError):
        raise Unprocessable("frame_damaged") from None


def _jpeg_header(codestream: bytes) -> Header:
    """Walk the marker segments up to the first scan (ISO 10918-1 B.1, ISO 14495-1 C.2)."""
    if codestream[:2] != b"\xff\xd8":
        raise ValueError
    at, frame, marker = 2, (0, 0, 0, 0), 0
    found = 0
    while True:
        if codestream[at] != 0xFF:  # noqa: PLR2004 - every marker starts with it
            raise ValueError
        marker = codestream[at + 1]
        if marker == 0xFF:  # noqa: PLR2004 - fill byte
            at += 1
            continue
        at += 2
        if marker in WITHOUT_LENGTH:
            continue
        (length,) = struct.unpack_from(">H", codestream, at)
        if marker in START_OF_FRAME:
            frame, found = struct.unpack_from(">BHHB", codestream, at + 2), marker
        if marker == 0xDA:  # noqa: PLR2004 - start of scan
            break
        at += length
    precision, rows, columns, samples = frame
    if not found:
        raise ValueError
    near = codestream[at + 3 + 2 * codestream[at + 2]]  # NEAR of a JPEG-LS scan
    lossy = near > 0 if found == 0xF7 else found not in {0xC3, 0xC7, 0xCB, 0xCF}  # noqa: PLR2004
    return Header(rows, columns, samples, precision, lossy)


def _jpeg_2000_header(codestream: bytes) -> Header:
    """Read SIZ and COD of the main header (ISO 15444-1 A.5.1, A.6.1); the codestream may lie in a JP2 box."""
    at = codestream.index(SIZ) + 4
    x1, y1, x0, y0 = struct.unpack_from(">4I", codestream, at + 4)
    samples, depth = struct.unpack_from(">HB", codestream, at + 36)
    for component in range(samples):
        _, step_x, step_y = struct.unpack_from(">3B", codestream, at + 38 + 3 * component)
        if (step_x, step_y) != (1, 1):
            raise Unprocessable("frame_mismatch")
    cod = codestream.index(COD, at)
    irreversible = codestream[cod + 13] == 0
    return Header(y1 - y0, x1 - x0, samples, (depth & 0x7F) + 1, irreversible)


def _decode(codestream: bytes, transfer_syntax_uid: str, expected: Expected) -> NDArray[np.generic]:
    samples: NDArray[np.generic]
    if transfer_syntax_uid in JPEG_2000 | HTJ2K:
        samples = imagecodecs.jpeg2k_decode(codestream, numthreads=1)
    elif transfer_syntax_uid in JPEG_LS:
        samples = imagecodecs.jpegls_decode(codestream)
    elif transfer_syntax_uid in JPEG_XL:
        samples = imagecodecs.jpegxl_decode(codestream, numthreads=1)
    elif transfer_syntax_uid in JPEG and expected.samples == 3:  # noqa: PLR2004 - colour
        # What the data set says of the colours counts, not the guess from JFIF and Adobe markers.
        stored = "YCBCR" if expected.photometric.startswith("YBR") else "RGB"
        samples = imagecodecs.jpeg_decode(codestream, colorspace=stored, outcolorspace="RGB")
    else:
        samples = imagecodecs.jpeg_decode(codestream)
    return samples


def _photometric(transfer_syntax_uid: str, before: str) -> str:
    """PhotometricInterpretation of the decoded samples (PS3.5 section 8.2)."""
    if before in {"YBR_ICT", "YBR_RCT", "YBR_PARTIAL_420", "XYB"}:
        return "RGB"
    if transfer_syntax_uid in JPEG and before.startswith("YBR"):
        return "RGB"
    return "YBR_FULL" if before == "YBR_FULL_422" else before


def _fit(samples: NDArray[np.generic], precision: int, expected: Expected) -> NDArray[np.generic]:
    """Widen to BitsAllocated, and extend the sign.

    Codecs disagree on signed images: JPEG and JPEG-LS code their bits as unsigned numbers, and a JPEG 2000 codestream
    may say another signedness than PixelRepresentation. The bits are right in each case.
    """
    width = np.dtype(f"<i{expected.bits_allocated // 8}")
    bits = samples.astype(width, copy=False)  # wraps: two's complement
    unused = expected.bits_allocated - precision
    if expected.signed:
        return np.ascontiguousarray((bits << unused) >> unused)
    unsigned = bits.view(f"<u{expected.bits_allocated // 8}")
    return np.ascontiguousarray((unsigned << unused) >> unused)


def _rle(codestream: bytes, expected: Expected) -> Decoded:
    """PackBits in byte planes (PS3.5 annex G): its size is bounded by Rows and Columns."""
    n_pixels = expected.rows * expected.columns
    if len(codestream) < RLE_HEADER_BYTES:
        raise Unprocessable("frame_damaged")
    if struct.unpack_from("<L", codestream)[0] != expected.samples * expected.bits_allocated // 8:
        raise Unprocessable("frame_mismatch")
    try:
        planes = decode_rle(codestream, n_pixels, expected.bits_allocated, "<")
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # noqa: BLE001 - a panic of its Rust code is no Exception
        raise Unprocessable("frame_damaged") from None
    kind = "i" if expected.signed else "u"
    samples = np.frombuffer(planes, f"<{kind}{expected.bits_allocated // 8}")
    if samples.size != n_pixels * expected.samples:
        raise Unprocessable("frame_mismatch")
    samples = samples.reshape(expected.samples, expected.rows, expected.columns)
    samples = samples[0] if expected.samples == 1 else np.ascontiguousarray(np.moveaxis(samples, 0, -1))
    return Decoded(samples, expected.bits_stored, lossy=False, photometric=_photometric("", expected.photometric))
