"""How the slices of a series lie in space: stacks, order, spacing, gantry tilt, gaps, repeats; and a verdict on it.

Positions and directions are in the patient coordinate system, mm (PS3.3 C.7.6.2.1.1). Header counts are never asked:
they tell completeness in a quarter of real series.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.messages import Geometry, Verdict

Vector = NDArray[np.float64]
Spacing = tuple[float, float] | None

SAME_POSITION_MM = 0.01
PARALLEL_DEG = 0.1
"""Directions closer than this are one direction; scanners round them to five or six digits."""
TILT_DEG = 0.1
TILT_TAG_DEG = 0.5
"""GantryDetectorTilt is nominal, as the standard says."""
UNEVEN_SHARE = 0.02
"""Steps that differ from the median by more than this share, and by more than SAME_POSITION_MM, are uneven."""
GAP_SHARE = 1.5
SPACING_SHARE = 0.001
"""PixelSpacing that differs by no more is the same, rounded to fewer digits."""
SCOUT_SLICES = 15
"""A scout of several planes has at most so many slices in each of them."""
SCOUT_DEG = 60.0
"""Two of a scout's planes are at least so far from parallel."""
DOWN = {"S": (0.0, 1.0, 0.0), "P": (0.0, -1.0, 0.0), "DR": (-1.0, 0.0, 0.0), "DL": (1.0, 0.0, 0.0)}
"""Where the table is, seen from the patient, by what follows HF or FF in PatientPosition (PS3.3 C.7.3.1.1.2)."""

VERDICTS: tuple[tuple[Verdict, frozenset[str]], ...] = (
    ("mixed", frozenset({"mixed_orientation", "mixed_size", "mixed_pixel_spacing"})),
    ("unknown", frozenset({"no_positions"})),
    ("4d", frozenset({"several_sets"})),
    ("repeated", frozenset({"repeated_positions"})),
    ("gaps", frozenset({"missing_slices"})),
    ("uneven", frozenset({"uneven_spacing"})),
    ("tilted", frozenset({"gantry_tilt", "sheared"})),
)
"""The verdict is the first of these whose warnings there are; before them come `localizer` and `single`."""


@dataclass(frozen=True, slots=True)
class Slice:
    """One frame of one instance."""

    position: tuple[float, float, float] | None
    """ImagePositionPatient."""
    orientation: tuple[float, ...] | None
    """ImageOrientationPatient: row direction, column direction."""
    rows: int
    columns: int
    pixel_spacing: tuple[float, float] | None = None
    tilt_tag_deg: float | None = None
    instance_number: int = 0
    modality: str | None = None
    patient_position: str = ""
    localizer: bool = False
    """ImageType says so."""


@dataclass(frozen=True, slots=True)
class _Frame:
    position: Vector
    row: Vector
    column: Vector

    @property
    def normal(self) -> Vector:
        across = np.cross(self.row, self.column)  # shorter than 1 where the two are not quite at right angles
        return across / np.linalg.norm(across)


def survey(slices: Sequence[Slice]) -> tuple[Geometry, list[int], list[str]]:
    """Return the geometry of a series, the order of its slices (indices into `slices`) and warning codes.

    Slices of one size, pixel spacing and direction are a stack. The order is stack by stack, the largest first, and in
    a stack along the normal; slices at one position keep the order of their InstanceNumber.
    """
    frames = [frame for frame in map(_frame, slices) if frame is not None]
    if len(frames) < len(slices):
        frames = []
    directions = _parallel(slices, frames)
    spacings = _spacings(slices)
    stacks = _stacks(slices, directions, spacings)
    warnings = _mixed(slices, directions, spacings)
    if _is_scout(directions, frames) or any(item.localizer for item in slices):
        warnings.add("localizer")
    told: dict[str, float | int | None] = {"n_positions": len(stacks[0])}
    if frames:
        stacks = [_sorted_by_depth(stack, frames) for stack in stacks]
        told = _measured(slices, stacks[0], frames, warnings)
    else:
        warnings.add("no_positions")
    whole = all(item.localizer for item in slices) or _is_scout(directions, frames)
    normal = [round(float(part), 6) for part in frames[stacks[0][0]].normal] if frames else None
    geometry = Geometry.model_validate(
        {
            "verdict": "localizer" if whole else _verdict(len(slices), warnings),
            "n_slices": len(slices),
            "n_stacks": len(stacks),
            "n_in_stack": len(stacks[0]),
            "normal": normal,
            **told,
        }
    )
    return geometry, [index for stack in stacks for index in stack], sorted(warnings)


