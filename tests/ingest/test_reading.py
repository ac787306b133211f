"""Bytes to a normalised instance: every encoding, every refusal, and files that mean harm."""

import io
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import Dataset, dcmread
from pydicom.filewriter import dcmwrite
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from services.ingest.protocol import Caps
from services.ingest.reading import looks_like_dicom, normalise, noted_in
from services.ingest.reasons import REASONS, WARNINGS
from shared.documents.revisions import sha_of
from shared.errors import Unprocessable
from tests.examples import examples

CAPS = Caps(inflated=1 << 24, pixels=1 << 24)


def refusal(upload: bytes, caps: Caps = CAPS) -> str:
    with pytest.raises(Unprocessable) as raised:
        normalise(upload, caps)
    return raised.value.reason_code


def data_set_at(upload: bytes) -> int:
    """Where the data set begins: at its SOPClassUID."""
    return upload.index(b"\x08\x00\x16\x00UI")


def read(body: bytes) -> Dataset:
    return dcmread(io.BytesIO(body))


def test_an_explicit_file_is_stored_element_for_element(maker, make_part_10):
    """What is in the stored encoding comes out byte for byte, behind an empty preamble and a fresh meta group."""
    upload = make_part_10(maker.ct())
    data_set = upload[data_set_at(upload) :]
    instance, body = normalise(b"junkjunk" * 16 + upload[128:], CAPS)

    assert body.endswith(data_set)
    assert body[:132] == b"\0" * 128 + b"DICM"
    assert instance.sha == sha_of(data_set)
    assert instance.warnings == ()


def test_the_same_data_set_in_another_wrapping_has_the_same_sha(maker, make_part_10):
    """Preamble and file meta group are not part of what tells instances apart."""
    upload = make_part_10(maker.ct())
    naked = upload[data_set_at(upload) :]
    (whole, whole_body), (bare, bare_body) = normalise(upload, CAPS), normalise(naked, CAPS)

    assert whole.sha == bare.sha
    assert bare.warnings == ("meta_missing", "preamble_missing")
    assert read(whole_body) == read(bare_body)


def test_a_file_without_preamble_is_read(maker, make_part_10):
    """The file meta group may stand at the very beginning."""
    found, _ = normalise(make_part_10(maker.ct())[132:], CAPS)

    assert found.warnings == ("preamble_missing",)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_other_native_encodings_become_explicit_little_endian(maker, syntax):
    """Values, sequences, private elements and pixel words survive the change of encoding."""
    item = Dataset()
    item.ReferencedSOPInstanceUID = "1.2.3"
    item.PixelData = b"\1\2\3\4"
    item["PixelData"].VR = "OW"
    dataset = maker.ct(ReferencedImageSequence=Sequence([item]), SpecificCharacterSet="ISO_IR 192", StudyID="Ä")
    dataset.add_new(0x00090010, "LO", "MADE")
    dataset.add_new(0x00091001, "LO", "private")
    before = read(normalise(_written(dataset, ExplicitVRLittleEndian), CAPS)[1])
    if syntax == ExplicitVRBigEndian:
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
        item.PixelData = b"\2\1\4\3"
    after = read(normalise(_written(dataset, syntax), CAPS)[1])

    assert np.array_equal(after.pixel_array, before.pixel_array)
    assert after.ReferencedImageSequence[0].PixelData == b"\1\2\3\4"
    assert after.StudyID == "Ä"
    assert {element.tag for element in after} == {element.tag for element in before}
    assert after.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian])
@pytest.mark.parametrize("charset", [b"ISO_IR 192", b"ISO_IR 999", b"\\\\ISO 2022", b"GB18030   "])
def test_names_keep_their_bytes(maker, syntax, charset):
    """A name in a character set that is unknown, or not the one that is claimed, is stored as it came."""
    name = b"M\xfcller^\xe4\xf6\x1b$B12"
    upload = _written(maker.ct(SpecificCharacterSet="ISO_IR 100", PatientName="N" * len(name)), syntax)
    upload = upload.replace(b"ISO_IR 100", charset.ljust(10), 1).replace(b"N" * len(name), name, 1)
    _, body = normalise(upload, CAPS)

    assert name in body
    assert charset.rstrip() in body[: body.index(name)]


def test_a_wrong_transfer_syntax_is_not_believed(maker, make_part_10):
    """A file that claims implicit and is explicit is read as it is, with a warning."""
    upload = make_part_10(maker.ct()).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2\0\0\0", 1)
    found, _ = normalise(upload, CAPS)

    assert found.warnings == ("vr_mismatch",)


