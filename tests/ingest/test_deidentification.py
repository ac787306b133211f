import io
from datetime import date

import numpy as np
import pytest
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.data import get_testdata_file
from pydicom.dataset import FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from services.ingest import deidentification
from services.ingest.datasets import BlankRule
from services.ingest.deidentification import Option, deidentify, keyed_uid, pseudonym
from services.ingest.deidentification.pixels import blank, burned_in_suspected, clear_unused_bits
from services.ingest.protection import is_clean, screen
from shared.errors import Unprocessable
from tests.ingest.sentinels import planted

SECRET = "a secret"


def dataset_of(**values):
    dataset = Dataset()
    dataset.SOPClassUID = CTImageStorage
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID = "1.2.1", "1.2.2", "1.2.3"
    dataset.PatientID, dataset.PatientName, dataset.StudyDate = "ID7", "DOE^JANE", "20240229"
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset


def written(dataset):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta = meta
    file = io.BytesIO()
    dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


@pytest.mark.parametrize(
    "options",
    [(), (Option.CLEAN_DESCRIPTORS, Option.RETAIN_MODIFIED_DATES, Option.RETAIN_SAFE_PRIVATE)],
    ids=["basic", "cleaned"],
)
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_no_sentinel_survives(options):
    """No value planted in the table's attributes, private or unknown elements comes through, at any depth."""
    numbers = iter(range(1, 10_000))
    dataset = dataset_of()
    found = planted(dataset, numbers)
    level = dataset
    for keyword in ("ReferencedImageSequence", "PurposeOfReferenceCodeSequence", "DerivationCodeSequence"):
        item = Dataset()
        found += planted(item, numbers)
        setattr(level, keyword, Sequence([item]))
        level = item
    before = written(dataset)

    assert len(found) > 1200
    assert all(_bytes(value) in before for value in found)

    deidentify(dataset, options, SECRET)
    after = written(dataset)

    dates_are_shifted = Option.RETAIN_MODIFIED_DATES in options  # one may become another's
    searched = [value for value in found if not (dates_are_shifted and len(value) == 8 and value[:2] == "18")]
    assert [value for value in searched if _bytes(value) in after] == []
    assert dcmread(io.BytesIO(after)).PatientIdentityRemoved == "YES"
    assert dataset.ReferencedImageSequence[0].PurposeOfReferenceCodeSequence[0].DerivationCodeSequence[0] is not None


def _bytes(value):
    return value if isinstance(value, bytes) else value.encode()


def test_uids_are_the_same_wherever_they_stand():
    """A UID is replaced by one and the same UID in every place, and DICOM's own UIDs stay."""
    item = Dataset()
    item.ReferencedSOPInstanceUID, item.ReferencedSOPClassUID = "1.2.3", CTImageStorage
    dataset = dataset_of(ReferencedImageSequence=[item], FrameOfReferenceUID="1.2.9")
    deidentify(dataset, (), SECRET)

    assert dataset.SOPInstanceUID == keyed_uid("1.2.3", SECRET) == item.ReferencedSOPInstanceUID
    assert dataset.FrameOfReferenceUID == keyed_uid("1.2.9", SECRET)
    assert dataset.SOPClassUID == item.ReferencedSOPClassUID == CTImageStorage
    assert keyed_uid("1.2.3", "another secret") != keyed_uid("1.2.3", SECRET)
    assert len(dataset.SOPInstanceUID) <= 64


def test_only_registered_uids_are_dicoms_own():
    """A UID that somebody made below DICOM's root is replaced like any other."""
    made = f"{CTImageStorage}.20240131.120000.777"
    dataset = dataset_of(SOPInstanceUID=made, FrameOfReferenceUID="1.2.840.10008.1.4.1.1")
    deidentify(dataset, (), SECRET)

    assert dataset.SOPInstanceUID == keyed_uid(made, SECRET)
    assert dataset.FrameOfReferenceUID == "1.2.840.10008.1.4.1.1"


