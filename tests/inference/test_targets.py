"""Each target of a push: what is pushed is found there, and what is not there is told with its reason."""

import io
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pydicom
import pytest
import pytest_asyncio
from botocore.exceptions import ClientError, EndpointConnectionError

from services.inference.handler import infer
from services.inference.records import Outputs, Result, result_prefix
from services.inference.targets import dicomweb, import_job, target
from services.inference.targets.dicomweb import DicomWebTarget
from services.inference.targets.healthimaging import HealthImaging
from services.inference.targets.import_job import ImportJobs
from services.inference.targets.s3_only import S3Only
from services.inference.targets.target import Instance, PushRejected, Targets
from shared.dicomweb import Basic, Bearer, DicomWeb
from shared.errors import Unavailable
from shared.messages import InferenceCompleted, InferenceFailed

ROLE = "arn:aws:iam::123456789012:role/import"
ORTHANC, PLUGIN = shutil.which("Orthanc"), Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
TIMEOUT_S = 60

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(target, "LOOK_PAUSE_S", 0.001)
    monkeypatch.setattr(import_job, "START_PAUSE_S", 0.1)
    monkeypatch.setattr(import_job, "JOB_PAUSE_S", 0.05)


@pytest.fixture
def lay(tmp_path):
    """Lay Part 10 contents into files, as instances to push."""

    def files(contents):
        made = []
        for index, content in enumerate(contents):
            header = pydicom.dcmread(io.BytesIO(content))
            path = tmp_path / f"{index}.dcm"
            path.write_bytes(content)
            uids = header.StudyInstanceUID, header.SeriesInstanceUID, header.SOPInstanceUID
            made.append(Instance(path, *uids))
        return made

    return files


@pytest.fixture
def healthimaging(worker):
    return worker.targets.by_name["healthimaging"]


@pytest.fixture
def imports(worker, clients, local_aws):
    place = worker.web, clients.medical_imaging, local_aws.datastore_id
    return ImportJobs(*place, objects=worker.objects, role_arn=ROLE)


@pytest.fixture
def pushers(healthimaging, imports):
    return {"healthimaging": healthimaging, "imports": imports}


# HealthImaging.


@pytest.mark.parametrize("target", ["healthimaging", "imports"])
async def test_what_is_pushed_is_primary_and_pushed_again_the_same(target, pushers, lay, series_files):
    """Each instance of two series is listed in a primary image set; a repeat changes nothing."""
    pushing = pushers[target]
    first = series_files()
    study_uid = pydicom.dcmread(io.BytesIO(first[0])).StudyInstanceUID
    instances = lay([*first, *series_files(StudyInstanceUID=study_uid)])
    image_sets = await pushing.push(instances)
    again = await pushing.push(instances)

    assert set(image_sets) == {one.series_uid for one in instances}
    assert again == image_sets
    for series_uid in image_sets:
        expected = {one.sop_instance_uid for one in instances if one.series_uid == series_uid}
        assert await pushing.shown(study_uid, series_uid) == expected


@pytest.mark.parametrize("target", ["healthimaging", "imports"])
@pytest.mark.parametrize("keyword", ["PatientID", "StudyDate", "AccessionNumber", "StudyID"])
async def test_what_becomes_non_primary_is_told_by_what_conflicts(target, keyword, pushers, lay, series_files):
    """The attribute in which it differs from its study is named, and its value is not."""
    pushing = pushers[target]
    first = series_files(n=1)
    study_uid = pydicom.dcmread(io.BytesIO(first[0])).StudyInstanceUID
    await pushing.push(lay(first))
    other = lay(series_files(n=1, StudyInstanceUID=study_uid, **{keyword: "20250505"}))
    with pytest.raises(PushRejected) as rejected:
        await pushing.push(other)

    assert (rejected.value.reason_code, rejected.value.where) == ("not_primary", keyword)


