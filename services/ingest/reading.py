"""The bytes of an upload to a normalised DICOM instance.

Theory of operation. The file is taken apart here rather than by `dcmread`, which mends what it can and tells it only in
warnings that echo values: a file cut short would pass. The data set's elements come from pydicom's generator, and each
is held against the length it declares. What is stored is Part 10 in Explicit VR Little Endian, decompressed; elements
that are in that encoding already are written back byte for byte; where all of them are, and in order, the data set is
taken as it is.
"""

import contextlib
import io
import struct
import uuid
import zlib
from collections.abc import Iterator

import numpy as np
from pydicom import DataElement, Dataset
from pydicom.charset import convert_encodings, default_encoding, python_encoding
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import generate_fragments, generate_frames, parse_basic_offsets
from pydicom.filereader import data_element_generator, read_dataset
from pydicom.filewriter import correct_ambiguous_vr, dcmwrite
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from services.ingest import frames
from services.ingest.protocol import Caps, Instance
from shared.documents.revisions import sha_of
from shared.errors import Unprocessable
from shared.keys import is_uid

PREAMBLE_BYTES = 128
MAGIC = b"DICM"
UNDEFINED = 0xFFFFFFFF
FIRST_TAG = 0x00080000
"""The first tag that a data set may have; groups before it belong to the file, or to messages."""
HEADER_BYTES = 8
"""The least bytes that an element takes."""
PIXEL_DATA = 0x7FE00010
NATIVE = {ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian}
OF_THE_WRAPPING = {"preamble_missing", "meta_missing", "meta_mismatch", "charset_unknown"}
"""Warnings after which the data set is as it was; what changes it is noted by others."""
DICOMDIR = "1.2.840.10008.1.3.10"
VRS = set(
    b"AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR US UT UV".split()
)
FIRST_GROUPS = {2, 8}
"""A file without preamble starts with the file meta group or with the identifying group."""
IMPLEMENTATION_UID = UID(f"2.25.{uuid.uuid5(uuid.NAMESPACE_DNS, 'ingest.radqueue.org').int}")
FLOATS = {"FloatPixelData": 4, "DoubleFloatPixelData": 8}
"""The bytes of a sample in each element of floating-point pixels."""
OTHER_PIXELS = (*FLOATS, "PixelDataProviderURL")
HALVED = {"YBR_FULL_422", "YBR_PARTIAL_422"}
"""Photometric interpretations in which two pixels share their colour (PS3.3 C.7.6.3.1.2)."""
TEXTS = {"AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT"}
BYTES = {"OB", "OD", "OF", "OL", "OV", "OW", "UN"}
WORD_BYTES = {"OW": 2, "OF": 4, "OL": 4, "OD": 8, "OV": 8}
NUMBER_BYTES = {"AT": 4, "FD": 8, "FL": 4, "SL": 4, "SS": 2, "SV": 8, "UL": 4, "US": 2, "UV": 8}
GREY = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
COLOUR = ("RGB", "HSV", "XYB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_PARTIAL_420", "YBR_PARTIAL_422", "YBR_RCT")
SAMPLES = dict.fromkeys(GREY, 1) | dict.fromkeys(COLOUR, 3) | dict.fromkeys(("ARGB", "CMYK"), 4)
"""Samples per pixel by photometric interpretation (PS3.3 C.7.6.3.1.2), those that are retired too."""

SOP_CLASS_OF_MODALITY = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "CR": "1.2.840.10008.5.1.4.1.1.1",
    "NM": "1.2.840.10008.5.1.4.1.1.20",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
    "US": "1.2.840.10008.5.1.4.1.1.6.1",
    "XA": "1.2.840.10008.5.1.4.1.1.12.1",
    "RF": "1.2.840.10008.5.1.4.1.1.12.2",
    "SC": "1.2.840.10008.5.1.4.1.1.7",
}
"""The class of a single-frame image, for a file that names none. A multi-frame image could be of several."""