@pytest.mark.parametrize(("keyword", "number"), [("SOPClassUID", "5.1.4.1.1.66.7"), ("ContextUID", "6.1.6")])
def test_a_class_that_is_newer_than_the_library_stays(keyword, number):
    """What names a kind of thing names nobody, and whoever gets the image has to know its class."""
    dataset = dataset_of(**{keyword: f"1.2.840.10008.{number}"})
    deidentify(dataset, (), SECRET)

    assert dataset[keyword].value == f"1.2.840.10008.{number}"


@pytest.mark.parametrize("options", [(), (Option.RETAIN_UIDS,)])
@pytest.mark.parametrize("vr", ["AE", "CS", "LO", "OB", "SH", "ST", "UT"])
def test_a_reference_of_another_vr_goes(vr, options):
    """A UID, or a sequence that holds UIDs, stays in no form when it is written as something else."""
    dataset = dataset_of()
    for keyword in ("FrameOfReferenceUID", "ReferencedImageSequence"):
        dataset.add_new(keyword, vr, b"1.2.9" if vr == "OB" else "1.2.9")
    deidentify(dataset, options, SECRET)

    assert "FrameOfReferenceUID" not in dataset
    assert "ReferencedImageSequence" not in dataset


def test_one_patient_keeps_one_pseudonym_and_one_shift():
    """Studies of one patient stay together, at their distance in time; another patient's are shifted otherwise."""
    first, later = dataset_of(), dataset_of(StudyDate="20240301", AcquisitionDateTime="20240302101112.5")
    other = dataset_of(PatientID="ID8")
    for dataset in (first, later, other):
        deidentify(dataset, [Option.RETAIN_MODIFIED_DATES], SECRET)

    assert first.PatientID == first.PatientName == later.PatientID == pseudonym("ID7", SECRET)
    assert other.PatientID != first.PatientID
    assert _days(later.StudyDate) - _days(first.StudyDate) == 1
    assert _days(later.AcquisitionDateTime[:8]) - _days(later.StudyDate) == 1
    assert later.AcquisitionDateTime[8:] == "101112.5"
    assert first.StudyDate not in {"20240229", other.StudyDate}


@pytest.mark.parametrize(("drawn", "days"), [(0, 1), (3649, 3650), (3650, 1)])
def test_dates_are_shifted_into_the_past(monkeypatch, drawn, days):
    """A shift goes back by one day to ten years, never forward: no image comes to lie in the future."""
    monkeypatch.setattr(deidentification, "_keyed", lambda *_: drawn.to_bytes(4, "big") * 8)
    dataset = dataset_of(StudyDate="20240229", AcquisitionDateTime="20240229101112")
    deidentify(dataset, [Option.RETAIN_MODIFIED_DATES], SECRET)

    assert _days("20240229") - _days(dataset.StudyDate) == days
    assert _days("20240229") - _days(dataset.AcquisitionDateTime[:8]) == days


def test_a_date_that_cannot_be_shifted_back_is_removed():
    """Before the year 1 there is no date."""
    dataset = dataset_of(StudyDate="00010101")
    deidentify(dataset, [Option.RETAIN_MODIFIED_DATES], SECRET)

    assert "StudyDate" not in dataset


def _days(text):
    return date.fromisoformat(str(text)).toordinal()


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("StudyDate", "20240131-20240229"),
        ("StudyDate", "20240131 DOE^JOHN"),
        ("StudyDate", ["20240131", "20240131 DOE"]),
        ("AcquisitionDateTime", "20240131120000-20240229120000"),
        ("AcquisitionDateTime", "20240131 DOE"),
        ("StudyTime", "DOE^JOHN 12"),
    ],
)
@pytest.mark.parametrize("option", [Option.RETAIN_MODIFIED_DATES, Option.RETAIN_FULL_DATES])
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_what_is_no_date_does_not_stay_as_one(option, keyword, value):
    """Where dates are kept, a value that is more than a date or a time is treated as if they were not."""
    kept, taken = dataset_of(**{keyword: value}), dataset_of(**{keyword: value})
    deidentify(kept, [option], SECRET)
    deidentify(taken, [], SECRET)

    assert kept[keyword] == taken[keyword]