async def test_a_series_that_is_another_studys_is_told(healthimaging, lay, series_files):
    """A SeriesInstanceUID belongs to one study."""
    first = series_files(n=1)
    await healthimaging.push(lay(first))
    taken = pydicom.dcmread(io.BytesIO(first[0])).SeriesInstanceUID
    with pytest.raises(PushRejected) as rejected:
        await healthimaging.push(lay(series_files(n=1, SeriesInstanceUID=taken)))

    assert (rejected.value.reason_code, rejected.value.where) == ("not_primary", "SeriesInstanceUID")


async def test_an_older_non_primary_image_set_does_no_harm(healthimaging, clients, local_aws, lay, series_files):
    """Once what conflicted is gone, the same instances are pushed again, and the old image set stays beside them."""
    wrong = series_files(n=1)
    study_uid = pydicom.dcmread(io.BytesIO(wrong[0])).StudyInstanceUID
    image_sets = await healthimaging.push(lay(wrong))
    right = lay(series_files(n=1, StudyInstanceUID=study_uid, PatientID="the-right-one"))
    with pytest.raises(PushRejected):
        await healthimaging.push(right)
    for image_set_id in image_sets.values():
        await clients.medical_imaging.delete_image_set(datastoreId=local_aws.datastore_id, imageSetId=image_set_id)
    found = await healthimaging.push(right)

    assert list(found) == [right[0].series_uid]


# Import jobs.


async def test_an_import_leaves_nothing_in_the_bucket(imports, worker, lay, series_files):
    """Input and output of a job are removed when it has ended, also when its files are refused."""
    await imports.push(lay(series_files(n=1)))
    with pytest.raises(PushRejected):
        await imports.push([Instance(_broken(lay, series_files), "1.2", "1.3", "1.4")])

    assert await worker.keys("imports/") == []


async def test_a_file_that_an_import_refuses_is_told_by_its_attribute(imports, lay, series_files):
    """The job says COMPLETED; its FAILURE folder names the attribute."""
    with pytest.raises(PushRejected) as rejected:
        await imports.push([Instance(_broken(lay, series_files), "1.2", "1.3", "1.4")])

    assert (rejected.value.reason_code, rejected.value.where) == ("push_rejected", "StudyInstanceUID")


async def test_an_import_that_does_not_begin_leaves_nothing_and_one_under_way_is_met_again(  # noqa: PLR0917
    imports, worker, clients, lay, series_files, monkeypatch
):
    """Copies go where no job reads them; where one may, they stay, and the next try has the same token."""
    instances, tokens, start = lay(series_files(n=1)), [], clients.medical_imaging.start_dicom_import_job

    async def refused(**request):
        raise ClientError({"Error": {"Code": "AccessDeniedException"}}, "StartDICOMImportJob")

    async def unheard(**request):
        tokens.append(request["clientToken"])
        await start(**request)
        raise EndpointConnectionError(endpoint_url="nowhere")

    async def heard(**request):
        tokens.append(request["clientToken"])
        return await start(**request)

    monkeypatch.setattr(clients.medical_imaging, "start_dicom_import_job", refused)
    with pytest.raises(Unavailable):
        await imports.push(instances)

    assert await worker.keys("imports/") == []

    monkeypatch.setattr(clients.medical_imaging, "start_dicom_import_job", unheard)
    with pytest.raises(Unavailable):
        await imports.push(instances)

    assert await worker.keys("imports/") != []

    monkeypatch.setattr(clients.medical_imaging, "start_dicom_import_job", heard)
    await imports.push(instances)

    assert tokens[0] == tokens[1]
    assert await worker.keys("imports/") == []


async def test_nothing_is_pushed_without_a_job(imports, clients, monkeypatch):
    """A MAP that made no DICOM starts no import."""
    monkeypatch.setattr(clients.medical_imaging, "start_dicom_import_job", None)

    assert await imports.push([]) == {}


