"""Thorax CT phantoms, written as real DICOM: made-up patients for the demo, the tests and the training of ct_tissues.

A phantom is drawn in millimetres, from analytic shapes whose edges are one voxel soft (the partial volume effect), in
the order in which one would peel it: body, chest wall, lungs, vessels, organs, skeleton, over a table. One seed is one
patient: size, fat, lung volume, contrast phase, bone density, vessels, noise and reconstruction kernel differ between
seeds, so that a generator has something to learn and a split by patient keeps something back.

Frame: DICOM LPS, millimetres. x grows to the patient's left, y to the back, z to the head; slices are axial, ascending
in z.
"""

# ruff: noqa: PLR2004 - a drawing is made of measures; a name for each would say less than its place in the drawing.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

Array = npt.NDArray[np.float32]
Reals = npt.NDArray[np.floating[Any]]

AIR_HU, FAT_HU, MUSCLE_HU = -1000.0, -100.0, 55.0
FIELD_OF_VIEW_MM = 420.0
"""Diameter of the reconstructed circle at a scale of one; outside of it there was no measurement."""
OUTSIDE_HU = -1024.0
"""The value that scanners store outside of the reconstructed circle."""
RESCALE_INTERCEPT = {12: -1024, 16: 0}
"""The intercept by bits stored: 12 bits are unsigned and need an offset, 16 bits are signed and hold HU as they are."""


@dataclass(frozen=True, slots=True)
class Volume:
    """A CT volume.

    `hu : (Z, Y, X) float32`, Hounsfield units; `pixel_spacing_mm` between rows and between columns,
    `slice_spacing_mm` between slices.
    """

    hu: Array
    pixel_spacing_mm: float
    slice_spacing_mm: float


@dataclass(frozen=True, slots=True)
class Patient:
    """The patient that a phantom claims to be: an invented one, and recognisably so."""

    name: str
    patient_id: str
    birth_date: str = "19700101"
    sex: str = "O"


@dataclass(slots=True)
class _Canvas:
    """The volume that is being drawn, and its voxel coordinates in millimetres, broadcastable over (Z, Y, X)."""

    hu: Array
    x: Array
    y: Array
    z: Array
    edge_mm: float

    def inside(self, distance_mm: Reals) -> Array:
        """How much of each voxel lies inside a shape, 0 to 1; `distance_mm` is positive inside."""
        covered: Array = np.clip(distance_mm / self.edge_mm + 0.5, 0, 1).astype(np.float32, copy=False)
        return covered

    def box(self, low_mm: npt.ArrayLike, high_mm: npt.ArrayLike) -> _Canvas:
        """The part of the canvas between two (x, y, z) corners: small shapes are drawn on that part alone."""
        axes = []
        low, high = np.asarray(low_mm) - self.edge_mm, np.asarray(high_mm) + self.edge_mm
        for axis, first, last in zip((self.x, self.y, self.z), low, high, strict=True):
            start, stop = np.searchsorted(axis.ravel(), (first, last))
            axes.append(slice(int(start), int(stop)))
        across, down, along = axes
        return _Canvas(self.hu[along, down, across], self.x[..., across], self.y[:, down], self.z[along], self.edge_mm)

    def paint(self, inside: Array, hu: Reals | float) -> None:
        """Mix `hu` into the volume by the fraction of each voxel that is inside."""
        self.hu += inside * (np.asarray(hu, np.float32) - self.hu)

    def ellipsoid(self, centre: npt.ArrayLike, radii: npt.ArrayLike, hu: float, within: Array | None = None) -> None:
        """Draw an ellipsoid: `centre` and `radii` are (x, y, z) in millimetres; `within` limits it to another shape."""
        c, r = np.asarray(centre, np.float32), np.asarray(radii, np.float32)
        part = self if within is not None else self.box(c - r, c + r)
        if not part.hu.size:
            return
        radius = ((part.x - c[0]) / r[0]) ** 2 + ((part.y - c[1]) / r[1]) ** 2 + ((part.z - c[2]) / r[2]) ** 2
        inside = part.inside((1 - np.sqrt(radius)) * np.float32(r[:2].min()))
        part.paint(inside if within is None else inside * within, hu)

    def tube(self, start: npt.ArrayLike, end: npt.ArrayLike, radius_mm: float, hu: float) -> None:
        """Draw a straight tube with round ends between two (x, y, z) points."""
        a, b = np.asarray(start, np.float32), np.asarray(end, np.float32)
        part = self.box(np.minimum(a, b) - radius_mm, np.maximum(a, b) + radius_mm)
        if not part.hu.size:
            return
        axis = b - a
        dx, dy, dz = part.x - a[0], part.y - a[1], part.z - a[2]
        along = np.clip((dx * axis[0] + dy * axis[1] + dz * axis[2]) / max(float(axis @ axis), 1e-6), 0, 1)
        distance = np.sqrt((dx - along * axis[0]) ** 2 + (dy - along * axis[1]) ** 2 + (dz - along * axis[2]) ** 2)
        part.paint(part.inside(np.float32(radius_mm) - distance), hu)