def test_a_value_that_cannot_be_converted_is_kept_as_bytes(maker):
    """A number of an impossible width in an implicit file costs neither the file nor the bytes."""
    upload = _written(maker.ct(), ImplicitVRLittleEndian)
    at = upload.index(b"\x20\x00\x0d\x00")
    width = b"\x18\x00\x06\x93\x06\0\0\0sixsix"  # SingleCollimationWidth is FD: eight bytes
    instance, body = normalise(upload[:at] + width + upload[at:], CAPS)

    assert instance.warnings == ("element_unreadable",)
    assert b"\x18\x00\x06\x93OB\0\0\x06\0\0\0sixsix" in body


@pytest.mark.parametrize("uid_in_meta", [True, False])
def test_a_missing_sop_class_is_restored(maker, make_part_10, uid_in_meta):
    """It comes from the file meta group, else from the modality, and a warning stays with the instance."""
    dataset = maker.ct()
    upload = make_part_10(dataset)
    if uid_in_meta:
        del dataset.SOPClassUID
        file = io.BytesIO()
        dcmwrite(file, dataset)
        upload = file.getvalue()
    else:
        upload = make_part_10(maker.ct(SOPClassUID=None))
    stored = read(normalise(upload, CAPS)[1])

    assert stored.SOPClassUID == "1.2.840.10008.5.1.4.1.1.2"
    assert noted_in(stored.file_meta) == ["sop_class_restored"]


@pytest.mark.parametrize(
    ("overrides", "code"),
    [
        ({"StudyInstanceUID": None}, "missing_uid"),
        ({"SeriesInstanceUID": ""}, "missing_uid"),
        ({"StudyInstanceUID": "../../etc"}, "invalid_uid"),
        ({"SeriesInstanceUID": "1." * 40 + "1"}, "invalid_uid"),
        ({"SOPInstanceUID": "1.2/3"}, "invalid_uid"),
        ({"SOPClassUID": None, "Modality": "XX"}, "missing_sop_class"),
        ({"SOPClassUID": None, "NumberOfFrames": 2}, "missing_sop_class"),
        ({"PixelData": None}, "missing_pixel_data"),
        ({"Rows": None}, "bad_image_header"),
        ({"Rows": 0}, "bad_image_header"),
        ({"BitsAllocated": 12}, "bad_image_header"),
        ({"SamplesPerPixel": 7}, "bad_image_header"),
        ({"NumberOfFrames": 3}, "truncated"),
        ({"Rows": 17}, "truncated"),
        ({"Rows": 60000, "Columns": 60000}, "too_large"),
        ({"Rows": 1, "Columns": 1, "NumberOfFrames": 1_000_000}, "too_large"),
    ],
)
def test_each_refusal_has_its_code(maker, make_part_10, overrides, code):
    """What keeps an instance from being stored is told by one code."""
    assert refusal(make_part_10(maker.ct(**overrides))) == code


@pytest.mark.parametrize(
    "upload",
    [
        b"",
        b"DICM",
        b"\x08\x00",
        b"%PDF-1.7 and so on, with many bytes" * 9,
        b"\xff\xd8\xff\xe0 a JPEG" * 20,
        b"\0" * 500,
    ],
)
def test_other_files_are_not_dicom(upload):
    """A file of another kind is told apart from a damaged DICOM file."""
    assert refusal(upload) in {"not_dicom", "truncated"}
    assert refusal(upload) == "not_dicom" or upload in {b"DICM", b"\x08\x00"}


def test_a_deflated_bomb_is_stopped(maker):
    """A deflated data set is inflated up to the limit and no further."""
    dataset = _written(maker.ct(), ExplicitVRLittleEndian)
    start = data_set_at(dataset)
    bomb = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    deflated = bomb.compress(dataset[start:] + b"\0" * (1 << 25)) + bomb.flush()
    meta = dataset[:start].replace(b"\x14\0" + b"1.2.840.10008.1.2.1\0", b"\x16\0" + b"1.2.840.10008.1.2.1.99")

    assert len(deflated) < 1 << 17
    assert refusal(meta + deflated) == "too_large"
    assert refusal(meta + deflated[:1000]) in {"truncated", "too_large"}


