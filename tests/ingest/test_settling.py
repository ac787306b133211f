"""When a series settles, in the time of the test: how often, for which dataset, and what ends it for good."""

import hashlib
import itertools
import math
import random
import resource
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from heapq import heappop, heappush

import pytest

from services.ingest.decoder import Decoder
from services.ingest.handler import handle_uploads
from services.ingest.protocol import Describe, Described
from services.ingest.stable_series import expect_settling, handle_settling
from shared import keys
from shared.child import ChildFailed
from shared.errors import Unprocessable
from shared.messages import SeriesReady, SeriesSettling
from shared.objects import ObjectMissing, ObjectStore, ObjectSummary

START = datetime(2026, 5, 1, tzinfo=UTC)


class TimedStore(ObjectStore):
    """Real S3, whose objects are as old as the test's clock says."""

    def __init__(self, store, clock):
        super().__init__(store._s3, store.bucket)
        self.clock, self.times, self.lost = clock, {}, lambda key: False

    async def _put(self, key, body, *kind, **condition):
        if self.lost(key):
            return ""
        etag = await super()._put(key, body, *kind, **condition)
        self.times[key] = self.clock()
        return etag

    async def list(self, prefix) -> AsyncIterator[ObjectSummary]:
        async for item in super().list(prefix):
            yield replace(item, last_modified=self.times[item.key].replace(microsecond=0))


@pytest.mark.parametrize("markers_are_lost", [False, True])
async def test_a_series_that_grows_settles_now_and_then(bench, maker, make_part_10, markers_are_lost):
    """One revision per max_settle_s while it grows, and one of all when it is quiet, though markers get lost."""
    now_s, turn = 0.0, itertools.count()
    store = TimedStore(bench.objects, lambda: START + timedelta(seconds=now_s))
    if markers_are_lost:  # of every third bucket
        store.lost = lambda key: key.startswith("settling/lung/") and int(key.rpartition("/")[2]) % 180 == 0
    settings = bench.ports.settings.model_copy(update={"max_settle_s": 300})
    ports = replace(bench.ports, objects=store, clock=store.clock, settings=settings)
    work = [(30.0 * number, next(turn), make_part_10(maker.ct(number))) for number in range(30)]
    sent = 0
    while work:
        now_s, number, what = heappop(work)
        if isinstance(what, bytes):
            uid = maker.ct(number).SOPInstanceUID
            await store.put(keys.instance(maker.study_uid, maker.series_uid, uid, "0" * 16), what)
            await expect_settling("lung", maker.study_uid, maker.series_uid, ports=ports)
        else:
            await handle_settling(what, ports=ports)
        for event, delay_s in zip(bench.published.events[sent:], bench.published.delays_s[sent:], strict=True):
            if isinstance(event, SeriesSettling):
                heappush(work, (now_s + delay_s, next(turn), event))
        sent = len(bench.published.events)

    ready = bench.published.of(SeriesReady)
    waits = [later.time - earlier.time for earlier, later in itertools.pairwise(ready)]

    assert [event.data.supersedes for event in ready[1:]] == [event.data.digest for event in ready[:-1]]
    assert ready[-1].data.n_instances == 30
    assert ready[-1].time < START + timedelta(seconds=900 + 130)
    assert len(ready) == 3
    assert min(waits[:-1]) >= timedelta(seconds=300)
    assert len(bench.published.of(SeriesSettling)) < 30


async def test_each_dataset_of_a_series_gets_its_array(bench, maker, make_part_10):
    """One series uploaded into two datasets within a quiet period ends with an array in both."""
    body = make_part_10(maker.ct())
    for dataset in ("lung", "chest"):
        await handle_uploads(await bench.upload(f"incoming/{dataset}/a.dcm", body), ports=bench.ports)
    bench.clock.shift_s = 62
    for event in bench.published.of(SeriesSettling):
        await handle_settling(event, ports=bench.ports)

    arrays = [await bench.keys(f"datasets/{dataset}/{maker.series_uid}.") for dataset in ("lung", "chest")]

    assert [len(keys) for keys in arrays] == [2, 2]
    assert len({event.id for event in bench.published.of(SeriesReady)}) == 1


