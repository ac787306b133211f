"""What the worker checks before its first message, and the folder that it works in."""

import asyncio

import pytest
from pydicom import dcmread

from services.inference.__main__ import open_archive, serve
from services.inference.settings import InferenceSettings
from shared.config import Misconfigured
from shared.metrics import Metrics

MAPS = "maps: [{name: m, source: m, when: {Modality: CT}}]"


@pytest.fixture
def maps_file(tmp_path):
    """A routing table with one MAP whose program does nothing."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "app.py").write_text("")
    (tmp_path / "maps.yaml").write_text(MAPS)
    return tmp_path / "maps.yaml"


async def refusal(aws, **settings):
    with pytest.raises(Misconfigured) as caught:
        await serve(InferenceSettings(**settings), aws, Metrics(aws.cloudwatch), asyncio.Event())
    return str(caught.value)


async def test_a_routing_table_that_is_not_there_is_told(aws, tmp_path):
    """The first thing that a new user gets wrong is named with its variable."""
    assert "RADQUEUE_MAPS_FILE" in await refusal(aws, maps_file=tmp_path / "none.yaml")


async def test_a_data_store_that_is_not_there_is_told(aws, maps_file):
    """Neither none nor a wrong one is found out at the first result."""
    assert "RADQUEUE_DATASTORE_ID: not set" in await refusal(aws, maps_file=maps_file)
    assert "ResourceNotFoundException" in await refusal(aws, maps_file=maps_file, datastore_id="0" * 32)


async def test_a_map_that_cannot_be_imported_is_told(aws, local_aws, maps_file, tmp_path):
    """A broken program stops the worker before it takes a message."""
    (tmp_path / "m" / "app.py").write_text("import there_is_no_such_module\n")
    said = await refusal(aws, maps_file=maps_file, datastore_id=local_aws.datastore_id)

    assert said == "maps.yaml: m: cannot be imported (raised ModuleNotFoundError app.py:1)."


async def test_another_archive_takes_results_without_healthimaging(aws, local_aws, dicom_bytes, tmp_path):
    """With a DICOMweb URL nothing is asked of HealthImaging's own API, and results carry no image set."""
    url = f"{local_aws.endpoint_url}/datastore/{local_aws.datastore_id}"
    settings = InferenceSettings(dicomweb_url=url, dicomweb_username="me", dicomweb_password="secret")
    (tmp_path / "a.dcm").write_bytes(dicom_bytes())
    made = dcmread(tmp_path / "a.dcm")
    async with open_archive(settings, aws) as archive:
        await archive.push([tmp_path / "a.dcm"])
        image_set_id = await archive.image_set_of(made.SeriesInstanceUID)
        found = await archive._web.search_series(made.StudyInstanceUID)

    assert image_set_id is None
    assert [one["0020000E"]["Value"][0] for one in found] == [made.SeriesInstanceUID]
    assert "secret" not in repr(settings)
