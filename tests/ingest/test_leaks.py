"""Nothing of a patient comes out of a de-identified dataset: files full of sentinels go the whole way of an upload."""

import io
import itertools
import json

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file
from pydicom.datadict import dictionary_VR
from pydicom.sequence import Sequence

from services.ingest.datasets import Deidentification
from services.ingest.deidentification import Option, keyed_uid, pseudonym
from services.ingest.handler import handle_uploads
from services.ingest.protection import protect
from services.ingest.protocol import Caps
from services.ingest.reading import normalise
from services.ingest.stable_series import handle_settling
from shared.documents.revisions import Revision, digest_of
from shared.messages import SeriesReady, SeriesSettling, UploadRejected
from tests.ingest.conftest import SECRET, Maker, part_10
from tests.ingest.sentinels import planted

PATIENT_ID = "PAT4711X"
NUMBERS = itertools.count(5000)
WITH_TEXTS = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.1", "Modality": "US"}


def real_ct(maker, **overrides):
    """A real CT slice as one of the maker's series."""
    dataset = dcmread(get_testdata_file("CT_small.dcm"))
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = maker.study_uid, maker.series_uid
    dataset.SOPInstanceUID = f"{maker.series_uid[:50]}.77"
    dataset.PatientID, dataset.PatientName = PATIENT_ID, "Secretperson^Jane"
    for keyword, value in overrides.items():
        setattr(dataset, keyword, value)
    return dataset


def full_of_sentinels(dataset):
    """Plant values of every VR, three sequences deep; return them."""
    found = planted(dataset, NUMBERS)
    level = dataset
    for keyword in ("ReferencedImageSequence", "PurposeOfReferenceCodeSequence", "DerivationCodeSequence"):
        item = Dataset()
        found += planted(item, NUMBERS)
        setattr(level, keyword, Sequence([item]))
        level = item
    return [value if isinstance(value, bytes) else value.encode() for value in found]


async def everything(bench, *prefixes, but=()):
    """Keys and bodies of what is stored under the prefixes, and what was announced."""
    keys = [key for prefix in prefixes for key in await bench.keys(prefix) if key not in but]
    bodies = {key: key.encode() + b"\n" + await bench.objects.get(key) for key in keys}
    return bodies | {f"event {n}": event.body().encode() for n, event in enumerate(bench.published.events)}


async def ingested(bench, dataset, *uploads):
    """Upload files under a name that tells of a patient, and settle what comes of them."""
    for number, body in enumerate(uploads):
        key = f"incoming/{dataset}/Secretperson^Jane/{number}.dcm"
        await handle_uploads(await bench.upload(key, body), ports=bench.ports)
    bench.clock.shift_s = 62
    for event in bench.published.of(SeriesSettling):
        await handle_settling(event, ports=bench.ports)
    bench.clock.shift_s = 0


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
async def test_no_sentinel_leaves_a_research_dataset(bench, capsys):
    """With `studies: true` no value, UID or hash of the original is in an object, a key, an event or a log."""
    maker = Maker("1.2.826.0.1.3680043.8.498.111222333", "1.2.826.0.1.3680043.8.498.111222333.4")
    before = {key for prefix in ("studies/", "datasets/", "settling/") for key in await bench.keys(prefix)}
    dataset = real_ct(maker)
    sentinels = full_of_sentinels(dataset)
    upload = part_10(dataset)
    await ingested(bench, bench.research, upload, upload[:-40])
    new = await everything(bench, "studies/", "datasets/", "settling/", but=before)
    printed = capsys.readouterr()
    new["log"] = (printed.out + printed.err).encode()
    known = [maker.study_uid, maker.series_uid, dataset.SOPInstanceUID, PATIENT_ID, "Secretperson"]
    known.append(normalise(upload, Caps(1 << 24, 1 << 24))[0].sha)
    (ready,) = bench.published.of(SeriesReady)
    (rejected,) = bench.published.of(UploadRejected)
    revision = Revision.model_validate_json(await bench.objects.get(ready.data.revision_key))
    stored = dcmread(io.BytesIO(await bench.objects.get(revision.instances[0].key)))
    original = dcmread(io.BytesIO(upload))

    assert len(sentinels) > 1200
    assert all(value in upload for value in sentinels)
    assert [(value, name) for value in sentinels for name, body in new.items() if value in body] == []
    assert [(value, name) for value in known for name, body in new.items() if value.encode() in body] == []
    assert ready.data.deidentified
    assert revision.deidentified
    assert ready.data.study_uid == stored.StudyInstanceUID == keyed_uid(maker.study_uid, SECRET)
    assert stored.PatientID == pseudonym(PATIENT_ID, SECRET)
    assert np.array_equal(stored.pixel_array, original.pixel_array)
    assert ready.data.array_key.startswith(f"datasets/{bench.research}/{ready.data.series_uid}.")
    assert rejected.data.reason_code == "truncated"


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
async def test_no_sentinel_reaches_training_data(bench):
    """With `studies: false` the instances stay as they are, and nothing in datasets/ tells whose they are."""
    maker = Maker("1.2.826.0.1.3680043.8.498.555666777", "1.2.826.0.1.3680043.8.498.555666777.8")
    dataset = real_ct(maker)
    sentinels = full_of_sentinels(dataset)
    await ingested(bench, bench.keyed, part_10(dataset))
    (ready,) = bench.published.of(SeriesReady)
    revision = Revision.model_validate_json(await bench.objects.get(ready.data.revision_key))
    told = {
        name: body
        for name, body in (await everything(bench, f"datasets/{bench.keyed}/")).items()
        if "event" not in name
    }
    known = [maker.study_uid, maker.series_uid, dataset.SOPInstanceUID, PATIENT_ID, "Secretperson"]
    known += [revision.digest, digest_of(revision.instances), revision.instances[0].sha]
    (sidecar,) = [json.loads(await bench.objects.get(key)) for key in told if key.endswith(".json")]

    assert [(value, name) for value in sentinels for name, body in told.items() if value in body] == []
    assert [(value, name) for value in known for name, body in told.items() if value.encode() in body] == []
    assert sidecar["series_uid"] == keyed_uid(maker.series_uid, SECRET)
    assert sidecar["patient_key"] == pseudonym(PATIENT_ID, SECRET)
    assert sidecar["pixel_spacing_mm"] == pytest.approx([0.661468, 0.661468])
    assert "revision_key" not in sidecar
    assert revision.array_key in told
    assert (ready.data.array_key, ready.data.deidentified, revision.deidentified) == (None, False, False)
    assert ready.data.series_uid == maker.series_uid


