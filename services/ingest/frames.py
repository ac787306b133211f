"""One compressed frame to its samples: which decoder reads which transfer syntax, and what it is held to.

A codestream is asked for its size before it is decoded, and what comes out must be what the data set says.
"""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from rle.utils import decode_frame as decode_rle  # type: ignore[attr-defined]

from services.ingest import codestreams
from services.ingest.codestreams import Damaged, Header
from shared.errors import Unprocessable

Samples = NDArray[np.generic]
RLE_HEADER_BYTES = 64
COLOUR = 3
"""Samples per pixel of a colour image; a grey one has 1."""


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
    planar: bool = False
    """Whether the colours lie one plane after the other (PlanarConfiguration 1)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a frame: (rows, columns) or (rows, columns, samples)."""
        return (self.rows, self.columns) + ((self.samples,) if self.samples > 1 else ())

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Of a sample; a single bit takes a byte here."""
        return np.dtype(f"<{'i' if self.signed else 'u'}{max(self.bits_allocated // 8, 1)}")


@dataclass(frozen=True, slots=True)
class Decoded:
    """`samples : (rows, columns) or (rows, columns, samples)`, of the allocated width, and what changed by decoding."""

    samples: Samples
    precision: int
    lossy: bool
    photometric: str


@dataclass(frozen=True, slots=True)
class Codec:
    """How frames of one transfer syntax are read."""

    name: str
    """The name of the transfer syntax."""
    decoder: str
    """The library that decodes it."""
    decode: Callable[[bytes, Expected], Samples]
    header: Callable[[bytes], Header] | None = None
    """Reads the size; None where the bytes have none, and their number is bounded by what the data set says."""
    method: str = ""
    """LossyImageCompressionMethod (PS3.3 C.7.6.1.1.5.1)."""
    starts: tuple[bytes, ...] = ()
    """The bytes that a frame begins with; empty if its first bytes say nothing."""
    bare: Callable[[bytes], bytes] = bytes
    """Takes the codestream out of what should not be around it."""


def decode(frame: bytes, transfer_syntax_uid: str, expected: Expected) -> Decoded:
    """Decode one frame.

    Raises:
        Unprocessable: `frame_mismatch`, `frame_damaged` or `unsupported_transfer_syntax`.
    """
    codec = CODECS.get(transfer_syntax_uid)
    if codec is None:
        raise Unprocessable("unsupported_transfer_syntax")
    try:
        frame = codec.bare(frame)
        header = codec.header(frame) if codec.header else None
        _check(header, expected)
        samples = codec.decode(frame, expected)
    except (MemoryError, KeyboardInterrupt, SystemExit, Unprocessable):
        raise
    except BaseException:  # noqa: BLE001 - each codec has its own error, a panic of Rust code is no Exception
        raise Unprocessable("frame_damaged") from None
    if samples.shape != expected.shape or samples.dtype.kind not in "iu":
        raise Unprocessable("frame_mismatch")
    if samples.dtype.itemsize * 8 > max(expected.bits_allocated, 8):
        raise Unprocessable("frame_mismatch")
    photometric = _photometric(transfer_syntax_uid, expected.photometric)
    if header is None:
        return Decoded(samples, expected.bits_stored, lossy=False, photometric=photometric)
    lossy = header.lossy and transfer_syntax_uid not in LOSSLESS
    return Decoded(_fit(samples, header.precision, expected), header.precision, lossy, photometric)


def begins_frame(fragment: bytes, transfer_syntax_uid: str, expected: Expected) -> bool:
    """Tell whether a fragment begins like a frame, rather than goes on with one."""
    codec = CODECS[transfer_syntax_uid]
    if codec.decode is _rle:  # its header: the number of segments, and the offset of the first (PS3.5 annex G.5)
        n_segments = expected.samples * max(expected.bits_allocated // 8, 1)
        return fragment[:8] == struct.pack("<2I", n_segments, RLE_HEADER_BYTES)
    return fragment.startswith(codec.starts)


def is_frame(frame: bytes, transfer_syntax_uid: str, expected: Expected) -> bool:
    """Tell whether these bytes are a frame of that size, as far as its header and its end tell."""
    codec = CODECS[transfer_syntax_uid]
    if codec.header is None:
        return begins_frame(frame, transfer_syntax_uid, expected)
    try:
        header = codec.header(codec.bare(frame))
    except Damaged:
        return False
    return (header.rows, header.columns) == (expected.rows, expected.columns)


def _check(header: Header | None, expected: Expected) -> None:
    if header is None:
        return
    same_size = (header.rows, header.columns) == (expected.rows, expected.columns)
    if not same_size or header.samples not in {None, expected.samples} or header.precision > expected.bits_allocated:
        raise Unprocessable("frame_mismatch")


def _jpeg(codestream: bytes, expected: Expected) -> Samples:
    if expected.samples != COLOUR:
        return imagecodecs.jpeg_decode(codestream)
    # What the data set says of the colours counts, not the guess from JFIF and Adobe markers.
    stored = "YCBCR" if expected.photometric.startswith("YBR") else "RGB"
    return imagecodecs.jpeg_decode(codestream, colorspace=stored, outcolorspace="RGB")


def _jpeg_lossless(codestream: bytes, expected: Expected) -> Samples:
    del expected
    return imagecodecs.jpeg_decode(codestream)


def _jpeg_ls(codestream: bytes, expected: Expected) -> Samples:
    del expected
    return imagecodecs.jpegls_decode(codestream)


def _jpeg_2000(codestream: bytes, expected: Expected) -> Samples:
    del expected
    return imagecodecs.jpeg2k_decode(codestream, numthreads=1)


def _jpeg_xl(codestream: bytes, expected: Expected) -> Samples:
    del expected
    return imagecodecs.jpegxl_decode(codestream, numthreads=1)


def _rle(frame: bytes, expected: Expected) -> Samples:
    """PackBits in byte planes (PS3.5 annex G); bits are packed into bytes before."""
    if expected.bits_allocated == 1:
        return _native(decode_rle(frame, _n_bytes(expected), 8, "<"), expected)
    planes = decode_rle(frame, expected.rows * expected.columns, expected.bits_allocated, "<")
    samples = np.frombuffer(planes, expected.dtype)
    if samples.size != expected.rows * expected.columns * expected.samples:
        raise Unprocessable("frame_mismatch")
    return _pixel_by_pixel(samples, expected, planar=True)


def _deflated(frame: bytes, expected: Expected) -> Samples:
    """Deflate of a native frame (PS3.5 A.4.13), inflated as far as it should reach and no further."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    pixels = inflater.decompress(frame, _n_bytes(expected) + 1)
    if len(pixels) < _n_bytes(expected):
        raise Damaged
    if len(inflater.unused_data) > 1:  # one byte may pad the frame
        raise Unprocessable("frame_mismatch")
    return _native(pixels, expected)


