"""The order and the regularity of slices, from their positions alone."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ingest.geometry import Slice, survey


def stack(depths, *, tilt_deg=0.0, tag=None, **changes):
    """Axial slices of a table that moves along z, under a gantry that leans."""
    lean = math.radians(tilt_deg)
    orientation = (1, 0, 0, 0, math.cos(lean), math.sin(lean))
    return [
        Slice((0.0, 0.0, depth), orientation, 512, 512, (0.7, 0.7), tag, number, "CT", **changes)
        for number, depth in enumerate(depths)
    ]


def test_an_even_stack_is_a_volume():
    """Parallel, evenly spaced slices are a volume without any warning."""
    geometry, order, warnings = survey(stack([0, 2, 4, 6]))

    assert (geometry.verdict, geometry.spacing_mm, geometry.tilt_deg) == ("volume", 2.0, 0.0)
    assert order == [0, 1, 2, 3]
    assert warnings == []


@given(
    n=st.integers(2, 40),
    spacing=st.floats(0.3, 10),
    tilt=st.floats(-30, 30).filter(lambda value: abs(value) > 0.2),
    seed=st.integers(0, 1000),
)
def test_tilt_and_order_are_found_whatever_the_file_order(n, spacing, tilt, seed):
    """The tilt that shuffled slices were made with is found, with its sign, and so is their order."""
    slices = stack([index * spacing for index in range(n)], tilt_deg=tilt, tag=tilt)
    random.Random(seed).shuffle(slices)  # noqa: S311 - an order, no secret
    geometry, order, warnings = survey(slices)

    assert geometry.tilt_deg == pytest.approx(tilt, abs=0.02)
    assert geometry.spacing_mm == pytest.approx(spacing * math.cos(math.radians(tilt)), abs=0.001)
    assert [slices[index].position[2] for index in order] == sorted(item.position[2] for item in slices)
    assert warnings == ["gantry_tilt"]


def test_a_tag_that_says_another_tilt_is_noted():
    """The vectors are believed, and the difference is told."""
    geometry, _, warnings = survey(stack([0, 2, 4], tag=10.0))

    assert (geometry.tilt_deg, geometry.tilt_tag_deg) == (0.0, 10.0)
    assert warnings == ["tilt_tag_mismatch"]


@pytest.mark.parametrize(
    ("depths", "expected"),
    [
        ([0, 2, 4, 8, 10], ["missing_slices", "uneven_spacing"]),
        ([0, 2, 4.1, 6], ["uneven_spacing"]),
        ([0, 2, 2, 4], ["repeated_positions"]),
        ([0, 0, 0], ["repeated_positions"]),
    ],
)
def test_irregular_stacks_are_named(depths, expected):
    """Gaps, uneven steps and repeats each have their code."""
    geometry, _, warnings = survey(stack(depths))

    assert warnings == expected
    assert geometry.verdict == "irregular"


def test_mixed_slices_are_named():
    """A series with slices of another size, spacing or direction is no volume."""
    slices = stack([0, 2, 4])
    slices[1] = Slice((0.0, 0.0, 2.0), (0, 1, 0, 0, 0, 1), 256, 256, (1.4, 1.4), None, 1, "CT")
    _, _, warnings = survey(slices)

    assert {"mixed_orientation", "mixed_pixel_spacing", "mixed_size"} <= set(warnings)


@pytest.mark.parametrize("orientation", [None, (0,) * 6, (1, 0, 0, 1, 0, 0), (math.nan,) * 6])
def test_slices_without_directions_keep_their_numbers(orientation):
    """Where no geometry can be had the order is that of InstanceNumber."""
    slices = [Slice((0.0, 0.0, 0.0), orientation, 8, 8, instance_number=number) for number in (3, 1, 2)]
    geometry, order, warnings = survey(slices)

    assert (geometry.verdict, order, warnings) == ("unknown", [1, 2, 0], ["no_positions"])
