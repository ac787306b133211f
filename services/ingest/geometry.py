"""How the slices of a series lie in space: order, spacing, gantry tilt, gaps, repeats.

Positions and directions are in the patient coordinate system, mm (PS3.3 C.7.6.2.1.1). Header counts are never asked:
they tell completeness in a quarter of real series.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shared.dicom import Geometry

Vector = NDArray[np.float64]
Verdict = Literal["volume", "irregular", "single", "unknown"]

SAME_POSITION_MM = 0.01
PARALLEL_DEG = 0.1
"""Directions closer than this are one direction; scanners round them to five or six digits."""
TILT_DEG = 0.1
TILT_TAG_DEG = 0.5
"""GantryDetectorTilt is nominal, as the standard says."""
UNEVEN_SHARE = 0.02
"""Steps that differ from the median by more than this share, and by more than SAME_POSITION_MM, are uneven."""
GAP_SHARE = 1.5


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


def survey(slices: Sequence[Slice]) -> tuple[Geometry, list[int], list[str]]:
    """Return the geometry of a series, the order of its slices (indices into `slices`) and warning codes.

    The order is along the normal; slices at one position keep the order of their InstanceNumber.
    """
    warnings = _mixed(slices)
    by_number = sorted(range(len(slices)), key=lambda index: slices[index].instance_number)
    frames = [_frame(item) for item in slices]
    placed = [frame for frame in frames if frame is not None]
    if len(placed) < len(slices):
        warnings = sorted({*warnings, "no_positions"})
        verdict: Verdict = "single" if len(slices) == 1 else "unknown"
        return Geometry(verdict=verdict, n_slices=len(slices), n_positions=len(slices)), by_number, warnings

    positions = np.array([position for position, _, _ in placed])
    normals = np.array([np.cross(row, column) for _, row, column in placed])
    row, column, normal = placed[0][1], placed[0][2], normals[0]
    if _max_angle_deg(normals, normal) > PARALLEL_DEG or _max_angle_deg(_rows(placed), row) > PARALLEL_DEG:
        warnings.append("mixed_orientation")
    depths = positions @ normal
    order = sorted(by_number, key=lambda index: round(float(depths[index]) / SAME_POSITION_MM))
    steps, n_positions = _steps(depths)
    told = _spacing(steps, warnings)
    if n_positions < len(slices):
        warnings.append("repeated_positions")
    told |= _tilt(slices[0], positions[order[-1]] - positions[order[0]], (row, column, normal), warnings)
    geometry = Geometry(
        verdict=_verdict(len(slices), warnings),
        n_slices=len(slices),
        n_positions=n_positions,
        normal=(round(float(normal[0]), 6), round(float(normal[1]), 6), round(float(normal[2]), 6)),
        **told,
    )
    return geometry, order, sorted(warnings)


def _frame(item: Slice) -> tuple[Vector, Vector, Vector] | None:
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
    cross = np.cross(row, column)
    if np.linalg.norm(cross) < 0.5:  # noqa: PLR2004 - the two are nearly parallel
        return None
    return position, row, column


def _rows(placed: Sequence[tuple[Vector, Vector, Vector]]) -> Vector:
    return np.array([row for _, row, _ in placed])


def _max_angle_deg(directions: Vector, reference: Vector) -> float:
    cosines = np.clip(directions @ reference / np.linalg.norm(directions, axis=1), -1, 1)
    return float(np.degrees(np.arccos(cosines)).max())


def _mixed(slices: Sequence[Slice]) -> list[str]:
    found = []
    if len({(item.rows, item.columns) for item in slices}) > 1:
        found.append("mixed_size")
    spacings = {item.pixel_spacing and tuple(round(value, 4) for value in item.pixel_spacing) for item in slices}
    if len(spacings) > 1:
        found.append("mixed_pixel_spacing")
    return found


def _steps(depths: Vector) -> tuple[Vector, int]:
    """Steps between distinct positions along the normal, and how many of these there are."""
    steps = np.diff(np.sort(depths))
    steps = steps[steps > SAME_POSITION_MM]
    return steps, len(steps) + 1


def _spacing(steps: Vector, warnings: list[str]) -> dict[str, float | int | None]:
    if not len(steps):
        return {}
    median = float(np.median(steps))
    n_gaps = int((steps >= GAP_SHARE * median).sum())
    if n_gaps:
        warnings.append("missing_slices")
    if np.abs(steps - median).max() > max(UNEVEN_SHARE * median, SAME_POSITION_MM):
        warnings.append("uneven_spacing")
    return {
        "spacing_mm": round(median, 4),
        "spacing_min_mm": round(float(steps.min()), 4),
        "spacing_max_mm": round(float(steps.max()), 4),
        "n_gaps": n_gaps,
    }


def _tilt(
    first: Slice, travel: Vector, axes: tuple[Vector, Vector, Vector], warnings: list[str]
) -> dict[str, float | None]:
    """Angle between the way from slice to slice and the normal, about the row axis and about the column axis.

    Its sign is that of GantryDetectorTilt of a patient who lies head first: negative where the gantry leans so that the
    next slice lies further up the columns.
    """
    row, column, normal = axes
    along = float(travel @ normal)
    if along <= SAME_POSITION_MM:
        return {"tilt_tag_deg": first.tilt_tag_deg}
    tilt = float(np.degrees(np.arctan2(travel @ column, along)))
    shear = float(np.degrees(np.arctan2(travel @ row, along)))
    if abs(tilt) > TILT_DEG:
        warnings.append("gantry_tilt" if first.modality in {None, "CT"} else "sheared")
    if abs(shear) > TILT_DEG and "sheared" not in warnings:
        warnings.append("sheared")
    if first.tilt_tag_deg is not None and abs(tilt - first.tilt_tag_deg) > TILT_TAG_DEG:
        warnings.append("tilt_tag_mismatch")
    return {"tilt_deg": round(tilt, 2) + 0.0, "tilt_tag_deg": first.tilt_tag_deg}


IRREGULAR = {
    "mixed_orientation",
    "mixed_size",
    "mixed_pixel_spacing",
    "missing_slices",
    "uneven_spacing",
    "repeated_positions",
    "gantry_tilt",
    "sheared",
}
"""Any of these keeps a series from being a regular volume."""


def _verdict(n_slices: int, warnings: list[str]) -> Verdict:
    if n_slices == 1:
        return "single"
    return "irregular" if IRREGULAR & set(warnings) else "volume"
