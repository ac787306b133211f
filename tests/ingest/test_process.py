"""`python -m services.ingest` as an operator runs it."""

import asyncio
import json
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from shared.messages import SeriesReady, decode
from shared.objects import ObjectStore

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60


async def received(sqs, queue_name, count):
    """Wait for `count` messages of a queue."""
    url = (await sqs.get_queue_url(QueueName=queue_name))["QueueUrl"]
    found = []
    async with asyncio.timeout(PATIENCE_S):
        while len(found) < count:
            answer = await sqs.receive_message(QueueUrl=url, WaitTimeSeconds=5)
            found += [decode(message["Body"]) for message in answer.get("Messages", [])]
    return found


async def test_an_upload_is_announced_and_sigterm_ends_with_zero(aws, local_aws, own_queues, maker, make_part_10):
    """The process takes an upload from its queue, settles and announces the series, and ends cleanly when told to."""
    queues = {f"RADQUEUE_{name.upper()}": value for name, value in own_queues.model_dump().items() if "queue" in name}
    environ = local_aws.process_environ | queues | {"RADQUEUE_QUIET_S": "1", "RADQUEUE_POLL_S": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "services.ingest"], cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True
    )
    try:
        key = f"incoming/lung/{maker.series_uid}/Secretperson.dcm"
        await ObjectStore(aws.s3, local_aws.bucket).put(key, make_part_10(maker.ct()))
        record = {
            "eventName": "ObjectCreated:Put",
            "eventTime": datetime.now(UTC).isoformat(),
            "s3": {"bucket": {"name": local_aws.bucket}, "object": {"key": key}},
        }
        url = (await aws.sqs.get_queue_url(QueueName=own_queues.ingest_queue))["QueueUrl"]
        await aws.sqs.send_message(QueueUrl=url, MessageBody=json.dumps({"Records": [record]}))
        (ready,) = await received(aws.sqs, own_queues.inference_queue, 1)
    finally:
        process.send_signal(signal.SIGTERM)
        _, logged = await asyncio.to_thread(process.communicate, timeout=PATIENCE_S)

    assert isinstance(ready, SeriesReady)
    assert ready.data.series_uid == maker.series_uid
    assert process.returncode == 0
    assert "series.ready" in logged
    assert "Secretperson" not in logged
    assert "MRN-4711" not in logged