@dataclass(frozen=True, slots=True)
class _Build:
    """What one patient is made of: lengths in mm, densities in HU."""

    half_width: float
    half_depth: float
    fat: float
    lung_hu: float
    blood_hu: float
    heart: float
    bone_hu: float
    phase: float
    emphysema: float
    male: bool


def thorax(seed: int, *, slices: int = 24, size: int = 256) -> Volume:
    """Make one patient's thorax.

    Args:
        seed: which patient; the same seed is the same volume.
        slices: how many axial slices, spread over the thorax from the upper abdomen to the clavicles.
        size: rows and columns.

    Returns:
        The volume, its values between -1024 and 3071 HU.
    """
    rng = np.random.default_rng([seed, 1])
    spacing = float(np.round(FIELD_OF_VIEW_MM * rng.uniform(0.92, 1.08) / size, 4))
    slice_spacing = float(np.round(rng.uniform(230, 270) / slices * 2) / 2) or 0.5
    build = _build(rng)
    canvas = _blank(slices, size, spacing, slice_spacing, rng)

    _draw_table(canvas, build, rng)
    chest = _draw_body(canvas, build, rng)
    lungs = _draw_lungs(canvas, build, chest, rng)
    _draw_vessels(canvas, build, rng)
    _draw_abdomen(canvas, build, lungs, rng)
    _draw_mediastinum(canvas, build, rng)
    _draw_skeleton(canvas, build, rng)

    _add_texture(canvas.hu, rng)
    in_plane = np.hypot(canvas.x - canvas.x.mean(), canvas.y - canvas.y.mean())
    hu = np.where(in_plane > size * spacing / 2, np.float32(OUTSIDE_HU), canvas.hu)
    return Volume(np.clip(hu, OUTSIDE_HU, 3071, dtype=np.float32), spacing, slice_spacing)


def volumes(patients: int, *, slices: int = 24, size: int = 256, seed: int = 0) -> Iterator[Volume]:
    """The volumes of a cohort, one patient after the other, as `write_cohort` writes them."""
    for index in range(patients):
        yield thorax(_patient_seed(seed, index), slices=slices, size=size)


def write_cohort(folder: Path, *, patients: int = 12, slices: int = 24, size: int = 256, seed: int = 0) -> list[Path]:
    """Write a cohort of patients with one CT series each.

    Args:
        folder: where to; made if it is not there. Each series gets a folder of its own, `patient-001` and so on.
        patients: how many.
        slices: slices per series.
        size: rows and columns.
        seed: the same seed writes the same bytes.

    Returns:
        The series folders, in the order of the patients.
    """
    return [
        write_ct_series(
            folder / f"patient-{index + 1:03d}",
            seed=_patient_seed(seed, index),
            slices=slices,
            size=size,
            patient=Patient(f"PHANTOM^THORAX {index + 1:03d}", f"PHANTOM-{seed}-{index + 1:03d}"),
        )
        for index in range(patients)
    ]