def test_a_deflated_data_set_of_just_the_limit_is_read(maker):
    """The limit is the largest size that is taken, not the smallest that is refused."""
    dataset = _written(maker.ct(), ExplicitVRLittleEndian)
    start = data_set_at(dataset)
    meta = dataset[:start].replace(b"\x14\0" + b"1.2.840.10008.1.2.1\0", b"\x16\0" + b"1.2.840.10008.1.2.1.99")
    deflating = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    upload = meta + deflating.compress(dataset[start:]) + deflating.flush()
    n_bytes = len(dataset) - start

    assert normalise(upload, replace(CAPS, inflated=n_bytes)) is not None
    assert refusal(upload, replace(CAPS, inflated=n_bytes - 1)) == "too_large"


def test_zeros_behind_the_data_set_are_dropped(maker, make_part_10):
    """Padding that some writers leave is no reason to refuse."""
    found, _ = normalise(make_part_10(maker.ct()) + b"\0" * 64, CAPS)

    assert found.warnings == ("trailing_bytes",)


@pytest.mark.parametrize("n_bytes", [1, 4, 7, 8, 130])
def test_padding_of_any_length_is_padding(maker, make_part_10, n_bytes):
    """Less than an element's header is no different from more."""
    found, _ = normalise(make_part_10(maker.ct()) + bytes(n_bytes), CAPS)

    assert found.warnings == ("trailing_bytes",)


@pytest.mark.parametrize("value", [None, [5]])
def test_a_table_that_is_not_described_costs_no_image(maker, make_part_10, value):
    """A descriptor that is empty, or of another count, is stored as it is."""
    dataset = maker.ct(PixelRepresentation=1)
    dataset.add_new("RedPaletteColorLookupTableDescriptor", "SS", value)

    assert normalise(make_part_10(dataset, ImplicitVRLittleEndian), CAPS)[0].warnings == ()


def test_a_second_file_behind_the_data_set_is_refused(maker, make_part_10):
    """It begins with zeros, and is no padding: its instance would be lost without a word."""
    assert refusal(make_part_10(maker.ct(0)) + make_part_10(maker.ct(1))) == "unreadable"


def test_a_rest_that_is_too_short_for_an_element_is_told(maker, make_part_10):
    """A file that ends within an element's header is cut short, whatever was read before."""
    upload = make_part_10(maker.ct(PixelData=None))
    ends = [upload.index(b"\x20\x00\x0e\x00UI") + left for left in range(1, 8)]

    assert {refusal(upload[:end]) for end in ends} == {"truncated"}


def test_pixels_of_floats_are_as_many_as_the_header_says(maker, make_part_10):
    """Pixel data of another kind is held against the header too."""
    dataset = maker.ct(PixelData=None, FloatPixelData=bytes(4 * 16 * 16))

    assert normalise(make_part_10(dataset), CAPS)[0].warnings == ()
    dataset.FloatPixelData = bytes(12)
    assert refusal(make_part_10(dataset)) == "truncated"


def test_what_implicit_vr_leaves_open_costs_no_image(maker, make_part_10):
    """Curves, whose VR nothing tells, and a table of more entries than a signed number counts."""
    table = Dataset()
    table.add_new("LUTDescriptor", "SS", [40000, -20000, 16])
    table.add_new("LUTData", "OW", bytes(80000))
    dataset = maker.ct(PixelRepresentation=1, ModalityLUTSequence=Sequence([table]))
    dataset.add_new(0x50003000, "OW", b"\1\0\2\0")
    found, body = normalise(make_part_10(dataset, ImplicitVRLittleEndian), CAPS)

    assert found.warnings == ()
    assert read(body)[0x50003000].value == b"\1\0\2\0"
    assert list(read(body).ModalityLUTSequence[0].LUTDescriptor) == [40000, -20000, 16]


def test_deep_nesting_ends_in_an_error_not_in_a_crash(maker, make_part_10):
    """Sequences nested beyond reason do not take the interpreter's stack down."""
    head = make_part_10(maker.ct(PixelData=None))
    opening = b"\x40\x00\x75\xa3SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"  # (0040,A375), an item

    assert refusal(head + opening * 20_000) == "unreadable"


@given(cut=st.integers(min_value=1, max_value=1400))
@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_short_is_never_taken(maker, make_part_10, cut):
    """Wherever a file ends too early, it is refused with a code that is documented."""
    upload = make_part_10(maker.ct(0))

    assert refusal(upload[: max(0, len(upload) - cut)]) in REASONS