def _native(pixels: bytes, expected: Expected) -> Samples:
    """Samples of one frame as PS3.5 section 8.1.1 packs them; one byte may pad them."""
    n_bytes = _n_bytes(expected)
    if not n_bytes <= len(pixels) <= n_bytes + n_bytes % 2:
        raise Unprocessable("frame_mismatch")
    if expected.bits_allocated == 1:
        bits = np.unpackbits(np.frombuffer(pixels, np.uint8), count=_n_samples(expected), bitorder="little")
        return bits.reshape(expected.shape)
    samples = np.frombuffer(pixels, expected.dtype, count=_n_samples(expected))
    return _pixel_by_pixel(samples, expected, planar=expected.planar)


def _n_samples(expected: Expected) -> int:
    return expected.rows * expected.columns * expected.samples


def _n_bytes(expected: Expected) -> int:
    return (_n_samples(expected) * expected.bits_allocated + 7) // 8


def _pixel_by_pixel(samples: Samples, expected: Expected, *, planar: bool) -> Samples:
    if not planar:
        return samples.reshape(expected.shape)
    planes = samples.reshape(expected.samples, expected.rows, expected.columns)
    return np.ascontiguousarray(np.moveaxis(planes, 0, -1)).reshape(expected.shape)


def _fit(samples: Samples, precision: int, expected: Expected) -> Samples:
    """Widen to BitsAllocated, and extend the sign.

    Codecs disagree on signed images: JPEG and JPEG-LS code their bits as unsigned numbers, and a JPEG 2000 codestream
    may say another signedness than PixelRepresentation. The bits are right in each case.
    """
    width = max(expected.bits_allocated, 8)
    bits = samples.astype(f"<i{width // 8}", copy=False)  # wraps: two's complement
    unused = width - precision
    if expected.signed:
        return np.ascontiguousarray((bits << unused) >> unused)
    unsigned = bits.view(f"<u{width // 8}")
    return np.ascontiguousarray((unsigned << unused) >> unused)


