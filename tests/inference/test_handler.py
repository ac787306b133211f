"""Both journeys with the real SDK, S3 and HealthImaging over HTTP."""

import asyncio
import io
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import aiohttp
import pydicom
import pytest
import structlog

from services.inference.handler import infer, route
from services.inference.targets import target
from services.inference.targets.dicomweb import DicomWebTarget
from services.inference.targets.healthimaging import HealthImaging
from shared import keys
from shared.dicomweb import DicomWeb
from shared.documents.document import body_of
from shared.documents.inference import Failure, Outputs, Result, Routing
from shared.errors import Leased, Unavailable, Unprocessable
from shared.keys import ResultKeys
from shared.messages import InferenceCompleted, InferenceFailed, InferenceOutput, InferenceRequested, InferenceSkipped
from shared.objects import ObjectStore
from tests.inference.conftest import targets_of

NOW = datetime(2026, 3, 4, tzinfo=UTC)

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def routing_of(worker, revision):
    key = f"results/{revision.study_uid}/{revision.series_uid}/{revision.digest}/routing.json"
    return Routing.model_validate_json(await worker.objects.get(key))


async def failure_of(worker, requested):
    return Failure.model_validate_json(await worker.objects.get(f"{ResultKeys.of(requested.data).prefix}failure.json"))


async def studies_run(runner):
    return runner._hosts["capture"].studies


async def test_a_series_that_meets_the_conditions_gets_one_request_per_map(worker):
    """Routing is stored, and asks for the MAP under its digest; a repeat asks by the same event."""
    revision = await worker.store_series()
    await route(worker.ready(revision), **worker.for_route)
    await route(worker.ready(revision), **worker.for_route)
    requests = worker.publish.events

    assert [type(event) for event in requests] == [InferenceRequested] * 2
    assert requests[0].id == requests[1].id
    assert requests[0].data.map_digest == worker.maps["capture"].map.digest
    assert requests[0].data.inputs[0].digest == revision.digest
    assert (await routing_of(worker, revision)).maps[0].map_digest == requests[0].data.map_digest


async def test_a_series_that_no_map_takes_is_done(worker):
    """No route is an outcome: it is stored, announced as the same event each time, and nothing is asked for."""
    revision = await worker.store_series(Modality="MR")
    await route(worker.ready(revision), **worker.for_route)
    await route(worker.ready(revision), **worker.for_route)
    first, second = worker.publish.events

    assert isinstance(first, InferenceSkipped)
    assert first == second
    assert (first.data.reason_code, first.data.modality) == ("no_route", "MR")
    assert first.data.digest == revision.digest
    assert (await routing_of(worker, revision)).maps == ()


async def test_a_revision_that_is_not_there_can_never_be_routed(worker):
    """A message about a revision that does not exist is for the dead-letter queue."""
    revision = await worker.store_series()
    await worker.objects.delete(keys.document_of(revision).key)
    with pytest.raises(Unprocessable, match="revision_missing"):
        await route(worker.ready(revision), **worker.for_route)


async def test_a_request_becomes_one_result_at_its_target(worker):
    """The instance that the MAP made is in S3 and in HealthImaging, and the announcement says where."""
    revision = await worker.store_series()
    await infer(worker.request(revision), **worker.for_infer)
    (event,) = worker.publish.events
    (output,) = event.data.outputs
    result = Result.model_validate_json(await worker.objects.get(event.data.result_key))
    pushed = await worker.web.retrieve_instance(revision.study_uid, output.series_uid, output.sop_instance_uid)
    found = await worker.web.search_series(revision.study_uid)
    keys = await worker.keys(ResultKeys.of(event.data).prefix)

    assert isinstance(event, InferenceCompleted)
    assert event.data.outcome == "completed"
    assert event.data.duration_s > 0
    assert output.image_set_id
    assert [one["0020000E"]["Value"] for one in found] == [[output.series_uid]]
    assert pydicom.dcmread(io.BytesIO(pushed)).SOPInstanceUID == output.sop_instance_uid
    assert sorted(keys) == sorted(
        [
            f"attempts/{result.attempt}/log.txt",
            f"attempts/{result.attempt}/{output.sop_instance_uid}.dcm",
            "claim.json",
            "outputs.json",
            "result.json",
        ]
    )


