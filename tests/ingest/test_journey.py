"""Ingest over real S3: what is stored, what is announced, and that doing it twice changes nothing."""

import asyncio
import hashlib
import io
import json
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
from pydicom import dcmread

from services.ingest.handler import handle_uploads
from services.ingest.stable_series import handle_settling
from shared import keys
from shared.concurrency import KeyedLocks
from shared.documents.document import body_of
from shared.documents.revisions import Revision
from shared.errors import Leased, Unprocessable
from shared.keys import series_prefix
from shared.messages import SeriesReady, SeriesSettling, UploadRejected, decode


async def settle_when_quiet(bench):
    """Deliver the last settling message when its series is quiet."""
    event = bench.published.of(SeriesSettling)[-1]
    bench.clock.shift_s = bench.ports.settings.quiet_s + 2
    await handle_settling(event, ports=bench.ports)
    bench.clock.shift_s = 0


async def test_a_file_becomes_a_ready_series(bench, maker, make_part_10):
    """A DICOM file ends as instance, revision, training array and one announcement that names them."""
    await handle_uploads(await bench.upload("incoming/lung/a.dcm", make_part_10(maker.ct())), ports=bench.ports)
    await settle_when_quiet(bench)

    (ready,) = bench.published.of(SeriesReady)
    revision = Revision.model_validate_json(await bench.objects.get(ready.data.revision_key))
    array = np.load(io.BytesIO(await bench.objects.get(ready.data.array_key)))
    sidecar = json.loads(await bench.objects.get(ready.data.array_key.replace(".npy", ".json")))
    pixels = np.frombuffer(maker.ct().PixelData, "<u2").reshape(16, 16).astype(float)
    stored = dcmread(io.BytesIO(await bench.objects.get(revision.instances[0].key)))

    assert (ready.data.dataset, ready.data.n_instances, ready.data.modality) == ("lung", 1, "CT")
    assert ready.time == revision.created
    assert decode(ready.body()) == ready
    assert ready.data.geometry == revision.geometry
    assert revision.geometry.verdict == "single"
    assert revision.attributes["NumberOfSeriesRelatedInstances"] == 1
    assert stored.PatientID == "MRN-4711"
    assert array.shape == (1, 16, 16)
    assert array.dtype == np.float32
    assert np.allclose(array[0], np.clip((pixels - 1024) / 1000, -1, 1), atol=1e-5)
    assert sidecar["n"] == 1
    assert "MRN" not in json.dumps(sidecar)
    assert "Secret" not in body_of(revision).decode()


async def test_a_second_delivery_changes_nothing(bench, maker, make_part_10):
    """The same notification and the same settling message twice store the same keys and announce the same event."""
    event = await bench.upload("incoming/lung/a.dcm", make_part_10(maker.ct()))
    await handle_uploads(event, ports=bench.ports)
    await settle_when_quiet(bench)
    before = await bench.keys(series_prefix(maker.study_uid, maker.series_uid))
    await handle_uploads(event, ports=bench.ports)
    await settle_when_quiet(bench)

    first, second = bench.published.of(SeriesReady)

    assert await bench.keys(series_prefix(maker.study_uid, maker.series_uid)) == before
    assert len(before) == 2
    assert (first.id, first.time, first.data) == (second.id, second.time, second.data)


async def test_one_settling_message_per_bucket(bench, maker, make_part_10):
    """Instances of one series that come within a time bucket send one message, due after the quiet period."""
    bench.clock.shift_s = -(bench.clock().timestamp() % 60)  # the bucket begins now
    for number in range(3):
        upload = await bench.upload(f"incoming/lung/{number}.dcm", make_part_10(maker.ct(number)))
        await handle_uploads(upload, ports=bench.ports)

    (event,) = bench.published.of(SeriesSettling)

    assert bench.published.delays_s == [61]
    assert event.time - event.data.first_seen == timedelta(seconds=61)


async def test_a_lost_marker_costs_a_message_not_a_series(bench, maker, make_part_10):
    """A crash after the message and before its marker makes the next delivery send the message again."""
    event = await bench.upload("incoming/lung/a.dcm", make_part_10(maker.ct()))
    await handle_uploads(event, ports=bench.ports)
    for key in await bench.keys(f"settling/lung/{maker.study_uid}/"):
        await bench.objects.delete(key)
    await handle_uploads(event, ports=bench.ports)

    assert len(bench.published.of(SeriesSettling)) == 2


