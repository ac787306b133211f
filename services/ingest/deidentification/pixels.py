"""Annotations that are drawn into the pixels: who is suspected of them, and blanking them by regions.

Nothing here reads the picture. The suspicion rests on what kind of image it is (PS3.15 E.3.1 leaves the finding to the
de-identifier); a region rule is written by somebody who has looked at the images of one device.
"""

from collections.abc import Sequence

import numpy as np
from pydicom import Dataset

SUSPECT_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.3.1",  # ultrasound multi-frame
    "1.2.840.10008.5.1.4.1.1.6.",  # ultrasound
    "1.2.840.10008.5.1.4.1.1.7",  # secondary capture, all of them
    "1.2.840.10008.5.1.4.1.1.77.1.",  # visible light: photographs, endoscopy
)
"""Beginnings of the SOP classes whose images carry the screen's texts more often than not."""
SUSPECT_MODALITIES = {"US", "SC", "OT", "ES", "XC", "GM", "DOC"}

Region = tuple[int, int, int, int]
"""Left, top, width and height, in pixels."""


def burned_in_suspected(dataset: Dataset) -> bool:
    """Tell whether a picture may show who the patient is: it says so, or is of such a kind and does not deny it."""
    said = str(dataset.get("BurnedInAnnotation") or "").strip().upper()
    if said in {"YES", "NO"}:
        return said == "YES"
    sop_class = str(dataset.get("SOPClassUID") or "")
    return sop_class.startswith(SUSPECT_CLASSES) or dataset.get("Modality") in SUSPECT_MODALITIES


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