async def test_an_import_that_is_throttled_is_started_later(imports, clients, lay, series_files, monkeypatch):
    """A 429 is waited out, with the same client token, so that no second job is made of one."""
    tokens = []
    start = clients.medical_imaging.start_dicom_import_job

    async def throttled(**request):
        tokens.append(request["clientToken"])
        if len(tokens) < 3:
            raise ClientError({"Error": {"Code": "ThrottlingException"}}, "StartDICOMImportJob")
        return await start(**request)

    monkeypatch.setattr(clients.medical_imaging, "start_dicom_import_job", throttled)
    instances = lay(series_files(n=1))
    await imports.push(instances)

    assert len(tokens) >= 3
    assert len(set(tokens)) == 1


async def test_an_import_that_always_is_throttled_is_tried_again_with_the_message(
    imports, clients, lay, series_files, monkeypatch
):
    """After some tries the message goes back to its queue."""

    async def throttled(**request):
        raise ClientError({"Error": {"Code": "ThrottlingException"}}, "StartDICOMImportJob")

    monkeypatch.setattr(import_job, "START_PAUSE_S", 0.001)
    monkeypatch.setattr(clients.medical_imaging, "start_dicom_import_job", throttled)
    with pytest.raises(Unavailable, match="too many import jobs"):
        await imports.push(lay(series_files(n=1)))


async def test_a_manifest_that_comes_late_is_waited_for(imports, worker, lay, series_files, monkeypatch):
    """COMPLETED may be said before the manifest is there."""
    looks = []
    get = worker.objects.get

    async def late(key):
        if key.endswith("job-output-manifest.json"):
            looks.append(key)
            if len(looks) < 3:
                raise import_job.ObjectMissing
        return await get(key)

    monkeypatch.setattr(worker.objects, "get", late)
    await imports.push(lay(series_files(n=1)))

    assert len(looks) == 3


async def test_a_job_that_says_completed_and_left_a_file_out_is_no_success(
    imports, worker, lay, series_files, monkeypatch
):
    """A file that is neither in SUCCESS nor in WARNING nor in FAILURE was not imported, whatever the job says."""
    get = worker.objects.get

    async def without_success(key):
        return b"" if key.endswith("success.ndjson") else await get(key)

    monkeypatch.setattr(worker.objects, "get", without_success)
    with pytest.raises(Unavailable, match="left files out"):
        await imports.push(lay(series_files(n=1)))


async def test_a_file_that_was_imported_with_a_warning_was_imported(imports, worker, lay, series_files, monkeypatch):
    """The WARNING folder counts like SUCCESS."""
    get, put, listed = worker.objects.get, worker.objects.put, worker.objects.list

    async def warned(key):
        if key.endswith("success.ndjson"):
            await put(key.replace("SUCCESS/success", "WARNING/warning"), await get(key))
            return b""
        return await get(key)

    async def success_first(prefix):
        if prefix.endswith("WARNING/"):  # the job of the local AWS warns of nothing, so the line is moved there
            async for item in listed(prefix.replace("WARNING/", "SUCCESS/")):
                await warned(item.key)
        async for item in listed(prefix):
            yield item

    monkeypatch.setattr(worker.objects, "get", warned)
    monkeypatch.setattr(worker.objects, "list", success_first)
    instances = lay(series_files(n=1))

    assert list(await imports.push(instances)) == [instances[0].series_uid]


async def test_a_job_that_fails_is_tried_again(imports, clients, lay, series_files, monkeypatch):
    """A role or a bucket that is wrong is ours to mend, so the work is not given up."""
    start = clients.medical_imaging.start_dicom_import_job

    async def from_nowhere(**request):
        return await start(**request | {"inputS3Uri": "s3://there-is-none/input/"})

    monkeypatch.setattr(clients.medical_imaging, "start_dicom_import_job", from_nowhere)
    with pytest.raises(Unavailable, match="an import job failed"):
        await imports.push(lay(series_files(n=1)))


