"""The order and the regularity of slices, from their positions alone."""

import io
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import dcmread

from services.ingest.geometry import Slice, survey
from services.ingest.series import describe
from shared.messages import Geometry


def stack(depths, *, tilt_deg=0.0, tag=None, **changes):
    """Axial slices of a table that moves along z, under a gantry that leans."""
    lean = math.radians(tilt_deg)
    orientation = (1, 0, 0, 0, math.cos(lean), math.sin(lean))
    return [
        Slice((0.0, 0.0, depth), orientation, 512, 512, (0.7, 0.7), tag, number, "CT", **changes)
        for number, depth in enumerate(depths)
    ]


def test_an_even_stack_is_a_volume():
    """Parallel, evenly spaced slices are a regular volume without any warning."""
    geometry, order, warnings = survey(stack([0, 2, 4, 6]))

    assert (geometry.verdict, geometry.spacing_mm, geometry.tilt_deg) == ("regular", 2.0, 0.0)
    assert (geometry.n_stacks, geometry.n_in_stack, geometry.n_positions, geometry.n_sets) == (1, 4, 4, 1)
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
    ("depths", "verdict", "expected", "n_sets"),
    [
        ([0, 2, 4, 8, 10], "gaps", ["missing_slices", "uneven_spacing"], 1),
        ([0, 2, 4.1, 6], "uneven", ["uneven_spacing"], 1),
        ([0, 2, 2, 4], "repeated", ["repeated_positions"], 2),
        ([0, 0, 0], "repeated", ["repeated_positions"], 3),
        ([0, 2, 4] * 3, "4d", ["several_sets"], 3),
        ([0, 2, 4] * 3 + [0, 2], "repeated", ["repeated_positions"], 4),
        ([0, 2, 4, 10] * 2, "4d", ["missing_slices", "several_sets", "uneven_spacing"], 2),
    ],
)
def test_irregular_stacks_are_named(depths, verdict, expected, n_sets):
    """Gaps, uneven steps, repeats and complete sets each have their verdict; all that is true is in the warnings."""
    geometry, _, warnings = survey(stack(depths))

    assert warnings == expected
    assert (geometry.verdict, geometry.n_sets, geometry.n_positions) == (verdict, n_sets, len(set(depths)))


@pytest.mark.parametrize(("last", "n_gaps"), [(6.99, 0), (7, 1)])
def test_a_gap_begins_at_one_and_a_half_medians(last, n_gaps):
    """A step of exactly 1.5 times the median is a gap; a shorter one is uneven and no more."""
    geometry, _, warnings = survey(stack([0, 2, 4, last]))

    assert (geometry.spacing_mm, geometry.n_gaps) == (2.0, n_gaps)
    assert geometry.verdict == ("gaps" if n_gaps else "uneven")
    assert ("missing_slices" in warnings) == bool(n_gaps)


def test_mixed_slices_are_split_into_stacks():
    """Slices of another size, spacing or direction are a stack of their own, and the largest stack is measured."""
    slices = stack([0, 2, 4, 6, 8, 10] * 4)
    for index in (1, 7, 13):
        slices[index] = replace(slices[index], rows=256, pixel_spacing=(1.4, 1.4))
    slices[2] = replace(slices[2], orientation=(0, 1, 0, 0, 0, 1))
    geometry, order, warnings = survey(slices)

    assert geometry.verdict == "mixed"
    assert {"mixed_orientation", "mixed_pixel_spacing", "mixed_size"} <= set(warnings)
    assert (geometry.n_stacks, geometry.n_in_stack, geometry.n_slices) == (3, 20, 24)
    assert (geometry.spacing_mm, geometry.n_positions) == (2.0, 6)
    assert order[20:] == [1, 7, 13, 2]
    assert sorted(order) == list(range(24))


@pytest.mark.parametrize(
    ("one", "other"),
    [((0.97655, 0.97655), (0.976549, 0.976549)), ((0.78125,) * 2, (0.7813,) * 2), ((0.6995, 0.7), (0.6995, 0.7006))],
)
def test_spacing_that_was_rounded_differently_is_one(one, other):
    """Writers keep more digits or fewer; that splits no series."""
    slices = stack([0, 2, 4, 6])
    for index, spacing in enumerate([one, other] * 2):
        slices[index] = replace(slices[index], pixel_spacing=spacing)
    geometry, _, warnings = survey(slices)

    assert (geometry.verdict, geometry.n_in_stack, warnings) == ("regular", 4, [])