def _verdict(n_slices: int, warnings: set[str]) -> Verdict:
    if n_slices == 1:
        return "single"
    return next((verdict for verdict, codes in VERDICTS if codes & warnings), "regular")


def _frame(item: Slice) -> _Frame | None:
    """Position, row direction and column direction; None where they are missing or are no directions."""
    if item.position is None or item.orientation is None:
        return None
    position, directions = np.array(item.position), np.array(item.orientation)
    if not (np.isfinite(position).all() and np.isfinite(directions).all()):
        return None
    row, column = directions[:3], directions[3:]
    lengths = float(np.linalg.norm(row)), float(np.linalg.norm(column))
    if min(lengths) < 0.5:  # noqa: PLR2004 - unit vectors are far from it, zeros are not
        return None
    row = row / lengths[0]
    column = column / lengths[1]
    if np.linalg.norm(np.cross(row, column)) < 0.5:  # noqa: PLR2004 - the two are nearly parallel
        return None
    return _Frame(position, row, column)


def _parallel(slices: Sequence[Slice], frames: Sequence[_Frame]) -> list[list[int]]:
    """Group the slices by direction, each group by InstanceNumber; one group where directions are not known."""
    left = np.array(sorted(range(len(slices)), key=lambda index: slices[index].instance_number))
    if not frames:
        return [left.tolist()]
    normals = np.array([frame.normal for frame in frames])
    rows = np.array([frame.row for frame in frames])
    groups = []
    while len(left):
        same = (_angles_deg(normals[left], normals[left[0]]) <= PARALLEL_DEG) & (
            _angles_deg(rows[left], rows[left[0]]) <= PARALLEL_DEG
        )
        groups.append(left[same].tolist())
        left = left[~same]
    return groups


def _angles_deg(directions: Vector, reference: Vector) -> Vector:
    """Angles between unit vectors, in degrees."""
    return np.degrees(np.arccos(np.clip(directions @ reference, -1, 1)))


def _is_scout(directions: Sequence[Sequence[int]], frames: Sequence[_Frame]) -> bool:
    """Tell whether there are a few slices each in planes that stand upon one another, as scouts have them."""
    if len(directions) < 2 or max(map(len, directions)) > SCOUT_SLICES:  # noqa: PLR2004 - one plane is none
        return False
    normals = np.array([frames[group[0]].normal for group in directions])
    return bool(np.abs(normals @ normals.T).min() < np.cos(np.radians(SCOUT_DEG)))


def _stacks(
    slices: Sequence[Slice], directions: Sequence[Sequence[int]], spacings: Sequence[Spacing]
) -> list[list[int]]:
    """Split groups of parallel slices by size; the largest stack comes first."""
    stacks: dict[object, list[int]] = defaultdict(list)
    for number, group in enumerate(directions):
        for index in group:
            item = slices[index]
            stacks[number, item.rows, item.columns, spacings[index]].append(index)
    return sorted(stacks.values(), key=len, reverse=True)


def _spacings(slices: Sequence[Slice]) -> list[Spacing]:
    """Return the PixelSpacing of each slice; those that differ by no more than rounding are one."""
    given = [item.pixel_spacing for item in slices]
    rows, columns = (_merged(spacing[axis] for spacing in given if spacing) for axis in (0, 1))
    return [spacing and (rows[spacing[0]], columns[spacing[1]]) for spacing in given]


def _merged(values: Iterable[float]) -> dict[float, float]:
    """Return for each value the least of those that are the same."""
    known: dict[float, float] = {}
    least = 0.0
    for value in sorted(set(values)):
        least = least if value <= least * (1 + SPACING_SHARE) else value
        known[value] = least
    return known