class SlowUploads(ObjectStore):
    """A store that uploads slowly, and looks at each `outputs.json` for what it names and is not there."""

    def __init__(self, objects) -> None:
        super().__init__(objects.client, objects.bucket)
        self.missing: list[list[str]] = []

    async def upload(self, path, key, *, media_type=None):
        await asyncio.sleep(0.2)
        await super().upload(path, key, media_type=media_type)

    async def put_if_absent(self, key, body):
        if key.endswith("/outputs.json"):
            named = Outputs.model_validate_json(body)
            keys = [one.key for one in (*named.outputs, *named.files)]
            self.missing.append([one for one in keys if not await self.exists(one)])
        return await super().put_if_absent(key, body)


async def test_what_outputs_json_names_is_there_before_it(worker):
    """The uploads end first: whoever finds `outputs.json` can push all that it names."""
    objects = SlowUploads(worker.objects)
    await infer(worker.request(await worker.store_series()), **(worker.for_infer | {"objects": objects}))

    assert objects.missing == [[]]
    assert worker.publish.events[0].data.n_outputs == 1


async def test_results_of_deidentified_series_stay_in_s3(worker):
    """No target gets what belongs to nobody's study, whatever the route and the settings say."""
    revision = (await worker.store_series()).model_copy(update={"deidentified": True})
    await worker.objects.put(keys.document_of(revision).key, body_of(revision))
    pushing = replace(worker.targets, originals=True)
    await infer(worker.request(revision), **(worker.for_infer | {"targets": pushing}))
    (event,) = worker.publish.events

    assert (event.data.outcome, event.data.pushed_to, event.data.n_outputs) == ("completed", "s3", 1)
    assert await worker.objects.exists(event.data.outputs[0].key)
    assert await worker.web.search_series(revision.study_uid) == []


async def test_a_repeated_request_announces_the_same_event_and_runs_nothing(worker):
    """A second delivery after the end finds the result, and tells of it under the same id."""
    revision = await worker.store_series()
    await infer(worker.request(revision), **worker.for_infer)
    before = await studies_run(worker.runner)
    await infer(worker.request(revision), **worker.for_infer)

    assert await studies_run(worker.runner) == before
    assert worker.publish.events[0] == worker.publish.events[1]


class Reading(ObjectStore):
    """S3, which remembers what was read."""

    def __init__(self, objects):
        super().__init__(objects.client, objects.bucket)
        self.keys = []

    async def get(self, key):
        self.keys.append(key)
        return await super().get(key)


async def test_what_is_known_is_not_read_again(worker):
    """`outputs.json` is looked for before the lease and under it, and the revision is read once."""
    revision = await worker.store_series()
    objects = Reading(worker.objects)
    everything = {"objects": objects, "targets": replace(worker.targets, originals=True)}
    await infer(worker.request(revision), **(worker.for_infer | everything))
    prefix = ResultKeys.of(worker.request(revision).data).prefix

    assert objects.keys == [
        f"{prefix}result.json",
        f"{prefix}failure.json",
        f"{prefix}outputs.json",
        keys.document_of(revision).key,
        f"{prefix}outputs.json",
    ]


class Announced:
    """A runner that tells when it is asked to run."""

    def __init__(self, runner) -> None:
        self.runner = runner
        self.runs = asyncio.Event()

    async def run(self, *args, **kwargs):
        self.runs.set()
        return await self.runner.run(*args, **kwargs)