def looks_like_dicom(head: bytes) -> bool:
    """Tell from the first 132 bytes whether a file may be DICOM, with or without preamble."""
    if head[PREAMBLE_BYTES : PREAMBLE_BYTES + 4] == MAGIC or head[:4] == MAGIC:
        return True
    if len(head) < HEADER_BYTES:
        return False
    little, big = struct.unpack_from("<HH", head), struct.unpack_from(">HH", head)
    if big[0] in FIRST_GROUPS:
        return head[4:6] in VRS
    plausible_length = struct.unpack_from("<I", head, 4)[0] <= 4096  # noqa: PLR2004 - the first element is a short one
    return little[0] in FIRST_GROUPS and little[1] <= 0x0100 and (head[4:6] in VRS or plausible_length)  # noqa: PLR2004


def is_dicomdir(upload: bytes) -> bool:
    """Tell whether the file is a directory of other files, which says nothing that they do not say themselves."""
    meta, _, _ = _split(upload)
    return text_of(meta, "MediaStorageSOPClassUID") == DICOMDIR


def normalise(upload: bytes, caps: Caps) -> tuple[Instance, bytes]:
    """Read an uploaded file; return the instance and the Part 10 file to store.

    `shared.pydicom_silence.silence()` goes before.

    Raises:
        Unprocessable: a code of `reasons.REASONS`.
    """
    # Take apart.
    if not looks_like_dicom(upload[: PREAMBLE_BYTES + 4]):
        raise Unprocessable("not_dicom")
    meta, data_set_bytes, notes = _split(upload)
    syntax = text_of(meta, "TransferSyntaxUID")
    sha = sha_of(data_set_bytes)
    if syntax == DeflatedExplicitVRLittleEndian:
        data_set_bytes = _inflate(data_set_bytes, caps.inflated)
    dataset, in_order = _parse(data_set_bytes, syntax, notes)

    # Check.
    if text_of(meta, "MediaStorageSOPClassUID") == DICOMDIR:
        raise Unprocessable("dicomdir")
    sop_class_uid = _sop_class(dataset, meta, notes)
    study_uid, series_uid, sop_instance_uid = _uids(dataset, meta, notes)
    if syntax and syntax not in NATIVE and syntax not in frames.CODECS:
        raise Unprocessable("unsupported_transfer_syntax")

    # Normalise.
    implicit, little = dataset.original_encoding
    if implicit or not little or _mend(dataset, notes):
        with contextlib.suppress(Exception):  # what stays ambiguous cannot be written, and is refused then
            correct_ambiguous_vr(dataset, little is not False)
        _convert(dataset, notes, big_endian=not little)
    decoder = ""
    if "PixelData" in dataset:
        decoder = _pixels(dataset, syntax, caps, notes)
    elif _wants_pixels(dataset, sop_class_uid):  # a file may end between two elements
        raise Unprocessable("missing_pixel_data")
    else:
        _check_floats(dataset)
    uids = {"SOPClassUID": sop_class_uid, "SOPInstanceUID": sop_instance_uid}
    uids |= {"StudyInstanceUID": study_uid, "SeriesInstanceUID": series_uid}
    if in_order and not decoder and notes <= OF_THE_WRAPPING and _spelled_so(data_set_bytes, uids):
        body = _head(sop_class_uid, sop_instance_uid, notes) + data_set_bytes
    else:
        body = part_10(dataset, sop_class_uid, sop_instance_uid, notes)
    return Instance(study_uid, series_uid, sop_instance_uid, sha, tuple(sorted(notes)), decoder), body


def _split(upload: bytes) -> tuple[Dataset, bytes, set[str]]:
    """Return the file meta group, the bytes of the data set, and warnings."""
    notes = set()
    if upload[PREAMBLE_BYTES : PREAMBLE_BYTES + 4] == MAGIC:
        at = PREAMBLE_BYTES + 4
    else:
        notes.add("preamble_missing")
        at = 4 if upload[:4] == MAGIC else 0
    stream = io.BytesIO(upload)
    stream.seek(at)
    meta = Dataset()
    if upload[at : at + 2] == b"\x02\x00":
        try:
            meta = read_dataset(stream, is_implicit_VR=False, is_little_endian=True, stop_when=_after_meta)
            at = stream.tell()
            for element in meta:  # convert now, so that what cannot be converted is noticed here
                _ = element.value
        except Exception:  # noqa: BLE001 - whatever a damaged group makes pydicom raise
            raise Unprocessable("unreadable") from None
    return meta, upload[at:], notes