def write_ct_series(
    folder: Path,
    *,
    seed: int = 0,
    slices: int = 24,
    size: int = 256,
    patient: Patient | None = None,
    bits_stored: int = 12,
) -> Path:
    """Write one thorax as a CT series: a study of one series, one file per slice, Explicit VR Little Endian.

    Args:
        folder: where to; made if it is not there. Files are named by slice, from the feet to the head.
        seed: which thorax; study, series and instance UIDs derive from it and from the patient's id.
        slices: how many.
        size: rows and columns.
        patient: who it claims to be.
        bits_stored: 12 (unsigned, rescale intercept -1024) or 16 (signed, rescale intercept 0).

    Returns:
        `folder`.

    Raises:
        KeyError: `bits_stored` is neither 12 nor 16.
    """
    intercept = RESCALE_INTERCEPT[bits_stored]
    who = patient or Patient(f"PHANTOM^THORAX {seed}", f"PHANTOM-{seed}")
    volume = thorax(seed, slices=slices, size=size)
    stored = (np.rint(volume.hu) - intercept).astype(np.dtype("<u2" if bits_stored == 12 else "<i2"))
    shared = _series_attributes(who, seed, volume, bits_stored)

    folder.mkdir(parents=True, exist_ok=True)
    for index, pixels in enumerate(stored):
        instance = Dataset(shared)
        _add_slice(instance, index, pixels, volume)
        instance.file_meta = FileMetaDataset()
        instance.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        instance.save_as(folder / f"slice-{index + 1:03d}.dcm", enforce_file_format=True)
    return folder


def _spine_y(build: _Build) -> float:
    """Where the vertebral bodies are, so that the tips of the spinous processes stay under the skin."""
    return build.half_depth - build.fat * 0.5 - 62


def _patient_seed(seed: int, index: int) -> int:
    return seed * 1000 + index


def _build(rng: np.random.Generator) -> _Build:
    return _Build(
        half_width=rng.uniform(148, 178),
        half_depth=rng.uniform(98, 122),
        fat=rng.uniform(8, 24),
        lung_hu=rng.uniform(-890, -790),
        # About half of all thorax CTs are taken with a contrast agent.
        blood_hu=rng.choice([rng.uniform(35, 55), rng.uniform(130, 330)]),
        heart=rng.uniform(0.85, 1.2),
        bone_hu=rng.uniform(0.75, 1.25),
        phase=rng.uniform(0, 2 * np.pi),
        emphysema=rng.uniform(0, 1) ** 3,
        male=bool(rng.integers(2)),
    )


def _blank(slices: int, size: int, spacing: float, slice_spacing: float, rng: np.random.Generator) -> _Canvas:
    across = ((np.arange(size) - (size - 1) / 2) * spacing).astype(np.float32)
    along = ((np.arange(slices) - (slices - 1) / 2) * slice_spacing).astype(np.float32)
    hu = np.full((slices, size, size), AIR_HU, np.float32)
    # Nobody lies exactly in the middle.
    off_centre = rng.normal(0, 6, 2).astype(np.float32)
    x, y = across[None, None, :] + off_centre[0], across[None, :, None] + off_centre[1]
    return _Canvas(hu, x, y, along[:, None, None], spacing)


def _draw_table(canvas: _Canvas, build: _Build, rng: np.random.Generator) -> None:
    """A curved shell of carbon fibre over foam."""
    top, curve = build.half_depth * 1.02 + rng.uniform(2, 6), rng.uniform(900, 2500)
    depth = canvas.y - top + canvas.x**2 / np.float32(curve)
    wide = canvas.inside(np.float32(205) - np.abs(canvas.x))
    canvas.paint(canvas.inside(depth) * canvas.inside(24 - depth) * wide, float(rng.uniform(-150, 60)))
    canvas.paint(canvas.inside(depth - 2.5) * canvas.inside(21 - depth) * wide, float(rng.uniform(-960, -900)))