async def test_a_series_that_still_grows_waits(bench, maker, make_part_10):
    """A settling message that is due while the newest instance is younger than the quiet period is sent again."""
    await handle_uploads(await bench.upload("incoming/lung/a.dcm", make_part_10(maker.ct())), ports=bench.ports)
    (event,) = bench.published.of(SeriesSettling)
    bench.clock.shift_s = 30
    await handle_settling(event, ports=bench.ports)

    again = bench.published.of(SeriesSettling)[-1]

    assert not bench.published.of(SeriesReady)
    assert again.data == event.data
    assert 30 <= bench.published.delays_s[-1] <= 61


async def test_a_backlog_delays_settling_until_the_limit(bench, maker, make_part_10):
    """A message handled long after it was due is delayed again, but not beyond max_settle_s after its first."""
    await handle_uploads(await bench.upload("incoming/lung/a.dcm", make_part_10(maker.ct())), ports=bench.ports)
    (event,) = bench.published.of(SeriesSettling)
    bench.clock.shift_s = 61 + 65
    await handle_settling(event, ports=bench.ports)
    waiting = len(bench.published.of(SeriesReady))
    bench.clock.shift_s = 901
    await handle_settling(event, ports=bench.ports)

    assert waiting == 0
    assert len(bench.published.of(SeriesReady)) == 1


async def test_a_busy_queue_is_not_taken_for_a_quiet_series(bench, maker, make_part_10):
    """Where uploads take 40 s to be stored, the quiet period begins that much later."""
    upload = await bench.upload("incoming/lung/a.dcm", make_part_10(maker.ct()))
    bench.clock.shift_s = 40
    await handle_uploads(upload, ports=bench.ports)
    bench.clock.shift_s = 0  # S3 says that it was stored now
    event = bench.published.of(SeriesSettling)[-1]
    for bench.clock.shift_s in (63, 63 + 40):
        await handle_settling(event.model_copy(update={"time": bench.clock()}), ports=bench.ports)

        assert len(bench.published.of(SeriesReady)) == int(bench.clock.shift_s > 100)


async def test_a_late_instance_supersedes(bench, maker, make_part_10):
    """An instance that comes after its series settled makes a second revision, which names the first."""
    await handle_uploads(await bench.upload("incoming/lung/0.dcm", make_part_10(maker.ct(0))), ports=bench.ports)
    await settle_when_quiet(bench)
    await handle_uploads(await bench.upload("incoming/lung/1.dcm", make_part_10(maker.ct(1))), ports=bench.ports)
    await settle_when_quiet(bench)

    first, second = bench.published.of(SeriesReady)

    assert first.data.supersedes is None
    assert second.data.supersedes == first.data.digest
    assert second.data.n_instances == 2
    assert await bench.objects.exists(first.data.revision_key)


async def test_a_series_in_a_second_dataset_is_trained_on_there_too(bench, maker, make_part_10, make_zip):
    """The same file uploaded into another dataset changes no revision, and its array lies in both."""
    body = make_zip({"a.dcm": make_part_10(maker.ct())})
    for dataset in ("lung", "chest"):
        await handle_uploads(await bench.upload(f"incoming/{dataset}/study.zip", body), ports=bench.ports)

    first, second = bench.published.of(SeriesReady)
    other = first.data.array_key.replace("datasets/lung/", "datasets/chest/")

    assert first.id == second.id
    assert await bench.objects.get(other) == await bench.objects.get(first.data.array_key)
    assert await bench.objects.exists(other.replace(".npy", ".json"))