def _after_meta(tag: int, vr: str | None, length: int) -> bool:
    del vr, length
    return int(tag) >> 16 != 2  # noqa: PLR2004 - the file meta group


def _inflate(deflated: bytes, limit: int) -> bytes:
    """Inflate up to `limit` bytes: a megabyte may hold two gigabytes."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = inflater.decompress(deflated, limit + 1)
    except zlib.error:
        raise Unprocessable("unreadable") from None
    if len(inflated) > limit:
        raise Unprocessable("too_large")
    if not inflater.eof:
        raise Unprocessable("truncated")
    return inflated


def _parse(body: bytes, syntax: str, notes: set[str]) -> tuple[Dataset, bool]:
    """Read the elements; each must be as long as it says. Tell whether they stand as they would be written."""
    implicit, little = _encoding(body, syntax, notes)
    stream = io.BytesIO(body)
    delimiter = b"\xfe\xff\xdd\xe0" if little else b"\xff\xfe\xe0\xdd"
    elements = {}
    in_order, last = not implicit and little, FIRST_TAG - 1
    try:
        end = 0
        for element in data_element_generator(stream, implicit, little):
            in_order, last = in_order and last < element.tag and element.tag.element != 0, element.tag
            if element.tag.group == 0:  # nothing of the kind belongs into a file: zeros behind the data set
                break
            end = stream.tell()
            _check_length(element, body, end, delimiter)
            if element.tag in elements:
                notes.add("element_repeated")
            elements[element.tag] = element
    except (EOFError, struct.error):  # the end came within a value, or within its header
        raise Unprocessable("truncated") from None
    except (MemoryError, Unprocessable):
        raise
    except Exception:  # noqa: BLE001 - pydicom raises what the bytes make it raise
        raise Unprocessable("unreadable") from None
    if not elements:
        raise Unprocessable("truncated")
    if end < len(body):
        _check_padding(body[end:])
        notes.add("trailing_bytes")
    dataset = Dataset(elements)
    dataset.set_original_encoding(implicit, little, _character_set(dataset, notes))
    return dataset, in_order


def _check_padding(left: bytes) -> None:
    """Refuse what stands behind a data set and is more than padding: the preamble of another file is zeros as well.

    What is shorter than an element's header is the beginning of one.
    """
    if left.strip(b"\0"):
        raise Unprocessable("truncated" if len(left) < HEADER_BYTES else "unreadable", "bytes behind the data set")


def _spelled_so(body: bytes, uids: dict[str, str]) -> bool:
    """Tell whether the UIDs are padded as the standard has it, and by nothing else."""
    for keyword, uid in uids.items():
        value = uid.encode() + b"\0" * (len(uid) % 2)
        tag = tag_for_keyword(keyword) or 0
        if struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, b"UI", len(value)) + value not in body:
            return False
    return True


def _character_set(dataset: Dataset, notes: set[str]) -> str | list[str]:
    """Return the encodings of its texts, in pydicom's terms: had they another type, all texts would be decoded."""
    named = dataset.get("SpecificCharacterSet")
    if not named:
        return default_encoding
    if any(name and name not in python_encoding for name in ([named] if isinstance(named, str) else named)):
        notes.add("charset_unknown")
    try:
        return convert_encodings(named)
    except LookupError:
        return default_encoding


def _check_length(element: object, body: bytes, at: int, delimiter: bytes) -> None:
    raw_length = getattr(element, "length", None)
    value = getattr(element, "value", None)
    if raw_length in {None, UNDEFINED}:  # a sequence, or encapsulated pixel data: it ends with a delimiter
        if body[at - 8 : at - 4] != delimiter:
            raise Unprocessable("truncated")
    elif raw_length and len(value or b"") != raw_length:
        raise Unprocessable("truncated")