def _draw_body(canvas: _Canvas, build: _Build, rng: np.random.Generator) -> Array:
    """Skin, fat and muscle; gives back the radius from the chest's axis, one at the inner chest wall, per voxel."""
    # Shoulders make the body wider towards the head, the abdomen makes it deeper towards the feet.
    width = build.half_width * (1 + 0.12 * np.clip(canvas.z / 130, -0.3, 1) ** 3)
    depth = build.half_depth * (1 - 0.06 * np.clip(canvas.z / 130, -1, 1))
    power = np.float32(rng.uniform(2.2, 2.7))
    squared = (np.abs(canvas.x / width) ** power + np.abs(canvas.y / depth) ** power) ** (2 / power)
    radius = np.sqrt(squared).astype(np.float32)
    outer = (1 - radius) * np.float32(build.half_depth)
    canvas.paint(canvas.inside(outer), 20.0)
    canvas.paint(canvas.inside(outer - 2), FAT_HU)
    if not build.male:
        for side in (-1, 1):
            canvas.ellipsoid((side * 75, -build.half_depth * 0.9, -5), (55, 38, 60), FAT_HU + rng.uniform(0, 50))
    muscle = outer - np.float32(build.fat)
    canvas.paint(canvas.inside(muscle), MUSCLE_HU)
    # Fat lies between the layers of the wall's muscles.
    layer = np.abs(muscle - 9 - 3 * np.sin(canvas.x / 30 + np.float32(build.phase)))
    canvas.paint(canvas.inside(1.5 - layer), FAT_HU + 30)
    inner = 1 - (build.fat + 20) / build.half_depth
    return (radius / np.float32(inner)).astype(np.float32)


def _draw_lungs(canvas: _Canvas, build: _Build, chest: Array, rng: np.random.Generator) -> Array:
    """Both lungs, denser towards the back where blood sinks; gives back how far each voxel is lung."""
    top = np.clip((125 - canvas.z) / 90, 0.05, 1) ** 0.5
    bulge = np.exp(-(((canvas.z + 45) / 55) ** 2) - ((canvas.y + 30) / 45) ** 2)
    beside_heart = bulge * np.where(canvas.x > 0, 1.3, 0.8)
    gap = 22 + 34 * build.heart * beside_heart - 12 * np.clip(-canvas.y / 80, 0, 1)
    fill = (top - chest) * np.float32(build.half_depth)
    side = np.abs(canvas.x - np.where(canvas.x > 0, 8, 0)) - gap
    spine = np.hypot(canvas.x, canvas.y - np.float32(_spine_y(build))) - 32
    floor = canvas.z + 118 - 26 * np.exp(-(((np.abs(canvas.x) - 80) / 45) ** 2) - ((canvas.y + 10) / 60) ** 2)
    lungs = canvas.inside(np.minimum(np.minimum(fill, side), np.minimum(spine, floor)).astype(np.float32))
    density = build.lung_hu + 50 * canvas.y / np.float32(build.half_depth)
    mottle = _smooth_noise(canvas.hu.shape, 10, rng) * 25 - build.emphysema * 60 * np.clip(
        _smooth_noise(canvas.hu.shape, 6, rng) - 0.5, 0, 2
    )
    canvas.paint(lungs, density + mottle)
    return lungs


def _draw_vessels(canvas: _Canvas, build: _Build, rng: np.random.Generator) -> None:
    """Arteries and veins that branch out of the hila, thinner with each step; here and there a nodule."""
    for side in (-1, 1):
        hilum = np.array([side * 42.0, 12.0, -5.0])
        for _ in range(26):
            goal = np.array([side * rng.uniform(55, 118), rng.uniform(-60, 62), rng.uniform(-110, 95)])
            start, radius = hilum, rng.uniform(2.0, 4.5)
            for step in (0.35, 0.65, 0.9):
                end = hilum + (goal - hilum) * step + rng.normal(0, 5, 3)
                canvas.tube(start, end, radius, build.blood_hu - 20)
                start, radius = end, radius * 0.6
        for _ in range(rng.integers(0, 3)):
            centre = (side * rng.uniform(55, 95), rng.uniform(-40, 40), rng.uniform(-70, 70))
            canvas.ellipsoid(centre, rng.uniform(3, 11, 3), float(rng.uniform(-100, 90)))


