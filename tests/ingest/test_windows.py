"""One window per dataset where `datasets.yaml` names none."""

import asyncio
import io
import json
import uuid
from dataclasses import replace

import numpy as np
import pytest

from services.ingest.decoder import Decoder
from services.ingest.handler import handle_uploads
from services.ingest.protocol import Measure
from shared.documents.revisions import Revision
from shared.messages import SeriesReady
from tests.ingest.conftest import Maker, part_10, zip_of


@pytest.fixture
def dataset():
    return f"w-{uuid.uuid4().hex[:8]}"


def mr(number, low, high):
    """A series of one MR slice whose values are `low` above and `high` below."""
    pixels = np.full((16, 16), low, "<u2")
    pixels[8:] = high
    return Maker().ct(number, Modality="MR", RescaleIntercept=None, RescaleSlope=None, PixelData=pixels.tobytes())


async def settled(bench, dataset, *instances, ports=None):
    """Settle an archive of the instances; return their arrays and sidecars by series."""
    body = zip_of({str(n): part_10(one) for n, one in enumerate(instances)})
    upload = await bench.upload(f"incoming/{dataset}/{uuid.uuid4().hex}.zip", body)
    await handle_uploads(upload, ports=ports or bench.ports)
    found = {}
    for event in bench.published.of(SeriesReady):
        revision = Revision.model_validate_json(await bench.objects.get(event.data.revision_key))
        if revision.array_key:
            array = np.load(io.BytesIO(await bench.objects.get(revision.array_key)))
            sidecar = json.loads(await bench.objects.get(revision.array_key.replace(".npy", ".json")))
            found[revision.series_uid] = array, sidecar
    return [found.get(one.SeriesInstanceUID) for one in instances]


async def test_all_series_of_a_dataset_have_one_window(bench, dataset):
    """The percentiles of the first series are those of the later ones: one value is one grey, whatever the series."""
    ((first, told),) = await settled(bench, dataset, mr(0, 100, 900))
    ((second, told_second),) = await settled(bench, dataset, mr(1, 500, 900))
    (key,) = await bench.keys(f"datasets/{dataset}/window.")
    stored = json.loads(await bench.objects.get(key))

    assert (first[0].min(), first[0].max()) == (-1, 1)
    assert (second[0, 0, 0], second[0].max()) == (0, 1)
    assert told["window"] == told_second["window"] == stored["window"] == [100, 900]
    assert told["window_from"] == told_second["window_from"] == key
    assert stored["source"]["series_uid"] == told["series_uid"]


async def test_two_workers_that_measure_at_once_use_one_window(bench, dataset):
    """Whichever is stored first is the window of both series, and it is stored once."""
    both_measure = asyncio.Barrier(2)

    class Waiting(Decoder):
        async def series_call(self, request):
            found = await super().series_call(request)
            if isinstance(request, Measure):
                await both_measure.wait()
            return found

    decoders = [Waiting(bench.ports.settings) for _ in range(2)]
    try:
        async with asyncio.timeout(60):
            found = await asyncio.gather(
                *(
                    settled(bench, dataset, instance, ports=replace(bench.ports, decoder=decoder))
                    for decoder, instance in zip(decoders, (mr(0, 100, 900), mr(1, 500, 900)), strict=True)
                )
            )
    finally:
        await asyncio.gather(*(decoder.stop() for decoder in decoders))
    windows = [sidecar["window"] for ((_, sidecar),) in found]

    assert windows[0] == windows[1]
    assert windows[0] in ([100, 900], [500, 900])
    assert len(await bench.keys(f"datasets/{dataset}/window.")) == 1


async def test_a_modality_has_its_own_window_and_a_dataset_too(bench, dataset):
    """Values of another kind, or of another dataset, are not scaled by the first series of this one."""
    pet = mr(1, 0, 10)
    pet.Modality = "PT"
    odd = mr(2, 5, 7)
    odd.Modality = "Secret/Name"
    (_, one), (_, other), (_, third) = await settled(bench, dataset, mr(0, 100, 900), pet, odd)
    ((_, elsewhere),) = await settled(bench, f"{dataset}-b", mr(3, 1, 2))
    names = [key.split("/")[2].split(".")[1] for key in await bench.keys(f"datasets/{dataset}/window.")]

    assert [told["window"] for told in (one, other, third, elsewhere)] == [[100, 900], [0, 10], [5, 7], [1, 2]]
    assert sorted(names) == ["MR", "PT", "other"]


async def test_a_series_that_shows_nothing_decides_nothing(bench, dataset):
    """A flat first series has no array, and the next one gives the window."""
    assert await settled(bench, dataset, mr(0, 7, 7)) == [None]
    assert not await bench.keys(f"datasets/{dataset}/window.")

    ((_, told),) = await settled(bench, dataset, mr(1, 100, 900))

    assert told["window"] == [100, 900]
    assert bench.published.of(SeriesReady)[0].data.warnings == ("blank_left_out",)


async def test_a_window_that_cannot_be_read_keeps_no_series_from_its_map(bench, dataset):
    """The series is announced without an array, with a warning; what lies there is not overwritten."""
    await settled(bench, dataset, mr(0, 100, 900))
    (key,) = await bench.keys(f"datasets/{dataset}/window.")
    await bench.objects.put(key, b"{}")

    assert await settled(bench, dataset, mr(1, 100, 900)) == [None]
    assert bench.published.of(SeriesReady)[-1].data.warnings == ("array_failed",)
    assert await bench.objects.get(key) == b"{}"


async def test_a_deidentified_dataset_names_no_original(bench):
    """The window's object tells of the series as its array does: by a keyed UID."""
    instance = mr(0, 100, 900)
    ((_, told),) = await settled(bench, bench.keyed, instance)
    body = await bench.objects.get(told["window_from"])

    assert instance.SeriesInstanceUID.encode() not in body
    assert json.loads(body)["source"]["series_uid"] == told["series_uid"]