def _encoding(body: bytes, syntax: str, notes: set[str]) -> tuple[bool, bool]:
    """Whether VRs are implicit and bytes little endian: as the first element looks, whatever is claimed."""
    if len(body) < HEADER_BYTES:
        raise Unprocessable("truncated")
    looks_explicit = body[4:6] in VRS
    looks_big = looks_explicit and body[0] == 0 and body[1] != 0
    seen = (not looks_explicit, not looks_big)
    claimed = (syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian)
    if not syntax:
        notes.add("meta_missing")
    elif seen != claimed:
        notes.add("vr_mismatch")
    return seen


def _uids(dataset: Dataset, meta: Dataset, notes: set[str]) -> tuple[str, str, str]:
    """Return the UIDs that become the key; an instance without study or series belongs nowhere."""
    in_meta = text_of(meta, "MediaStorageSOPInstanceUID")
    if not text_of(dataset, "SOPInstanceUID") and is_uid(in_meta):
        _set_uid(dataset, "SOPInstanceUID", in_meta)
        notes.add("sop_instance_restored")
    elif in_meta and in_meta != text_of(dataset, "SOPInstanceUID"):
        notes.add("meta_mismatch")
    found = []
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        uid = text_of(dataset, keyword)
        if not uid:
            raise Unprocessable("missing_uid", keyword)
        if not is_uid(uid):
            raise Unprocessable("invalid_uid", keyword)
        found.append(uid)
    return found[0], found[1], found[2]


def text_of(dataset: Dataset, keyword: str) -> str:
    """Return an element's only value as text; empty where it is missing, empty or unreadable."""
    try:
        value = dataset.get(keyword)
    except Exception:  # noqa: BLE001 - pydicom converts here, and raises what the value makes it raise
        return ""
    return "" if value is None else str(value).strip(" \0")


def _set_uid(dataset: Dataset, keyword: str, uid: str) -> None:
    """Put an element in place of what is there, which may be unreadable."""
    dataset[keyword] = DataElement(tag_for_keyword(keyword) or 0, "UI", uid)


def _sop_class(dataset: Dataset, meta: Dataset, notes: set[str]) -> str:
    uid = text_of(dataset, "SOPClassUID")
    if not uid:
        uid = text_of(meta, "MediaStorageSOPClassUID")
        if not is_uid(uid) and "NumberOfFrames" not in dataset:
            uid = SOP_CLASS_OF_MODALITY.get(text_of(dataset, "Modality"), "")
        if not is_uid(uid):
            raise Unprocessable("missing_sop_class")
        _set_uid(dataset, "SOPClassUID", uid)
        notes.add("sop_class_restored")
    if not is_uid(uid):
        raise Unprocessable("invalid_uid", "SOPClassUID")
    return uid


def _mend(dataset: Dataset, notes: set[str]) -> bool:
    """Keep the bytes of what no reader could convert; tell whether there are elements without VR in explicit data."""
    mixed = False
    for tag in list(dataset.keys()):
        element = dataset.get_item(tag, keep_deferred=True)
        if not isinstance(element, RawDataElement):
            for item in element.value if element is not None and element.VR == "SQ" else ():
                mixed |= _mend(item, notes)
        elif element.VR is None:
            notes.add("vr_mismatch")
            mixed = True
        elif element.VR.encode() not in VRS or len(element.value or b"") % NUMBER_BYTES.get(element.VR, 1):
            dataset[tag] = _kept(element, notes)
    return mixed


def _kept(element: object, notes: set[str]) -> DataElement:
    """Return the element with its bytes for a value: as OB, since readers give UN the VR of its tag, and stumble."""
    notes.add("element_unreadable")
    value = getattr(element, "value", None)
    return DataElement(getattr(element, "tag", 0), "OB", value if isinstance(value, bytes) else b"")


