import itertools
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.trainer.data import manifest
from services.trainer.data.images import AT_ONCE, load_images
from services.trainer.data.manifest import (
    Array,
    Manifest,
    NotNormalised,
    newest_revisions,
    opened,
    series_of,
    split,
    summary_of,
)
from services.trainer.products.generation import image_grid
from shared.errors import Unprocessable
from tests.examples import examples

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


def array(number: int, group: str, class_name: str | None = None) -> Array:
    key, series = f"datasets/d/1.2.{number}.a.b.npy", f"1.2.{number}"
    return Array(key=key, etag="e", series_uid=series, group=group, n=10, class_name=class_name)


def divided(arrays: list[Array]) -> Manifest:
    """Split arrays whose slices differ by nothing but noise."""
    return split("d", arrays, {item.key: np.random.default_rng(len(item.group)).normal(size=32) for item in arrays})


def test_only_the_newest_revision_of_a_series_counts():
    """Of several digests and configurations of a series the one stored last is taken."""
    one, two, three = "datasets/d/1.2.840.1", "datasets/d/1.2.840.11", "ab" * 16
    keys = {
        f"{one}.{'aa' * 16}.c1.npy": NOON,
        f"{one}.{'bb' * 16}.c1.npy": NOON + timedelta(seconds=5),
        f"{one}.{three}.c2.npy": NOON + timedelta(seconds=2),
        f"{two}.{'aa' * 16}.c1.npy": NOON,
    }

    assert newest_revisions(keys) == [f"{one}.{'bb' * 16}.c1.npy", f"{two}.{'aa' * 16}.c1.npy"]
    assert series_of(f"{two}.{'aa' * 16}.c1.npy") == "1.2.840.11"


def test_of_two_arrays_stored_in_one_second_the_last_by_key_counts():
    """S3 tells whole seconds: then every worker takes the same array, whatever the order of the listing."""
    first, last = (f"datasets/d/1.2.840.1.{digest * 16}.c1.npy" for digest in ("aa", "bb"))

    assert newest_revisions({first: NOON, last: NOON}) == [last]
    assert newest_revisions({last: NOON, first: NOON}) == [last]
    assert newest_revisions({last: NOON, first: NOON + timedelta(seconds=1)}) == [first]


def test_files_that_ingest_did_not_make_are_series_of_their_own():
    """Names with dots that only look like a revision's never stand for one another."""
    keys = dict.fromkeys(
        ["folder/scan.001.axial.npy", "folder/scan.001.sagittal.npy", "folder/scan.npy", "more/scan.npy"], NOON
    )

    assert newest_revisions(keys) == sorted(keys)
    assert series_of("folder/scan.001.axial.npy") == "folder/scan.001.axial"


