"""Compressed frames: exact where the codec is, refused before decoding where the size is a lie."""

import io
import shutil
import struct
import subprocess
import zlib

import imagecodecs
import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.encaps import encapsulate
from rle.utils import encode_array

from services.ingest import codestreams
from services.ingest.frames import CODECS
from services.ingest.pixels import modality_values
from services.ingest.protocol import Caps
from services.ingest.reading import normalise
from shared.errors import Unprocessable

CAPS = Caps(inflated=1 << 24, pixels=1 << 26)
J2K, JPEG, JPEG_LS, LJPEG = (f"1.2.840.10008.1.2.4.{number}" for number in (90, 50, 80, 70))
HTJ2K, JPEG_XL, RLE = "1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.110", "1.2.840.10008.1.2.5"


def compressed(maker, make_part_10, frames, syntax, **overrides):
    """A file with these codestreams; it is written as JPEG 2000 first, since pydicom does not know all of these."""
    return _renamed(make_part_10(_encapsulated(maker, frames, **overrides), J2K), syntax)


def _encapsulated(maker, fragments, *, has_offsets=True, **overrides):
    dataset = maker.ct(PixelData=encapsulate(fragments, has_bot=has_offsets), **overrides)
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    return dataset


def _renamed(upload, syntax):
    length = len(syntax) + len(syntax) % 2
    told = b"UI" + struct.pack("<H", length) + syntax.encode().ljust(length, b"\0")
    return upload.replace(b"UI\x16\0" + J2K.encode(), told, 1)


def stored(upload):
    instance, body = normalise(upload, CAPS)
    return dcmread(io.BytesIO(body)), instance.warnings


def refusal(upload):
    with pytest.raises(Unprocessable) as raised:
        normalise(upload, CAPS)
    return raised.value.reason_code


def deflated(octets):
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(octets) + compressor.flush()


DEFLATED, NATIVE_FRAMES = "1.2.840.10008.1.2.8.1", "1.2.840.10008.1.2.1.98"
RLE_KEYS = {"bits_allocated": 16, "rows": 16, "columns": 16, "samples_per_pixel": 1, "number_of_frames": 1}
LOSSLESS = {
    (J2K,): lambda image: imagecodecs.jpeg2k_encode(image, reversible=True, codecformat="j2k"),
    (JPEG_LS, JPEG_LS[:-1] + "1"): lambda image: imagecodecs.jpegls_encode(image.view("u2")),
    (LJPEG, LJPEG[:-2] + "57"): lambda image: imagecodecs.ljpeg_encode(image.view("u2"), bitspersample=16),
    (HTJ2K, HTJ2K[:-1] + "2", HTJ2K[:-1] + "3"): lambda image: imagecodecs.htj2k_encode(image, reversible=True),
    (RLE,): lambda image: next(iter(encode_array(image.view("u2"), **RLE_KEYS))),
    (JPEG_XL,): lambda image: imagecodecs.jpegxl_encode(image.view("u2"), lossless=True),
    (DEFLATED,): lambda image: deflated(image.tobytes()),
    (NATIVE_FRAMES,): lambda image: image.tobytes(),
}
CODECS_OF = [(syntax, encode) for syntaxes, encode in LOSSLESS.items() for syntax in syntaxes]


@pytest.mark.parametrize(("syntax", "encode"), CODECS_OF)
@pytest.mark.parametrize("signed", [False, True])
def test_lossless_codecs_give_back_every_value(maker, make_part_10, syntax, encode, signed):
    """Signed and unsigned 16 bit images survive each lossless codec exactly, and are not called lossy."""
    low, high = (-2000, 3000) if signed else (0, 60000)
    image = np.random.default_rng(1).integers(low, high, (16, 16)).astype("<i2" if signed else "<u2")
    bits = {"BitsStored": 16, "HighBit": 15, "PixelRepresentation": int(signed)}
    dataset, warnings = stored(compressed(maker, make_part_10, [encode(image)], syntax, **bits))

    assert np.array_equal(dataset.pixel_array, image)
    assert warnings == ()
    assert "LossyImageCompression" not in dataset