async def test_a_revision_is_as_old_as_its_listing(bench, maker, make_part_10, make_zip):
    """A worker that computes for long makes no revision that is newer than one listed meanwhile."""

    class Slow(Decoder):
        async def series_call(self, request):
            bench.clock.shift_s += 100
            return await super().series_call(request)

    decoder = Slow(bench.ports.settings)
    started = bench.clock()
    upload = await bench.upload("incoming/lung/a.zip", make_zip({"a": make_part_10(maker.ct())}))
    await handle_uploads(upload, ports=replace(bench.ports, decoder=decoder))
    await decoder.stop()

    (ready,) = bench.published.of(SeriesReady)

    assert bench.clock() - started > timedelta(seconds=200)
    assert ready.time - started < timedelta(seconds=100)


async def test_a_series_that_cannot_be_described_has_a_reason(bench, maker, make_part_10):
    """Its message goes to the dead letters by its reason, not as a bug, and its instances stay."""
    await handle_uploads(await bench.upload("incoming/lung/a.dcm", make_part_10(maker.ct())), ports=bench.ports)
    (event,) = bench.published.of(SeriesSettling)
    decoder = Decoder(bench.ports.settings.model_copy(update={"series_deadline_s": 0.001}))
    bench.clock.shift_s = 62
    with pytest.raises(Unprocessable) as raised:
        await handle_settling(event, ports=replace(bench.ports, decoder=decoder))
    await decoder.stop()

    assert raised.value.reason_code == "series_deadline"
    assert len(await bench.keys(f"studies/{maker.study_uid}/")) == 1


async def test_a_series_that_cannot_be_described_keeps_no_other_of_its_zip(bench, maker, make_part_10, make_zip):
    """The other series of the upload are announced before its message goes to the dead letters."""

    class Fragile(Decoder):
        async def series_call(self, request):
            if self.fails:
                self.fails = False
                raise ChildFailed("crashed")
            return await super().series_call(request)

    decoder = Fragile(bench.ports.settings)
    decoder.fails = True
    other = type(maker)(study_uid=maker.study_uid)
    body = make_zip({"a": make_part_10(maker.ct()), "b": make_part_10(other.ct())})
    upload = await bench.upload("incoming/lung/a.zip", body)
    with pytest.raises(Unprocessable) as raised:
        await handle_uploads(upload, ports=replace(bench.ports, decoder=decoder))
    await decoder.stop()

    (ready,) = bench.published.of(SeriesReady)

    assert raised.value.reason_code == "series_crashed"
    assert ready.data.series_uid == max(maker.series_uid, other.series_uid)


async def test_a_series_may_take_more_processor_time_than_a_file(bench, maker, make_part_10, tmp_path):
    """The child that reads series runs under its own limit."""
    path = tmp_path / "a.dcm"
    path.write_bytes(make_part_10(maker.ct()))
    decoder = Decoder(bench.ports.settings.model_copy(update={"decode_cpu_s": 50, "series_cpu_s": 500}))
    await decoder.normalise(path, tmp_path / "out")
    await decoder.series_call(Describe([str(path)]))
    pids = [children.all[0].pid for children in (decoder._files, decoder._series)]
    file_s, series_s = (resource.prlimit(pid, resource.RLIMIT_CPU)[0] for pid in pids)
    await decoder.stop()

    assert 50 < file_s < 100
    assert 500 < series_s < 550


class MemoryStore(ObjectStore):
    """Objects in memory, as old as the test's clock says; counts how often a series was listed."""

    def __init__(self, clock):
        super().__init__(None, "bucket")
        self.clock, self.stored, self.n_listings = clock, {}, 0

    async def get_with_etag(self, key):
        if key not in self.stored:
            raise ObjectMissing
        body = self.stored[key][0]
        return body, hashlib.sha256(body).hexdigest()

    async def exists(self, key):
        return key in self.stored

    async def put(self, key, body):
        self.stored[key] = body, self.clock().replace(microsecond=0)
        return ""

    async def put_if_absent(self, key, body):
        free = key not in self.stored
        if free:
            await self.put(key, body)
        return free

    async def put_if_match(self, key, body, etag):
        if (await self.get_with_etag(key))[1] != etag:
            return None
        await self.put(key, body)
        return (await self.get_with_etag(key))[1]

    async def download(self, key, path):
        path.write_bytes(self.stored[key][0])

    async def list(self, prefix) -> AsyncIterator[ObjectSummary]:
        self.n_listings += prefix.startswith("studies/") and prefix.count("/") == 3
        for key in sorted(key for key in self.stored if key.startswith(prefix)):
            body, modified = self.stored[key]
            yield ObjectSummary(key, len(body), modified, "")