def _draw_abdomen(canvas: _Canvas, build: _Build, lungs: Array, rng: np.random.Generator) -> None:
    """Liver, spleen and stomach, up to the diaphragm."""
    enhanced = 0.25 * build.blood_hu
    free = 1 - lungs
    canvas.ellipsoid((-65, -5, -140), (80, 72, 62), 50 + enhanced, free)
    canvas.ellipsoid((88, 30, -140), (38, 42, 45), 45 + enhanced, free)
    centre = np.array([55.0, -35.0, -135.0])
    canvas.ellipsoid(centre, (40, 34, 32), 25.0, free)
    canvas.ellipsoid(np.add(centre, (0, -10, 4)), (26, 14, 20), AIR_HU + rng.uniform(0, 150), free)


def _draw_mediastinum(canvas: _Canvas, build: _Build, rng: np.random.Generator) -> None:
    """Heart and great vessels in fat, with the airways and the oesophagus."""
    h, blood = build.heart, build.blood_hu
    muscle = 60 + 0.3 * blood
    shift = rng.normal(0, 4, 3)
    heart = np.array([20.0, -28.0, -50.0]) + shift
    canvas.ellipsoid(heart, np.array([62, 48, 56]) * h, FAT_HU + 10)
    canvas.ellipsoid(heart, np.array([56, 43, 51]) * h, muscle)
    canvas.ellipsoid(np.add(heart, (22 * h, 6, -6)), np.array([24, 22, 30]) * h, blood)
    canvas.ellipsoid(np.add(heart, (-18 * h, -8, -2)), np.array([24, 24, 34]) * h, blood * rng.uniform(0.8, 1.1))
    canvas.ellipsoid(np.add(heart, (0, 20, 22)), np.array([32, 18, 22]) * h, blood)
    canvas.tube((5, -14, 0), (5, -14, 130), 32, FAT_HU + 15)
    canvas.tube((-14, -22, -20), (-10, -20, 48), 14 * h, blood)
    canvas.tube((-10, -20, 48), (18, 32, 48), 12, blood)
    canvas.tube((18, 32, 48), (16, 38, -150), rng.uniform(10, 13), blood)
    canvas.tube((-32, -14, -15), (-30, -16, 110), 9, blood * rng.uniform(0.9, 1.5))
    canvas.tube((12, -20, -15), (14, -8, 22), 13, blood)
    canvas.tube((14, -8, 18), (-40, 12, 8), 9, blood)
    canvas.tube((14, -8, 20), (46, 12, 12), 9, blood)
    for x in (-16, 8, 26):
        canvas.tube((x, -8, 45), (x * 1.4, -14, 140), rng.uniform(4, 7), blood)
    canvas.tube((2, 26, 150), (4, 34, -150), rng.uniform(6, 9), 35.0)
    if rng.integers(2):
        canvas.tube((2, 26, 150), (3, 30, rng.uniform(0, 90)), 2.5, AIR_HU + 100)
    carina = rng.uniform(15, 32)
    for extra, hu in ((2.0, 40.0), (0.0, AIR_HU)):
        canvas.tube((0, 8, 150), (0, 12, carina), 8 + extra, hu)
        canvas.tube((0, 12, carina), (-36, 14, carina - 32), 6 + extra, hu)
        canvas.tube((0, 12, carina), (42, 14, carina - 38), 5.5 + extra, hu)


def _draw_skeleton(canvas: _Canvas, build: _Build, rng: np.random.Generator) -> None:
    """Ribs, spine, sternum, shoulder blades and collar bones: a dense shell around marrow."""
    cortex, marrow = 750 * build.bone_hu, 230 * build.bone_hu
    _draw_ribs(canvas, build, cortex, marrow)
    _draw_spine(canvas, build, cortex, marrow)
    front = -build.half_depth + build.fat + 14
    for shrink, hu in ((0.0, cortex * 0.7), (2.0, marrow * 0.8)):
        canvas.ellipsoid((0, front, 20), (19 - shrink, 7 - shrink, 75), hu)
        for side in (-1, 1):
            blade = np.array([side * 0.72 * build.half_width, 0.52 * build.half_depth, 60.0])
            canvas.tube(blade, np.add(blade, (side * -38, 22, -45)), 4.5 - shrink, hu)
            canvas.tube(blade, np.add(blade, (side * -30, 20, 40)), 4.5 - shrink, hu)
            canvas.tube(blade, np.add(blade, (side * 16, -26, 55)), 6.5 - shrink, hu)
            collar = (side * 22, front + 12, 98 + rng.uniform(-3, 3))
            canvas.tube(collar, (side * 120, front + 55, 118), 7 - shrink, hu)


