"""What becomes of a run: agreed outputs, files that are no DICOM, and whether another try can help."""

import asyncio
import json
from dataclasses import replace
from functools import partial

import pytest

from services.inference.__main__ import in_turn
from services.inference.computing import _may_be_the_machines
from services.inference.handler import infer
from services.inference.records import Result, result_prefix
from services.inference.serving.runner import GpuLost, Run
from services.inference.serving.versions import InstalledMap
from shared.messages import InferenceCompleted, InferenceFailed

pytestmark = pytest.mark.asyncio(loop_scope="session")


def agreed(worker, outputs):
    """Let the worker's MAP be held to these outputs."""
    found = worker.maps["capture"]
    route = found.route.model_copy(update={"outputs": outputs})
    return replace(worker, maps={"capture": InstalledMap(found.map, route)})


async def test_a_map_that_does_not_make_what_was_agreed_on_has_failed(worker):
    """One capture is no segmentation: the failure has its own code and names what is missing; nothing is pushed."""
    revision = await worker.store_series()
    await infer(worker.request(revision), **agreed(worker, {"SEG": 1}).for_infer)
    (event,) = worker.publish.events

    assert isinstance(event, InferenceFailed)
    assert (event.data.reason_code, event.data.where) == ("outputs_missing", "SEG")
    assert await worker.web.search_instances(revision.study_uid) == []


async def test_files_that_are_no_dicom_stay_in_the_results(worker):
    """Where a MAP is agreed on to make any file, a report is a result, and it is told with its media type."""
    revision = await worker.store_series(SeriesDescription="report")
    await infer(worker.request(revision), **agreed(worker, {}).for_infer)
    (event,) = worker.publish.events
    result = Result.model_validate_json(await worker.objects.get(event.data.result_key))
    (file,) = result.files

    assert isinstance(event, InferenceCompleted)
    assert (event.data.outputs, event.data.files) == ((), (file,))
    assert (file.media_type, file.n_bytes) == ("text/plain", len("no DICOM"))
    assert file.key.endswith("/files/0/report.txt")
    assert await worker.objects.get(file.key) == b"no DICOM"


async def test_a_file_beside_dicom_outputs_is_stored_as_well(worker):
    """What a MAP writes beside its instances is kept under the same attempt."""
    revision = await worker.store_series(SeriesDescription="look around")
    await infer(worker.request(revision), **worker.for_infer)
    (event,) = worker.publish.events
    (file,) = event.data.files

    assert len(event.data.outputs) == 1
    assert file.media_type == "application/json"
    assert json.loads(await worker.objects.get(file.key))


async def test_a_worker_that_lost_its_gpu_stops_and_gives_its_message_back(worker, monkeypatch):
    """No study fails of it: nothing is announced or stored as failed, and the process ends for a new one to start."""
    revision = await worker.store_series(SeriesDescription="gpu lost")
    requested, stop = worker.request(revision), asyncio.Event()
    handle = in_turn(partial(infer, **worker.for_infer), stop)
    host = worker.runner._hosts["capture"]
    await host.start()

    async def started():
        host.device = "cuda"  # as where there was a GPU

    monkeypatch.setattr(host, "start", started)
    try:
        with pytest.raises(GpuLost):
            await handle(requested)
    finally:
        worker.runner.unfit, host.device = None, "cpu"

    assert stop.is_set()
    assert worker.publish.events == []
    assert not await worker.objects.exists(f"{result_prefix(requested.data)}failure.json")


@pytest.mark.parametrize(
    ("run", "again"),
    [
        (Run("crashed", 1, error_type="SIGKILL"), True),
        (Run("out_of_memory", 1, error_type="SIGKILL", where="kernel"), True),
        (Run("gpu_out_of_memory", 1, error_type="OutOfMemoryError"), True),
        (Run("crashed", 1, error_type="SIGSEGV"), False),
        (Run("out_of_memory", 1, error_type="MemoryError", where="app.py:3"), False),
        (Run("application_error", 1, error_type="KeyError"), False),
        (Run("deadline", 1), False),
        (Run("no_matching_series", 1), False),
    ],
)
async def test_another_try_is_made_only_where_the_machine_may_be_the_cause(run, again):
    """A kill from outside, and memory that others use as well, may not come again; what the program did will."""
    assert _may_be_the_machines(run) is again
