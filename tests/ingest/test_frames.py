"""Compressed frames: exact where the codec is, refused before decoding where the size is a lie."""

import io
import struct

import imagecodecs
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.encaps import encapsulate
from rle.utils import encode_array

from services.ingest.reading import Caps, normalise
from shared.errors import Unprocessable

CAPS = Caps(inflated=1 << 24, pixels=1 << 26)
J2K, JPEG, JPEG_LS, LJPEG = (f"1.2.840.10008.1.2.4.{number}" for number in (90, 50, 80, 70))
HTJ2K, JPEG_XL, RLE = "1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.110", "1.2.840.10008.1.2.5"


def compressed(maker, make_part_10, frames, syntax, **overrides):
    """A file with these codestreams."""
    dataset = maker.ct(PixelData=encapsulate(frames), **overrides)
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    return make_part_10(dataset, syntax)


def stored(upload):
    instance, body = normalise(upload, CAPS)
    return dcmread(io.BytesIO(body)), instance.warnings


def refusal(upload):
    with pytest.raises(Unprocessable) as raised:
        normalise(upload, CAPS)
    return raised.value.reason_code


RLE_KEYS = {"bits_allocated": 16, "rows": 16, "columns": 16, "samples_per_pixel": 1, "number_of_frames": 1}
CODECS = [
    (J2K, lambda image: imagecodecs.jpeg2k_encode(image, reversible=True, codecformat="j2k")),
    (JPEG_LS, lambda image: imagecodecs.jpegls_encode(image.view("u2"))),
    (LJPEG, lambda image: imagecodecs.ljpeg_encode(image.view("u2"), bitspersample=16)),
    (HTJ2K, lambda image: imagecodecs.htj2k_encode(image, reversible=True)),
    (RLE, lambda image: next(iter(encode_array(image.view("u2"), **RLE_KEYS)))),
]


@pytest.mark.parametrize(("syntax", "encode"), CODECS)
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


def test_jpeg_xl_is_read(maker, make_part_10):
    """JPEG XL, the newest transfer syntax, decodes exactly."""
    image = np.random.default_rng(3).integers(0, 4096, (16, 16)).astype("<u2")
    upload = compressed(maker, make_part_10, [imagecodecs.jpegxl_encode(image, lossless=True)], HTJ2K)
    dataset, _ = stored(upload.replace(HTJ2K.encode(), JPEG_XL.encode()))

    assert np.array_equal(dataset.pixel_array, image)


@pytest.mark.parametrize(("syntax", "encode"), CODECS)
def test_a_frame_of_another_size_is_refused(maker, make_part_10, syntax, encode):
    """A codestream that is not Rows by Columns is no frame of this image."""
    frame = encode(np.zeros((16, 16), "<u2"))

    assert refusal(compressed(maker, make_part_10, [frame], syntax, Rows=17)) in {"frame_mismatch", "frame_damaged"}


def test_a_small_codestream_of_a_huge_image_is_never_decoded(maker, make_part_10):
    """A JPEG 2000 header that claims 60000 by 60000 is held against Rows and Columns first."""
    frame = bytearray(imagecodecs.jpeg2k_encode(np.zeros((16, 16), "<u2"), reversible=True, codecformat="j2k"))
    struct.pack_into(">2I", frame, 8, 60000, 60000)

    assert refusal(compressed(maker, make_part_10, [bytes(frame)], J2K)) == "frame_mismatch"


@pytest.mark.parametrize(("syntax", "encode"), CODECS)
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


def test_video_is_not_read(maker, make_part_10):
    """A transfer syntax without a decoder is named as the reason."""
    assert (
        refusal(compressed(maker, make_part_10, [b"mpeg"], "1.2.840.10008.1.2.4.102")) == "unsupported_transfer_syntax"
    )