def _draw_ribs(canvas: _Canvas, build: _Build, cortex: float, marrow: float) -> None:
    """Ribs on an elliptic wall, sloping from the spine down to the front, so that a slice cuts several."""
    width = build.half_width - build.fat - 13
    depth = build.half_depth - build.fat - 11
    flat_r = np.hypot(canvas.x / width, canvas.y / depth)
    off_wall = (flat_r - 1) * np.float32(depth)
    toward_back = (canvas.y / depth) / np.maximum(flat_r, 0.2)
    pitch = 25.0
    height = canvas.z - 32 * toward_back + np.float32(build.phase / (2 * np.pi) * pitch)
    off_rib = (height + pitch / 2) % pitch - pitch / 2
    # Cartilage, not bone, joins the ribs to the sternum, and no rib crosses the spine.
    bony = canvas.inside((np.abs(canvas.x) - 34) * (canvas.y < 0) + (np.abs(canvas.x) - 20) * (canvas.y >= 0))
    near = np.flatnonzero((np.abs(off_wall) < 9).any(axis=(0, 2)))  # Rows without a wall need no work.
    rows = slice(near[0], near[-1] + 1)
    for half_thick, half_high, hu in ((4.2, 6.5, cortex), (2.4, 4.5, marrow)):
        radius = np.sqrt((off_wall[:, rows] / half_thick) ** 2 + (off_rib[:, rows] / half_high) ** 2)
        inside = canvas.inside((1 - radius) * np.float32(half_thick)) * bony[:, rows]
        part = _Canvas(canvas.hu[:, rows], canvas.x, canvas.y[:, rows], canvas.z, canvas.edge_mm)
        part.paint(inside, hu)


def _draw_spine(canvas: _Canvas, build: _Build, cortex: float, marrow: float) -> None:
    """Vertebral bodies with discs between them, arches, processes and the canal."""
    back = _spine_y(build)
    part = canvas.box((-70, back - 40, -1e4), (70, back + 60, 1e4))
    level = np.cos((part.z + np.float32(build.phase)) * np.float32(2 * np.pi / 27))
    disc = part.inside((-0.72 - level) * 12)
    body = np.sqrt((part.x / 19) ** 2 + ((part.y - back) / 15) ** 2)
    arch = np.hypot(part.x, part.y - np.float32(back + 23))
    for half in (-1, 1):
        part.tube((0, back + 24, -1e3), (half * 36, back + 30, -1e3), 5, cortex)
    arms = np.where(level > 0, np.abs(part.y - np.float32(back + 26) - np.abs(part.x) * 0.12), np.float32(50))
    part.paint(part.inside(4.5 - arms) * part.inside(36 - np.abs(part.x)), cortex * 0.8)
    part.paint(part.inside(4 - np.abs(part.x)) * part.inside(14 - np.abs(part.y - np.float32(back + 40))), cortex * 0.8)
    part.paint(part.inside(15 - arch), cortex * 0.9)
    part.paint(part.inside((1 - body) * 15), cortex)
    part.paint(part.inside((0.86 - body) * 15), marrow)
    part.paint(part.inside((1 - body) * 15) * disc, 85.0)
    part.paint(part.inside(9 - arch), 25.0)


def _add_texture(hu: Array, rng: np.random.Generator) -> None:
    """Noise as a reconstruction leaves it: correlated over a few pixels, stronger where there is a body."""
    sigma, sharp = rng.uniform(6, 22), rng.uniform(0.0, 0.8)
    noise = rng.standard_normal(hu.shape, np.float32)
    for axis in (1, 2):
        noise += np.float32(1 - sharp) * np.roll(noise, 1, axis)
    noise *= np.float32(sigma / (1 + (1 - sharp) ** 2))
    noise *= np.where(hu < -950, np.float32(0.5), np.float32(1))
    hu += noise