async def test_a_broken_file_goes_into_quarantine(bench, maker, make_part_10):
    """A file cut short is kept with its reason and announced at the time of its upload; nothing names its key."""
    body = make_part_10(maker.ct())[:-100]
    event = await bench.upload("incoming/lung/Jane Secretperson.dcm", body)
    await handle_uploads(event, ports=bench.ports)
    await handle_uploads(event, ports=bench.ports)

    first, second = bench.published.of(UploadRejected)
    reason = await bench.objects.get(first.data.quarantine_key)

    assert (first.id, first.time) == (second.id, event.objects[0].time)
    assert first.data.reason_code == "truncated"
    assert await bench.objects.get(f"quarantine/{first.data.object_sha256}/object") == body
    assert b"Jane" not in reason + first.body().encode()
    assert not bench.published.of(SeriesSettling)


async def test_a_changed_instance_conflicts(bench, maker, make_part_10):
    """Another data set under a SOPInstanceUID that is taken is refused, and the first stays."""
    await handle_uploads(await bench.upload("incoming/lung/a.dcm", make_part_10(maker.ct())), ports=bench.ports)
    changed = make_part_10(maker.ct(PatientComments="changed"))
    await handle_uploads(await bench.upload("incoming/lung/b.dcm", changed), ports=bench.ports)

    (rejected,) = bench.published.of(UploadRejected)

    assert rejected.data.reason_code == "conflicting_duplicate"
    assert len(await bench.keys(series_prefix(maker.study_uid, maker.series_uid))) == 1


async def test_of_two_data_sets_under_one_uid_that_come_together_one_stays(bench, maker, make_part_10, make_zip):
    """Members of an archive are taken at the same time; the second one to be stored is refused."""
    parts = [make_part_10(maker.ct(PatientComments=text)) for text in ("first", "second", "third")]
    body = make_zip({f"{number}.dcm": part for number, part in enumerate(parts)})
    await handle_uploads(await bench.upload("incoming/lung/a.zip", body), ports=bench.ports)
    stored = [key for key in await bench.keys(series_prefix(maker.study_uid, maker.series_uid)) if key.endswith(".dcm")]

    assert [one.data.reason_code for one in bench.published.of(UploadRejected)] == ["conflicting_duplicate"] * 2
    assert len(stored) == 1


async def test_a_repeat_of_an_instance_that_is_stored_is_no_conflict(bench, maker, make_part_10):
    """After two data sets under one UID were stored at the same moment, an event of either that comes again is done."""
    event = await bench.upload("incoming/lung/a.dcm", make_part_10(maker.ct()))
    await handle_uploads(event, ports=bench.ports)
    other = keys.instance(maker.study_uid, maker.series_uid, maker.ct().SOPInstanceUID, "0" * 16)
    await bench.objects.put(other, b"of another worker")
    await handle_uploads(event, ports=bench.ports)

    assert not bench.published.of(UploadRejected)


async def test_a_uid_that_begins_like_another_is_no_conflict(bench, maker, make_part_10):
    """1.2.3 and 1.2.3.4 are two instances, though one key begins like the other."""
    longer = maker.ct(1, SOPInstanceUID=f"{maker.ct().SOPInstanceUID}.4")
    await handle_uploads(await bench.upload("incoming/lung/b.dcm", make_part_10(longer)), ports=bench.ports)
    await handle_uploads(await bench.upload("incoming/lung/a.dcm", make_part_10(maker.ct())), ports=bench.ports)

    assert not bench.published.of(UploadRejected)
    assert len(await bench.keys(series_prefix(maker.study_uid, maker.series_uid))) == 2


async def test_two_zips_of_one_series_at_once_end_in_a_revision_of_all(bench, maker, make_part_10, make_zip):
    """Whoever settles last knows of the other's instances and of its revision; who comes too early comes again."""
    slices = [make_part_10(maker.ct(number)) for number in range(6)]
    events = [
        await bench.upload(f"incoming/lung/{name}.zip", make_zip({f"{i}.dcm": body for i, body in enumerate(some)}))
        for name, some in {"a": slices[:2], "b": slices[2:]}.items()
    ]
    other = replace(bench.ports, settling=KeyedLocks(), storing=KeyedLocks(), markers=KeyedLocks())

    async def delivered(event, ports):
        while True:
            try:
                return await handle_uploads(event, ports=ports)
            except Leased:
                await asyncio.sleep(0.1)

    await asyncio.gather(delivered(events[0], bench.ports), delivered(events[1], other))
    keys = await bench.keys(f"{series_prefix(maker.study_uid, maker.series_uid)}revisions/")
    revisions = [Revision.model_validate_json(await bench.objects.get(key)) for key in keys]

    assert [revision.supersedes for revision in revisions].count(None) == 1
    assert max(len(revision.instances) for revision in revisions) == 6