async def test_of_two_workers_on_one_request_one_computes(worker):
    """The other gives its message back, and finds the result when it comes again."""
    revision = await worker.store_series()
    requested = worker.request(revision)
    ends = await asyncio.gather(
        infer(requested, **worker.for_infer), infer(requested, **worker.for_infer), return_exceptions=True
    )
    await infer(requested, **worker.for_infer)
    attempts = {key.split("/")[0] for key in await worker.keys(f"{ResultKeys.of(requested.data).prefix}attempts/")}

    assert [type(end) for end in ends if end] == [Leased]
    assert len(attempts) == 1
    assert worker.publish.events[0] == worker.publish.events[1]


async def test_two_workers_that_both_compute_make_one_result(worker):
    """One does not notice that its claim has ended. Both compute, with other UIDs each; the first one's are pushed."""
    revision = await worker.store_series()
    requested = worker.request(revision)
    prefix = ResultKeys.of(requested.data).prefix
    first = worker.for_infer | {"runner": Announced(worker.runner), "lease_s": 3600}
    second = worker.for_infer | {"clock": lambda: NOW + timedelta(days=1)}
    computing = asyncio.ensure_future(infer(requested, **first))
    await asyncio.wait({computing, asyncio.ensure_future(first["runner"].runs.wait())}, return_when="FIRST_COMPLETED")
    await asyncio.gather(computing, infer(requested, **second))
    instances = [key for key in await worker.keys(f"{prefix}attempts/") if key.endswith(".dcm")]
    outputs = Outputs.model_validate_json(await worker.objects.get(f"{prefix}outputs.json"))
    at_target = await worker.web.search_instances(revision.study_uid)

    assert len(instances) == 2, "the race that this test is about did happen"
    assert len({event.id for event in worker.publish.events}) == 1
    assert [one["00080018"]["Value"][0] for one in at_target] == [outputs.outputs[0].sop_instance_uid]


async def test_after_a_crash_between_outputs_and_push_the_same_instances_are_pushed(worker):
    """What an earlier attempt stored is what gets pushed; the MAP does not run again."""
    revision = await worker.store_series()
    async with aiohttp.ClientSession() as session:
        # Nothing listens on the discard port: the attempt ends where a killed worker would have.
        closed = targets_of(DicomWebTarget(DicomWeb("http://127.0.0.1:9/datastore/none", session=session)))
        with pytest.raises(Unavailable):
            await infer(worker.request(revision), **(worker.for_infer | {"targets": closed}))
    prefix = ResultKeys.of(worker.request(revision).data).prefix
    stored = Outputs.model_validate_json(await worker.objects.get(f"{prefix}outputs.json"))
    before = await studies_run(worker.runner)
    await infer(worker.request(revision), **worker.for_infer)
    (event,) = worker.publish.events

    assert await studies_run(worker.runner) == before
    assert [one.sop_instance_uid for one in event.data.outputs] == [one.sop_instance_uid for one in stored.outputs]
    assert len(await worker.web.search_instances(revision.study_uid)) == 1


async def test_superseded_work_is_skipped(worker):
    """A request on a revision that a newer one replaced ends without a result."""
    revision = await worker.store_series()
    newer = revision.model_copy(update={"digest": "f" * 32, "supersedes": revision.digest})
    await worker.objects.put(keys.document_of(newer).key, body_of(newer))
    await infer(worker.request(revision), **worker.for_infer)

    assert worker.publish.events == []
    assert await worker.keys(ResultKeys.of(worker.request(revision).data).prefix) == []


async def test_a_request_for_an_older_map_asks_for_the_current_one(worker):
    """Where the MAP changed since, the request goes out again under the digest that this worker has."""
    revision = await worker.store_series()
    await infer(worker.request(revision, map_digest="0" * 32), **worker.for_infer)
    (event,) = worker.publish.events

    assert isinstance(event, InferenceRequested)
    assert event.data == worker.request(revision).data
    assert worker.publish.delays_s[0] > 0, "two workers with two versions must not throw it to and fro"