def _smooth_noise(shape: tuple[int, ...], cells: int, rng: np.random.Generator) -> Array:
    """Unit noise that changes over about 1 / `cells` of the field: a coarse lattice, interpolated along each axis."""
    field = rng.standard_normal((max(2, min(shape[0], cells)), cells, cells), np.float32)
    for axis, length in enumerate(shape):
        at = np.linspace(0, field.shape[axis] - 1, length, dtype=np.float32)
        low = np.minimum(at.astype(int), field.shape[axis] - 2)
        weight = (at - low).reshape([-1 if a == axis else 1 for a in range(3)])
        field = np.take(field, low, axis) * (1 - weight) + np.take(field, low + 1, axis) * weight
    return field


def _series_attributes(patient: Patient, seed: int, volume: Volume, bits_stored: int) -> Dataset:
    """What all instances of a series share: patient, study, series, equipment, frame of reference, CT image modules."""
    entropy = ["radqueue-phantom", patient.patient_id, str(seed), str(volume.hu.shape), str(bits_stored)]
    shared = Dataset()
    shared.SpecificCharacterSet = "ISO_IR 192"
    shared.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    shared.SOPClassUID = CTImageStorage
    for name in ("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate"):
        setattr(shared, name, "20260105")
    for name in ("StudyTime", "SeriesTime", "AcquisitionTime", "ContentTime"):
        setattr(shared, name, "101500")
    shared.AccessionNumber = f"PH{seed:06d}"
    shared.Modality = "CT"
    shared.Manufacturer = "radqueue"
    shared.ManufacturerModelName = "thorax phantom"
    shared.ReferringPhysicianName = ""
    shared.StudyDescription = "Thorax phantom"
    shared.SeriesDescription = "Thorax phantom, axial"
    shared.PatientName = patient.name
    shared.PatientID = patient.patient_id
    shared.PatientBirthDate = patient.birth_date
    shared.PatientSex = patient.sex
    shared.QualityControlSubject = "YES"  # PS3.3 C.7.1.1: the subject is a phantom.
    shared.BodyPartExamined = "CHEST"
    shared.SliceThickness = volume.slice_spacing_mm
    shared.KVP = 120
    shared.SpacingBetweenSlices = volume.slice_spacing_mm
    shared.GantryDetectorTilt = 0
    shared.PatientPosition = "HFS"
    shared.StudyInstanceUID = generate_uid(entropy_srcs=[*entropy, "study"])
    shared.SeriesInstanceUID = generate_uid(entropy_srcs=[*entropy, "series"])
    shared.StudyID = str(seed)
    shared.SeriesNumber = 1
    shared.AcquisitionNumber = 1
    shared.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.FrameOfReferenceUID = generate_uid(entropy_srcs=[*entropy, "frame"])
    shared.PositionReferenceIndicator = ""
    shared.SamplesPerPixel = 1
    shared.PhotometricInterpretation = "MONOCHROME2"
    shared.Rows, shared.Columns = volume.hu.shape[1:]
    shared.PixelSpacing = [volume.pixel_spacing_mm] * 2
    shared.BitsAllocated = 16
    shared.BitsStored = bits_stored
    shared.HighBit = bits_stored - 1
    shared.PixelRepresentation = int(bits_stored == 16)
    shared.WindowCenter = 40
    shared.WindowWidth = 400
    shared.RescaleIntercept = RESCALE_INTERCEPT[bits_stored]
    shared.RescaleSlope = 1
    shared.RescaleType = "HU"
    return shared


def _add_slice(instance: Dataset, index: int, pixels: npt.NDArray[np.generic], volume: Volume) -> None:
    """What one slice adds: its identity, its place and its pixels."""
    slices, rows, columns = volume.hu.shape
    corner = [-(columns - 1) / 2 * volume.pixel_spacing_mm, -(rows - 1) / 2 * volume.pixel_spacing_mm]
    z = round((index - (slices - 1) / 2) * volume.slice_spacing_mm, 4)
    instance.SOPInstanceUID = generate_uid(entropy_srcs=[instance.SeriesInstanceUID, str(index)])
    instance.InstanceNumber = index + 1
    instance.ImagePositionPatient = [round(corner[0], 4), round(corner[1], 4), z]
    instance.SliceLocation = z
    instance.PixelData = pixels.tobytes()