def _mixed(slices: Sequence[Slice], directions: Sequence[Sequence[int]], spacings: Sequence[Spacing]) -> set[str]:
    found = set()
    if len(directions) > 1:
        found.add("mixed_orientation")
    if len({(item.rows, item.columns) for item in slices}) > 1:
        found.add("mixed_size")
    if len(set(spacings)) > 1:
        found.add("mixed_pixel_spacing")
    return found


def _sorted_by_depth(stack: Sequence[int], frames: Sequence[_Frame]) -> list[int]:
    normal = frames[stack[0]].normal
    return sorted(stack, key=lambda index: round(float(frames[index].position @ normal) / SAME_POSITION_MM))


def _measured(
    slices: Sequence[Slice], stack: Sequence[int], frames: Sequence[_Frame], warnings: set[str]
) -> dict[str, float | int | None]:
    """Measure one stack, which is in order along its normal."""
    first = frames[stack[0]]
    depths = np.sort(np.array([frames[index].position for index in stack]) @ first.normal)
    steps = np.diff(depths)
    new = steps > SAME_POSITION_MM
    at_positions = np.diff(np.flatnonzero(np.concatenate(([True], new, [True]))))  # slices at each position
    n_sets = int(at_positions.max())
    if n_sets > 1:
        complete = len(at_positions) > 1 and int(at_positions.min()) == n_sets
        warnings.add("several_sets" if complete else "repeated_positions")
    told = _spacing(steps[new], warnings)
    told |= _tilt(slices[stack[0]], frames[stack[-1]].position - first.position, first, warnings)
    return {"n_positions": len(at_positions), "n_sets": n_sets, **told}


def _spacing(steps: Vector, warnings: set[str]) -> dict[str, float | int | None]:
    """Tell of the steps between distinct positions along the normal."""
    if not len(steps):
        return {}
    median = float(np.median(steps))
    n_gaps = int((steps >= GAP_SHARE * median).sum())
    if n_gaps:
        warnings.add("missing_slices")
    if np.abs(steps - median).max() > max(UNEVEN_SHARE * median, SAME_POSITION_MM):
        warnings.add("uneven_spacing")
    return {
        "spacing_mm": round(median, 4),
        "spacing_min_mm": round(float(steps.min()), 4),
        "spacing_max_mm": round(float(steps.max()), 4),
        "n_gaps": n_gaps,
    }


def _tilt(item: Slice, travel: Vector, frame: _Frame, warnings: set[str]) -> dict[str, float | int | None]:
    """Angle between the way from slice to slice and the normal, about the row axis and about the column axis."""
    along = float(travel @ frame.normal)
    if along <= SAME_POSITION_MM:
        return {"tilt_tag_deg": item.tilt_tag_deg}
    tilt = float(np.degrees(np.arctan2(travel @ frame.column, along))) * _tilt_sign(item, frame)
    shear = float(np.degrees(np.arctan2(travel @ frame.row, along)))
    if abs(tilt) > TILT_DEG:
        warnings.add("gantry_tilt" if item.modality in {None, "CT"} else "sheared")
    if abs(shear) > TILT_DEG:
        warnings.add("sheared")
    if item.tilt_tag_deg is not None and abs(tilt - item.tilt_tag_deg) > TILT_TAG_DEG:
        warnings.add("tilt_tag_mismatch")
    return {"tilt_deg": round(tilt, 2) + 0.0, "tilt_tag_deg": item.tilt_tag_deg}


def _tilt_sign(item: Slice, frame: _Frame) -> int:
    """Return what gives the tilt the sign of GantryDetectorTilt.

    That is negative where the top of the gantry leans away from the side where the table enters (PS3.3 C.8.2.1): away
    from the feet of a patient who goes in head first, and away from the head of one who goes in feet first. The columns
    need not run towards the table. Without PatientPosition the patient is taken to lie on the back, head first.
    """
    position = item.patient_position
    down = np.array(DOWN.get(position[2:], DOWN["S"]))
    feet_first = position.startswith("FF")
    upwards = float(frame.column @ down) < 0
    return -1 if feet_first != upwards else 1