def test_frames_keep_their_order(maker, make_part_10):
    """A multi-frame instance has its frames one after the other."""
    images = np.random.default_rng(2).integers(0, 4096, (3, 16, 16)).astype("<u2")
    frames = [imagecodecs.jpegls_encode(image) for image in images]
    dataset, _ = stored(compressed(maker, make_part_10, frames, JPEG_LS, NumberOfFrames=3))

    assert np.array_equal(dataset.pixel_array, images)
    assert refusal(compressed(maker, make_part_10, frames[:2], JPEG_LS, NumberOfFrames=3)) == "frame_count"


@pytest.mark.parametrize(("syntax", "encode"), [*CODECS_OF, (JPEG, imagecodecs.jpeg8_encode)])
@pytest.mark.parametrize("offsets", [False, True])
def test_frames_that_nothing_tells_of_are_not_lost(maker, make_part_10, syntax, encode, offsets):
    """Fragments are one frame where there is one; those that begin further frames are refused, and not left out."""
    bits = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7} if syntax == JPEG else {}
    images = np.random.default_rng(2).integers(0, 200, (3, 16, 16)).astype("u1" if bits else "<u2")
    coded = [encode(image) for image in images]
    for told in (bits, bits | {"NumberOfFrames": 1}):
        whole = make_part_10(_encapsulated(maker, coded, has_offsets=offsets, **told), J2K)

        assert refusal(_renamed(whole, syntax)) in {"frame_count", "frame_mismatch"}


def test_a_frame_in_several_fragments_is_one(maker, make_part_10):
    """A writer may cut a codestream where it likes."""
    image = np.random.default_rng(2).integers(0, 4096, (16, 16)).astype("<u2")
    coded = imagecodecs.jpeg2k_encode(image, reversible=True, codecformat="j2k")
    parts = [coded[at : at + 100] for at in range(0, len(coded), 100)]
    dataset, warnings = stored(make_part_10(_encapsulated(maker, parts, has_offsets=False), J2K))

    assert np.array_equal(dataset.pixel_array, image)
    assert warnings == ()


@pytest.mark.parametrize("size", [40, 100])
@pytest.mark.parametrize(
    ("syntax", "encode"),
    [one for one in CODECS_OF if one[0] in {J2K, JPEG_LS, LJPEG}] + [(JPEG, imagecodecs.jpeg8_encode)],
)
def test_frames_in_several_fragments_are_not_lost_either(maker, make_part_10, size, syntax, encode):
    """Where nothing tells of a second frame its first bytes do, wherever it was cut."""
    bits = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7} if syntax == JPEG else {}
    images = np.random.default_rng(2).integers(0, 200, (2, 16, 16)).astype("u1" if bits else "<u2")
    coded = [encode(image) for image in images]
    parts = [one[at : at + size] for one in coded for at in range(0, len(one), size)]
    whole = make_part_10(_encapsulated(maker, parts, has_offsets=False, **bits), J2K)

    assert refusal(_renamed(whole, syntax)) == "frame_count"


def test_the_boxes_of_a_jp2_file_may_be_a_fragment_of_their_own(maker, make_part_10):
    """What goes before a fragment that begins like a frame is a frame only where it is whole."""
    image = np.random.default_rng(2).integers(0, 4096, (16, 16)).astype("<u2")
    coded = imagecodecs.jpeg2k_encode(image, reversible=True, codecformat="jp2")
    at = coded.index(b"\xff\x4f\xff\x51")
    at -= at % 2
    dataset, _ = stored(make_part_10(_encapsulated(maker, [coded[:at], coded[at:]], has_offsets=False), J2K))

    assert np.array_equal(dataset.pixel_array, image)


