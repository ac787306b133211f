import io

import pydicom
import pytest
from pydicom.uid import generate_uid

from services.inference.outputs import OutputRefused, check


@pytest.fixture
def folders(tmp_path, series_files):
    """A source series, and a folder with one instance derived from it."""
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    output.mkdir()
    files = series_files()
    for index, content in enumerate(files):
        (source / f"{index}.dcm").write_bytes(content)
    return sorted(source.iterdir()), output, files[0]


def derive(content, path, *, without=(), **changes):
    dataset = pydicom.dcmread(io.BytesIO(content))
    attributes = {"SOPInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid()} | changes
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    for keyword in without:
        delattr(dataset, keyword)
    dataset.save_as(path)
    return dataset


def test_derived_instances_are_found_wherever_they_lie_and_sorted(folders):
    """Every DICOM file below the output folder counts, whatever its name; other files do not."""
    sources, output, content = folders
    (output / "deep").mkdir()
    one = derive(content, output / "deep" / "noname")
    other = derive(content, output / "other.dcm")
    (output / "notes.txt").write_text("x" * 200)
    made = check(output, sources)

    assert [each.sop_instance_uid for each in made] == sorted([one.SOPInstanceUID, other.SOPInstanceUID])
    assert {each.sop_class_uid for each in made} == {one.SOPClassUID}


def test_nothing_written_is_no_output(folders):
    """Success without a DICOM file is a failure."""
    sources, output, _ = folders
    (output / "notes.txt").write_text("nothing else")
    with pytest.raises(OutputRefused) as caught:
        check(output, sources)

    assert caught.value.reason_code == "no_output"


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "PatientID", "StudyDate", "AccessionNumber", "StudyID"])
def test_what_a_result_must_copy_is_compared_and_named_without_its_value(folders, keyword):
    """An attribute that differs from the source would hide the result; the refusal names it, and no value."""
    sources, output, content = folders
    value = {"StudyDate": "20251231", "StudyInstanceUID": "1.2.3.99"}.get(keyword, "other")
    derive(content, output / "a.dcm", **{keyword: value})
    with pytest.raises(OutputRefused) as caught:
        check(output, sources)

    assert (caught.value.reason_code, caught.value.where) == ("attributes_differ", keyword)
    assert value not in str(caught.value)


def test_a_missing_attribute_equals_an_empty_one(tmp_path, folders, series_files):
    """A source with an empty StudyID may have a result without one."""
    _, output, _ = folders
    content = series_files(StudyID="")[0]
    (tmp_path / "source.dcm").write_bytes(content)
    derive(content, output / "a.dcm", without=["StudyID"])

    assert len(check(output, [tmp_path / "source.dcm"])) == 1


def test_an_instance_under_a_uid_of_the_source_is_refused(folders):
    """A result that names itself as its source would replace it in the archive."""
    sources, output, content = folders
    derive(content, output / "a.dcm", SOPInstanceUID=pydicom.dcmread(sources[1]).SOPInstanceUID)
    with pytest.raises(OutputRefused) as caught:
        check(output, sources)

    assert (caught.value.reason_code, caught.value.where) == ("invalid_output", "SOPInstanceUID")


def test_two_instances_of_one_uid_are_refused(folders):
    """Two files under one UID cannot both be the result."""
    sources, output, content = folders
    derive(content, output / "a.dcm", SOPInstanceUID="1.2.3")
    derive(content, output / "b.dcm", SOPInstanceUID="1.2.3")
    with pytest.raises(OutputRefused) as caught:
        check(output, sources)

    assert (caught.value.reason_code, caught.value.where) == ("invalid_output", "SOPInstanceUID")


@pytest.mark.parametrize("keyword", ["SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID"])
def test_an_instance_without_its_uids_is_refused(folders, keyword):
    """What cannot be addressed cannot be stored."""
    sources, output, content = folders
    derive(content, output / "a.dcm", without=[keyword])
    with pytest.raises(OutputRefused) as caught:
        check(output, sources)

    assert (caught.value.reason_code, caught.value.where) == ("invalid_output", keyword)


def test_a_dcm_file_that_is_no_dicom_is_refused(folders):
    """A name that promises DICOM is held to it."""
    sources, output, _ = folders
    (output / "a.dcm").write_bytes(b"\x00" * 200)
    with pytest.raises(OutputRefused) as caught:
        check(output, sources)

    assert caught.value.reason_code == "invalid_output"