def _broken(lay, series_files):
    """Return a file that no import takes: it has no StudyInstanceUID."""
    (instance,) = lay(series_files(n=1))
    dataset = pydicom.dcmread(instance.path)
    del dataset.StudyInstanceUID
    dataset.save_as(instance.path)
    return instance.path


# S3 only, and originals.


async def test_results_may_stay_in_s3(worker):
    """Nothing is pushed, and the result says so."""
    revision = await worker.store_series()
    targets = Targets({"s3": S3Only()}, default="s3", originals=True)
    await infer(worker.request(revision), **(worker.for_infer | {"targets": targets}))
    (event,) = worker.publish.events

    assert event.data.pushed_to == "s3"
    assert [output.image_set_id for output in event.data.outputs] == [None]
    assert await worker.web.search_instances(revision.study_uid) == []


async def test_originals_are_pushed_before_results_where_a_route_says_so(worker, healthimaging):
    """A viewer that opens the study has the images that the result belongs to; they are pushed once."""
    revision = await worker.store_series()
    requested = worker.request(revision)
    found = worker.maps["capture"]
    pushes = []

    class Remembering(HealthImaging):
        async def push(self, instances):
            pushes.append({one.series_uid for one in instances})
            return await super().push(instances)

    remembering = Remembering(healthimaging._web, healthimaging._client, healthimaging._datastore_id)
    targets = Targets({"healthimaging": remembering}, default="healthimaging")
    with_originals = found.route.model_copy(update={"originals": True})
    maps = {"capture": type(found)(found.map, with_originals)}
    await infer(requested, **(worker.for_infer | {"targets": targets, "maps": maps}))
    await worker.objects.delete(f"{result_prefix(requested.data)}result.json")
    await infer(requested, **(worker.for_infer | {"targets": targets, "maps": maps}))
    (output,) = worker.publish.events[0].data.outputs

    assert worker.publish.events[0].data.pushed_to == "healthimaging"
    assert pushes == [{revision.series_uid}, {output.series_uid}, set(), {output.series_uid}]
    assert await remembering.shown(revision.study_uid, revision.series_uid) == {
        one.sop_instance_uid for one in revision.instances
    }


async def test_originals_that_conflict_end_the_request(worker, series_files):
    """A study that the target has under another patient is not mixed up with this one."""
    revision = await worker.store_series()
    (other,) = series_files(n=1, StudyInstanceUID=revision.study_uid, PatientID="another-id")
    await worker.web.store([other])
    targets = Targets(worker.targets.by_name, worker.targets.default, originals=True)
    await infer(worker.request(revision), **(worker.for_infer | {"targets": targets}))
    (event,) = worker.publish.events

    assert isinstance(event, InferenceFailed)
    assert (event.data.reason_code, event.data.where) == ("not_primary", "PatientID")


async def test_what_is_no_dicom_stays_in_s3_with_its_media_type(worker, clients):
    """A report lies beside the result under its type, and the announcement lists it."""
    found = worker.maps["capture"]
    maps = {"capture": type(found)(found.map, found.route.model_copy(update={"outputs": {}}))}
    revision = await worker.store_series(SeriesDescription="report")
    await infer(worker.request(revision), **(worker.for_infer | {"maps": maps}))
    (event,) = worker.publish.events
    (file,) = event.data.files
    stored = await clients.s3.head_object(Bucket=worker.objects.bucket, Key=file.key)
    prefix = result_prefix(event.data)
    outputs = Outputs.model_validate_json(await worker.objects.get(f"{prefix}outputs.json"))
    result = Result.model_validate_json(await worker.objects.get(f"{prefix}result.json"))

    assert isinstance(event, InferenceCompleted)
    assert file.key.endswith("/report.txt")
    assert (file.media_type, file.n_bytes) == ("text/plain", len("no DICOM"))
    assert stored["ContentType"] == "text/plain"
    assert outputs.files == result.files == (file,)