@pytest.mark.parametrize("syntax", [RLE, DEFLATED, NATIVE_FRAMES])
def test_cells_that_begin_at_a_higher_bit_are_moved(maker, make_part_10, syntax):
    """These syntaxes code whole cells, so HighBit means what it means in native pixel data."""
    image = np.random.default_rng(2).integers(0, 4096, (16, 16)).astype("<u2")
    coded = dict(CODECS_OF)[syntax](image << 4)
    dataset, warnings = stored(compressed(maker, make_part_10, [coded], syntax, HighBit=15))

    assert np.array_equal(dataset.pixel_array, image)
    assert (dataset.HighBit, warnings) == (11, ("high_bit_corrected",))


def test_a_compressed_icon_is_removed_at_any_depth(maker, make_part_10):
    """What is stored as native holds no encapsulated pixels."""
    image = np.random.default_rng(2).integers(0, 4096, (16, 16)).astype("<u2")
    icon = maker.ct(PixelData=encapsulate([b"icon"]))
    icon["PixelData"].is_undefined_length = True
    reference = Dataset()
    reference.IconImageSequence = [icon]
    coded = imagecodecs.jpeg2k_encode(image, reversible=True, codecformat="j2k")
    dataset, warnings = stored(compressed(maker, make_part_10, [coded], J2K, ReferencedImageSequence=[reference]))

    assert "IconImageSequence" not in dataset.ReferencedImageSequence[0]
    assert warnings == ("icon_removed",)


COLOUR = {
    "SamplesPerPixel": 3,
    "PlanarConfiguration": 0,
    "BitsAllocated": 8,
    "BitsStored": 8,
    "HighBit": 7,
    "RescaleSlope": None,
    "RescaleIntercept": None,
}