def _convert(dataset: Dataset, notes: set[str], *, big_endian: bool) -> None:
    """Re-encode every element in place as Explicit VR Little Endian.

    Texts keep their bytes, whatever character set they are in: a name decoded wrongly would be lost for good.
    """
    for tag in list(dataset.keys()):
        raw = dataset.get_item(tag, keep_deferred=True)
        try:
            element = dataset[tag]
        except Exception:  # noqa: BLE001 - pydicom raises what the value makes it raise
            element = None
        if element is None or (isinstance(element.value, bytes) and element.VR[:2] not in BYTES):
            dataset[tag] = _kept(raw, notes)
            continue
        if element.VR == "OB or OW":  # of curves and the like nothing tells which; implicit VR means OW (PS3.5 A.1)
            element.VR = "OW"
        if element.VR == "SQ":
            for item in element.value:
                _convert(item, notes, big_endian=big_endian)
        elif element.VR == "SS" and element.VM == 3 and element.keyword.endswith("Descriptor"):  # noqa: PLR2004
            element.value[0] %= 2**16  # the number of entries is unsigned, whatever the VR (PS3.3 C.11.1.1.1)
        elif element.VR in TEXTS and isinstance(raw, RawDataElement):
            dataset[tag] = raw._replace(VR=element.VR, is_implicit_VR=False, is_little_endian=True)
        elif big_endian and isinstance(element.value, bytes) and (width := _word_bytes(element, dataset)) > 1:
            element.value = _swapped(element.value, width)
    dataset.set_original_encoding(is_implicit_vr=False, is_little_endian=True)


