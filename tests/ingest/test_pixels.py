"""Right, not just decoded: each rule of the page "Right pixels" in docs/ingest.md against a decoder that is not ours.

dcmtk reads the file as it was uploaded, we the instance that we store; where dcmtk has no notion of something,
highdicom reads the upload.
"""

import io
import re
import shutil
import subprocess
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom import Dataset, dcmread
from pydicom.pixels import apply_color_lut, pixel_array
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

from services.ingest.pixels import RULES, modality_values
from services.ingest.protocol import Caps
from services.ingest.reading import normalise
from services.ingest.series import describe
from shared.errors import Unprocessable

CAPS = Caps(1 << 28, 1 << 28)
BUNDLED = Path(pydicom.__file__).parent / "data" / "test_files"
LEVELS = 65535
PAGE = Path(__file__).parents[2] / "docs" / "ingest.md"


@pytest.fixture
def dcmtk(tmp_path):
    """Read a frame of an upload with dcmtk: grey from the lowest to the highest value, colour as RGB."""

    def read(upload: bytes, frame: int = 0, program: str = "dcm2pnm") -> np.ndarray:
        if shutil.which(program) is None:
            pytest.skip(f"{program} of dcmtk is not installed")
        (tmp_path / "in.dcm").write_bytes(upload)
        options = ["-q", "+F", str(frame + 1), "+Wm", "+opw"]
        subprocess.run([program, *options, tmp_path / "in.dcm", tmp_path / "out.pnm"], check=True)
        kind, *numbers = re.sub(r"#.*", "", (tmp_path / "out.pnm").read_text()).split()
        width, height, highest, *samples = map(int, numbers)
        shape = (height, width) if kind == "P2" else (height, width, 3)
        return np.array(samples).reshape(shape) / highest

    return read


def stored(upload: bytes) -> Dataset:
    return dcmread(io.BytesIO(normalise(upload, CAPS)[1]))


def ramp(frames: int = 1) -> np.ndarray:
    """Values over 12 bits, other ones in each frame."""
    values = np.arange(frames * 256).reshape(frames, 16, 16) * 13 % 4096
    return values if frames > 1 else values[0]


def table() -> Dataset:
    """A lookup table that turns the order of values round, beginning at 100."""
    item = Dataset()
    item.LUTDescriptor, item.ModalityLUTType = [1000, 100, 16], "US"
    item["LUTDescriptor"].VR = "US"
    item.add_new(0x00283006, "OW", (60000 - 55 * np.arange(1000)).astype("<u2").tobytes())
    return item


NOTHING = {"RescaleSlope": None, "RescaleIntercept": None}
SIGNED = (ramp() - 2048) & 0x1FFF
"""13 bits with a sign, and nothing in the three bits above it."""
GREY = {
    "rescale": {"RescaleSlope": 2, "RescaleIntercept": -1000, "PixelData": ramp().astype("<u2").tobytes()},
    "modality_lut": {
        "ModalityLUTSequence": Sequence([table()]),
        "PixelData": ramp().astype("<u2").tobytes(),
        **NOTHING,
    },
    "polarity": {"PhotometricInterpretation": "MONOCHROME1", "PixelData": ramp().astype("<u2").tobytes()},
    "sign": {
        "PixelRepresentation": 1,
        "BitsStored": 13,
        "HighBit": 12,
        "PixelData": SIGNED.astype("<u2").tobytes(),
    },
    "unused_bits": {"PixelData": (ramp() | 0x5000).astype("<u2").tobytes()},
    "high_bit": {"HighBit": 15, "PixelData": (ramp() << 4 | 3).astype("<u2").tobytes()},
    "frames": {"NumberOfFrames": 3, "PixelData": ramp(3).astype("<u2").tobytes()},
    "bytes": {
        "BitsAllocated": 8,
        "BitsStored": 7,
        "HighBit": 6,
        "Rows": 15,
        "Columns": 15,
        "PixelData": (np.arange(225) % 100).astype("u1").tobytes() + b"\0",
    },
}


@pytest.mark.parametrize("rule", GREY)
def test_grey_values_are_what_dcmtk_sees(maker, make_part_10, dcmtk, rule):
    """Modality values of every frame are those of dcmtk, bright where it is bright."""
    upload = make_part_10(maker.ct(**GREY[rule]))
    dataset = stored(upload)
    for index, values in enumerate(modality_values(dataset)):
        unit = (values - values.min()) / (values.max() - values.min())
        bright = 1 - unit if dataset.PhotometricInterpretation == "MONOCHROME1" else unit

        assert np.abs(bright - dcmtk(upload, index)).max() < 2 / LEVELS


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_byte_order_is_undone(maker, make_part_10, dcmtk, syntax):
    """Words of either order hold the same values, in a file that dcmtk reads alike."""
    order = ">u2" if syntax == ExplicitVRBigEndian else "<u2"
    upload = make_part_10(maker.ct(PixelData=ramp().astype(order).tobytes()), syntax)
    (values,) = modality_values(stored(upload))

    assert np.array_equal(values, ramp() - 1024)
    assert np.abs((values - values.min()) / np.ptp(values) - dcmtk(upload)).max() < 2 / LEVELS