def gradient():
    """A smooth colour image, whose channels differ."""
    y, x = np.mgrid[0:16, 0:16]
    return np.stack([x * 16, y * 16, 255 - x * 8], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("photometric", ["YBR_FULL_422", "RGB"])
def test_jpeg_colours_are_what_the_header_says(maker, make_part_10, photometric):
    """YCbCr comes out as RGB, RGB stays, whatever markers the codestream carries; the image is marked as lossy."""
    stored_space = "YCBCR" if photometric.startswith("YBR") else "RGB"
    frame = imagecodecs.jpeg8_encode(gradient(), level=98, colorspace="RGB", outcolorspace=stored_space)
    upload = compressed(maker, make_part_10, [frame], JPEG, PhotometricInterpretation=photometric, **COLOUR)
    dataset, _ = stored(upload)

    assert dataset.PhotometricInterpretation == "RGB"
    assert np.abs(dataset.pixel_array.astype(int) - gradient()).max() < 24
    assert dataset.LossyImageCompression == "01"
    assert dataset.LossyImageCompressionMethod == "ISO_10918_1"


def test_jpeg_2000_colours_become_rgb(maker, make_part_10):
    """The colour transform of JPEG 2000 is undone by decoding."""
    frame = imagecodecs.jpeg2k_encode(gradient(), reversible=True, codecformat="j2k", mct=True)
    dataset, _ = stored(compressed(maker, make_part_10, [frame], J2K, PhotometricInterpretation="YBR_RCT", **COLOUR))

    assert dataset.PhotometricInterpretation == "RGB"
    assert np.array_equal(dataset.pixel_array, gradient())


def test_run_length_colours_are_interleaved(maker, make_part_10):
    """RLE codes planes; the stored pixels are colour by pixel."""
    (frame,) = encode_array(gradient(), **RLE_KEYS | {"bits_allocated": 8, "samples_per_pixel": 3})
    dataset, _ = stored(compressed(maker, make_part_10, [frame], RLE, PhotometricInterpretation="RGB", **COLOUR))

    assert dataset.PlanarConfiguration == 0
    assert np.array_equal(dataset.pixel_array, gradient())


@pytest.mark.parametrize(("syntax", "encode"), CODECS_OF)
def test_a_frame_of_another_size_is_refused(maker, make_part_10, syntax, encode):
    """A codestream that is not Rows by Columns is no frame of this image."""
    frame = encode(np.zeros((16, 16), "<u2"))

    assert refusal(compressed(maker, make_part_10, [frame], syntax, Rows=17)) in {"frame_mismatch", "frame_damaged"}


def test_a_small_codestream_of_a_huge_image_is_never_decoded(maker, make_part_10):
    """A JPEG 2000 header that claims 60000 by 60000 is held against Rows and Columns first."""
    frame = bytearray(imagecodecs.jpeg2k_encode(np.zeros((16, 16), "<u2"), reversible=True, codecformat="j2k"))
    struct.pack_into(">2I", frame, 8, 60000, 60000)

    assert refusal(compressed(maker, make_part_10, [bytes(frame)], J2K)) == "frame_mismatch"


@pytest.mark.parametrize(("syntax", "encode"), CODECS_OF)
def test_a_damaged_frame_is_refused_or_decoded(maker, make_part_10, syntax, encode):
    """Changed bytes in a codestream end in a code or in an image of the right size, never in another error."""
    image = np.random.default_rng(4).integers(0, 4096, (16, 16)).astype("<u2")
    frame = encode(image)
    for at in range(0, len(frame), 7):
        damaged = bytearray(frame)
        damaged[at] ^= 0xFF
        dataset, code = None, None
        try:
            dataset, _ = stored(compressed(maker, make_part_10, [bytes(damaged)], syntax))
        except Unprocessable as error:
            code = error.reason_code

        assert code in {None, "frame_damaged", "frame_mismatch", "frame_count"}
        assert dataset is None or dataset.pixel_array.shape == (16, 16)


def test_bits_stored_follows_the_values(maker, make_part_10):
    """Twelve bits in a codestream of sixteen change nothing; values above BitsStored correct it."""
    small, large = np.full((16, 16), 4095, "<u2"), np.full((16, 16), 5000, "<u2")
    as_said, quiet = stored(compressed(maker, make_part_10, [imagecodecs.jpegls_encode(small, level=0)], JPEG_LS))
    corrected, noted = stored(compressed(maker, make_part_10, [imagecodecs.jpegls_encode(large, level=0)], JPEG_LS))

    assert (as_said.BitsStored, quiet) == (12, ())
    assert corrected.BitsStored >= 13
    assert corrected.HighBit == corrected.BitsStored - 1
    assert noted == ("bits_stored_corrected",)


def smooth():
    """A grey image that lossy codecs keep well, 12 bits."""
    y, x = np.mgrid[0:16, 0:16]
    return (y * 100 + x * 120).astype("<u2")


LOSSY = {
    "1.2.840.10008.1.2.4.50": lambda image: imagecodecs.jpeg8_encode((image >> 4).astype("u1"), level=98),
    "1.2.840.10008.1.2.4.51": lambda image: imagecodecs.jpeg8_encode(image, level=98, bitspersample=12),
    "1.2.840.10008.1.2.4.53": lambda image: imagecodecs.jpeg8_encode(image, level=98, bitspersample=12),
    "1.2.840.10008.1.2.4.55": lambda image: imagecodecs.jpeg8_encode(image, level=98, bitspersample=12),
    "1.2.840.10008.1.2.4.81": lambda image: imagecodecs.jpegls_encode(image, level=3),
    "1.2.840.10008.1.2.4.91": lambda image: imagecodecs.jpeg2k_encode(image, level=85, codecformat="j2k"),
    "1.2.840.10008.1.2.4.111": lambda image: imagecodecs.jpegxl_encode_jpeg(
        imagecodecs.jpeg8_encode((image >> 4).astype("u1"), level=98)
    ),
    "1.2.840.10008.1.2.4.112": lambda image: imagecodecs.jpegxl_encode(image, level=98, bitspersample=12),
    "1.2.840.10008.1.2.4.203": lambda image: imagecodecs.htj2k_encode(image, reversible=False, level=0.001),
}


@pytest.mark.parametrize("syntax", LOSSY)
def test_lossy_codecs_keep_the_picture(maker, make_part_10, syntax):
    """Values after a codec with loss are close to those before, and the instance says that there was a loss."""
    image, eight = smooth(), syntax.endswith((".50", ".111"))
    bits = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7} if eight else {}
    dataset, warnings = stored(compressed(maker, make_part_10, [LOSSY[syntax](image)], syntax, **bits))
    expected = image >> 4 if eight else image

    assert np.abs(dataset.pixel_array.astype(int) - expected).max() <= expected.max() * 0.03
    assert dataset.LossyImageCompression == "01"
    assert dataset.LossyImageCompressionMethod == CODECS[syntax].method
    assert warnings == ()