def test_each_of_several_dates_is_shifted():
    """Dates in one element stay at their distance."""
    dataset = dataset_of(DateOfLastCalibration=["20240131", "20240302"])
    deidentify(dataset, [Option.RETAIN_MODIFIED_DATES], SECRET)
    first, second = dataset.DateOfLastCalibration

    assert _days(second) - _days(first) == 31
    assert first != "20240131"


def test_an_option_keeps_no_value_of_another_vr():
    """A text in place of an age is no patient characteristic."""
    dataset = dataset_of()
    dataset.add_new("PatientAge", "LO", "Doe^Leaky")
    deidentify(dataset, [Option.RETAIN_PATIENT_CHARACTERISTICS], SECRET)

    assert "PatientAge" not in dataset


@pytest.mark.parametrize(
    ("option", "keyword", "value"),
    [
        (Option.RETAIN_UIDS, "SOPInstanceUID", "1.2.3"),
        (Option.RETAIN_FULL_DATES, "StudyDate", "20240229"),
        (Option.RETAIN_PATIENT_CHARACTERISTICS, "PatientAge", "045Y"),
        (Option.RETAIN_DEVICE_IDENTITY, "DeviceSerialNumber", "D1"),
        (Option.RETAIN_INSTITUTION_IDENTITY, "InstitutionName", "General"),
    ],
)
def test_an_option_keeps_what_the_basic_profile_takes(option, keyword, value):
    """Each retaining option keeps its attributes, which the basic profile alone replaces or removes."""
    kept, taken = dataset_of(**{keyword: value}), dataset_of(**{keyword: value})
    deidentify(kept, [option], SECRET)
    deidentify(taken, [], SECRET)

    assert kept.get(keyword) == value
    assert taken.get(keyword) != value
    assert len(kept.DeidentificationMethodCodeSequence) == 2


def test_a_safe_private_element_stays_with_its_creator():
    """With the option, a private element of the standard's list stays, and its neighbour in the block goes."""
    dataset = dataset_of()
    block = dataset.private_block(0x7053, "Philips PET Private Group", create=True)
    block.add_new(0x00, "DS", "0.5")
    block.add_new(0x01, "LO", "DOE")
    deidentify(dataset, [Option.RETAIN_SAFE_PRIVATE], SECRET)

    kept = dataset.private_block(0x7053, "Philips PET Private Group")
    assert kept[0x00].value == 0.5
    assert 0x01 not in kept


def test_the_upper_half_of_a_safe_private_block_is_the_lists_own():
    """What stays is told by all eight bits of the place in the block: 9E is listed, A3 is not, though 23 is."""
    dataset = dataset_of()
    block = dataset.private_block(0x0019, "GEMS_ACQU_01", create=True)
    block.add_new(0x23, "DS", "0.5")
    block.add_new(0x9E, "LO", "SE")
    for place in (0x1E, 0x80, 0xA3, 0xA4, 0xFF):
        block.add_new(place, "DS", "77")
    deidentify(dataset, [Option.RETAIN_SAFE_PRIVATE], SECRET)
    private = {tag.element: dataset[tag].value for tag in dataset.keys() if tag.is_private}  # noqa: SIM118 - as below

    assert private == {0x0010: "GEMS_ACQU_01", 0x1023: 0.5, 0x109E: "SE"}


