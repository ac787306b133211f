"""Draws for people to look at: a segmentation over its images, and real images beside generated ones.

Frames of the segmentation are matched to slices by their position in the patient (DICOM PS3.3 C.7.6.2), not by their
order: a writer may leave out empty frames, or sort them otherwise.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from pydicom import Dataset, dcmread
from pydicom.pixels.processing import apply_modality_lut

from shared.pydicom_silence import silence

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

WINDOW_HU = (-1000.0, 500.0)
"""From black to white: wide enough for lungs and bone in one picture."""
POSITION_TOLERANCE_MM = 0.1
COLOURS = ((86, 180, 233), (0, 158, 115), (230, 159, 0), (204, 121, 167), (240, 228, 66), (213, 94, 0))
"""Okabe and Ito's palette, which people with any colour vision can tell apart."""
FONT = ImageFont.load_default(14)
TINT = 0.3
"""Share of the label's colour inside of it; its edge is drawn in full."""
TILE = 256
CAPTION = 28
GRID = 8
"""Rows and columns of a grid of small images."""
SCALE = 3
GAP = 24


class Mismatch(ValueError):  # noqa: N818 - it states a fact about two files
    """The segmentation does not lie on these slices."""


def overlay(slices: Sequence[Path], segmentation: Path, out: Path, *, n_columns: int = 6, note: str = "") -> Path:
    """Write a PNG of `n_columns` evenly chosen slices: the image above, the labels drawn over it below, and a legend.

    Args:
        slices: the instances of one series, in any order.
        segmentation: a DICOM SEG on them, of binary segments or a label map.
        out: the PNG; its folder is made if it is not there.
        n_columns: how many slices.
        note: a line below the legend.

    Raises:
        Mismatch: no frame of the segmentation lies on a slice.
    """
    silence()
    seg = dcmread(segmentation)
    images = _in_order([dcmread(path) for path in slices])
    places = _places(images)
    labels = _labels(seg)
    masks = _masks(seg, places)
    if not masks:
        raise Mismatch("no frame of the segmentation lies on a slice of the series")
    chosen = np.unique(np.linspace(0, len(images) - 1, n_columns).round().astype(int))
    picture = Image.new("RGB", (TILE * len(chosen), 2 * TILE + 2 * CAPTION))
    for column, index in enumerate(chosen):
        grey = _tile(_grey(images[index]), images[index], Image.Resampling.BILINEAR)
        on_slice = {
            number: _tile(mask.astype(np.uint8), images[index], Image.Resampling.NEAREST) > 0
            for (place, number), mask in masks.items()
            if place == index
        }
        picture.paste(Image.fromarray(grey), (column * TILE, 0))
        picture.paste(Image.fromarray(_coloured(grey, on_slice)), (column * TILE, TILE))
    _caption(picture, labels, str(seg.get("SeriesDescription", "")), note)
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out, optimize=True)
    return out