@pytest.mark.parametrize(
    ("option", "syntax"), [("+ee", "51"), ("+es", "53"), ("+ep", "55"), ("+el", "57"), ("+e1", "70")]
)
def test_what_dcmtk_encodes_is_read(maker, make_part_10, tmp_path, option, syntax):
    """Spectral selection, progression and each lossless process, from an encoder that is not ours."""
    program = shutil.which("dcmcjpeg")
    if program is None:
        pytest.skip("dcmcjpeg of dcmtk is not installed")
    (tmp_path / "in.dcm").write_bytes(make_part_10(maker.ct(PixelData=smooth().tobytes())))
    subprocess.run([program, "-q", option, tmp_path / "in.dcm", tmp_path / "out.dcm"], check=True)
    upload = (tmp_path / "out.dcm").read_bytes()
    dataset, _ = stored(upload)
    lossless = syntax in {"57", "70"}
    assert dcmread(io.BytesIO(upload)).file_meta.TransferSyntaxUID == f"1.2.840.10008.1.2.4.{syntax}"
    (values,) = modality_values(dataset)  # dcmtk spreads the values over the bits, and says so in the rescale

    assert np.abs(values - (smooth() - 1024.0)).max() <= (0 if lossless else 100)


def test_every_transfer_syntax_is_tested():
    """What the table of decoders lists is encoded and decoded here."""
    assert {syntax for syntax, _ in CODECS_OF} | set(LOSSY) == set(CODECS)


@pytest.mark.parametrize("syntax", [J2K, RLE, DEFLATED, NATIVE_FRAMES])
def test_masks_of_single_bits_are_packed_without_a_gap(maker, make_part_10, syntax):
    """Frames whose bits fill no whole byte follow one another as PS3.5 section 8.1.1 packs them."""
    masks = np.random.default_rng(5).integers(0, 2, (3, 15, 15)).astype(np.uint8)
    packed = [np.packbits(mask, bitorder="little") for mask in masks]
    encode = {
        J2K: lambda number: imagecodecs.jpeg2k_encode(
            masks[number], reversible=True, codecformat="j2k", bitspersample=1
        ),
        RLE: lambda number: next(
            iter(encode_array(packed[number][None], **RLE_KEYS | {"bits_allocated": 8, "rows": 1, "columns": 29}))
        ),
        DEFLATED: lambda number: deflated(packed[number].tobytes()),
        NATIVE_FRAMES: lambda number: packed[number].tobytes(),
    }[syntax]
    bits = {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0, "Rows": 15, "Columns": 15, "NumberOfFrames": 3}
    dataset, warnings = stored(compressed(maker, make_part_10, [encode(number) for number in range(3)], syntax, **bits))

    assert np.array_equal(dataset.pixel_array, masks)
    assert len(dataset.PixelData) == 86  # 675 bits
    assert warnings == ()


@pytest.mark.parametrize("planar", [0, 1])
def test_deflated_planes_become_pixels(maker, make_part_10, planar):
    """A deflated colour frame is native inside, whose planes are put side by side."""
    pixels = np.moveaxis(gradient(), -1, 0) if planar else gradient()
    colour = COLOUR | {"PlanarConfiguration": planar, "PhotometricInterpretation": "RGB"}
    dataset, _ = stored(compressed(maker, make_part_10, [deflated(pixels.tobytes())], DEFLATED, **colour))

    assert np.array_equal(dataset.pixel_array, gradient())
    assert dataset.PlanarConfiguration == 0