# Orthanc.


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory):
    """A real DICOMweb server with a user, on a free port; as installed by Debian's orthanc-dicomweb."""
    if ORTHANC is None or not PLUGIN.exists():
        pytest.skip("Orthanc is not installed: apt-get install orthanc orthanc-dicomweb")
    folder = tmp_path_factory.mktemp("orthanc")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "Name": "test",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "index"),
        "Plugins": [str(PLUGIN)],
        "HttpPort": port,
        "HttpBindAddresses": ["127.0.0.1"],
        "DicomServerEnabled": False,
        "RemoteAccessAllowed": True,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {"radqueue": "a password"},
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            [ORTHANC, str(folder / "orthanc.json")], stdout=log, stderr=log, env=dict(os.environ)
        ) as process,
    ):
        until = time.monotonic() + TIMEOUT_S
        while not _listens(port):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/dicom-web"
        process.terminate()
        process.wait(TIMEOUT_S)


def _listens(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest_asyncio.fixture(loop_scope="session")
async def pacs(orthanc) -> AsyncIterator[DicomWebTarget]:
    async with aiohttp.ClientSession() as session:
        yield DicomWebTarget(DicomWeb(orthanc, session=session, auth=Basic("radqueue", "a password")))


async def test_orthanc_takes_a_result_with_its_originals(pacs, worker):
    """The whole journey into a PACS: originals and result are found there, and a repeat pushes nothing twice."""
    revision = await worker.store_series()
    targets = Targets({"dicomweb": pacs}, default="dicomweb", originals=True)
    await infer(worker.request(revision), **(worker.for_infer | {"targets": targets}))
    (event,) = worker.publish.events
    (output,) = event.data.outputs

    assert isinstance(event, InferenceCompleted)
    assert (event.data.pushed_to, output.image_set_id) == ("dicomweb", None)
    assert await pacs.shown(revision.study_uid, output.series_uid) == {output.sop_instance_uid}
    assert await pacs.shown(revision.study_uid, revision.series_uid) == {
        one.sop_instance_uid for one in revision.instances
    }


async def test_orthanc_refuses_what_is_no_dicom(pacs, tmp_path):
    """The refusal is the target's answer to the instances, not an outage."""
    (tmp_path / "a.dcm").write_bytes(b"no DICOM at all")
    with pytest.raises(PushRejected) as rejected:
        await pacs.push([Instance(tmp_path / "a.dcm", "1.2", "1.3", "1.4")])

    assert rejected.value.reason_code == "push_rejected"


@pytest.mark.parametrize("auth", [None, Basic("radqueue", "another"), Bearer("a token")])
async def test_orthanc_does_not_know_everybody(orthanc, auth, lay, series_files):
    """Wrong credentials are ours to mend, so the message comes again."""
    async with aiohttp.ClientSession() as session:
        stranger = DicomWebTarget(DicomWeb(orthanc, session=session, auth=auth))
        with pytest.raises(Unavailable, match="HTTP 401"):
            await stranger.push(lay(series_files(n=1)))


async def test_what_a_target_does_not_show_is_not_pushed(pacs, lay, series_files, monkeypatch):
    """A 200 is not enough: what a search does not find later is pushed again with the message."""
    instances = lay(series_files(n=2))
    search = pacs._web.search_instances

    async def one_short(*uids, **filters):
        return (await search(*uids, **filters))[1:]

    monkeypatch.setattr(pacs._web, "search_instances", one_short)
    with pytest.raises(Unavailable, match="does not show"):
        await pacs.push(instances)


async def test_a_series_of_several_pages_is_shown_whole(pacs, lay, series_files, monkeypatch):
    """The search goes on until the target has no more."""
    monkeypatch.setattr(dicomweb, "QIDO_PAGE", 2)
    instances = lay(series_files(n=5))
    await pacs.push(instances)
    shown = await pacs.shown(instances[0].study_uid, instances[0].series_uid)

    assert shown == {one.sop_instance_uid for one in instances}