async def test_a_request_for_a_map_that_this_worker_lacks_is_given_back(worker):
    """In a rolling deployment another worker has it, so nothing is decided here, and the log names the MAP."""
    revision = await worker.store_series()
    requested = worker.request(revision, map="newer")
    with structlog.testing.capture_logs() as lines, pytest.raises(Unavailable):
        await infer(requested, **worker.for_infer)

    assert worker.publish.events == []
    assert await worker.keys(ResultKeys.of(requested.data).prefix) == []
    assert [(line["event"], line["map"]) for line in lines] == [("inference.unknown_map", "newer")]


async def test_what_another_worker_computed_is_pushed_only_by_one_that_has_the_map(worker):
    """Where results go, the MAP's route says: without it nothing is pushed to the worker's own target."""
    revision = await worker.store_series()
    requested = worker.request(revision)
    outputs = Outputs(attempt="0" * 32, outputs=(), files=(), duration_s=1, device="cpu", time=requested.time)
    key = f"{ResultKeys.of(requested.data).prefix}outputs.json"
    await worker.objects.put(key, outputs.model_dump_json().encode())
    with pytest.raises(Unavailable):
        await infer(requested, **(worker.for_infer | {"maps": {}}))

    assert worker.publish.events == []


async def test_a_repeat_after_a_failure_announces_that_failure_and_a_new_request_tries_again(worker):
    """Killed before its message was deleted, a failed request is not run again; who wants it again, asks anew."""
    revision = await worker.store_series(SeriesDescription="silent")
    requested = worker.request(revision)
    again = requested.model_copy(update={"id": "asked-by-a-person"})
    for asked in (requested, requested, again, again):
        await infer(asked, **worker.for_infer)
    prefix = ResultKeys.of(requested.data).prefix
    first, repeat, second, its_repeat = (event.data.attempt for event in worker.publish.events)
    attempts = {key.split("/")[0] for key in await worker.keys(f"{prefix}attempts/")}

    assert (first, second) == (repeat, its_repeat)
    assert attempts == {first, second}
    assert len({event.id for event in worker.publish.events}) == 2
    assert (await failure_of(worker, requested)).request_id == again.id

    await worker.objects.delete(f"{prefix}failure.json")
    await infer(again, **worker.for_infer)

    assert worker.publish.events[-1].data.attempt not in attempts


async def test_an_instance_that_is_gone_can_never_be_inferred(worker):
    """A revision whose instance was removed is for the dead-letter queue."""
    revision = await worker.store_series()
    await worker.objects.delete(revision.instances[0].key)
    with pytest.raises(Unprocessable, match="instance_missing"):
        await infer(worker.request(revision), **worker.for_infer)


@pytest.mark.parametrize(
    ("wish", "reason_code", "where"),
    [("silent", "no_output", ""), ("report", "no_output", ""), ("other patient", "attributes_differ", "PatientID")],
)
async def test_output_that_cannot_be_pushed_is_a_failure(worker, wish, reason_code, where):
    """A MAP that ends well and made nothing usable has failed, and nothing is pushed."""
    revision = await worker.store_series(SeriesDescription=wish)
    await infer(worker.request(revision), **worker.for_infer)
    (event,) = worker.publish.events
    failure = await failure_of(worker, worker.request(revision))

    assert (event.data.reason_code, failure.where) == (reason_code, where)
    assert await worker.web.search_instances(revision.study_uid) == []


async def test_instances_that_the_target_refuses_are_a_failure(worker):
    """A refusal will not change, so the request ends with it."""
    revision = await worker.store_series()
    requested = worker.request(revision)
    key = f"{ResultKeys.of(requested.data).prefix}attempts/one/1.2.3.dcm"
    output = InferenceOutput(sop_class_uid="1.2", sop_instance_uid="1.2.3", series_uid="1.2.4", key=key)
    outputs = Outputs(attempt="one", outputs=(output,), duration_s=1, device="cpu", time=NOW)
    await worker.objects.put(key, b"no DICOM at all")
    await worker.objects.put(f"{ResultKeys.of(requested.data).prefix}outputs.json", outputs.model_dump_json().encode())
    await infer(requested, **worker.for_infer)
    (event,) = worker.publish.events

    assert isinstance(event, InferenceFailed)
    assert event.data.reason_code == "push_rejected"


