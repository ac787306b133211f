"""What operators do works over the services' own store and queues, as a portal has them, without the command line."""

import hashlib
import json
import uuid
from datetime import UTC, datetime

import pytest

from shared.objects import ObjectStore
from shared.operations import quarantine
from shared.operations.refused import Refused, WrongUsage

NOW = datetime(2026, 11, 2, tzinfo=UTC)


@pytest.fixture
def objects(aws, local_aws) -> ObjectStore:
    return ObjectStore(aws.s3, local_aws.bucket)


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