class Describer:
    """A series of no pictures: what is told of it is not what is tested."""

    async def series_call(self, request):
        assert isinstance(request, Describe)
        return Described({}, None, [], n_grey=0, deidentified=False)


@pytest.mark.parametrize(("duration_s", "began_s"), [(290, 59), (840, 0)])
async def test_five_thousand_instances_settle_once(bench, maker, duration_s, began_s):
    """A series of 5,000 that come one by one, in any order, is listed duration / quiet period + 2 times, not more."""
    rng = random.Random(duration_s)  # noqa: S311 - an order, no secret
    now_s, turn = 0.0, itertools.count()
    store = MemoryStore(lambda: START + timedelta(seconds=began_s + now_s))
    ports = replace(bench.ports, objects=store, clock=store.clock, decoder=Describer())
    numbers = rng.sample(range(5000), 5000)
    work = [(duration_s * index / 5000, next(turn), number) for index, number in enumerate(numbers)]
    sent = 0
    while work:
        now_s, _, what = heappop(work)
        if isinstance(what, int):
            uid = f"{maker.series_uid[:50]}.{what}"
            await store.put(keys.instance(maker.study_uid, maker.series_uid, uid, "0" * 16), b"")
            await expect_settling("lung", maker.study_uid, maker.series_uid, ports=ports)
        else:
            await handle_settling(what, ports=ports)
        for event, delay_s in zip(bench.published.events[sent:], bench.published.delays_s[sent:], strict=True):
            if isinstance(event, SeriesSettling):
                heappush(work, (now_s + delay_s, next(turn), event))
        sent = len(bench.published.events)
    (ready,) = bench.published.of(SeriesReady)

    assert ready.data.n_instances == 5000
    assert store.n_listings <= math.ceil(duration_s / ports.settings.quiet_s) + 2


async def test_a_complete_folder_settles_at_once(bench, maker, make_part_10):
    """`_COMPLETE` settles what lies below its folder, also what no notification has told of yet, and nothing else."""
    other = type(maker)()
    events = [
        await bench.upload(f"incoming/lung/scan/deep/{n}.dcm", make_part_10(maker.ct(n))) for n in reversed(range(3))
    ]
    await handle_uploads(await bench.upload("incoming/lung/scan2/a.dcm", make_part_10(other.ct())), ports=bench.ports)
    await handle_uploads(events[0], ports=bench.ports)
    await handle_uploads(await bench.upload("incoming/lung/scan/_COMPLETE", b""), ports=bench.ports)
    (ready,) = bench.published.of(SeriesReady)
    for event in events:  # those that were late
        await handle_uploads(event, ports=bench.ports)
    bench.clock.shift_s = 62
    for event in bench.published.of(SeriesSettling):
        await handle_settling(event, ports=bench.ports)
    later = [event for event in bench.published.of(SeriesReady) if event.data.series_uid == maker.series_uid]

    assert (ready.data.series_uid, ready.data.n_instances) == (maker.series_uid, 3)
    assert {event.id for event in later} == {ready.id}
    assert len(await bench.keys(f"studies/{maker.study_uid}/{maker.series_uid}/revisions/")) == 1


async def test_an_instance_after_complete_is_a_late_one(bench, maker, make_part_10):
    """What comes into a complete folder nevertheless makes a new revision when it is quiet."""
    await bench.upload("incoming/lung/done/0.dcm", make_part_10(maker.ct(0)))
    await handle_uploads(await bench.upload("incoming/lung/done/_COMPLETE", b""), ports=bench.ports)
    late = await bench.upload("incoming/lung/done/1.dcm", make_part_10(maker.ct(1)))
    await handle_uploads(late, ports=bench.ports)
    bench.clock.shift_s = 62
    await handle_settling(bench.published.of(SeriesSettling)[-1], ports=bench.ports)
    first, second = bench.published.of(SeriesReady)

    assert (first.data.n_instances, second.data.n_instances) == (1, 2)
    assert second.data.supersedes == first.data.digest


async def test_a_dataset_is_never_complete(bench, maker, make_part_10):
    """The marker is about a folder of a dataset: all that was ever uploaded into one is not read again."""
    await bench.upload("incoming/whole/a.dcm", make_part_10(maker.ct()))
    for key in ("incoming/whole/_COMPLETE", "incoming/_COMPLETE"):
        await handle_uploads(await bench.upload(key, b""), ports=bench.ports)

    assert bench.published.events == []
