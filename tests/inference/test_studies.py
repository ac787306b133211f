"""MAPs that read a study as a whole: when it counts as settled, what they are given, and what supersedes what."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from pydicom.uid import generate_uid

from services.inference import stable_studies
from services.inference.handler import infer, route
from services.inference.records import Routing, StudyRouting, result_prefix, routing_prefix
from services.inference.stable_studies import Quiet, settle
from shared.errors import Unprocessable
from shared.messages import InferenceCompleted, InferenceRequested, InferenceSkipped, StudySettling

QUIET = Quiet(quiet_s=60, max_settle_s=600)

pytestmark = pytest.mark.asyncio(loop_scope="session")


class Clock:
    """Tells the time that a test says."""

    def __init__(self):
        self.now = datetime.now(UTC)

    def __call__(self):
        return self.now

    def pass_s(self, seconds):
        self.now += timedelta(seconds=seconds)


class Delayed:
    """A `Publish` that remembers each event with its delay."""

    def __init__(self):
        self.sent = []

    async def __call__(self, event, *, delay_s=0):
        self.sent.append((event, delay_s))

    def of(self, kind):
        return [event for event, _ in self.sent if isinstance(event, kind)]


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def publish():
    return Delayed()


@pytest.fixture
def given(worker, clock, publish):
    """What the handlers of a worker are given whose one MAP reads CT studies as a whole."""
    found = worker.maps["capture"]
    maps = {"capture": replace(found, route=found.route.model_copy(update={"level": "study"}))}
    return {"objects": worker.objects, "publish": publish, "maps": maps, "clock": clock, "quiet": QUIET}


@pytest.fixture
def study_uid():
    return generate_uid()


async def routing_of(worker, event):
    return Routing.model_validate_json(await worker.objects.get(f"{routing_prefix(event.data)}routing.json"))


async def test_the_series_of_a_study_bring_one_message_per_bucket(worker, given, clock, publish, study_uid):
    """Each series says that a whole study is to be looked at; within a bucket of time that is one delayed message."""
    clock.now = clock.now.replace(second=1)
    for _ in range(2):
        revision = await worker.store_series(StudyInstanceUID=study_uid)
        await route(worker.ready(revision), **given)
    clock.pass_s(60)
    await route(worker.ready(revision), **given)
    events = publish.of(StudySettling)

    assert [event.data.study_uid for event in events] == [study_uid] * 2
    assert len({event.data.bucket for event in events}) == 2
    assert all(delay_s > QUIET.quiet_s for _, delay_s in publish.sent)
    assert (await routing_of(worker, worker.ready(revision))).study_maps == ("capture",)
    assert publish.of(InferenceSkipped) == []


async def test_a_series_that_no_map_takes_brings_none(worker, given, publish, study_uid):
    """A study is only looked at where a MAP wants it."""
    revision = await worker.store_series(StudyInstanceUID=study_uid, Modality="MR")
    await route(worker.ready(revision), **given)

    assert [type(event) for event, _ in publish.sent] == [InferenceSkipped]


async def test_a_quiet_study_becomes_one_request_for_all_its_series_that_meet_the_conditions(
    worker, given, clock, publish, study_uid
):
    """The newest revision of each is an input; a repeat asks by the same event; the MAP runs once on all of them."""
    first = await worker.store_series(StudyInstanceUID=study_uid)
    second = await worker.store_series(StudyInstanceUID=study_uid)
    await worker.store_series(StudyInstanceUID=study_uid, Modality="MR")
    newer = second.model_copy(
        update={"digest": "e" * 32, "supersedes": second.digest, "created": second.created + timedelta(hours=1)}
    )
    await worker.objects.put(newer.key, newer.body())
    await route(worker.ready(first), **given)
    (settling,) = publish.of(StudySettling)
    clock.pass_s(120)
    await settle(settling, **given)
    await settle(settling, **given)
    requested, repeated = publish.of(InferenceRequested)
    await infer(requested, **(worker.for_infer | {"maps": given["maps"]}))
    (done,) = worker.publish.events

    assert requested == repeated
    assert {(one.series_uid, one.digest) for one in requested.data.inputs} == {
        (first.series_uid, first.digest),
        (newer.series_uid, newer.digest),
    }
    assert isinstance(done, InferenceCompleted)
    assert done.data.inputs == requested.data.inputs
    assert done.data.result_key.startswith(f"results/{study_uid}/study/")


async def test_a_study_that_is_not_quiet_is_looked_at_later(worker, given, clock, publish, study_uid):
    """The same message goes out again, with what is missing to the quiet period, and nothing is asked for."""
    revision = await worker.store_series(StudyInstanceUID=study_uid)
    await route(worker.ready(revision), **given)
    (settling,) = publish.of(StudySettling)
    clock.pass_s(30)
    await settle(settling, **given)
    again, delay_s = publish.sent[-1]

    assert again.data == settling.data
    assert 30 <= delay_s <= 33
    assert publish.of(InferenceRequested) == []


async def test_a_study_with_a_series_that_has_not_settled_waits_for_it_but_not_for_ever(
    worker, given, clock, publish, study_uid
):
    """Instances without a revision will bring one; after `max_settle_s` the study is taken as it is."""
    revision = await worker.store_series(StudyInstanceUID=study_uid)
    await route(worker.ready(revision), **given)
    (settling,) = publish.of(StudySettling)
    await worker.objects.put(f"studies/{study_uid}/1.2.3/1.2.3.4.{'a' * 16}.dcm", b"")
    clock.pass_s(300)
    await settle(settling, **given)
    asked_early = publish.of(InferenceRequested)
    clock.pass_s(400)
    await settle(settling, **given)
    (requested,) = publish.of(InferenceRequested)

    assert asked_early == []
    assert [one.series_uid for one in requested.data.inputs] == [revision.series_uid]


async def test_of_two_messages_the_older_leaves_the_study_to_the_newer(worker, given, clock, publish, study_uid):
    """Two buckets' messages do not both ask."""
    revision = await worker.store_series(StudyInstanceUID=study_uid)
    await route(worker.ready(revision), **given)
    clock.pass_s(61)
    await route(worker.ready(revision), **given)
    older, newer = publish.of(StudySettling)
    clock.pass_s(120)
    await settle(older, **given)
    after_older = publish.of(InferenceRequested)
    await settle(newer, **given)

    assert after_older == []
    assert len(publish.of(InferenceRequested)) == 1