@given(edits=st.lists(st.tuples(st.integers(128, 900), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_taken_or_refused(maker, make_part_10, edits):
    """Whatever bytes are changed, the outcome is an instance with known warnings, or a code that is documented."""
    upload = bytearray(make_part_10(maker.ct(0)))
    for at, value in edits:
        upload[at] = value
    found, code = None, None
    try:
        found = normalise(bytes(upload), CAPS)
    except Unprocessable as error:
        code = error.reason_code

    assert code in REASONS if found is None else set(found[0].warnings) <= set(WARNINGS)
    assert found is None or read(found[1]).SOPInstanceUID == found[0].sop_instance_uid


def inserted(upload: bytes, element: bytes) -> bytes:
    """The file with an element before its StudyInstanceUID."""
    at = upload.index(b"\x20\x00\x0d\x00")
    return upload[:at] + element + upload[at:]


@pytest.mark.parametrize(
    ("element", "kept"),
    [
        (b"\x18\x00\x50\x00XX\x04\x001.25", b"\x18\x00\x50\x00OB\0\0\x04\0\0\x001.25"),
        (b"\x18\x00\x06\x93FD\x06\x00sixsix", b"\x18\x00\x06\x93OB\0\0\x06\0\0\x00sixsix"),
        (b"\x19\x00\x01\x10US\x03\x00odd", b"\x19\x00\x01\x10OB\0\0\x04\0\0\x00odd\0"),
    ],
)
def test_an_element_that_nobody_could_convert_keeps_its_bytes(maker, make_part_10, element, kept):
    """An unknown VR, or a number of an impossible width, costs no image, and no later reader stumbles over it."""
    instance, body = normalise(inserted(make_part_10(maker.ct()), element), CAPS)

    assert instance.warnings == ("element_unreadable",)
    assert kept in body
    assert len([element.value for element in read(body)]) == len(maker.ct()) + 1


def test_a_writer_that_switches_to_implicit_is_followed(maker, make_part_10):
    """An element without VR among explicit ones gets the VR of its tag, also inside a sequence."""
    thickness = b"\x18\x00\x50\x00\x04\0\0\x001.25"
    sequence = b"\x18\x00\x01\x93SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" + thickness
    sequence += b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
    for element in (thickness, sequence):
        instance, body = normalise(inserted(make_part_10(maker.ct()), element), CAPS)

        assert instance.warnings == ("vr_mismatch",)
        assert b"\x18\x00\x50\x00DS\x04\x001.25" in body
        assert np.array_equal(read(body).pixel_array, read(make_part_10(maker.ct())).pixel_array)


@pytest.mark.parametrize("charset", ["ISO_IR 999", "ISO_IR192", "utf8"])
def test_an_unknown_character_set_is_told(maker, make_part_10, charset):
    """Texts in a character set that the standard does not have stay as they are, with a warning."""
    instance, body = normalise(make_part_10(maker.ct(SpecificCharacterSet=charset)), CAPS)

    assert instance.warnings == ("charset_unknown",)
    assert read(body).SpecificCharacterSet == charset


@pytest.mark.parametrize(
    "keyword", ["SamplesPerPixel", "PhotometricInterpretation", "BitsStored", "HighBit", "PixelRepresentation"]
)
@pytest.mark.parametrize("value", [None, ""])
def test_a_header_that_leaves_out_the_usual_is_completed(maker, make_part_10, keyword, value):
    """What readers need and only one value makes sense for is added, with a warning."""
    upload = make_part_10(maker.ct(**{keyword: value}))
    instance, body = normalise(upload, CAPS)

    assert "image_header_completed" in instance.warnings
    assert read(body).pixel_array.shape == (16, 16)


def test_decompressed_pixels_under_a_compressed_syntax_are_read(maker, make_part_10):
    """Who decompresses and forgets the transfer syntax still has native pixel data of the right length."""
    upload = make_part_10(maker.ct())
    length = upload.index(b"UI\x14\x001.2.840.10008.1.2.1\0")
    told = upload[:length] + b"UI\x16\x001.2.840.10008.1.2.4.90" + upload[length + 24 :]
    instance, body = normalise(told, CAPS)

    assert instance.warnings == ("vr_mismatch",)
    assert np.array_equal(read(body).pixel_array, read(upload).pixel_array)


def test_padding_is_dropped_and_frames_are_not(maker, make_part_10):
    """A few bytes behind the pixels go, with a warning; as much as a frame is a header that lies."""
    pixels = maker.ct().PixelData
    instance, body = normalise(make_part_10(maker.ct(PixelData=pixels + bytes(40))), CAPS)

    assert instance.warnings == ("excess_pixel_data",)
    assert read(body).PixelData == pixels
    assert refusal(make_part_10(maker.ct(PixelData=pixels * 2))) == "frame_count"


def test_a_text_that_begins_with_eight_is_not_dicom():
    """Bytes that look like a first tag by chance need a VR or a plausible length."""
    assert not looks_like_dicom(b"\x08\x00\x05\x00zzzz")
    assert looks_like_dicom(b"\x08\x00\x05\x00CS\x0a\x00")
    assert looks_like_dicom(b"\x08\x00\x05\x00\x0a\x00\x00\x00")


def _written(dataset: Dataset, syntax: str) -> bytes:
    """A file of `dataset` in `syntax`."""
    copy = Dataset(dataset)
    file = io.BytesIO()
    copy.ensure_file_meta()
    copy.file_meta.MediaStorageSOPClassUID = dataset.get("SOPClassUID", "1.2")
    copy.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    copy.file_meta.TransferSyntaxUID = syntax
    copy.preamble = b"\0" * 128
    dcmwrite(file, copy)
    return file.getvalue()


TEST_FILES = Path(pydicom.__file__).parent / "data" / "test_files"
NO_REFERENCE = {"GDCMJ2K_TextGBR.dcm", "JPEG-lossy.dcm", "JPGExtended.dcm", "SC_rgb_jpeg_gdcm.dcm"}
"""These pydicom cannot decode without further libraries."""


def test_the_bundled_files_of_pydicom_are_read_as_pydicom_reads_them():
    """Each of 170 curious files is refused with a documented code, or stored with the very pixels that pydicom sees."""
    n_compared = 0
    for path in sorted(path for path in TEST_FILES.rglob("*") if path.is_file()):
        try:
            instance, body = normalise(path.read_bytes(), Caps(1 << 28, 1 << 28))
        except Unprocessable:
            continue
        stored = read(body)

        assert set(instance.warnings) <= set(WARNINGS)
        if "PixelData" in stored and path.name not in NO_REFERENCE:
            n_compared += 1

            assert np.array_equal(stored.pixel_array, dcmread(path, force=True).pixel_array), path.name
    assert n_compared > 60


def test_a_data_set_that_needs_no_writing_is_stored_as_it_came(maker, make_part_10):
    """Where nothing is changed the stored bytes are those of the upload, and the file meta group is ours."""
    upload = make_part_10(maker.ct())
    at = upload.index(b"\x08\x00\x16\x00")
    _, body = normalise(upload, CAPS)

    assert body.endswith(upload[at:])
    assert read(body).file_meta.ImplementationVersionName == "RADQUEUE"


@pytest.mark.parametrize(
    ("extra", "warnings"),
    [
        (b"\x08\x00\x00\x00UL\x04\x00\x10\x00\x00\x00", ()),  # a group's length
        (b"\x08\x00\x16\x00UI\x06\x001.2.3\x00", ("element_repeated",)),  # a SOP class before the one that counts
        (b"\x10\x00\x20\x00LO\x04\x00LEAK", ("element_repeated",)),  # a patient, and again in the right place
    ],
)
def test_what_stands_out_of_order_is_written_anew(maker, make_part_10, extra, warnings):
    """An element is stored once, as it was understood: no other reader of the file can understand another one."""
    upload = make_part_10(maker.ct())
    at = upload.index(b"\x08\x00\x16\x00")
    plain, body = normalise(upload, CAPS)
    found, mixed = normalise(upload[:at] + extra + upload[at:], CAPS)

    assert mixed[data_set_at(mixed) :] == body[data_set_at(body) :]
    assert found.sha != plain.sha
    assert found.warnings == warnings


def test_a_uid_that_is_padded_with_spaces_is_stored_without(maker, make_part_10):
    """The UIDs in the stored file are those of its key."""
    dataset = maker.ct()
    dataset.StudyInstanceUID = "1.2.3"
    upload = make_part_10(dataset).replace(b"UI\x06\x001.2.3\x00", b"UI\x08\x001.2.3   ", 1)
    found, body = normalise(upload, CAPS)

    assert found.study_uid == "1.2.3"
    assert b"1.2.3\x00" in body
    assert b"1.2.3 " not in body