async def test_a_zip_settles_at_its_end(bench, maker, make_part_10, make_zip):
    """A zip is found by content; its images become a series at once, its junk is passed over, its bad member told."""
    body = make_zip(
        {
            "study/series/im0": make_part_10(maker.ct(0)),
            "study/series/im1": make_part_10(maker.ct(1)),
            "../../etc/im2": make_part_10(maker.ct(2)),
            "study/broken.dcm": make_part_10(maker.ct(3))[:-9],
            "study/strange": b"these are not the images you are looking for" * 10,
            "__MACOSX/._im0": b"junk",
            ".DS_Store": b"junk",
            "README.txt": b"junk",
            "autorun.inf": b"junk",
        }
    )
    await handle_uploads(await bench.upload("incoming/lung/study.bin", body), ports=bench.ports)

    (ready,) = bench.published.of(SeriesReady)
    rejections = bench.published.of(UploadRejected)
    rejected = sorted(event.data.reason_code for event in rejections)
    reasons = [json.loads(await bench.objects.get(event.data.quarantine_key)) for event in rejections]

    assert {reason["place"] for reason in reasons} == {"#3", "#4"}
    assert ready.data.n_instances == 3
    assert rejected == ["not_dicom", "truncated"]
    assert not bench.published.of(SeriesSettling)


@pytest.mark.parametrize(
    ("key", "dataset", "code"),
    [
        ("incoming/no spaces please/a.dcm", "default", "bad_dataset_name"),
        ("incoming/a-note-without-a-folder", "default", "not_dicom"),
        ("incoming/lung/empty", "lung", "not_dicom"),
    ],
)
async def test_what_cannot_be_taken_is_told(bench, key, dataset, code):
    """Each refused object has its reason code and its dataset."""
    body = b"" if key.endswith("empty") else b"plain text"
    await handle_uploads(await bench.upload(key, body), ports=bench.ports)

    (rejected,) = bench.published.of(UploadRejected)

    assert (rejected.data.dataset, rejected.data.reason_code) == (dataset, code)


async def test_what_is_no_upload_is_passed_over(bench):
    """Other prefixes, directory markers and notifications without objects are done without a word."""
    await bench.objects.put("incoming/lung/", b"")
    await handle_uploads(bench.notification("incoming/lung/", "studies/1/2/3.dcm"), ports=bench.ports)
    await handle_uploads(bench.notification(), ports=bench.ports)

    assert bench.published.events == []


async def test_a_gone_object_is_unprocessable_and_loses_no_other(bench, maker, make_part_10):
    """A notification about an object that is gone can never work, but its other objects are taken."""
    await bench.objects.put("incoming/lung/here.dcm", make_part_10(maker.ct()))
    event = bench.notification("incoming/lung/gone.dcm", "incoming/lung/here.dcm")
    with pytest.raises(Unprocessable) as raised:
        await handle_uploads(event, ports=bench.ports)

    assert raised.value.reason_code == "object_gone"
    assert len(bench.published.of(SeriesSettling)) == 1


async def test_a_second_dataset_needs_no_array_of_the_first(bench, maker, make_part_10, make_zip):
    """Its array is made from the instances, by its own rules, whatever became of the first one's."""
    body = make_zip({"a.dcm": make_part_10(maker.ct())})
    await handle_uploads(await bench.upload("incoming/lung/study.zip", body), ports=bench.ports)
    (ready,) = bench.published.of(SeriesReady)
    await bench.objects.delete(ready.data.array_key)

    await handle_uploads(await bench.upload("incoming/chest/study.zip", body), ports=bench.ports)

    assert len(await bench.keys(f"datasets/chest/{maker.series_uid}.")) == 2