def test_a_wrong_high_bit_moves_nothing(maker, make_part_10):
    """Where the values fit as they are, HighBit is what is wrong."""
    upload = make_part_10(maker.ct(HighBit=15, PixelData=ramp().astype("<u2").tobytes()))
    instance, body = normalise(upload, CAPS)
    dataset = dcmread(io.BytesIO(body))

    assert np.array_equal(dataset.pixel_array, ramp())
    assert (dataset.HighBit, instance.warnings) == (11, ("high_bit_corrected",))


@pytest.mark.parametrize("signed", [False, True])
def test_a_dark_slice_is_moved_like_the_others_of_its_series(maker, make_part_10, signed):
    """Values that begin at a higher bit leave those below it empty, also where all of them would fit as they are."""
    dark = ramp() % 200 - 100 * signed
    pixels = (dark << 4).astype("<i2").tobytes()
    dataset = stored(make_part_10(maker.ct(HighBit=15, PixelRepresentation=int(signed), PixelData=pixels)))

    assert np.array_equal(dataset.pixel_array, dark)


@pytest.mark.parametrize("vr", ["OB", "OW"])
def test_big_endian_words_are_turned_whatever_their_vr(maker, make_part_10, vr):
    """A cell of 16 bits is two bytes; a writer that calls them OB means the same."""
    dataset = maker.ct(PixelData=ramp().astype(">u2").tobytes())
    dataset["PixelData"].VR = vr

    assert np.array_equal(stored(make_part_10(dataset, ExplicitVRBigEndian)).pixel_array, ramp())