def _photometric(transfer_syntax_uid: str, before: str) -> str:
    """PhotometricInterpretation of the decoded samples (PS3.5 section 8.2)."""
    if before in {"YBR_ICT", "YBR_RCT", "YBR_PARTIAL_420", "XYB"}:
        return "RGB"
    if transfer_syntax_uid in BECOMES_RGB and before.startswith("YBR"):
        return "RGB"
    return "YBR_FULL" if before == "YBR_FULL_422" else before


_jpeg_codec = partial(
    Codec,
    decoder="imagecodecs (libjpeg-turbo)",
    header=codestreams.jpeg,
    starts=(codestreams.START_OF_IMAGE,),
    method="ISO_10918_1",
)
_jpeg_ls_codec = partial(
    Codec,
    decoder="imagecodecs (CharLS)",
    decode=_jpeg_ls,
    header=codestreams.jpeg,
    starts=(codestreams.START_OF_IMAGE,),
    method="ISO_14495_1",
)
_jpeg_2000_codec = partial(
    Codec,
    decoder="imagecodecs (OpenJPEG)",
    decode=_jpeg_2000,
    header=codestreams.jpeg_2000,
    starts=(codestreams.SIZ, codestreams.JP2),
    bare=codestreams.bare_jpeg_2000,
)
_jpeg_xl_codec = partial(
    Codec,
    decoder="imagecodecs (libjxl)",
    decode=_jpeg_xl,
    header=codestreams.jpeg_xl,
    starts=(codestreams.JXL_CODESTREAM, codestreams.JXL),
    method="ISO_18181_1",
)

CODECS = {
    "1.2.840.10008.1.2.1.98": Codec("Encapsulated Uncompressed Explicit VR Little Endian", "numpy", _native),
    "1.2.840.10008.1.2.8.1": Codec("Deflated Image Frame", "zlib", _deflated),
    "1.2.840.10008.1.2.5": Codec("RLE Lossless", "pylibjpeg-rle", _rle),
    "1.2.840.10008.1.2.4.50": _jpeg_codec("JPEG Baseline, 8 bit", decode=_jpeg),
    "1.2.840.10008.1.2.4.51": _jpeg_codec("JPEG Extended, 12 bit", decode=_jpeg),
    "1.2.840.10008.1.2.4.53": _jpeg_codec("JPEG Spectral Selection (retired)", decode=_jpeg),
    "1.2.840.10008.1.2.4.55": _jpeg_codec("JPEG Full Progression (retired)", decode=_jpeg),
    "1.2.840.10008.1.2.4.57": _jpeg_codec("JPEG Lossless", decode=_jpeg_lossless),
    "1.2.840.10008.1.2.4.70": _jpeg_codec("JPEG Lossless, First-Order Prediction", decode=_jpeg_lossless),
    "1.2.840.10008.1.2.4.80": _jpeg_ls_codec("JPEG-LS Lossless"),
    "1.2.840.10008.1.2.4.81": _jpeg_ls_codec("JPEG-LS Near-Lossless"),
    "1.2.840.10008.1.2.4.90": _jpeg_2000_codec("JPEG 2000 Lossless", method="ISO_15444_1"),
    "1.2.840.10008.1.2.4.91": _jpeg_2000_codec("JPEG 2000", method="ISO_15444_1"),
    "1.2.840.10008.1.2.4.110": _jpeg_xl_codec("JPEG XL Lossless"),
    "1.2.840.10008.1.2.4.111": _jpeg_xl_codec("JPEG XL JPEG Recompression"),
    "1.2.840.10008.1.2.4.112": _jpeg_xl_codec("JPEG XL"),
    "1.2.840.10008.1.2.4.201": _jpeg_2000_codec("HTJ2K Lossless", method="ISO_15444_15"),
    "1.2.840.10008.1.2.4.202": _jpeg_2000_codec("HTJ2K Lossless, RPCL", method="ISO_15444_15"),
    "1.2.840.10008.1.2.4.203": _jpeg_2000_codec("HTJ2K", method="ISO_15444_15"),
}
"""The codec of each transfer syntax, by its UID."""
LOSSLESS = {"1.2.840.10008.1.2.4.110"}
"""JPEG XL does not tell in its first bits whether it is."""
BECOMES_RGB = {uid for uid, codec in CODECS.items() if codec.decode is _jpeg} | {"1.2.840.10008.1.2.4.111"}
"""Whose decoders undo the colour transform that the data set tells of."""