def test_a_deflated_frame_is_inflated_no_further_than_it_may_be(maker, make_part_10):
    """A frame that holds more, or less, than Rows by Columns is refused."""
    assert refusal(compressed(maker, make_part_10, [deflated(bytes(1 << 24))], DEFLATED)) == "frame_mismatch"
    assert refusal(compressed(maker, make_part_10, [deflated(bytes(500))], DEFLATED)) == "frame_damaged"


@pytest.mark.parametrize("keep", [0.4, 0.7, 0.97])
@pytest.mark.parametrize(("syntax", "encode"), [*CODECS_OF, *LOSSY.items()])
def test_half_a_frame_is_never_taken(maker, make_part_10, syntax, encode, keep):
    """Decoders fill what is missing with grey; a codestream that was cut short is refused instead."""
    bits = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7} if syntax.endswith((".50", ".111")) else {}
    frame = encode(np.random.default_rng(6).integers(0, 4096, (16, 16)).astype("<u2"))
    code = refusal(compressed(maker, make_part_10, [frame[: int(len(frame) * keep)]], syntax, **bits))

    assert code in {"frame_damaged", "frame_mismatch"}


def test_a_jp2_file_in_a_frame_is_read(maker, make_part_10):
    """Some writers leave the boxes of a JP2 file around the codestream; what they say of colours does not count."""
    image = np.random.default_rng(7).integers(0, 4096, (16, 16)).astype("<u2")
    dataset, _ = stored(
        compressed(maker, make_part_10, [imagecodecs.jpeg2k_encode(image, reversible=True, codecformat="jp2")], J2K)
    )

    assert np.array_equal(dataset.pixel_array, image)


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (300, 400), (33, 77), (270, 480), (2000, 10), (1, 1), (512, 256)])
@pytest.mark.parametrize(("bits", "kind"), [(8, "u1"), (10, "u2"), (16, "u2")])
def test_a_jpeg_xl_tells_its_size_beforehand(shape, bits, kind):
    """Every form of the size header is read: small, with a ratio, and of each width."""
    image = np.random.default_rng(8).integers(0, 1 << bits, shape).astype(kind)
    for lossless in (True, False):
        header = codestreams.jpeg_xl(imagecodecs.jpegxl_encode(image, lossless=lossless, bitspersample=bits))

        assert (header.rows, header.columns, header.precision) == (*shape, bits)


def test_a_jpeg_xl_of_another_size_is_never_decoded(maker, make_part_10, monkeypatch):
    """The size is held against Rows and Columns before libjxl sees the frame, and an animation is none."""
    called = []
    monkeypatch.setattr(imagecodecs, "jpegxl_decode", lambda *arguments, **_: called.append(arguments))
    frame = imagecodecs.jpegxl_encode(np.zeros((3000, 3000), "u1"), lossless=True)
    moving = imagecodecs.jpegxl_encode(np.zeros((3, 16, 16), "u2"), lossless=True)

    assert refusal(compressed(maker, make_part_10, [frame], JPEG_XL)) == "frame_mismatch"
    assert refusal(compressed(maker, make_part_10, [moving], JPEG_XL)) == "frame_damaged"
    assert called == []


def test_of_two_sizes_in_a_jpeg_none_counts():
    """A second frame header could be what a decoder believes."""
    frame = imagecodecs.jpegls_encode(np.zeros((16, 16), "<u2"))
    at = frame.index(b"\xff\xf7")
    header = frame[at : at + 2 + struct.unpack_from(">H", frame, at + 2)[0]]
    twice = frame[:at] + header.replace(b"\0\x10\0\x10", b"\x40\0\x40\0") + frame[at:]

    assert codestreams.jpeg(frame).rows == 16
    with pytest.raises(codestreams.Damaged):
        codestreams.jpeg(twice)


def test_video_is_not_read(maker, make_part_10):
    """A transfer syntax without a decoder is named as the reason."""
    assert (
        refusal(compressed(maker, make_part_10, [b"mpeg"], "1.2.840.10008.1.2.4.102")) == "unsupported_transfer_syntax"
    )
