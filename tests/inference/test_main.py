"""What the worker checks before its first message, and the folder that it works in."""

import asyncio
from pathlib import Path

import pytest
from pydicom import dcmread

from services.inference.__main__ import serve
from services.inference.settings import InferenceSettings
from services.inference.targets.configured import open_targets
from services.inference.targets.target import Instance
from shared.config import Misconfigured
from shared.metrics import Metrics
from shared.objects import ObjectStore

MAPS = "maps: [{name: m, source: m, when: {Modality: CT}}]"


@pytest.fixture
def maps_file(tmp_path):
    """A routing table with one MAP whose program does nothing."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "app.py").write_text("")
    (tmp_path / "maps.yaml").write_text(MAPS)
    return str(tmp_path / "maps.yaml")


async def refusal(aws, **settings):
    with pytest.raises(Misconfigured) as caught:
        await serve(InferenceSettings(**settings), aws, Metrics(aws.cloudwatch), asyncio.Event())
    return str(caught.value)


@pytest.mark.parametrize("maps_file", ["none.yaml", "s3://radqueue/none.yaml", "s3://no-such-bucket/none.yaml"])
async def test_a_routing_table_that_is_not_there_is_told(aws, local_aws, maps_file):
    """The first thing that a new user gets wrong is named with its variable."""
    assert "RADQUEUE_MAPS_FILE" in await refusal(aws, maps_file=maps_file, datastore_id=local_aws.datastore_id)


async def test_a_target_that_is_not_set_is_told(aws, local_aws, maps_file):
    """A MAP whose results are to go where the worker cannot push is found out at the start, and so is the default."""
    Path(maps_file).write_text(MAPS.replace("when:", "push: dicomweb, when:"))
    by_route = await refusal(aws, maps_file=maps_file, datastore_id=local_aws.datastore_id)
    by_default = await refusal(
        aws, maps_file=maps_file, datastore_id=local_aws.datastore_id, push_to="healthimaging-import"
    )

    assert by_route == "maps.yaml: m: push: dicomweb needs RADQUEUE_DICOMWEB_URL."
    assert "RADQUEUE_IMPORT_ROLE_ARN" in by_default


async def test_a_data_store_that_is_not_there_is_told(aws, maps_file):
    """Neither none nor a wrong one is found out at the first result."""
    assert "RADQUEUE_DATASTORE_ID: not set" in await refusal(aws, maps_file=maps_file)
    assert "ResourceNotFoundException" in await refusal(aws, maps_file=maps_file, datastore_id="0" * 32)


async def test_a_map_that_cannot_be_imported_is_told(aws, local_aws, maps_file, tmp_path):
    """A broken program stops the worker before it takes a message."""
    (tmp_path / "m" / "app.py").write_text("import there_is_no_such_module\n")
    Path(maps_file).write_text(MAPS.replace("name: m", "name: never-served"))
    said = await refusal(aws, maps_file=maps_file, datastore_id=local_aws.datastore_id)

    assert said == "maps.yaml: never-served: cannot be imported (raised ModuleNotFoundError app.py:1)."


async def test_a_pacs_takes_results_without_healthimaging(aws, local_aws, dicom_bytes, tmp_path):
    """With a DICOMweb URL nothing is asked of HealthImaging's own API, and results carry no image set."""
    url = f"{local_aws.endpoint_url}/datastore/{local_aws.datastore_id}"
    settings = InferenceSettings(dicomweb_url=url, dicomweb_username="me", dicomweb_password="secret")
    (tmp_path / "a.dcm").write_bytes(dicom_bytes())
    made = dcmread(tmp_path / "a.dcm")
    uids = made.StudyInstanceUID, made.SeriesInstanceUID, made.SOPInstanceUID
    async with open_targets(settings, aws, ObjectStore(aws.s3, local_aws.bucket)) as targets:
        target, originals = targets.of(None)
        image_sets = await target.push([Instance(tmp_path / "a.dcm", *uids)])
        shown = await target.shown(*uids[:2])

    assert (target.name, originals) == ("dicomweb", False)
    assert image_sets == {made.SeriesInstanceUID: None}
    assert shown == {made.SOPInstanceUID}
    assert "secret" not in repr(settings)