def _word_bytes(element: DataElement, dataset: Dataset) -> int:
    """Return the width that big endian turns round: a pixel wider than a word is one number (PS3.5 section 8.1)."""
    bits = dataset.get("BitsAllocated") if element.keyword == "PixelData" else None
    return max(WORD_BYTES.get(element.VR[-2:], 1), bits // 8 if isinstance(bits, int) else 0)


def _swapped(value: bytes, width: int) -> bytes:
    swapped = bytearray(value)
    for offset in range(width):
        swapped[offset::width] = value[width - 1 - offset :: width]
    return bytes(swapped)


def _expected(dataset: Dataset, notes: set[str]) -> tuple[frames.Expected, int]:
    """Return what the image pixel module says, and the number of frames (PS3.3 C.7.6.3); what it leaves out is added.

    An image is grey, unsigned and fills its bits where nothing else is said.
    """
    try:
        n_frames = int(dataset.get("NumberOfFrames") or 1)
        samples = int(_completed(dataset, "SamplesPerPixel", 1, notes))
        bits_allocated = int(dataset.BitsAllocated)
        bits_stored = int(_completed(dataset, "BitsStored", bits_allocated, notes))
        _completed(dataset, "HighBit", bits_stored - 1, notes)
        photometric = "MONOCHROME2" if samples == 1 else ""
        expected = frames.Expected(
            rows=int(dataset.Rows),
            columns=int(dataset.Columns),
            samples=samples,
            bits_allocated=bits_allocated,
            bits_stored=bits_stored,
            signed=(False, True)[int(_completed(dataset, "PixelRepresentation", 0, notes))],
            photometric=str(_completed(dataset, "PhotometricInterpretation", photometric, notes)).strip(" \0"),
            planar=samples > 1 and (False, True)[int(_completed(dataset, "PlanarConfiguration", 0, notes))],
        )
    except Exception:  # noqa: BLE001 - missing, empty, or no number
        raise Unprocessable("bad_image_header") from None
    plausible = (
        min(n_frames, expected.rows, expected.columns) >= 1
        and SAMPLES.get(expected.photometric) == expected.samples
        and not (expected.signed and expected.samples > 1)
        and expected.bits_allocated in {1, 8, 16, 32, 64}
        and 1 <= expected.bits_stored <= expected.bits_allocated
    )
    if not plausible:
        raise Unprocessable("bad_image_header")
    return expected, n_frames


def _completed(dataset: Dataset, keyword: str, default: int | str, notes: set[str]) -> int | str:
    """Return an element's value; where it has none, the default becomes its value."""
    value: int | str | None = dataset.get(keyword)
    if value is not None and value != "":
        return value
    setattr(dataset, keyword, default)
    notes.add("image_header_completed")
    return default


def _wants_pixels(dataset: Dataset, sop_class_uid: str) -> bool:
    """Tell whether an instance without PixelData misses it."""
    is_image = "BitsAllocated" in dataset or "Image Storage" in UID(sop_class_uid).name
    return is_image and not any(keyword in dataset for keyword in OTHER_PIXELS)


def _check_floats(dataset: Dataset) -> None:
    """Hold pixel data of floats, which are never compressed, against the header (PS3.3 C.7.6.24)."""
    for keyword, width in FLOATS.items():
        if keyword not in dataset:
            continue
        try:
            n_samples = int(dataset.Rows) * int(dataset.Columns) * int(dataset.get("NumberOfFrames") or 1)
        except Exception:  # noqa: BLE001 - missing, empty, or no number
            raise Unprocessable("bad_image_header") from None
        if len(dataset[keyword].value or b"") < n_samples * width:
            raise Unprocessable("truncated")


def _pixels(dataset: Dataset, syntax: str, caps: Caps, notes: set[str]) -> str:
    """Check native pixel data, or decompress encapsulated pixel data, in place; return what decoded it."""
    expected, n_frames = _expected(dataset, notes)
    n_samples = expected.rows * expected.columns * expected.samples * n_frames
    raw = dataset.get_item("PixelData")
    encapsulated = getattr(raw, "length", None) == UNDEFINED or getattr(raw, "is_undefined_length", False)
    # A decoder spends a byte on a bit.
    bits = max(expected.bits_allocated, 8) if encapsulated else expected.bits_allocated
    if n_samples * bits // 8 > caps.pixels or n_frames > caps.frames:
        raise Unprocessable("too_large")
    value = bytes(raw.value or b"") if raw is not None else b""
    if not encapsulated:
        value = _checked(dataset, value, (expected, n_frames), syntax, notes)
        _align(dataset, value, expected, notes)
        return ""
    if syntax not in frames.CODECS:
        raise Unprocessable("unsupported_transfer_syntax")
    if expected.bits_allocated not in {1, 8, 16, 32} or expected.samples not in {1, frames.COLOUR}:
        raise Unprocessable("bad_image_header")
    _decompress(dataset, value, syntax, (expected, n_frames), notes)
    return frames.CODECS[syntax].decoder


def _checked(dataset: Dataset, value: bytes, told: tuple[frames.Expected, int], syntax: str, notes: set[str]) -> bytes:
    """Hold native pixel data against the header; what is left over is dropped, unless it could be another frame."""
    expected, n_frames = told
    bits = expected.rows * expected.columns * expected.samples * expected.bits_allocated
    if expected.photometric in HALVED:
        bits = bits * 2 // 3
    needed = (n_frames * bits + 7) // 8
    padded = needed + needed % 2
    if syntax and syntax not in NATIVE:
        if len(value) not in {needed, padded}:
            raise Unprocessable("frame_damaged")
        notes.add("vr_mismatch")  # decompressed by somebody who left the transfer syntax as it was
    if len(value) < needed:
        raise Unprocessable("truncated")
    if len(value) <= padded:
        return value
    if len(value) * 8 >= (n_frames + 1) * bits or expected.photometric in HALVED:
        raise Unprocessable("frame_count")
    notes.add("excess_pixel_data")
    value = value[:needed] + b"\0" * (needed % 2)
    dataset["PixelData"] = DataElement(PIXEL_DATA, dataset["PixelData"].VR, value)
    return value


def _align(dataset: Dataset, value: bytes, expected: frames.Expected, notes: set[str]) -> None:
    """Put samples that do not begin at the lowest bit there: readers have stopped looking at HighBit (PS3.5 8.1.1).

    Often it is the header that is wrong, and the values show it: they fit into BitsStored as they are, and the bits
    below them are in use.
    """
    expected_high_bit = expected.bits_stored - 1
    high_bit = dataset.HighBit
    if high_bit == expected_high_bit or expected.bits_allocated == 1:
        return
    dataset.HighBit = expected_high_bit
    notes.add("high_bit_corrected")
    if not isinstance(high_bit, int) or not expected_high_bit < high_bit < expected.bits_allocated:
        return
    samples = np.frombuffer(value[: len(value) - len(value) % expected.dtype.itemsize], expected.dtype)
    n_below = high_bit - expected_high_bit
    top = 1 << (expected.bits_stored - expected.signed)
    fits = (-top if expected.signed else 0) <= int(samples.min()) and int(samples.max()) < top
    if not fits or not (samples & ((1 << n_below) - 1)).any():  # a dark slice fits, and lies as high as the others
        shifted = (samples >> n_below).astype(expected.dtype)
        dataset["PixelData"] = DataElement(PIXEL_DATA, dataset["PixelData"].VR, shifted.tobytes())


def _decompress(
    dataset: Dataset, encapsulated: bytes, syntax: str, told: tuple[frames.Expected, int], notes: set[str]
) -> None:
    """Replace encapsulated pixel data by native, and say in the header what decoding changed (PS3.5 section 8.2)."""
    expected, n_frames = told
    pixels, first, lossy, needed_bits = bytearray(), None, False, 0
    if n_frames == 1:
        _check_single(_fragments(encapsulated), syntax, expected)
    for n_decoded, codestream in enumerate(_codestreams(encapsulated, n_frames)):
        if n_decoded == n_frames:
            raise Unprocessable("frame_count")
        frame = frames.decode(codestream, syntax, expected)
        pixels += frame.samples.tobytes()
        first, lossy = first or frame, lossy or frame.lossy
        needed_bits = max(needed_bits, _bits_needed(frame, expected))
    if first is None or len(pixels) < n_frames * first.samples.nbytes:
        raise Unprocessable("frame_count")
    dataset.PhotometricInterpretation = first.photometric
    if expected.samples > 1:
        dataset.PlanarConfiguration = 0
    if expected.bits_allocated == 1:  # the frames follow one another without a gap (PS3.5 section 8.1.1)
        pixels = bytearray(np.packbits(np.frombuffer(pixels, np.uint8), bitorder="little").tobytes())
    if lossy:
        _mark_lossy(dataset, syntax, len(pixels) / max(len(encapsulated), 1))
    _drop_what_was_compressed(dataset, notes)
    pixels += b"\0" * (len(pixels) % 2)
    dataset["PixelData"] = DataElement(PIXEL_DATA, "OB" if expected.bits_allocated <= 8 else "OW", bytes(pixels))  # noqa: PLR2004
    if frames.CODECS[syntax].header is None:  # whole cells were coded, and HighBit is about cells
        _align(dataset, bytes(pixels), expected, notes)
    else:
        _correct_bits(dataset, max(needed_bits, expected.bits_stored), notes)


def _correct_bits(dataset: Dataset, bits_stored: int, notes: set[str]) -> None:
    """Say how many bits the values take; decoders put the lowest one first."""
    if dataset.BitsStored != bits_stored:
        notes.add("bits_stored_corrected")
    elif dataset.HighBit != bits_stored - 1:
        notes.add("high_bit_corrected")
    dataset.BitsStored, dataset.HighBit = bits_stored, bits_stored - 1


def _drop_what_was_compressed(dataset: Dataset, notes: set[str]) -> None:
    for keyword in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):
        if keyword in dataset:
            delattr(dataset, keyword)
    _drop_compressed_icons(dataset, notes)