def test_a_safe_private_element_without_a_vr_is_read_by_that_of_the_list():
    """Implicit encodings do not tell the VR of a private element; what cannot be read by it goes."""
    dataset = dataset_of()
    header = dataset.private_block(0x0099, "NQHeader", create=True)
    header.add_new(0x01, "UN", b"1.2.3\0")
    ultrasound = dataset.private_block(0x0119, "SIEMENS Ultrasound SC2000", create=True)
    ultrasound.add_new(0x02, "UN", b"\xfe\xff\x00\xe0\x10\0\0\0\x08\0\x60\0CS\x02\0US\x10\0\x10\0PN\x04\0DOE ")
    dataset = dcmread(io.BytesIO(written(dataset)))
    deidentify(dataset, [Option.RETAIN_SAFE_PRIVATE], SECRET)
    kept = dataset.private_block(0x0099, "NQHeader")

    assert (kept[0x01].VR, kept[0x01].value) == ("UI", keyed_uid("1.2.3", SECRET))
    assert ultrasound.get_tag(0x02) not in dataset


def test_the_profile_reaches_into_safe_private_elements():
    """In a sequence that stays nothing else stays that would not elsewhere; UIDs are new, and each VR is the list's."""
    item = dataset_of(PatientBirthDate="19580312")
    item.private_block(0x0029, "ACME", create=True).add_new(0, "LO", "DOE")
    dataset = dataset_of()
    hologic = dataset.private_block(0x7E01, "HOLOGIC, Inc.", create=True)
    hologic.add_new(0x10, "SQ", [item])
    hologic.add_new(0x11, "UN", b"DOE")
    header = dataset.private_block(0x0099, "NQHeader", create=True)
    header.add_new(0x01, "UI", "1.2.3")
    header.add_new(0x04, "LO", "DOE")
    deidentify(dataset, [Option.RETAIN_SAFE_PRIVATE], SECRET)

    assert hologic[0x10].value[0] is item
    assert header[0x01].value == item.SOPInstanceUID == keyed_uid("1.2.3", SECRET)
    assert (item.PatientName, item.PatientBirthDate) == (pseudonym("ID7", SECRET), None)
    assert 0x11 not in hologic
    assert 0x04 not in header
    assert not [tag for tag in item.keys() if tag.is_private]  # noqa: SIM118 - a data set iterates over elements


def test_descriptors_keep_vocabulary_and_lose_names():
    """A cleaned description keeps medical words; names, long numbers and words of the patient's name go."""
    dataset = dataset_of(
        PatientName="ARM^THORAX", SeriesDescription="Smithers CT thorax axial 1.5 for 0123456 arm of Dr Jones T2w"
    )
    deidentify(dataset, [Option.CLEAN_DESCRIPTORS], SECRET)

    words = dataset.SeriesDescription.split()
    assert {"CT", "axial", "1.5", "T2w"} <= set(words)
    assert not {"Smithers", "0123456", "Jones", "thorax", "arm"} & set(words)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("T2w 3D 1.5 mm 64 slices", "T2w 3D 1.5 mm 64 slices"),
        ("Head 943 476 591", "Head"),
        ("Head 123-456-789", "Head"),
        ("DOB 12/03/58 Brain", "Brain"),
        ("born 12 May 58, 3.4. 1958", ""),
        ("Thorax tel 030 123 45 67", "Thorax"),
        ("Thorax 12 Jones 34", "Thorax"),
        (["Thorax", "94", "47"], ["Thorax", "", ""]),
        ("born 12th of May 58", ""),
        ("12 de maio de 58, 12 Out 58", ""),
        ("chest 77 mm", "chest mm"),
        ("rose 943 slices, 12 mm", "slices mm"),
    ],
)
def test_descriptors_keep_short_single_numbers(text, cleaned):
    """A number stays if it has three digits at most, no number beside it, and is no part of an identifier."""
    dataset = dataset_of(PatientID="ROSE943", AccessionNumber="7 12", StudyID="77", SeriesDescription=text)
    deidentify(dataset, [Option.CLEAN_DESCRIPTORS], SECRET)

    assert dataset.SeriesDescription == cleaned


