import io

import pydicom
import pytest
from pydicom.uid import generate_uid

from services.inference.outputs import LONGEST, OutputRefused, Scrubber, check, files, headers, other_files


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
    """A result that names itself as its source would replace it at the target."""
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


@pytest.mark.parametrize(
    ("least", "reason_code", "where"),
    [
        (None, None, ""),
        ({"CT": 2}, None, ""),
        ({"CT": 3}, "outputs_missing", "CT"),
        ({"CT": 1, "SEG": 1, "SR": 1}, "outputs_missing", "SEG,SR"),
    ],
)
def test_a_map_is_held_to_the_outputs_that_were_agreed_on(folders, least, reason_code, where):
    """At least so many instances of each modality; those that are missing are named."""
    sources, output, content = folders
    derive(content, output / "a.dcm")
    derive(content, output / "b.dcm")
    if reason_code is None:
        assert len(check(output, sources, least)) == 2
        return
    with pytest.raises(OutputRefused) as caught:
        check(output, sources, least)

    assert (caught.value.reason_code, caught.value.where) == (reason_code, where)


def test_where_any_file_will_do_one_must_be_there(folders):
    """A MAP that makes no DICOM is agreed on by an empty contract; its files are told with their media types."""
    sources, output, _ = folders
    with pytest.raises(OutputRefused, match="no_output"):
        check(output, sources, {})
    for name in ("a.json", "b.nii.gz", "c.strange"):
        (output / name).write_text("{}")
    (output / "link").symlink_to("/etc/hostname")

    assert check(output, sources, {}) == []
    assert [(one.path.name, one.media_type) for one in other_files(output)] == [
        ("a.json", "application/json"),
        ("b.nii.gz", "application/gzip"),
        ("c.strange", "application/octet-stream"),
    ]


@pytest.fixture
def scrubber(tmp_path, series_files):
    """Made of a series of a patient with a name beyond ASCII, an address and another id."""
    content = series_files(
        n=1,
        SpecificCharacterSet="ISO_IR 192",
        PatientName="Müller-Lüdenscheidt^Anna Maria",
        PatientID="4711/b",
        AccessionNumber="ACC.77",
        PatientBirthDate="19700102",
        PatientAddress="Seeweg 1",
        ReferringPhysicianName="Doctor^Who",
        PatientSex="O",
    )[0]
    (tmp_path / "patient.dcm").write_bytes(content)
    return Scrubber([tmp_path / "patient.dcm"])


@pytest.mark.parametrize(
    "said",
    [
        "Müller-Lüdenscheidt^Anna Maria",
        "Anna Maria Müller-Lüdenscheidt",
        "MÜLLER-LÜDENSCHEIDT, ANNA",
        "{'name': 'M\\xfcller-L\\xfcdenscheidt'}",
        '"M\\u00fcller-L\\u00fcdenscheidt"',
        "PatientID=4711/b",
        "/data/4711/b_out",
        "born 1970-01-02 or 19700102",
        "seeweg 1",
        "order ACC.77",
        "asked by Who",
    ],
)
def test_what_tells_of_the_patient_is_replaced_however_it_is_printed(scrubber, said):
    """Encodings, escapes, cases, the words of a name and the other way to write a date are all found."""
    scrubbed = scrubber.scrub(said.encode())

    assert b"***" in scrubbed
    for value in ("üller", "xfcller", "fcller", "Anna", "4711", "1970", "eeweg", "77", "Who"):
        assert value.encode().lower() not in scrubbed.lower()


def test_what_a_log_is_read_for_stays(scrubber):
    """Words that only contain a value, short values and UIDs are left alone."""
    said = b'File "app.py", line 12, in compute\nwhole annals, 0 of 47111 1.2.840.10008\n'

    assert scrubber.scrub(said) == said


def test_the_end_of_a_log_holds_no_half_of_a_name(scrubber):
    """Where the beginning is cut off, a value that the cut runs through is left out with it."""
    name = "Müller-Lüdenscheidt^Anna Maria".encode()
    text = (name + b" ") * 200
    for cut in range(40):
        tail = scrubber.scrub_tail(text[cut : cut + 2000 + LONGEST], 2000)

        assert set(tail.replace(b"***", b"")) <= set(b"^ ")
        assert len(tail) <= 2000


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Wang^XiaoDong=王^小東", "王^小東"),
        ("Wang^XiaoDong=王^小東", "of 王 alone"),
        ("Wang^XiaoDong=王^小東", "小東王"),
        ("Doe^John^Q", "DOEJOHN"),
        ("Doe^John^Q", "path/johndoe.dcm"),
        ("Doe^John^Q", "QJohnDoe"),
    ],
)
def test_short_and_joined_parts_of_a_name_are_replaced(tmp_path, series_files, name, said):
    """One ideograph tells who it is; so do parts that nothing separates. A question mark tells nobody."""
    (tmp_path / "a.dcm").write_bytes(series_files(n=1, SpecificCharacterSet="ISO_IR 192", PatientName=name)[0])
    scrubbed = Scrubber([tmp_path / "a.dcm"]).scrub(f"why?? {said} ? ??".encode()).decode()

    assert scrubbed.startswith("why?? ")
    assert scrubbed.endswith(" ? ??")
    assert "***" in scrubbed
    assert not {"王", "小東"} & set(scrubbed)
    assert "doe" not in scrubbed.lower()


def test_links_are_followed_at_no_depth(tmp_path, folders):
    """Neither a link to a file, nor to a folder, nor an output that is one, brings in what lies elsewhere."""
    _, output, content = folders
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "secret.txt").write_text("of somebody else")
    derive(content, secret / "a.dcm")
    (output / "deep").mkdir()
    (output / "deep" / "folder").symlink_to(secret)
    (output / "deep" / "file").symlink_to(secret / "secret.txt")
    (tmp_path / "link").symlink_to(secret)

    assert files(output) == other_files(output) == files(tmp_path / "link") == []


def test_what_the_map_was_given_is_compared_as_it_was_before(folders):
    """Headers that were read before the run hold, whatever the MAP did to the files."""
    sources, output, content = folders
    before = headers(sources)
    derive(content, output / "a.dcm", PatientID="other")
    for path in sources:
        derive(path.read_bytes(), path, PatientID="other")

    assert len(check(output, sources)) == 1
    with pytest.raises(OutputRefused, match="attributes_differ PatientID"):
        check(output, before)