def test_a_table_begins_where_the_sign_of_the_pixels_says(maker, make_part_10):
    """The first value of a LUT has the sign of the stored values, whatever VR it was written with."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [256, 2**16 - 1024, 16])
    item.add_new("LUTData", "OW", (np.arange(256) * 7).astype("<u2").tobytes())
    pixels = np.arange(-1024, -768).astype("<i2").tobytes()
    told = {"PixelRepresentation": 1, "BitsStored": 16, "HighBit": 15, "PixelData": pixels}
    dataset = stored(make_part_10(maker.ct(ModalityLUTSequence=Sequence([item]), **told, **NOTHING)))
    (values,) = modality_values(dataset)

    assert np.array_equal(values.ravel(), np.arange(256) * 7)


@pytest.mark.parametrize("name", ["liver_1frame.dcm", "liver_expb_1frame.dcm"])
def test_single_bits_are_unpacked_in_order(dcmtk, name):
    """A segmentation of one bit per pixel has its mask where dcmtk has it."""
    upload = (BUNDLED / name).read_bytes()
    mask = pixel_array(stored(upload))

    assert 0 < mask.sum() < mask.size
    assert np.array_equal(mask, dcmtk(upload))


def planes() -> np.ndarray:
    y, x = np.mgrid[0:16, 0:16]
    return np.stack([x * 16, y * 16, 255 - x * 8]).astype("u1")


COLOURED = {"SamplesPerPixel": 3, "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, **NOTHING}
COLOUR = {
    "planes": {"PhotometricInterpretation": "RGB", "PlanarConfiguration": 1},
    "ybr": {"PhotometricInterpretation": "YBR_FULL", "PlanarConfiguration": 1},
}


def rgb(upload: bytes) -> np.ndarray:
    """What who reads the stored instance with pydicom sees, from 0 to 1."""
    dataset = stored(upload)
    pixels = pixel_array(dataset)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
    return pixels.astype(float) / np.iinfo(pixels.dtype).max


@pytest.mark.parametrize("rule", COLOUR)
def test_colours_are_what_dcmtk_sees(maker, make_part_10, dcmtk, rule):
    """Planes lie beside one another, and YCbCr is RGB to who looks."""
    upload = make_part_10(maker.ct(PixelData=planes().tobytes(), **COLOURED, **COLOUR[rule]))

    assert np.abs(rgb(upload) - dcmtk(upload)).max() < 3 / 255


NATIVE_COLOUR = [
    "examples_palette.dcm",
    "SC_ybr_full_422_uncompressed.dcm",
    "SC_rgb_rle_2frame.dcm",
    "examples_rgb_color.dcm",
]
LOSSY_COLOUR = [
    "SC_rgb_dcmtk_+eb+cy+np.dcm",
    "SC_rgb_dcmtk_+eb+cy+n1.dcm",
    "SC_rgb_jpeg_dcmtk.dcm",
    "examples_ybr_color.dcm",
]


@pytest.mark.parametrize("name", NATIVE_COLOUR)
def test_bundled_colours_are_what_dcmtk_sees(dcmtk, name):
    """Palettes, shared chroma and planes of real files come out as in dcmtk."""
    upload = (BUNDLED / name).read_bytes()
    ours = rgb(upload)

    assert np.abs((ours[0] if ours.ndim == 4 else ours) - dcmtk(upload)).max() < 3 / 255


@pytest.mark.parametrize("name", LOSSY_COLOUR)
def test_jpeg_colours_are_what_dcmtk_sees(dcmtk, name):
    """YCbCr in JPEG comes out as the RGB of dcmtk, up to how each smooths shared chroma at edges."""
    upload = (BUNDLED / name).read_bytes()
    ours = rgb(upload)
    difference = np.abs((ours[0] if ours.ndim == 4 else ours) - dcmtk(upload, program="dcmj2pnm"))

    assert difference.mean() < 2 / 255
    assert np.quantile(difference, 0.95) < 12 / 255


def transformation(slope: float, intercept: float) -> Sequence:
    item = Dataset()
    item.RescaleSlope, item.RescaleIntercept, item.RescaleType = slope, intercept, "HU"
    return Sequence([item])


def enhanced(maker, *, shared: bool) -> Dataset:
    """An enhanced CT, whose rescale is that of all frames, or another one in each."""
    per_frame, common = [Dataset() for _ in range(3)], Dataset()
    for number, groups in enumerate(per_frame):
        if not shared:
            groups.PixelValueTransformationSequence = transformation(1 + number, -100 * number)
    if shared:
        common.PixelValueTransformationSequence = transformation(0.5, -7)
    return maker.ct(
        SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1",
        NumberOfFrames=3,
        PixelData=ramp(3).astype("<u2").tobytes(),
        SharedFunctionalGroupsSequence=Sequence([common]),
        PerFrameFunctionalGroupsSequence=Sequence(per_frame),
        **NOTHING,
    )


@pytest.mark.parametrize("shared", [True, False])
def test_rescale_in_functional_groups_is_what_highdicom_sees(maker, make_part_10, shared):
    """Each frame has the rescale of its own group, or of the group of all frames."""
    upload = make_part_10(enhanced(maker, shared=shared))
    image = highdicom.Image.from_dataset(dcmread(io.BytesIO(upload)))
    for number, values in enumerate(modality_values(stored(upload)), 1):
        theirs = image.get_frame(number, apply_modality_transform=True, apply_voi_transform=False)

        assert np.allclose(values, theirs)


@pytest.mark.parametrize(("slope", "intercept", "expected"), [(2, None, 20), (None, -5, 5), (None, None, 10)])
def test_half_a_rescale_counts(maker, make_part_10, slope, intercept, expected):
    """A slope without an intercept, or the reverse, is applied; pydicom would leave the values as they are."""
    pixels = np.full((16, 16), 10, "<u2").tobytes()
    upload = make_part_10(maker.ct(RescaleSlope=slope, RescaleIntercept=intercept, PixelData=pixels))
    (values,) = modality_values(stored(upload))

    assert values.max() == expected


@pytest.mark.parametrize("name", ["test-SR.dcm", "reportsi.dcm", "rtplan.dcm", "rtstruct.dcm", "waveform_ecg.dcm"])
def test_what_is_no_image_passes_and_makes_no_slice(name):
    """Reports, plans, structures and waveforms are stored for inference, and have no frames to learn from."""
    dataset = stored((BUNDLED / name).read_bytes())

    assert describe([dataset]).order == []
    assert describe([dataset]).attributes["SOPClassUID"] == dataset.SOPClassUID


@pytest.mark.parametrize(
    "overrides",
    [
        {"PhotometricInterpretation": "MONOCHROME"},
        {"PhotometricInterpretation": "RGB"},
        {"PixelRepresentation": 2},
        {**COLOURED, **COLOUR["planes"], "PixelRepresentation": 1, "PixelData": bytes(768)},
    ],
)
def test_a_header_with_two_meanings_is_refused(maker, make_part_10, overrides):
    """Where nobody can tell what the values are, the file is refused."""
    with pytest.raises(Unprocessable, match="bad_image_header"):
        normalise(make_part_10(maker.ct(**overrides)), CAPS)


def test_every_rule_stands_on_the_page():
    """The rules that are tested here are those of docs/ingest.md."""
    section = PAGE.read_text().split("## Right pixels")[1].split("\n## ")[0]
    told = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))

    assert told >= {rule.name for rule in RULES}
    assert told == {
        *GREY,
        *COLOUR,
        "byte_order",
        "single_bits",
        "palette",
        "jpeg_colour",
        "functional_groups",
        "no_image",
    }
