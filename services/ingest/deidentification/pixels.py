"""Annotations that are drawn into the pixels: who is suspected of them, blanking them by regions, and unused bits.

Nothing here reads the picture. The suspicion rests on what kind of image it is (PS3.15 E.3.1 leaves the finding to the
de-identifier); a region rule is written by somebody who has looked at the images of one device.
"""

import re
from collections.abc import Sequence

import numpy as np
from pydicom import Dataset

SUSPECT_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.3.",  # ultrasound multi-frame, and its retired class
    "1.2.840.10008.5.1.4.1.1.6.",  # ultrasound, and its retired class
    "1.2.840.10008.5.1.4.1.1.7.",  # secondary capture, all of them
    "1.2.840.10008.5.1.4.1.1.77.",  # visible light: photographs, endoscopy
)
"""SOP classes whose images carry the screen's texts more often than not, with those below them."""
SUSPECT_MODALITIES = {"US", "SC", "OT", "ES", "XC", "GM", "DOC"}

Region = tuple[int, int, int, int]
"""Left, top, width and height, in pixels."""


def burned_in_suspected(dataset: Dataset) -> bool:
    """Tell whether a picture may show who the patient is: it says so, or is of such a kind and does not deny it.

    Only NO denies it. Of several modalities, or in another case or VR than the standard has them, one is enough.
    """
    said = str(dataset.get("BurnedInAnnotation") or "").strip().upper()
    if said:
        return said != "NO"
    sop_class = str(dataset.get("SOPClassUID") or "").strip()
    modalities = re.findall("[A-Z]+", str(dataset.get("Modality")).upper())
    return f"{sop_class}.".startswith(SUSPECT_CLASSES) or not SUSPECT_MODALITIES.isdisjoint(modalities)


def blank(dataset: Dataset, regions: Sequence[Region]) -> None:
    """Set the regions to zero in every frame of uncompressed pixel data, and say that no annotation is left.

    Raises:
        ValueError: pixels that are not whole bytes.
    """
    bits = int(dataset.BitsAllocated)
    if bits % 8:
        raise ValueError("pixels of single bits")
    frames, samples = int(dataset.get("NumberOfFrames") or 1), int(dataset.get("SamplesPerPixel") or 1)
    rows, columns, width = int(dataset.Rows), int(dataset.Columns), bits // 8
    by_plane = samples > 1 and dataset.get("PlanarConfiguration") == 1
    shape = (frames, samples, rows, columns, width) if by_plane else (frames, 1, rows, columns, samples * width)
    values = np.frombuffer(dataset.PixelData, np.uint8).copy()
    picture = values[: np.prod(shape)].reshape(shape)
    for left, top, across, down in regions:
        picture[:, :, top : top + down, left : left + across] = 0
    dataset.PixelData = values.tobytes()
    dataset.BurnedInAnnotation = "NO"


def clear_unused_bits(dataset: Dataset) -> None:
    """Leave zeros, or the sign, above BitsStored: overlays used to be there (PS3.5 section 8.1.2), and stay readable.

    The values of a normalised instance begin at the lowest bit, so that nothing lies below them.
    """
    unused = int(dataset.BitsAllocated) - int(dataset.BitsStored)
    if unused:
        sign = "i" if int(dataset.PixelRepresentation) else "u"
        samples = np.frombuffer(dataset.PixelData, f"<{sign}{int(dataset.BitsAllocated) // 8}").copy()
        samples <<= unused
        samples >>= unused
        dataset.PixelData = samples.tobytes()