async def test_too_large_an_object_is_refused_where_it_lies(bench, maker, make_part_10):
    """An object above the limit is not moved, and is found in quarantine by its hash like any other."""
    ports = replace(bench.ports, settings=bench.ports.settings.model_copy(update={"max_upload_bytes": 100}))
    body = make_part_10(maker.ct())
    await handle_uploads(await bench.upload("incoming/lung/a.dcm", body), ports=ports)

    (rejected,) = bench.published.of(UploadRejected)
    sha256 = hashlib.sha256(body).hexdigest()

    assert (rejected.data.reason_code, rejected.data.object_sha256) == ("too_large", sha256)
    assert await bench.keys(f"quarantine/{sha256}/") == [f"quarantine/{sha256}/reason.json"]
    assert await bench.objects.exists("incoming/lung/a.dcm")


async def test_an_object_of_just_the_limit_is_taken(bench, maker, make_part_10):
    """The limit is the largest size that is taken."""
    body = make_part_10(maker.ct())
    limited = bench.ports.settings.model_copy(update={"max_upload_bytes": len(body)})
    await handle_uploads(await bench.upload("incoming/lung/a.dcm", body), ports=replace(bench.ports, settings=limited))

    assert bench.published.of(UploadRejected) == []


async def test_a_series_without_images_has_no_array(bench, maker, make_part_10):
    """A structured report passes through to routing, without geometry and without array."""
    report = maker.ct(Modality="SR", SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
    for keyword in ("PixelData", "Rows", "Columns", "BitsAllocated"):
        delattr(report, keyword)
    await handle_uploads(await bench.upload("incoming/lung/sr.dcm", make_part_10(report)), ports=bench.ports)
    await settle_when_quiet(bench)

    (ready,) = bench.published.of(SeriesReady)
    revision = Revision.model_validate_json(await bench.objects.get(ready.data.revision_key))

    assert (ready.data.modality, ready.data.array_key, revision.geometry) == ("SR", None, None)


async def test_two_workers_that_settle_at_once_agree(bench, maker, make_part_10):
    """Of two revisions made at the same moment one is stored, and both workers announce that one."""
    await handle_uploads(await bench.upload("incoming/lung/a.dcm", make_part_10(maker.ct())), ports=bench.ports)
    event = bench.published.of(SeriesSettling)[-1]
    bench.clock.shift_s = 62
    await asyncio.gather(*(handle_settling(event, ports=bench.ports) for _ in range(2)))

    first, second = bench.published.of(SeriesReady)

    assert (first.id, first.time) == (second.id, second.time)
    assert len(await bench.keys(f"{series_prefix(maker.study_uid, maker.series_uid)}revisions/")) == 1


async def test_a_real_study_as_a_zip(bench, real_data, make_zip):
    """54 slices of a tilted phantom in one zip are one series, with its tilt as a warning and its slices in order."""
    folder = real_data / "ct_phantom_philips_tilt54"
    body = make_zip({f"DICOM/{path.name}": path.read_bytes() for path in folder.iterdir()})
    await handle_uploads(await bench.upload("incoming/phantom/study.zip", body), ports=bench.ports)

    (ready,) = bench.published.of(SeriesReady)
    revision = Revision.model_validate_json(await bench.objects.get(ready.data.revision_key))
    array = np.load(io.BytesIO(await bench.objects.get(ready.data.array_key)))

    assert not bench.published.of(UploadRejected)
    assert ready.data.n_instances == 54
    assert ready.data.warnings == ("gantry_tilt",)
    assert revision.geometry.tilt_deg == pytest.approx(-18.5, abs=0.05)
    assert array.shape == (54, 16, 16)
    assert np.abs(array).max() <= 1


async def test_no_patient_reaches_a_log(bench, maker, make_part_10, capsys):
    """Neither a name, an id nor an upload key is in any log line of a good and a bad upload."""
    good, bad = make_part_10(maker.ct(0)), make_part_10(maker.ct(1))[:-50]
    await handle_uploads(await bench.upload("incoming/lung/Secretperson.dcm", good), ports=bench.ports)
    await handle_uploads(await bench.upload("incoming/lung/Secretperson2.dcm", bad), ports=bench.ports)
    await settle_when_quiet(bench)
    printed = capsys.readouterr()

    assert "series.ready" in printed.out + printed.err
    assert "Secretperson" not in printed.out + printed.err
    assert "MRN-4711" not in printed.out + printed.err