def test_a_value_that_cannot_be_read_is_removed():
    """An element whose value does not fit its VR goes, for nobody can show that it is harmless."""
    dataset = dataset_of()
    dataset.add_new(0x00181151, "IS", "77")
    broken = written(dataset).replace(b"IS\x02\x0077", b"IS\x02\x00DO")
    raw = dcmread(io.BytesIO(broken))
    deidentify(raw, [], SECRET)

    assert "XRayTubeCurrent" not in raw


@pytest.mark.parametrize(
    ("changes", "suspected"),
    [
        ({}, False),
        ({"BurnedInAnnotation": "YES"}, True),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.1"}, True),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, True),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "BurnedInAnnotation": "NO"}, False),
        ({"Modality": "ES"}, True),
        ({"Modality": "us"}, True),
        ({"Modality": ["CT", "US"]}, True),
        ({"Modality": ["CT", "PT"]}, False),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.6"}, True),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.3"}, True),
        ({"BurnedInAnnotation": ""}, False),
        ({"BurnedInAnnotation": "Y"}, True),
        ({"BurnedInAnnotation": "TRUE"}, True),
        ({"BurnedInAnnotation": ["NO", "YES"]}, True),
        ({"Modality": "US", "BurnedInAnnotation": "no"}, False),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_burned_in_annotation_is_suspected_by_kind(changes, suspected):
    """Screens, ultrasound and photographs are suspected unless they deny it; a CT is not, unless it says otherwise."""
    assert burned_in_suspected(dataset_of(**changes)) is suspected


@pytest.mark.parametrize("name", ["examples_rgb_color.dcm", "CT_small.dcm", "rtdose.dcm"])
def test_regions_are_blanked_in_every_frame(name):
    """A blanked region is zero in all frames and samples, and nothing outside of it changes."""
    dataset = dcmread(get_testdata_file(name))
    before = dataset.pixel_array.copy()
    blank(dataset, [(2, 3, 10, 5)])
    after = dataset.pixel_array

    inside = (slice(3, 8), slice(2, 12)) if before.shape[-1] == 3 else (..., slice(3, 8), slice(2, 12))
    assert not after[inside].any()
    expected = before.copy()
    expected[inside] = 0
    assert (after == expected).all()
    assert dataset.BurnedInAnnotation == "NO"


@pytest.mark.parametrize("region", [(0, 700, 800, 60), (20, 0, 5, 5)])
@pytest.mark.parametrize("modality", ["US", "CT"])
def test_a_region_beside_the_picture_cleans_nothing(region, modality):
    """A rule for pictures of another size says that there are texts, and not where: the picture is held back."""
    rules = [BlankRule(when={"PatientID": "ID7"}, regions=[(0, 0, 5, 5), region])]
    dataset = dataset_of(Modality=modality, Rows=20, Columns=20, BitsAllocated=8)
    dataset.PixelData = bytes(400)

    assert not is_clean(dataset, rules)
    with pytest.raises(Unprocessable, match="burned_in_suspected"):
        screen(dataset, rules)


@pytest.mark.parametrize(("signed", "dtype"), [(0, "<u2"), (1, "<i2")])
def test_nothing_of_an_overlay_is_left(signed, dtype):
    """Bits above the values are cleared and the values stay; of the overlay's own elements none does."""
    values = np.array([0, 1, 2047, -2048 if signed else 4095], dtype)
    dataset = dataset_of(BitsAllocated=16, BitsStored=12, HighBit=11, PixelRepresentation=signed)
    dataset.add_new("PixelData", "OW", (values ^ 0x5000).astype(dtype).tobytes())
    for tag, vr, value in ((0x60000010, "US", 2), (0x60000102, "US", 12), (0x60021500, "LO", "DOE")):
        dataset.add_new(tag, vr, value)
    clear_unused_bits(dataset)
    deidentify(dataset, (), SECRET)

    assert dataset.PixelData == values.tobytes()
    assert not [tag for tag in dataset.keys() if tag.group >= 0x6000 and tag.group < 0x7000]  # noqa: SIM118 - as above
