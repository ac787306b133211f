"""The phantoms are real DICOM: what a scanner would have written, and the same bytes each time."""

from __future__ import annotations

import time

import numpy as np
import pydicom
import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from pydicom.valuerep import PersonName

from shared.phantom import Patient, thorax, volumes, write_cohort, write_ct_series

TYPE_1 = """
    SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID FrameOfReferenceUID Modality ImageType
    InstanceNumber ImagePositionPatient ImageOrientationPatient PixelSpacing SamplesPerPixel
    PhotometricInterpretation Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation RescaleIntercept
    RescaleSlope PixelData
"""
"""Attributes that a CT image must have, with a value (PS3.3 A.3.3)."""
TYPE_2 = """
    PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime ReferringPhysicianName StudyID
    AccessionNumber SeriesNumber Manufacturer KVP AcquisitionNumber SliceThickness PositionReferenceIndicator
"""
"""Attributes that a CT image must have, though perhaps empty."""


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_cohort(tmp_path_factory.mktemp("cohort"), patients=3, slices=6, size=96, seed=5)


def read(folder):
    return [pydicom.dcmread(path) for path in sorted(folder.iterdir())]


def test_each_instance_is_a_complete_ct_image(cohort):
    """Every file is Part 10, Explicit VR Little Endian, with all mandatory attributes of a CT image."""
    for instance in (i for folder in cohort for i in read(folder)):
        assert instance.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
        assert instance.file_meta.MediaStorageSOPInstanceUID == instance.SOPInstanceUID
        assert instance.SOPClassUID == CTImageStorage
        assert [name for name in TYPE_1.split() if not str(instance.get(name, ""))] == []
        assert [name for name in TYPE_2.split() if name not in instance] == []


def test_a_patient_is_one_study_of_one_series(cohort):
    """Instances of a folder share patient, study and series; folders share none of them; no instance UID repeats."""
    series = [read(folder) for folder in cohort]
    for name in ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        per_folder = [{str(i[name].value) for i in instances} for instances in series]

        assert [len(values) for values in per_folder] == [1, 1, 1]
        assert len(set.union(*per_folder)) == 3
    uids = [i.SOPInstanceUID for instances in series for i in instances]

    assert len(set(uids)) == len(uids)
    assert all(pydicom.uid.UID(uid).is_valid for uid in uids)


def test_slices_are_regular(cohort):
    """Positions step along the slice normal by SpacingBetweenSlices, in the order of the instance numbers."""
    for folder in cohort:
        instances = sorted(read(folder), key=lambda i: i.InstanceNumber)
        steps = np.diff([i.ImagePositionPatient for i in instances], axis=0)

        np.testing.assert_allclose(steps, [[0, 0, instances[0].SpacingBetweenSlices]] * 5, atol=1e-6)


def test_patients_are_recognisably_made_up(cohort):
    """Nobody can take a phantom for a person."""
    instances = [read(folder)[0] for folder in cohort]

    assert all("PHANTOM" in str(i.PatientName) and "PHANTOM" in i.PatientID for i in instances)
    assert {i.QualityControlSubject for i in instances} == {"YES"}


def test_the_same_seed_writes_the_same_bytes(cohort, tmp_path):
    """A cohort is a function of its seed, so two uploads of a demo are the same objects."""
    again = write_cohort(tmp_path / "again", patients=3, slices=6, size=96, seed=5)
    other = write_cohort(tmp_path / "other", patients=1, slices=6, size=96, seed=6)
    content = [[path.read_bytes() for path in sorted(folder.iterdir())] for folder in (*cohort, *again)]

    assert content[:3] == content[3:]
    assert [path.read_bytes() for path in sorted(other[0].iterdir())] != content[0]


@pytest.mark.parametrize("bits_stored", [12, 16])
def test_stored_values_rescale_to_hounsfield_units(bits_stored, tmp_path):
    """Slope and intercept give back the volume's Hounsfield units, rounded, whether stored unsigned or signed."""
    instances = read(write_ct_series(tmp_path, seed=3, slices=3, size=64, bits_stored=bits_stored))
    hu = [i.pixel_array * float(i.RescaleSlope) + float(i.RescaleIntercept) for i in instances]

    np.testing.assert_array_equal(hu, np.rint(thorax(3, slices=3, size=64).hu))


def test_the_given_patient_is_written(tmp_path):
    """Tests can plant a name, an id and a birth date and look for them elsewhere."""
    (instance,) = read(
        write_ct_series(tmp_path, slices=1, size=32, patient=Patient("PHANTOM^Größe", "P-1", "19010203"))
    )

    assert instance.PatientName == PersonName("PHANTOM^Größe")
    assert (instance.PatientID, instance.PatientBirthDate) == ("P-1", "19010203")


def test_a_thorax_holds_what_a_thorax_holds():
    """Air around it, lungs, fat, muscle and bone are there, and patients differ by more than their noise."""
    made = list(volumes(2, slices=12, size=128, seed=1))
    for volume in made:
        hu = volume.hu
        middle = hu[6, 32:96, 32:96]
        shares = [np.mean(hu < -950), np.mean((middle > -950) & (middle < -700)), np.mean((hu > -150) & (hu < -60))]
        shares += [np.mean((hu > 0) & (hu < 110)), np.mean(hu > 400)]

        assert all(share > least for share, least in zip(shares, (0.3, 0.2, 0.01, 0.05, 0.002), strict=True)), shares
    difference = np.abs(made[0].hu - made[1].hu)

    assert np.mean(difference > 150) > 0.05


def test_a_cohort_is_made_quickly():
    """A volume of 24 slices of 256x256 costs less than two seconds of one core."""
    started = time.process_time()
    thorax(9, slices=24, size=256)

    assert time.process_time() - started < 2