def side_by_side(real: Sequence[Path], generated: Path, out: Path) -> Path:
    """Write a PNG of real images on the left and generated ones on the right, both labelled.

    Args:
        real: arrays (n, H, W) in [-1, 1]; slices are taken evenly from all of them, and drawn as small as the others.
        generated: one such array.
        out: the PNG; its folder is made if it is not there.
    """
    made = _greys(generated)[: GRID * GRID]
    every = [image for path in real for image in _greys(path)]
    chosen = np.linspace(0, len(every) - 1, len(made)).round().astype(int)
    rows, columns = made[0].height, made[0].width
    width, height = SCALE * GRID * columns, SCALE * -(-len(made) // GRID) * rows
    picture = Image.new("RGB", (2 * width + GAP, height + CAPTION))
    draw = ImageDraw.Draw(picture)
    sides = ("real slices of the dataset", [every[index] for index in chosen]), ("generated", made)
    for left, (label, images) in zip((0, width + GAP), sides, strict=True):
        draw.text((left + 8, height + CAPTION // 2), label, fill="white", font=FONT, anchor="lm")
        for index, image in enumerate(images):
            small = image.resize((columns, rows), Image.Resampling.BILINEAR)
            tile = small.resize((SCALE * columns, SCALE * rows), Image.Resampling.NEAREST)
            picture.paste(tile, (left + index % GRID * tile.width, index // GRID * tile.height))
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out, optimize=True)
    return out


def _greys(path: Path) -> list[Image.Image]:
    images = np.load(path, allow_pickle=False)
    return [Image.fromarray(image) for image in ((images.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)]


def _in_order(images: list[Dataset]) -> list[Dataset]:
    """Sort by the position along the slice normal."""
    rows, columns = np.split(np.asarray(images[0].ImageOrientationPatient, float), 2)
    normal = np.cross(rows, columns)
    return sorted(images, key=lambda image: float(normal @ np.asarray(image.ImagePositionPatient, float)))


def _places(images: Sequence[Dataset]) -> npt.NDArray[np.float64]:
    """Return the positions of the slices, (N, 3) in mm."""
    return np.asarray([image.ImagePositionPatient for image in images], float)


def _labels(seg: Dataset) -> dict[int, str]:
    """Return the segments' labels by their number."""
    return {int(item.SegmentNumber): str(item.SegmentLabel) for item in seg.SegmentSequence if int(item.SegmentNumber)}


def _masks(seg: Dataset, places: npt.NDArray[np.float64]) -> dict[tuple[int, int], Mask]:
    """Return the masks (Y, X) by slice and segment number, of those frames that lie on a slice."""
    frames = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    masks: dict[tuple[int, int], Mask] = {}
    for frame, groups in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        position = np.asarray(groups.PlanePositionSequence[0].ImagePositionPatient, float)
        distances = np.linalg.norm(places - position, axis=1)
        nearest = int(distances.argmin())
        if distances[nearest] > POSITION_TOLERANCE_MM:
            continue
        if seg.SegmentationType == "LABELMAP":
            numbers = (int(number) for number in np.unique(frame) if number)
            masks |= {(nearest, number): frame == number for number in numbers}
        else:
            identification = groups.get("SegmentIdentificationSequence") or _shared(seg).SegmentIdentificationSequence
            masks[nearest, int(identification[0].ReferencedSegmentNumber)] = frame > 0
    return masks


def _shared(seg: Dataset) -> Dataset:
    groups: Dataset = seg.SharedFunctionalGroupsSequence[0]
    return groups


def _grey(image: Dataset) -> Pixels:
    """Return the slice as (Y, X), windowed."""
    values = np.asarray(apply_modality_lut(image.pixel_array, image), float)
    low, high = WINDOW_HU
    return (np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def _coloured(grey: Pixels, masks: Mapping[int, Mask]) -> Pixels:
    """Return the slice as (Y, X, 3) with its labels tinted and outlined."""
    pixels = np.repeat(grey[..., None], 3, axis=2).astype(float)
    for number, mask in masks.items():
        colour = np.asarray(COLOURS[(number - 1) % len(COLOURS)], float)
        pixels[mask] = (1 - TINT) * pixels[mask] + TINT * colour
        pixels[_edge(mask)] = colour
    return pixels.astype(np.uint8)


def _edge(mask: Mask) -> Mask:
    """Return the pixels of the mask that have a neighbour outside of it; what is beyond the picture is none."""
    padded = np.pad(mask, 1, mode="edge")
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    edge: Mask = mask & ~inner
    return edge


def _tile(pixels: Pixels, image: Dataset, resampling: Image.Resampling) -> Pixels:
    """Fit a slice (Y, X) into a square (TILE, TILE), in its true proportions."""
    between_rows, between_columns = (float(value) for value in image.get("PixelSpacing", (1, 1)))
    height, width = pixels.shape[0] * between_rows, pixels.shape[1] * between_columns
    scale = TILE / max(height, width)
    fitted = Image.fromarray(pixels).resize((round(width * scale), round(height * scale)), resampling)
    tile = Image.new("L", (TILE, TILE))
    tile.paste(fitted, ((TILE - fitted.width) // 2, (TILE - fitted.height) // 2))
    return np.asarray(tile)


def _caption(picture: Image.Image, labels: Mapping[int, str], description: str, note: str) -> None:
    draw = ImageDraw.Draw(picture)
    at, middle = 8, picture.height - 3 * CAPTION // 2
    for number, label in labels.items():
        draw.rectangle((at, middle - 6, at + 12, middle + 6), fill=COLOURS[(number - 1) % len(COLOURS)])
        draw.text((at + 18, middle), label, fill="white", font=FONT, anchor="lm")
        at += 36 + round(draw.textlength(label, font=FONT))
    draw.text((picture.width - 8, middle), description, fill="lightgrey", font=FONT, anchor="rm")
    draw.text((8, middle + CAPTION), note, fill="lightgrey", font=FONT, anchor="lm")
