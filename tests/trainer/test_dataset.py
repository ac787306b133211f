from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.dataset import Array, Manifest, newest_revisions, series_of, split, summary_of
from services.trainer.worker import image_grid, load_images
from shared.errors import Unprocessable

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


def array(number: int, group: str) -> Array:
    return Array(key=f"datasets/d/1.2.{number}.a.b.npy", etag="e", series_uid=f"1.2.{number}", group=group, n=10)


def divided(arrays: list[Array]) -> Manifest:
    """Split arrays whose slices differ by nothing but noise."""
    return split("d", arrays, {item.key: np.random.default_rng(len(item.group)).normal(size=32) for item in arrays})


def test_only_the_newest_revision_of_a_series_counts():
    """Of several digests and configurations of a series the one stored last is taken."""
    keys = {
        "datasets/d/1.2.840.1.aa.c1.npy": NOON,
        "datasets/d/1.2.840.1.bb.c1.npy": NOON + timedelta(seconds=5),
        "datasets/d/1.2.840.1.ab.c2.npy": NOON + timedelta(seconds=2),
        "datasets/d/1.2.840.11.aa.c1.npy": NOON,
    }

    assert newest_revisions(keys) == ["datasets/d/1.2.840.1.bb.c1.npy", "datasets/d/1.2.840.11.aa.c1.npy"]
    assert series_of("datasets/d/1.2.840.11.aa.c1.npy") == "1.2.840.11"


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
        summary_of(slices[0])


def test_larger_arrays_are_scaled_down_without_moire(tmp_path):
    """Stripes finer than the new pixels become their mean, and a slice that is not square is padded with air."""
    stripes = np.tile(np.array([-1, 1], np.float32), (2, 64, 16))
    np.save(tmp_path / "a.npy", stripes)
    images = load_images([str(tmp_path / "a.npy")] * 2, 16)

    assert images.shape == (4, 1, 16, 16)
    assert images[..., 5:11].abs().max() < 0.15
    assert (images[..., :3] == -1).all()


@pytest.mark.parametrize(
    ("made", "reason_code"),
    [
        (np.zeros((2, 8, 8), np.float32), "images_too_small"),
        (np.zeros((8, 8), np.float32), "invalid_array"),
        (np.full((2, 16, 16), np.nan, np.float32), "invalid_array"),
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
