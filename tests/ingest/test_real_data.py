"""Real files from real scanners and toolkits."""

import io

import numpy as np
import pytest
from pydicom import dcmread

from services.ingest.protocol import Caps
from services.ingest.reading import normalise
from services.ingest.series import describe
from shared.errors import Unprocessable

CAPS = Caps(1 << 30, 1 << 30)


def read(path, **changes):
    """The normalised instance of a file, some of whose elements are set before."""
    upload = path.read_bytes()
    if changes:
        dataset = dcmread(io.BytesIO(upload))
        for keyword, value in changes.items():
            setattr(dataset, keyword, value)
        file = io.BytesIO()
        dataset.save_as(file)
        upload = file.getvalue()
    instance, body = normalise(upload, CAPS)
    return dcmread(io.BytesIO(body)), instance


LARGEST_ERROR = {"1.2.840.10008.1.2.4.91": 5, "1.2.840.10008.1.2.4.81": 1}
"""What lossy coding may change of 4400 grey levels, where the values are comparable."""
RESCALED = {f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 53, 55)}
"""These hold 8 or 12 bits of the 16 that the original has, with a rescale of their own."""


def test_the_ct_is_the_same_in_every_transfer_syntax(real_data):
    """Thirteen encodings of one CT image give one image."""
    folder = real_data / "ct_same_image_13ts"
    reference, _ = read(folder / "CTImage.dcm")
    hu = reference.pixel_array * float(reference.RescaleSlope) + float(reference.RescaleIntercept)
    seen = set()
    for path in sorted(folder.iterdir()):
        syntax = dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID
        dataset, found = read(path)
        seen.add(syntax)

        assert found.warnings == ()
        assert ("LossyImageCompression" in dataset) == (syntax in RESCALED or syntax in LARGEST_ERROR)
        if syntax in RESCALED:
            values = dataset.pixel_array.astype(float)

            assert np.corrcoef(values.ravel(), hu.ravel())[0, 1] > 0.95
        else:
            difference = np.abs(dataset.pixel_array.astype(int) - reference.pixel_array)

            assert difference.max() <= LARGEST_ERROR.get(syntax, 0)
    assert len(seen) >= 13


def test_the_mosaic_is_the_same_in_every_transfer_syntax(real_data):
    """Nine encodings of one Siemens mosaic, private elements and all, give one image."""
    files = sorted((real_data / "mr_same_mosaic_9ts").iterdir())
    reference, _ = read(files[0])
    for path in files:
        dataset, found = read(path)

        assert found.warnings == ()
        assert np.array_equal(dataset.pixel_array, reference.pixel_array)
        assert (dataset.BitsStored, dataset.PatientID) == (reference.BitsStored, reference.PatientID)
    assert len(files) == 9


def test_the_tilt_of_the_phantom_is_found(real_data):
    """54 slices under a gantry that leans by -18.5 degrees, as its tag says and its vectors prove."""
    headers = [read(path)[0] for path in sorted((real_data / "ct_phantom_philips_tilt54").iterdir())]
    found = describe(headers)
    positions = [placed.slice.position[2] for placed in found.order]

    assert found.geometry.tilt_deg == pytest.approx(-18.5, abs=0.05)
    assert found.geometry.tilt_tag_deg == -18.5
    assert found.geometry.verdict == "tilted"
    assert found.geometry.n_positions == 54
    assert found.warnings == ["gantry_tilt"]
    assert positions == sorted(positions)
    assert found.attributes["Manufacturer"].lower().startswith("philips")
    assert not {"PatientID", "PatientName", "StudyDate"} & set(found.attributes)


def test_the_emptied_series_gets_its_class_and_instance_back(real_data):
    """A series whose identifying UIDs were emptied is refused; with study and series given, the rest is restored."""
    files = sorted((real_data / "ct_body_j2k_nosop20").iterdir())
    with pytest.raises(Unprocessable) as raised:
        read(files[0])
    given = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.3.4"}
    headers = []
    for path in files:
        dataset, found = read(path, **given)
        original = dcmread(path)
        headers.append(dataset)

        assert found.warnings == ("sop_class_restored", "sop_instance_restored")
        assert dataset.SOPClassUID == "1.2.840.10008.5.1.4.1.1.2"
        assert dataset.SOPInstanceUID == original.file_meta.MediaStorageSOPInstanceUID
        assert "LossyImageCompression" not in dataset
        assert dataset.pixel_array.max() == original.LargestImagePixelValue
    found = describe(headers)

    assert raised.value.reason_code == "missing_uid"
    assert (found.geometry.verdict, found.geometry.spacing_mm) == ("regular", 2.0)
    assert found.warnings == ["sop_class_restored", "sop_instance_restored"]