def test_spacing_that_changes_step_by_step_is_told_whatever_the_order():
    """Which slices are one stack does not depend on the order they came in."""
    slices = [
        replace(one, pixel_spacing=(0.7 * 1.0009 ** (number // 7),) * 2) for number, one in enumerate(stack(range(21)))
    ]
    verdicts = [survey(slices[turn:] + slices[:turn])[0] for turn in range(21)]

    assert {(one.verdict, one.n_stacks, one.n_in_stack) for one in verdicts} == {("mixed", 2, 14)}


def test_distances_are_along_a_normal_of_length_one():
    """Directions that are not quite at right angles, as rounding leaves them, shorten no distance."""
    slices = [replace(one, orientation=(1, 0, 0, 0.1, 0.995, 0)) for one in stack([0, 5, 10])]
    geometry, _, _ = survey(slices)

    assert geometry.spacing_mm == 5.0
    assert geometry.normal == (0, 0, 1)


def plane(normal, n):
    """A few slices in one of the three planes of the body."""
    orientations = {"z": (1, 0, 0, 0, 1, 0), "y": (1, 0, 0, 0, 0, -1), "x": (0, 1, 0, 0, 0, -1)}
    position = {"z": (0.0, 0.0, 5.0), "y": (0.0, 5.0, 0.0), "x": (5.0, 0.0, 0.0)}[normal]
    return [
        Slice(tuple(part * i for part in position), orientations[normal], 256, 256, (1, 1), None, i) for i in range(n)
    ]


@pytest.mark.parametrize(
    ("slices", "verdict"),
    [
        ([*plane("x", 3), *plane("y", 3), *plane("z", 3)], "localizer"),
        ([*plane("x", 15), *plane("y", 3)], "localizer"),
        ([*plane("x", 16), *plane("y", 3)], "mixed"),
        ([*plane("x", 40), *plane("y", 3)], "mixed"),
        ([replace(item, localizer=True) for item in plane("z", 1)], "localizer"),
        ([*plane("z", 20), replace(plane("x", 1)[0], localizer=True)], "mixed"),
        (plane("z", 9), "regular"),
        (plane("z", 1), "single"),
    ],
)
def test_scouts_are_no_volumes(slices, verdict):
    """Pictures that say so, and a few slices each in planes that stand upon one another, are localizers."""
    geometry, _, warnings = survey(slices)

    assert geometry.verdict == verdict
    assert ("localizer" in warnings) == (verdict == "localizer" or slices[-1].localizer)


@pytest.mark.parametrize(
    ("patient_position", "column", "tag"),
    [
        ("HFS", (0, 1, -1), -45.0),  # the front of the body, which is up, lies nearer to the head
        ("FFS", (0, 1, 1), -45.0),
        ("HFP", (0, 1, 1), -45.0),  # the back is up
        ("HFP", (0, -1, -1), -45.0),
        ("FFP", (0, 1, -1), -45.0),
        ("FFS", (0, 1, -1), 45.0),
        ("HFDR", (-1, 0, -1), -45.0),
        ("", (0, 1, -1), -45.0),
    ],
)
def test_the_tilt_has_the_sign_of_the_tag_however_the_patient_lies(patient_position, column, tag):
    """Negative is a gantry whose top leans away from the side where the table enters, in every position."""
    column = [part / math.sqrt(2) for part in column]
    along = (1, 0, 0) if column[1] else (0, 1, 0)
    row = along if math.copysign(1, column[1] or -column[0]) > 0 else tuple(-part for part in along)
    slices = [
        Slice((0.0, 0.0, 2.0 * n), (*row, *column), 64, 64, (1, 1), tag, n, "CT", patient_position) for n in range(4)
    ]
    geometry, _, warnings = survey(slices)

    assert geometry.tilt_deg == pytest.approx(tag)
    assert (geometry.verdict, warnings) == ("tilted", ["gantry_tilt"])


def test_what_lies_in_the_headers_is_asked(maker, make_part_10):
    """Position of the patient, localizers and tilt come from the instances of the series."""
    column = [0, math.cos(0.2), math.sin(0.2)]
    lying = {
        "PatientPosition": "FFS",
        "ImageOrientationPatient": [1, 0, 0, *column],
        "GantryDetectorTilt": -math.degrees(0.2),
    }
    files = [make_part_10(maker.ct(n, **lying)) for n in range(3)]
    scout = make_part_10(maker.ct(9, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    found = describe([dcmread(io.BytesIO(body)) for body in files])
    scouts = describe([dcmread(io.BytesIO(scout))])

    assert found.geometry.tilt_deg == pytest.approx(-math.degrees(0.2), abs=0.01)
    assert found.warnings == ["gantry_tilt"]
    assert (scouts.geometry.verdict, scouts.warnings) == ("localizer", ["localizer"])


def test_a_stored_geometry_of_the_first_version_is_read():
    """Documents that say `volume` or `irregular` parse for ever; the first is `regular` today."""
    old = {"n_slices": 2, "n_positions": 2}

    assert Geometry.model_validate(old | {"verdict": "volume"}).verdict == "regular"
    assert Geometry.model_validate(old | {"verdict": "irregular"}).verdict == "irregular"


@pytest.mark.parametrize("orientation", [None, (0,) * 6, (1, 0, 0, 1, 0, 0), (math.nan,) * 6])
def test_slices_without_directions_keep_their_numbers(orientation):
    """Where no geometry can be had the order is that of InstanceNumber."""
    slices = [Slice((0.0, 0.0, 0.0), orientation, 8, 8, instance_number=number) for number in (3, 1, 2)]
    geometry, order, warnings = survey(slices)

    assert (geometry.verdict, order, warnings) == ("unknown", [1, 2, 0], ["no_positions"])
