"""`radqueue quarantine` on what ingest itself refused, and ingest on what was released."""

import hashlib
import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from cli.main import app
from services.ingest.handler import handle_uploads
from shared.messages import SeriesReady, UploadRejected
from tests.ingest.conftest import part_10, zip_of


@pytest.fixture
def dataset():
    """A dataset of the test's own: quarantine is one place for all."""
    return f"q-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def quarantine(local_aws):
    """Run `radqueue quarantine …` and return its exit code and what it printed."""

    def run(*arguments):
        # In a thread, as a process of its own: the tests have an event loop, and the command line runs one.
        runner = CliRunner(env=local_aws.environ)
        with ThreadPoolExecutor(1) as thread:
            done = thread.submit(runner.invoke, app, ["quarantine", *arguments]).result()
        return done.exit_code, done.output

    return run


@pytest.fixture
def listed(quarantine, dataset):
    """What `list --json` says of the dataset."""

    def run(*arguments):
        code, printed = quarantine("list", "--dataset", dataset, "--json", *arguments)
        assert code == 0, printed
        return json.loads(printed)["refused"]

    return run


async def test_a_released_object_that_is_mended_is_taken(bench, maker, dataset, quarantine, listed):
    """After a limit was raised the object is taken in like any upload, and is not listed any more."""
    body = zip_of({"secretperson": part_10(maker.ct())})
    strict = replace(bench.ports, settings=bench.ports.settings.model_copy(update={"max_upload_bytes": 100}))
    await handle_uploads(await bench.upload(f"incoming/{dataset}/Secretperson.zip", body), ports=strict)
    (refused,) = listed()
    code, printed = quarantine("release", refused["sha256"][:20], "--json")
    (key,) = json.loads(printed)["released"].values()
    await handle_uploads(bench.notification(key), ports=bench.ports)
    (released,) = listed("--released")

    assert (refused["reason_code"], refused["bytes"]) == ("too_large", None)  # it lies where it was uploaded
    assert refused["sha256"] == hashlib.sha256(body).hexdigest()
    assert code == 0
    assert key == f"incoming/{dataset}/released/{refused['sha256']}"
    assert bench.published.of(SeriesReady)[0].data.dataset == dataset
    assert not listed()
    assert released["released"] is not None


async def test_a_released_object_that_is_refused_again_is_there_again(bench, maker, dataset, quarantine, listed):
    """It is in quarantine under the same hash, by its new upload, and nothing was lost on the way."""
    body = part_10(maker.ct())[:-100]
    await handle_uploads(await bench.upload(f"incoming/{dataset}/Secretperson.dcm", body), ports=bench.ports)
    (before,) = listed()
    code, printed = quarantine("release", before["sha256"], "--json")
    key = json.loads(printed)["released"][before["sha256"]]
    between = listed()
    await handle_uploads(bench.notification(key), ports=bench.ports)
    (after,) = listed()

    assert (code, between) == (0, [])
    assert (after["sha256"], after["reason_code"], after["released"]) == (before["sha256"], "truncated", None)
    assert after["upload_key_sha256"] != before["upload_key_sha256"]
    assert await bench.objects.get(f"quarantine/{after['sha256']}/object") == body
    assert len({event.id for event in bench.published.of(UploadRejected)}) == 2


async def test_one_object_that_is_gone_keeps_no_other_from_being_released(bench, maker, dataset, quarantine, listed):
    """A release by reason gives what it can, names what it cannot, and ends with 1."""
    strict = replace(bench.ports, settings=bench.ports.settings.model_copy(update={"max_upload_bytes": 100}))
    bodies = [zip_of({f"secretperson{n}": part_10(maker.ct(n))}) for n in range(2)]
    for n, body in enumerate(bodies):
        await handle_uploads(await bench.upload(f"incoming/{dataset}/Secretperson{n}.zip", body), ports=strict)
    lost, kept = (hashlib.sha256(body).hexdigest() for body in bodies)
    await bench.objects.delete(f"incoming/{dataset}/Secretperson0.zip")
    code, printed = quarantine("release", "--reason", "too_large", "--json")

    assert code == 1
    told = json.JSONDecoder().raw_decode(printed)[0]
    assert told["released"][kept] == f"incoming/{dataset}/released/{kept}"
    assert lost in told["not_released"]
    assert [refusal["sha256"] for refusal in listed()] == [lost]


async def test_people_see_the_reason_and_no_name(bench, maker, make_part_10, dataset, quarantine):
    """`list` and `show` tell the code, what it means and what to do; the upload's key is not told."""
    body = make_part_10(maker.ct())[:-50]
    await handle_uploads(await bench.upload(f"incoming/{dataset}/Secretperson.dcm", body), ports=bench.ports)
    sha256 = hashlib.sha256(body).hexdigest()
    _, table = quarantine("list", "--dataset", dataset)
    code, shown = quarantine("show", sha256[:12])

    assert code == 0
    assert all(text in table for text in (sha256[:12], "truncated", dataset))
    assert "Upload it again" in shown
    assert "Secretperson" not in table + shown


async def test_an_object_is_released_into_another_dataset(bench, maker, make_part_10, dataset, quarantine):
    """What one dataset may not take, another one may: a report is taken where nothing is de-identified."""
    report = maker.ct(0, Modality="SR", SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
    for keyword in ("PixelData", "Rows", "Columns", "BitsAllocated"):
        delattr(report, keyword)
    body = make_part_10(report)
    await handle_uploads(await bench.upload(f"incoming/{bench.research}/report", body), ports=bench.ports)
    sha256 = hashlib.sha256(body).hexdigest()
    code, printed = quarantine("release", sha256, "--dataset", dataset)
    key = f"incoming/{dataset}/released/{sha256}"
    await handle_uploads(bench.notification(key), ports=bench.ports)

    assert code == 0, printed
    assert key in printed
    assert len(await bench.keys(f"studies/{maker.study_uid}/")) == 1


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("show", "ffff00000000ffff"), 1),
        (("show", "../incoming"), 2),
        (("release",), 2),
        (("release", "abc", "--reason", "truncated"), 2),
        (("release", "--reason", "no_such_reason"), 2),
        (("list", "--reason", "no_such_reason"), 2),
    ],
)
def test_what_cannot_be_meant_is_refused(quarantine, arguments, code):
    """Hashes that are none, unknown reasons and contradictions end with their exit code, and release nothing."""
    assert quarantine(*arguments)[0] == code


async def test_an_object_is_told_once_whatever_the_redeliveries(bench, maker, make_part_10):
    """Every delivery of one refused object, and its folder's `_COMPLETE`, announce one and the same event."""
    event = await bench.upload("incoming/lung/told/a.dcm", make_part_10(maker.ct())[:-30])
    for _ in range(3):
        await handle_uploads(event, ports=bench.ports)
    await handle_uploads(await bench.upload("incoming/lung/told/_COMPLETE", b""), ports=bench.ports)
    told = bench.published.of(UploadRejected)

    assert len(told) == 4
    assert len({event.id for event in told}) == 1
