"""Training arrays: values, polarity, window and shape."""

import io
from dataclasses import asdict

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.sequence import Sequence

from services.ingest.arrays import centred, percentile_window, shrink
from services.ingest.pixels import modality_values
from services.ingest.protocol import ArrayConfig, Assemble, Caps
from services.ingest.reading import normalise
from services.ingest.worker import answer

CAPS = Caps(1 << 24, 1 << 24)
SECRET = "secret"
CONFIG = {"size": 16, "window": (-1000, 1000), "percentiles": (0.5, 99.5)}


def assemble(tmp_path, files, *, secret=SECRET, blank=(), **changes):
    paths = []
    for number, upload in enumerate(files):
        path = tmp_path / f"{number}.dcm"
        path.write_bytes(normalise(upload, CAPS)[1])
        paths.append(str(path))
    out = tmp_path / "out.npy"
    told = answer(Assemble(paths, str(out), ArrayConfig(**CONFIG | changes), list(blank), secret), print)
    return np.load(out), asdict(told)


def test_slices_are_in_order_and_in_hounsfield_window(maker, make_part_10, tmp_path):
    """Files in any order come out by position; -1000 HU is -1 and 1000 HU is 1."""
    files = [make_part_10(maker.ct(number)) for number in (2, 0, 1)]
    array, told = assemble(tmp_path, files)
    stored = np.stack([np.frombuffer(maker.ct(number).PixelData, "<u2").reshape(16, 16) for number in range(3)])

    assert np.allclose(array, np.clip((stored.astype(float) - 1024) / 1000, -1, 1), atol=1e-5)
    assert told["shape"] == [3, 16, 16]


def test_inverted_polarity_is_turned(maker, make_part_10, tmp_path):
    """The same values as MONOCHROME1 are the negative picture."""
    plain, _ = assemble(tmp_path, [make_part_10(maker.ct())])
    inverted, _ = assemble(tmp_path, [make_part_10(maker.ct(PhotometricInterpretation="MONOCHROME1"))])

    assert np.allclose(inverted, -plain)


def test_rescale_in_functional_groups_counts(maker, make_part_10):
    """Enhanced objects keep rescale per frame, or for all frames, and not in the instance."""
    frames = []
    for slope in (1, 2):
        transformation, groups = Dataset(), Dataset()
        transformation.RescaleSlope, transformation.RescaleIntercept, transformation.RescaleType = slope, -1024, "HU"
        groups.PixelValueTransformationSequence = Sequence([transformation])
        frames.append(groups)
    pixels = np.full((2, 16, 16), 100, "<u2")
    overrides = {"NumberOfFrames": 2, "PixelData": pixels.tobytes(), "RescaleSlope": None, "RescaleIntercept": None}
    enhanced = maker.ct(PerFrameFunctionalGroupsSequence=Sequence(frames), **overrides)
    first, second = modality_values(dcmread(io.BytesIO(make_part_10(enhanced))))

    assert (first.max(), second.max()) == (-924, -824)


def test_colour_is_left_out(maker, make_part_10, tmp_path):
    """Colour slices are skipped with a warning; the grey ones stay."""
    pixels = np.zeros((16, 16, 3), np.uint8).tobytes()
    colour = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "SamplesPerPixel": 3, "PlanarConfiguration": 0}
    files = [
        make_part_10(maker.ct(0)),
        make_part_10(maker.ct(1, PhotometricInterpretation="RGB", PixelData=pixels, **colour)),
    ]
    array, told = assemble(tmp_path, files)

    assert array.shape == (1, 16, 16)
    assert told["warnings"] == ["colour_skipped"]


def flat(maker, number, value=1000, **overrides):
    return maker.ct(number, PixelData=np.full((16, 16), value, "<u2").tobytes(), **overrides)


def test_named_rules_leave_slices_out(maker, make_part_10, tmp_path):
    """Blank slices and localizers are left out where the dataset wants it, and the sidecar counts them by rule."""
    scout = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    files = [make_part_10(one) for one in (maker.ct(0), flat(maker, 1), maker.ct(2, **scout), maker.ct(3))]
    every, told_every = assemble(tmp_path, files)
    some, told = assemble(tmp_path, files, leave_out=["blank", "localizer"])

    assert (len(every), told_every["left_out"]) == (4, {})
    assert np.array_equal(some, every[[0, 3]])
    assert told["left_out"] == {"localizer": 1, "blank": 1}
    assert told["warnings"] == ["blank_left_out", "localizer_left_out"]


def test_noise_in_air_is_blank_and_a_small_shape_is_not(maker, make_part_10, tmp_path):
    """What differs by less than a hundredth of the window shows nothing."""
    noise = np.random.default_rng(0).integers(1000, 1004, (16, 16)).astype("<u2")
    shape = noise.copy()
    shape[4:8, 4:8] = 1500
    files = [make_part_10(maker.ct(n, PixelData=pixels.tobytes())) for n, pixels in enumerate((noise, shape))]
    array, told = assemble(tmp_path, files, leave_out=["blank"])

    assert told["left_out"] == {"blank": 1}
    assert array.max() > 0.4