def _drop_compressed_icons(dataset: Dataset, notes: set[str]) -> None:
    """Remove them at any depth: their pixels are encapsulated, which the new transfer syntax has no place for."""
    if _has_compressed_icon(dataset):
        del dataset.IconImageSequence
        notes.add("icon_removed")
    for tag in list(dataset.keys()):
        element = dataset.get_item(tag, keep_deferred=True)
        for item in dataset[tag].value if element is not None and element.VR == "SQ" else ():
            _drop_compressed_icons(item, notes)


def _codestreams(encapsulated: bytes, n_frames: int) -> Iterator[bytes]:
    try:
        yield from generate_frames(encapsulated, number_of_frames=n_frames)
    except (ValueError, EOFError, struct.error):  # fragments that are none
        raise Unprocessable("frame_damaged") from None


def _check_single(fragments: list[bytes], syntax: str, expected: frames.Expected) -> None:
    """Refuse fragments of more than one frame: what goes before one that begins a frame is whole without it."""
    for n_before, fragment in enumerate(fragments):
        begins = frames.begins_frame(fragment, syntax, expected)
        if begins and frames.is_frame(b"".join(fragments[:n_before]), syntax, expected):
            raise Unprocessable("frame_count")


def _fragments(encapsulated: bytes) -> list[bytes]:
    stream = io.BytesIO(encapsulated)
    try:
        parse_basic_offsets(stream)
        return list(generate_fragments(stream))
    except (ValueError, EOFError, struct.error):
        raise Unprocessable("frame_damaged") from None