async def test_a_late_series_makes_a_new_request_that_supersedes_the_first(worker, given, clock, publish, study_uid):
    """The first request ends without a result once the second is decided; the second has both series."""
    first = await worker.store_series(StudyInstanceUID=study_uid)
    await route(worker.ready(first), **given)
    clock.pass_s(120)
    await settle(publish.of(StudySettling)[-1], **given)
    stored = await worker.store_series(StudyInstanceUID=study_uid)
    late = stored.model_copy(update={"created": stored.created + timedelta(minutes=5)})
    await worker.objects.put(late.key, late.body())
    await route(worker.ready(late), **given)
    clock.pass_s(120)
    await settle(publish.of(StudySettling)[-1], **given)
    early, whole = publish.of(InferenceRequested)
    superseded = [await stable_studies.is_superseded(asked.data, objects=worker.objects) for asked in (early, whole)]
    await infer(early, **(worker.for_infer | {"maps": given["maps"]}))

    assert [len(asked.data.inputs) for asked in (early, whole)] == [1, 2]
    assert superseded == [True, False]
    assert worker.publish.events == []
    assert await worker.keys(result_prefix(early.data)) == []


async def test_what_was_decided_stands(worker, given, clock, publish, study_uid):
    """A worker with other MAPs that looks at the same study later asks for what the first one decided."""
    revision = await worker.store_series(StudyInstanceUID=study_uid)
    await route(worker.ready(revision), **given)
    (settling,) = publish.of(StudySettling)
    clock.pass_s(120)
    await settle(settling, **given)
    await settle(settling, **(given | {"maps": {}}))
    keys = await worker.keys(f"results/{study_uid}/study/")
    record = StudyRouting.model_validate_json(await worker.objects.get(f"results/{study_uid}/study/{keys[0]}"))

    assert len(keys) == 1
    assert [task.map for task in record.tasks] == ["capture"]
    assert len(publish.of(InferenceRequested)) == 2


async def test_a_study_that_is_gone_can_never_settle(given, publish, study_uid, clock):
    """A message about a study that was removed is for the dead-letter queue."""
    await stable_studies.expect_settling(
        study_uid, **{key: given[key] for key in ("objects", "publish", "clock", "quiet")}
    )
    clock.pass_s(120)
    with pytest.raises(Unprocessable, match="study_gone"):
        await settle(publish.of(StudySettling)[0], **given)
