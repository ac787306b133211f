"""What operators do works over the services' own store and queues, as a portal has them, without the command line."""

import asyncio
import hashlib
import json
import uuid
from datetime import UTC, datetime

import pytest

from shared.messages import InferenceTask, SeriesRef, TrainingRequest
from shared.objects import ObjectStore
from shared.operations import dead_letters, quarantine, studies, trainings
from shared.operations.refused import Refused, WrongUsage

NOW = datetime(2026, 11, 2, tzinfo=UTC)


@pytest.fixture
def objects(aws, local_aws) -> ObjectStore:
    return ObjectStore(aws.s3, local_aws.bucket)


class Remembered:
    """A `Publish` that keeps what it is given."""

    def __init__(self) -> None:
        self.events = []

    async def __call__(self, event, *, delay_s=0) -> None:
        self.events.append(event)


async def refused(objects, dataset) -> str:
    """Put an object into quarantine, as ingest does, and return its hash."""
    body = uuid.uuid4().hex.encode()
    sha256 = hashlib.sha256(body).hexdigest()
    reason = {"reason_code": "not_dicom", "place": "", "dataset": dataset, "time": NOW.isoformat()}
    await objects.put(f"quarantine/{sha256}/object", body)
    await objects.put(f"quarantine/{sha256}/reason.json", json.dumps(reason | {"upload_key_sha256": "0"}).encode())
    return sha256


async def test_a_refusal_is_found_and_released(objects):
    """A released object lies where ingest takes it in, and is listed only where one asks for what was released."""
    dataset = f"q-{uuid.uuid4().hex[:8]}"
    sha256 = await refused(objects, dataset)
    (found,) = await quarantine.chosen([sha256[:20]], released=False, objects=objects)
    key = await quarantine.release(found, objects=objects, now=NOW)
    waiting = await quarantine.chosen([], dataset=dataset, released=False, objects=objects)
    (released,) = await quarantine.chosen([], dataset=dataset, released=True, objects=objects)

    assert key == f"incoming/{dataset}/released/{sha256}"
    assert hashlib.sha256(await objects.get(key)).hexdigest() == sha256
    assert (waiting, released.released) == ([], NOW.isoformat())


async def test_what_is_not_in_quarantine_is_refused(objects):
    """A hash that is none, one of nothing, and an object that is gone are told apart for the person who asked."""
    sha256 = await refused(objects, "d")
    (found,) = await quarantine.chosen([sha256], released=False, objects=objects)
    await objects.delete(f"quarantine/{sha256}/object")

    with pytest.raises(WrongUsage):
        await quarantine.chosen(["xyz"], released=True, objects=objects)
    with pytest.raises(Refused, match="no objects in quarantine begin with"):
        await quarantine.chosen(["0" * 64], released=True, objects=objects)
    with pytest.raises(Refused, match="is gone"):
        await quarantine.release(found, objects=objects, now=NOW)


async def test_dead_letters_are_told_and_redriven(aws, own_queues):
    """What is in a dead-letter queue is told by reason and stays there; a redrive brings it back to its queue."""
    place = await dead_letters.place_of("reporting", own_queues.reporting_queue, sqs=aws.sqs)
    for reason in ("not_json", "bug", "bug"):
        attributes = {"reason_code": {"DataType": "String", "StringValue": reason}}
        await aws.sqs.send_message(QueueUrl=place.dead_url, MessageBody=reason, MessageAttributes=attributes)
    found = await dead_letters.listed(place, sqs=aws.sqs)
    await asyncio.sleep(1.5)  # what is younger than the look at the queue would count as failed again
    place = await dead_letters.place_of("reporting", own_queues.reporting_queue, sqs=aws.sqs)
    moving = dead_letters.Redrive(place=place, sqs=aws.sqs, reason="bug")
    await moving.run()
    left = await dead_letters.listed(place, sqs=aws.sqs)

    assert {row["reason"]: row["count"] for row in found["reasons"]} == {"bug": 2, "not_json": 1}
    assert (moving.n_moved, moving.n_left, moving.by_reason) == (2, 1, {"bug": 2})
    assert [row["reason"] for row in left["reasons"]] == ["not_json"]


async def test_what_failed_of_a_study_is_asked_for_once_more(objects):
    """A failure that was not followed by a result is another event, the same at each retry of the one attempt."""
    study = f"1.2.{uuid.uuid4().int}"[:60]
    series = SeriesRef(study_uid=study, series_uid=f"{study}.1", digest="f" * 32, revision_key="none")
    failed, mended = (InferenceTask(map=name, map_digest="e" * 32, inputs=(series,)) for name in ("bad", "mended"))
    for task in (failed, mended):
        prefix = f"results/{study}/{series.series_uid}/{series.digest}/{task.map}@{task.map_digest}"
        told = {"attempt": task.map, "reason_code": "deadline", "time": NOW.isoformat()}
        await objects.put(f"{prefix}/failure.json", json.dumps(task.model_dump() | told).encode())
    await objects.put(f"{prefix}/result.json", json.dumps(task.model_dump() | {"time": NOW.isoformat()}).encode())
    publish = Remembered()
    asked = [await studies.retry(study, objects=objects, publish=publish, now=NOW) for _ in range(2)]
    first, second = publish.events

    assert [list(one) for one in asked] == [[(series.series_uid, "bad")]] * 2
    assert (first.data, first.id) == (second.data, second.id) == (failed, first.id)
    with pytest.raises(Refused, match="is not known"):
        await studies.retry("1.2.3", objects=objects, publish=publish, now=NOW)


async def test_a_training_is_asked_for_where_it_can_be_made(objects):
    """A request without data, or under an id that another request has, is refused before it is sent."""
    dataset = f"d-{uuid.uuid4().hex[:8]}"
    request = TrainingRequest(request_id=dataset, dataset=dataset)
    with pytest.raises(Refused, match="no training data"):
        await trainings.check(request, objects=objects)
    await objects.put(f"datasets/{dataset}/a.npy", b"")
    await trainings.check(request, objects=objects)
    publish = Remembered()
    await trainings.ask(request, publish=publish, now=NOW)
    options = {"request": request.model_dump(mode="json")}
    await objects.put(f"models/{dataset}/options.json", json.dumps(options).encode())
    await trainings.check(request, objects=objects)

    assert [(event.subject, event.data) for event in publish.events] == [(dataset, request)]
    with pytest.raises(Refused, match="made before, with another max_rounds"):
        await trainings.check(request.model_copy(update={"max_rounds": 1}), objects=objects)
