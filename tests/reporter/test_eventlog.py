import asyncio
import uuid
from datetime import timedelta

import pytest

from services.reporter.eventlog import EventLog
from shared.errors import Unavailable
from shared.messages import decode
from shared.objects import ObjectStore
from tests.reporter.month import MAY, series_ready

NEVER_S = 3600.0


async def keys(objects) -> list[str]:
    return [summary.key async for summary in objects.list("events/")]


async def events_of(log, month) -> list:
    return [decode(line.decode()) async for lines in log.read(month) for line in lines.splitlines()]


async def begun(log, *events) -> list[asyncio.Task]:
    """Start appends that wait for a write."""
    tasks = [asyncio.create_task(log.append(event)) for event in events]
    await asyncio.sleep(0)  # one turn of the loop: each has joined the batch
    return tasks


async def test_fifty_at_once_are_one_write_per_date(objects):
    """50 concurrent appends of two dates return when all are stored, in two objects."""
    log = EventLog(objects, max_events=100, max_wait_s=0.1)
    sent = [series_ready(number, time=MAY + timedelta(days=number % 2)) for number in range(50)]
    await asyncio.gather(*(log.append(event) for event in sent))
    stored = await keys(objects)

    assert [key.split("/")[1] for key in stored] == ["date=2026-05-01", "date=2026-05-02"]
    assert {event.id for event in await events_of(log, "2026-05")} == {event.id for event in sent}


async def test_a_full_batch_does_not_wait(objects):
    """With the batch full the write begins at once, and the events beyond it begin the next batch."""
    log = EventLog(objects, max_events=4, max_wait_s=NEVER_S)
    tasks = await begun(log, *(series_ready(number) for number in range(10)))
    done, waiting = await asyncio.wait(tasks, timeout=5, return_when=asyncio.FIRST_COMPLETED)
    while len(done) < 8:
        some, waiting = await asyncio.wait(waiting, timeout=5, return_when=asyncio.FIRST_COMPLETED)
        assert some, "a full batch was not written"
        done |= some
    await log.flush()
    await asyncio.gather(*waiting)

    assert len(await keys(objects)) == 3
    assert len(await events_of(log, "2026-05")) == 10


async def test_flush_writes_what_waits(objects):
    """After flush, everything appended before is stored, and those who waited have returned."""
    log = EventLog(objects, max_events=100, max_wait_s=NEVER_S)
    (task,) = await begun(log, series_ready(1))
    await log.flush()
    await asyncio.wait_for(task, 1)

    assert len(await events_of(log, "2026-05")) == 1


async def test_a_failed_write_fails_everyone_and_can_be_repeated(aws):
    """Without its bucket, all who wait get Unavailable; the same events are stored once the bucket is there."""
    bucket = f"later-{uuid.uuid4()}"
    objects = ObjectStore(aws.s3, bucket)
    log = EventLog(objects, max_events=100, max_wait_s=0.02)
    sent = [series_ready(number) for number in range(7)]
    ends = await asyncio.gather(*(log.append(event) for event in sent), return_exceptions=True)
    await aws.s3.create_bucket(Bucket=bucket)
    await asyncio.gather(*(log.append(event) for event in sent))

    assert [type(end) for end in ends] == [Unavailable] * 7
    assert len(await events_of(log, "2026-05")) == 7


async def test_flush_tells_of_a_failed_write(aws):
    """A flush whose write fails raises as well: a report must not be made without those events."""
    log = EventLog(ObjectStore(aws.s3, f"absent-{uuid.uuid4()}"), max_events=100, max_wait_s=NEVER_S)
    (task,) = await begun(log, series_ready(1))
    with pytest.raises(Unavailable):
        await log.flush()
    with pytest.raises(Unavailable):
        await task


async def test_a_refused_write_is_no_bug_of_the_message(objects):
    """Whatever S3 says of the write, a denied one too, the events' messages are kept for later."""

    class Denied(ObjectStore):
        async def put(self, key, body):
            raise PermissionError(key, len(body))

    log = EventLog(Denied(objects._s3, objects.bucket), max_events=1, max_wait_s=0)
    with pytest.raises(Unavailable, match="PermissionError"):
        await log.append(series_ready(1))


async def test_a_cancelled_handler_leaves_the_others_their_write(objects):
    """One of those who wait is cancelled; the batch is written all the same."""
    log = EventLog(objects, max_events=100, max_wait_s=NEVER_S)
    first, second = await begun(log, series_ready(1), series_ready(2))
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await log.flush()
    await second

    assert first.cancelled()
    assert len(await events_of(log, "2026-05")) == 2


async def test_only_the_month_is_read(objects):
    """Reading May leaves June alone."""
    log = EventLog(objects, max_events=1, max_wait_s=0)
    await log.append(series_ready(1))
    await log.append(series_ready(2, time=MAY + timedelta(days=31)))

    assert [event.data.study_uid for event in await events_of(log, "2026-05")] == ["1.2.1"]
    assert [event.data.study_uid for event in await events_of(log, "2026-06")] == ["1.2.2"]


async def test_more_objects_than_are_read_at_once(objects):
    """A month of many objects is read whole."""
    log = EventLog(objects, max_events=1, max_wait_s=0)
    await asyncio.gather(*(log.append(series_ready(number)) for number in range(40)))

    assert len(await keys(objects)) == 40
    assert {event.data.study_uid for event in await events_of(log, "2026-05")} == {f"1.2.{n}" for n in range(40)}