@pytest.mark.parametrize("vr", [b"AE", b"CS", b"LO", b"SH", b"ST"])
@pytest.mark.parametrize("options", [(), (Option.RETAIN_UIDS,)])
def test_an_instance_has_its_new_uids_whatever_their_vr(maker, vr, options):
    """UIDs that are not written as such are in the stored file, and in its key, as those of another file would be."""
    upload = as_written = part_10(maker.ct())
    for tag in (b"\x08\0\x16\0", b"\x08\0\x18\0", b"\x20\0\x0d\0", b"\x20\0\x0e\0"):
        upload = upload.replace(tag + b"UI", tag + vr)
    rules = Deidentification(studies=True, options=options)
    caps = Caps(1 << 24, 1 << 24)
    expected, _ = protect(*normalise(as_written, caps), rules, SECRET)
    instance, body = protect(*normalise(upload, caps), rules, SECRET)
    stored = dcmread(io.BytesIO(body))

    assert upload != as_written
    assert (instance.study_uid, instance.series_uid) == (expected.study_uid, expected.series_uid)
    assert instance.sop_instance_uid == expected.sop_instance_uid == stored.SOPInstanceUID
    assert (maker.series_uid.encode() in body) == bool(options)
    assert stored.SOPClassUID == stored.file_meta.MediaStorageSOPClassUID == maker.ct().SOPClassUID


def test_bits_beside_the_values_are_not_stored(maker):
    """An overlay in the unused bits of the pixels is gone from a de-identified instance."""
    dataset = maker.ct()
    values = dataset.PixelData
    dataset.PixelData = (np.frombuffer(values, "<u2") | 0x1000).tobytes()
    _, body = protect(*normalise(part_10(dataset), Caps(1 << 24, 1 << 24)), Deidentification(studies=True), SECRET)

    assert dcmread(io.BytesIO(body)).PixelData == values