async def test_a_result_that_dicomweb_does_not_show_is_a_failure(worker, series_files, monkeypatch):
    """What conflicts with the study at the target becomes non-primary there: the failure names what conflicts."""
    monkeypatch.setattr(target, "LOOK_PAUSE_S", 0.001)
    revision = await worker.store_series()
    (other,) = series_files(n=1, StudyInstanceUID=revision.study_uid, PatientID="another-id")
    await worker.web.store([other])
    await infer(worker.request(revision), **worker.for_infer)
    (event,) = worker.publish.events

    assert isinstance(event, InferenceFailed)
    assert (event.data.reason_code, event.data.where) == ("not_primary", "PatientID")
    assert not await worker.objects.exists(f"{ResultKeys.of(event.data).prefix}result.json")


async def test_a_result_that_the_target_does_not_find_is_pushed_again_later(worker, clients, monkeypatch):
    """No image set is no result: nothing is announced, and a repeat pushes the same instances where they belong."""
    monkeypatch.setattr(target, "LOOK_PAUSE_S", 0.001)
    revision = await worker.store_series()
    empty = await clients.medical_imaging.create_datastore(datastoreName="empty", clientToken="empty")
    elsewhere = targets_of(HealthImaging(worker.web, clients.medical_imaging, empty["datastoreId"]))
    with pytest.raises(Unavailable, match="does not show"):
        await infer(worker.request(revision), **(worker.for_infer | {"targets": elsewhere}))

    assert worker.publish.events == []

    await infer(worker.request(revision), **worker.for_infer)
    (event,) = worker.publish.events

    assert event.data.outputs[0].image_set_id
    assert len(await worker.web.search_instances(revision.study_uid)) == 1


async def test_a_target_that_does_not_know_us_is_asked_again_later(worker):
    """A wrong address or a missing permission is ours to mend, so the work is not given up."""
    revision = await worker.store_series()
    async with aiohttp.ClientSession() as session:
        unsigned = targets_of(DicomWebTarget(DicomWeb(worker.web._base_url[:-4] + "ffff", session=session)))
        with pytest.raises(Unavailable, match="refused with HTTP 40"):
            await infer(worker.request(revision), **(worker.for_infer | {"targets": unsigned}))

    assert worker.publish.events == []


async def test_no_matching_series_is_a_result_without_outputs(worker):
    """A MAP whose selector takes no series has not failed: the result says so, and a repeat tells the same."""
    revision = await worker.store_series(Modality="MR")
    await infer(worker.request(revision), **worker.for_infer)
    await infer(worker.request(revision), **worker.for_infer)
    first, second = worker.publish.events

    assert first == second
    assert (first.data.outcome, first.data.outputs) == ("no_matching_series", ())


async def test_a_failed_map_is_told_by_type_and_place_and_its_words_lie_in_the_attempt(worker, capsys):
    """The failure names no patient; nor does what the MAP printed, which lies beside it in S3, and in no log line."""
    revision = await worker.store_series(SeriesDescription="raise")
    requested = worker.request(revision)
    await infer(requested, **worker.for_infer)
    (event,) = worker.publish.events
    failure = await failure_of(worker, requested)
    words = await worker.objects.get(f"{ResultKeys.of(requested.data).prefix}attempts/{failure.attempt}/log.txt")

    assert event.data.reason_code == "application_error"
    assert failure.error_type == "KeyError"
    assert failure.where.startswith("app.py:")
    assert "Secret" not in failure.model_dump_json()
    assert b"printed by the MAP about ***" in words
    assert b"KeyError: '***'" in words
    assert "Secret" not in "".join(capsys.readouterr())
