"""What of an instance may be kept where its dataset is de-identified: it with other UIDs and values, or nothing."""

import io
from collections.abc import Callable, Sequence
from typing import Any

from pydicom import DataElement, Dataset, dcmread
from pydicom.datadict import dictionary_VR

from services.ingest.datasets import BlankRule, Deidentification
from services.ingest.deidentification import METHOD, deidentify, keyed_hash
from services.ingest.deidentification.pixels import blank, burned_in_suspected, clear_unused_bits
from services.ingest.protocol import Instance
from services.ingest.reading import noted_in, part_10, text_of
from shared.documents.revisions import SHA_LENGTH
from shared.errors import Unprocessable

RESPELT = (
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope", "RescaleIntercept"),
    *("PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient"),
)
"""The elements that pixels and geometry are read by."""
SPELLINGS: dict[str, Callable[[Any], Any]] = {
    "CS": lambda value: str(value).strip(),
    "DS": lambda value: f"{float(value):.10g}",
    "IS": lambda value: str(int(float(value))),
    "US": int,
}
"""The function that spells a value anew, by VR; a DS has no more than 16 characters."""


def protect(instance: Instance, body: bytes, rules: Deidentification, secret: str) -> tuple[Instance, bytes]:
    """De-identify a normalised instance; return it under its new UIDs, and the file to store.

    The sha in its key is keyed as well: whoever has the original could tell by a plain one that this is it. It depends
    on the rules, so that an instance that was stored under others is told from this one.

    Raises:
        Unprocessable: `cannot_deidentify`, `burned_in_suspected`.
    """
    dataset = dcmread(io.BytesIO(body))
    notes = set(noted_in(dataset.file_meta))
    # Reports, documents, plans and annotations: what they are is text that a person wrote, and the profile removes it.
    if "PixelData" not in dataset:
        raise Unprocessable("cannot_deidentify")
    cleaned = screen(dataset, rules.blank)
    try:
        _respell(dataset)
        clear_unused_bits(dataset)
        deidentify(dataset, rules.options, secret, pixels_cleaned=cleaned)
        sop_instance_uid = text_of(dataset, "SOPInstanceUID")
        stored = part_10(dataset, text_of(dataset, "SOPClassUID"), sop_instance_uid, notes)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - pydicom raises what the values make it raise; what is not clean is not kept
        raise Unprocessable("cannot_deidentify") from None
    study_uid, series_uid = text_of(dataset, "StudyInstanceUID"), text_of(dataset, "SeriesInstanceUID")
    sha = keyed_hash(f"{instance.sha}:{rules.fingerprint()}", secret, SHA_LENGTH)
    return Instance(study_uid, series_uid, sop_instance_uid, sha, instance.warnings, instance.decoder), stored


def _respell(dataset: Dataset) -> None:
    """Write what pixels are read by with the VR that the standard has: what does not fit its VR is not kept."""
    for keyword in filter(dataset.__contains__, RESPELT):
        element, vr = dataset[keyword], dictionary_VR(keyword)
        if vr != element.VR and not element.is_empty:
            values = str(element.value).split("\\") if element.VM == 1 else element.value
            dataset[keyword] = DataElement(element.tag, vr, [SPELLINGS[vr](value) for value in values])


def screen(dataset: Dataset, rules: Sequence[BlankRule]) -> bool:
    """Blank the regions of the rules that apply, and tell whether one did.

    Raises:
        Unprocessable: `burned_in_suspected`: the picture may show who the patient is, and no rule says where; or one
            does for pictures of another size.
    """
    applying = [rule for rule in rules if rule.applies(dataset)]
    if not all(rule.fits(dataset) for rule in applying):
        raise Unprocessable("burned_in_suspected")
    regions = [region for rule in applying for region in rule.regions]
    try:
        if regions:
            blank(dataset, regions)
    except ValueError:  # of pixels that are not whole bytes, or not one value per pixel
        raise Unprocessable("burned_in_suspected") from None
    if burned_in_suspected(dataset):
        raise Unprocessable("burned_in_suspected")
    return bool(regions)


def is_clean(header: Dataset, rules: Sequence[BlankRule]) -> bool:
    """Tell whether `screen` would let the picture pass."""
    applying = [rule for rule in rules if rule.applies(header)]
    if applying:
        return int(header.BitsAllocated) % 8 == 0 and all(rule.fits(header) for rule in applying)
    return not burned_in_suspected(header)


def is_protected(header: Dataset) -> bool:
    """Tell whether an instance says that this profile was applied to it."""
    said = text_of(header, "PatientIdentityRemoved"), text_of(header, "DeidentificationMethod")
    return said == ("YES", METHOD)
