"""What the reporter's tests share."""

import uuid

import pytest

from shared.objects import ObjectStore


@pytest.fixture
async def objects(aws) -> ObjectStore:
    """An empty bucket of the test's own."""
    bucket = f"reporter-{uuid.uuid4()}"
    await aws.s3.create_bucket(Bucket=bucket)
    return ObjectStore(aws.s3, bucket)