@settings(deadline=None, max_examples=examples(150))
@given(groups=st.lists(st.sampled_from("abcdefghijkl"), min_size=2, max_size=40))
def test_no_patient_is_on_both_sides(groups):
    """All arrays of a patient are on one side, a quarter of the patients is kept back, in whatever order they come."""
    arrays = [array(number, group) for number, group in enumerate(groups)]
    manifest = divided(arrays)
    kept_back = {item.group for item in manifest.arrays if item.held_out}
    learnt = {item.group for item in manifest.arrays if not item.held_out}

    assert not kept_back & learnt
    assert len(kept_back) == max(1, len(set(groups)) // 4)
    assert manifest == divided(arrays[::-1])
    assert manifest.n_images(held_out=True) + manifest.n_images(held_out=False) == 10 * len(groups)


@settings(deadline=None, max_examples=examples(150))
@given(patients=st.lists(st.tuples(st.sampled_from("abcdefghijkl"), st.sampled_from("xyz")), min_size=1, max_size=40))
def test_a_class_of_two_patients_of_its_own_is_on_both_sides(patients):
    """Each class keeps back some of its patients and learns from others, and a patient stays whole."""
    arrays = [array(number, f"{name}-{group}", name) for number, (group, name) in enumerate(patients)]
    manifest = divided(arrays)
    for name in {item.class_name for item in arrays}:
        of_class = [item for item in manifest.arrays if item.class_name == name]
        n_patients = len({item.group for item in of_class})

        assert len({item.group for item in of_class if item.held_out}) == max(1, n_patients // 4)
        assert len({item.held_out for item in of_class}) == min(2, n_patients)
    assert manifest == divided(arrays[::-1])


def test_patients_of_two_classes_are_divided_so_that_both_sides_have_both():
    """A division that leaves a side without a class is not taken, however alike its sides are."""
    arrays = [array(1, "a", "x"), array(2, "b", "x"), array(3, "b", "y"), array(4, "c", "y")]
    values = dict(zip("abc", (-1.0, 1.0, 0.0), strict=True))
    manifest = split("d", arrays, {item.key: np.full(32, values[item.group]) for item in arrays})

    assert {(item.class_name, item.held_out) for item in manifest.arrays} == {
        (name, held_out) for name in "xy" for held_out in (False, True)
    }


def test_a_patient_of_a_rare_class_counts_for_a_common_one():
    """No more patients are kept back because some of them have images of two classes."""
    draws = list(manifest._draws("d", "abcdefgh", [range(8), [2, 5]]))

    assert {len(kept_back) for kept_back in draws} == {2}


def test_labels_are_the_places_of_the_classes():
    """The label of an array is its class's place among the names; a dataset without classes has none."""
    arrays = (array(1, "a", "y"), array(2, "b", "x").model_copy(update={"held_out": True}), array(3, "c", "y"))
    manifest = Manifest(dataset="d", arrays=arrays, classes=("x", "y"))

    assert manifest.labels(held_out=False) == [1, 1]
    assert manifest.labels(held_out=True) == [0]
    assert manifest.model_copy(update={"classes": ()}).labels(held_out=False) == []


def test_one_patient_alone_leaves_nothing_to_learn_from():
    """With one patient there is no honest split: all is kept back."""
    assert divided([array(1, "a"), array(2, "a")]).n_images(held_out=False) == 0


def test_sides_are_alike():
    """Of eight dark and eight bright patients, two of each kind are kept back."""
    arrays = [array(number, f"patient-{number}") for number in range(16)]
    bright = {item.key: np.full(32, float(number % 2)) for number, item in enumerate(arrays)}
    kept_back = [bright[item.key][0] for item in split("d", arrays, bright).arrays if item.held_out]

    assert sorted(kept_back) == [0, 0, 1, 1]


def test_summary_tells_mean_and_spread_of_each_cell():
    """Two slices that differ in one corner have its mean and spread there, and none elsewhere."""
    slices = np.zeros((2, 9, 8), np.float32)
    slices[1, :2, :2] = 1
    summary = summary_of(slices)

    assert summary[[0, 16]].tolist() == [0.5, 0.5]
    assert np.delete(summary, [0, 16]).tolist() == [0] * 30
    with pytest.raises(ValueError, match="not finite"):
        summary_of(slices * np.nan)
    with pytest.raises(ValueError, match="slices"):
        summary_of(slices[:, :3])
    with pytest.raises(NotNormalised):
        summary_of(slices * 255)


def test_a_pixel_that_no_cell_has_counts():
    """A NaN, or a value out of range, is found in the rows and columns that the grid leaves out, too."""
    slices = np.zeros((2, 9, 9), np.float32)
    slices[1, 8, 8] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        summary_of(slices)
    slices[1, 8, 8] = 1.5
    with pytest.raises(NotNormalised):
        summary_of(slices)


def test_a_damaged_header_is_told_as_such(tmp_path):
    """Whatever a byte of a file's header is changed to, the array is opened, or refused with a ValueError."""
    np.save(tmp_path / "a.npy", np.zeros((1, 4, 4), np.float32))
    good = (tmp_path / "a.npy").read_bytes()
    refused = 0
    for place, character in itertools.product(range(12, 80, 3), b"9('{\0"):
        (tmp_path / "a.npy").write_bytes(good[:place] + bytes([character]) + good[place + 1 :])
        try:
            opened(tmp_path / "a.npy")
        except ValueError:
            refused += 1

    assert refused > 100


def test_larger_arrays_are_scaled_down_without_moire(tmp_path):
    """Stripes finer than the new pixels become their mean, and a slice that is not square is padded with air."""
    stripes = np.tile(np.array([-1, 1], np.float32), (2, 64, 16))
    np.save(tmp_path / "a.npy", stripes)
    images, labels = load_images([str(tmp_path / "a.npy")] * 2, 16, [1, 0])

    assert images.shape == (4, 1, 16, 16)
    assert labels.tolist() == [1, 1, 0, 0]
    assert images[..., 5:11].abs().max() < 0.15
    assert (images[..., :3] == -1).all()


@pytest.mark.parametrize(("made", "size"), [(np.float32, 16), (np.float64, 16), (np.int8, 16), (np.float32, 8)])
def test_every_slice_of_every_array_arrives_in_order(tmp_path, made, size):
    """More slices than are scaled at a time, of any number type, come out in the order of the files."""
    values = np.linspace(-1, 1, 2 * AT_ONCE + 3)
    slices = np.broadcast_to(values[:, None, None], (len(values), 16, 16)).astype(made)
    for name, part in zip("ab", np.split(slices, [AT_ONCE + 1]), strict=True):
        np.save(tmp_path / f"{name}.npy", part)
    images, labels = load_images([str(tmp_path / "a.npy"), str(tmp_path / "b.npy")], size)

    assert labels is None
    assert (images.shape, images.dtype) == ((len(values), 1, size, size), torch.float32)
    assert torch.allclose(images[:, 0].mean((1, 2)), torch.from_numpy(values.astype(made).astype(np.float32)))


@pytest.mark.parametrize(
    ("made", "reason_code"),
    [
        (np.zeros((2, 8, 8), np.float32), "images_too_small"),
        (np.zeros((8, 8), np.float32), "invalid_array"),
        (np.full((2, 16, 16), np.nan, np.float32), "invalid_array"),
        (np.full((2, 16, 16), np.inf, np.float32), "invalid_array"),
        (np.full((2, 16, 16), "x"), "invalid_array"),
        (np.full((2, 16, 16), None), "invalid_array"),
    ],
)
def test_unusable_arrays_are_refused(tmp_path, made, reason_code):
    """Arrays that would have to be scaled up, or that hold no numbers, are refused with a reason."""
    np.save(tmp_path / "a.npy", made)
    with pytest.raises(Unprocessable) as refused:
        load_images([str(tmp_path / "a.npy")], 16)

    assert refused.value.reason_code == reason_code


def test_grid_shows_every_image_once():
    """Five images become two rows of three, black to white, with a pixel between them."""
    images = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 1, 2, 2)
    grid = image_grid(images)

    assert grid.shape == (5, 8)
    assert grid[::3, ::3].tolist() == [[0, 64, 128], [191, 255, 0]]
    assert (grid[2] == 0).all()