def test_a_mixed_series_gives_its_largest_stack(maker, make_part_10, tmp_path):
    """Slices of another size are not put between the others."""
    other = maker.ct(1, Rows=8, Columns=8, PixelData=bytes(128), PixelSpacing=[2, 2])
    array, told = assemble(tmp_path, [make_part_10(one) for one in (maker.ct(0), other, maker.ct(2))])
    alone, _ = assemble(tmp_path, [make_part_10(one) for one in (maker.ct(0), maker.ct(2))])

    assert np.array_equal(array, alone)
    assert (told["left_out"], told["warnings"]) == ({"other_stack": 1}, ["smaller_stacks_left_out"])
    assert told["pixel_spacing_mm"] == (1.0, 1.0)


def test_a_series_of_which_all_is_left_out_has_an_empty_array(maker, make_part_10, tmp_path):
    """Nothing is no failure."""
    array, told = assemble(tmp_path, [make_part_10(flat(maker, 0))], leave_out=["blank"])

    assert array.shape == (0, 16, 16)
    assert told["left_out"] == {"blank": 1}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_in_the_window(value):
    """NaN and the infinities become an end of the window, as a value beyond it does."""
    frame = np.array([[value, 50.0], [0.0, 100.0]], np.float32)
    picture = shrink(frame, (0, 100), 2, None, inverted=False)

    assert np.array_equal(picture, [[1 if value > 0 else -1, 0], [-1, 1]])


def test_the_patient_is_a_keyed_hash(maker, make_part_10, tmp_path):
    """One patient has one key, which another secret changes and which holds nothing of the PatientID."""
    files = [make_part_10(maker.ct())]
    keys = [assemble(tmp_path, files, secret=secret)[1]["patient_key"] for secret in ("a", "a", "b")]

    assert keys[0] == keys[1] != keys[2]
    assert "4711" not in keys[0]


def test_shrinking_does_not_alias():
    """A pattern finer than the target becomes its mean, not stripes."""
    stripes = np.tile(np.array([0, 100], np.float32), (64, 32))
    small = shrink(stripes, (0, 100), 8, None, inverted=False)

    assert np.abs(small).max() < 0.05


@pytest.mark.parametrize(("spacing", "filled"), [((1.0, 1.0), (8, 16)), ((2.0, 1.0), (16, 16))])
def test_the_physical_aspect_is_kept(spacing, filled):
    """A picture is centred on -1 with its height and width in millimetres to scale."""
    canvas = centred(shrink(np.full((32, 64), 100, np.float32), (0, 100), 16, spacing, inverted=False), 16)

    assert (canvas > 0).any(axis=1).sum() == filled[0]
    assert (canvas > 0).any(axis=0).sum() == filled[1]


@pytest.mark.parametrize(
    "told", [{"ImagerPixelSpacing": [0.4, 0.2]}, {"PixelAspectRatio": [2, 1]}, {"NominalScannedPixelSpacing": [2, 1]}]
)
def test_the_shape_of_a_pixel_may_stand_elsewhere(maker, make_part_10, tmp_path, told):
    """Radiographs and ultrasound tell it without a PixelSpacing of the patient."""
    upload = make_part_10(maker.ct(PixelSpacing=None, PixelData=b"\xff\x0f" * 256, **told))
    array, _ = assemble(tmp_path, [upload])

    assert (array[0] > 0).sum(axis=1).max() == 8
    assert (array[0] > 0).sum(axis=0).max() == 16


def test_percentiles_are_of_all_frames():
    """They are taken over the frames together, and numbers only."""
    frames = [np.full((4, 4), 100, np.float32), np.full((4, 4), 300, np.float32), np.full((4, 4), np.nan, np.float32)]

    assert percentile_window(iter(frames), 48, (0.5, 99.5)) == (100, 300)


@pytest.mark.parametrize("frames", [[], [np.zeros((4, 4), np.float32)], [np.full((4, 4), np.nan, np.float32)]])
def test_a_flat_series_tells_of_no_window(frames):
    """One value, none, or no number: there is nothing to scale by."""
    assert percentile_window(iter(frames), 16, (0.5, 99.5)) is None


def test_the_key_tells_configurations_apart():
    """What changes the array changes the hash in its key; percentiles do so only where they are used."""
    window = ArrayConfig(64, (-1000, 1000), (1, 99))

    assert window.hash() == ArrayConfig(64, (-1000, 1000), (2, 98)).hash()
    assert (
        len({window.hash(), ArrayConfig(32, (-1000, 1000), (1, 99)).hash(), ArrayConfig(64, None, (1, 99)).hash()}) == 3
    )