def _bits_needed(frame: frames.Decoded, expected: frames.Expected) -> int:
    """Bits that the values take: encoders often code 12 bits in a codestream of 16, which changes nothing."""
    if frame.precision <= expected.bits_stored:
        return frame.precision
    low, high = int(frame.samples.min()), int(frame.samples.max())
    if expected.signed:
        return max(high.bit_length(), (-low - 1).bit_length() if low < 0 else 0) + 1
    return high.bit_length()


def _mark_lossy(dataset: Dataset, syntax: str, ratio: float) -> None:
    """Say that the image was once compressed with loss: that outlives the compression (PS3.3 C.7.6.1.1.5)."""
    if text_of(dataset, "LossyImageCompression") != "01":
        dataset.LossyImageCompression = "01"
        dataset.LossyImageCompressionRatio = f"{ratio:.4g}"
        dataset.LossyImageCompressionMethod = frames.CODECS[syntax].method


def _has_compressed_icon(dataset: Dataset) -> bool:
    for item in dataset.get("IconImageSequence") or []:
        raw = item.get_item("PixelData") if "PixelData" in item else None
        if getattr(raw, "length", None) == UNDEFINED or getattr(raw, "is_undefined_length", False):
            return True
    return False


def noted_in(meta: Dataset) -> list[str]:
    """Return the warning codes that `normalise` left in the file meta group of an instance."""
    if text_of(meta, "PrivateInformationCreatorUID") != IMPLEMENTATION_UID:
        return []
    return bytes(meta.PrivateInformation).decode("ascii").rstrip("\0 ").split(",")


def part_10(dataset: Dataset, sop_class_uid: str, sop_instance_uid: str, notes: set[str]) -> bytes:
    """Write the file: preamble of zeros, a fresh file meta group, Explicit VR Little Endian (PS3.10 section 7.1)."""
    dataset.file_meta, dataset.preamble = FileMetaDataset(), None
    file = io.BytesIO()
    try:
        dcmwrite(file, dataset, implicit_vr=False, little_endian=True)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - what could be read and cannot be written is no valid data set
        raise Unprocessable("unreadable") from None
    return _head(sop_class_uid, sop_instance_uid, notes) + file.getvalue()


def _head(sop_class_uid: str, sop_instance_uid: str, notes: set[str]) -> bytes:
    """Return what stands before the data set; pydicom takes longer to write this than to read a whole file.

    The warnings travel in the file meta group's private information: it belongs to the file, not to the data set.
    """
    meta = struct.pack("<HH2sHI", 2, 0x0001, b"OB", 0, 2) + b"\0\1"
    meta += _short(0x0002, b"UI", sop_class_uid) + _short(0x0003, b"UI", sop_instance_uid)
    meta += _short(0x0010, b"UI", ExplicitVRLittleEndian) + _short(0x0012, b"UI", IMPLEMENTATION_UID)
    meta += _short(0x0013, b"SH", "RADQUEUE")
    if notes:
        noted = ",".join(sorted(notes)).encode()
        noted += b"\0" * (len(noted) % 2)
        meta += (
            _short(0x0100, b"UI", IMPLEMENTATION_UID) + struct.pack("<HH2sHI", 2, 0x0102, b"OB", 0, len(noted)) + noted
        )
    return bytes(PREAMBLE_BYTES) + MAGIC + struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(meta)) + meta


def _short(element: int, vr: bytes, text: str) -> bytes:
    """Encode an element of the file meta group whose length has two bytes."""
    value = text.encode() + b"\0" * (len(text) % 2)
    return struct.pack("<HH2sH", 2, element, vr, len(value)) + value