@pytest.mark.parametrize(
    ("keyword", "vr", "value"),
    [
        *(("Rows", vr, 16) for vr in ("UL", "SS", "IS")),
        ("PhotometricInterpretation", "LT", "MONOCHROME2"),
        ("NumberOfFrames", "US", 1),
        ("RescaleIntercept", "FD", -1024.5),
        ("RescaleIntercept", "LO", "-1024.5"),
        ("PixelSpacing", "FD", [0.5, 0.25]),
        ("ImagePositionPatient", "LO", ["1", "2", "3.5"]),
    ],
)
def test_what_pixels_are_read_by_stays_whatever_its_vr(maker, keyword, vr, value):
    """A writer that gives a number another VR means the same, and the image is read by it afterwards."""
    dataset = maker.ct()
    dataset.add_new(keyword, vr, value)
    _, body = protect(*normalise(part_10(dataset), Caps(1 << 24, 1 << 24)), Deidentification(studies=True), SECRET)
    stored = dcmread(io.BytesIO(body))

    assert stored.pixel_array.shape == (16, 16)
    assert dictionary_VR(keyword) == stored[keyword].VR
    assert str(stored[keyword].value) == str(value).replace("'", "")


async def test_two_uploads_of_one_study_stay_together(bench, maker):
    """Instances of one series that come one by one have the same new UIDs; the same file again is the same instance."""
    files = [part_10(maker.ct(number)) for number in (0, 1, 0)]
    await ingested(bench, bench.research, *files)
    (ready,) = {event.id: event for event in bench.published.of(SeriesReady)}.values()

    assert ready.data.n_instances == 2
    assert ready.data.geometry.verdict == "regular"
    assert ready.data.series_uid == keyed_uid(maker.series_uid, SECRET)
    assert not bench.published.of(UploadRejected)


async def test_what_cannot_be_made_harmless_is_refused(bench, maker):
    """Reports have no pixels to keep, screens may show names: neither is stored in a research dataset."""
    report = maker.ct(0, Modality="SR", SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
    for keyword in ("PixelData", "Rows", "Columns", "BitsAllocated"):
        delattr(report, keyword)
    await ingested(bench, bench.research, part_10(report), part_10(maker.ct(1, **WITH_TEXTS)))

    assert [event.data.reason_code for event in bench.published.of(UploadRejected)] == [
        "cannot_deidentify",
        "burned_in_suspected",
    ]
    assert not bench.published.of(SeriesSettling)
    assert not await bench.keys(f"studies/{keyed_uid(maker.study_uid, SECRET)}/")


@pytest.mark.parametrize("studies", [True, False])
async def test_a_region_rule_blanks_what_is_drawn_there(bench, maker, studies):
    """Where a rule knows the place of the texts the picture is taken without them, in instances and arrays."""
    pixels = np.full((20, 20), 2000, "<u2")
    pixels[10:] = 1000
    screen = {"Rows": 20, "Columns": 20, "PixelData": pixels.tobytes()} | WITH_TEXTS
    await ingested(bench, bench.research if studies else bench.keyed, part_10(maker.ct(0, **screen)))
    (ready,) = bench.published.of(SeriesReady)
    revision = Revision.model_validate_json(await bench.objects.get(ready.data.revision_key))
    stored = dcmread(io.BytesIO(await bench.objects.get(revision.instances[0].key))).pixel_array
    array = np.load(io.BytesIO(await bench.objects.get(revision.array_key)))

    assert array[0, 0].max() == -1 < array[0, 6].min()
    assert (stored[:4] == 0).all() == studies
    assert (stored[4:] == pixels[4:]).all()


async def test_suspected_pictures_are_left_out_of_training_data(bench, maker):
    """With `studies: false` a screen is stored and routed, and is in no array; the other slices are."""
    await ingested(bench, bench.keyed, part_10(maker.ct(0)), part_10(maker.ct(1, BurnedInAnnotation="YES")))
    (ready,) = bench.published.of(SeriesReady)
    revision = Revision.model_validate_json(await bench.objects.get(ready.data.revision_key))
    sidecar = json.loads(await bench.objects.get(revision.array_key.replace(".npy", ".json")))

    assert ready.data.n_instances == 2
    assert ready.data.warnings == ("burned_in_left_out",)
    assert (sidecar["n"], sidecar["left_out"]) == (1, {"burned_in": 1})


async def test_a_series_in_a_plain_and_a_keyed_dataset_is_keyed_in_the_second(bench, maker, make_zip):
    """The second dataset's array is made by its own rules, and not copied with the UIDs of the first."""
    body = make_zip({"a.dcm": part_10(maker.ct())})
    for dataset in ("lung", bench.keyed):
        await handle_uploads(await bench.upload(f"incoming/{dataset}/study.zip", body), ports=bench.ports)

    assert not await bench.keys(f"datasets/{bench.keyed}/{maker.series_uid}")
    assert len(await bench.keys(f"datasets/{bench.keyed}/{keyed_uid(maker.series_uid, SECRET)}.")) == 2
    assert len(await bench.keys(f"datasets/lung/{maker.series_uid}.")) == 2
