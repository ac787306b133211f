"""What docs/events.md and docs/asyncapi.yaml say is so."""

import json
import re
import subprocess
import sys

import jsonschema
import pytest
import yaml

from shared.messages import EVENT_TYPES, ObjectsCreated, ReportRequested, TrainingRequested, decode
from tests.docs.events import recorded, type_of
from tests.docs.markdown import DOCS

GUIDE = (DOCS / "events.md").read_text()
TRAINING, REPORT, UPLOAD, READING = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
DOCUMENT = yaml.safe_load((DOCS / "asyncapi.yaml").read_text())
WITHIN_S = 60


def ran(code, aws, folder) -> str:
    """Run an example as a user would, in a process and a folder of its own, and return what it printed."""
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=aws.process_environ, cwd=folder, check=True, capture_output=True, text=True, timeout=WITHIN_S
    ).stdout


@pytest.mark.parametrize(("code", "queue"), [(TRAINING, "training"), (REPORT, "reporting")])
def test_what_the_examples_send_is_a_message(local_aws, own_queues, aws_client, tmp_path, *, code, queue):
    """A request that is sent with boto3, as the page shows it, is decoded as that request."""
    sqs = aws_client("sqs")
    name = getattr(own_queues, f"{queue}_queue")
    ran(code.replace(f'"radqueue-{queue}"', f'"{name}"'), local_aws, tmp_path)
    url = sqs.get_queue_url(QueueName=name)["QueueUrl"]
    (message,) = sqs.receive_message(QueueUrl=url, WaitTimeSeconds=5)["Messages"]

    assert isinstance(decode(message["Body"]), {"training": TrainingRequested, "reporting": ReportRequested}[queue])


def test_an_upload_and_the_event_log_are_as_the_examples_have_them(local_aws, aws_client, tmp_path):
    """The upload's key is one that ingest takes, and the lines of the log are read as events."""
    s3 = aws_client("s3")
    s3.create_bucket(Bucket="test-events")
    (tmp_path / "study.zip").write_bytes(b"PK")
    ran(UPLOAD.replace('"radqueue"', '"test-events"'), local_aws, tmp_path)
    lines = "".join(json.dumps(body) + "\n" for event in EVENT_TYPES for body in recorded(event))
    s3.put_object(Bucket="test-events", Key="events/date=2026-11-02/any.jsonl", Body=lines.encode())
    printed = ran(READING.replace('"radqueue"', '"test-events"'), local_aws, tmp_path)
    uploaded = s3.list_objects_v2(Bucket="test-events", Prefix="incoming/")["Contents"]

    assert [found["Key"] for found in uploaded] == ["incoming/chest/study.zip"]
    assert {line.split()[0] for line in printed.splitlines()} == {type_of(event) for event in EVENT_TYPES}


def test_every_body_on_the_page_parses():
    """What stands there as the body of a message is one."""
    bodies = re.findall(r"```json\n(.*?)```", GUIDE, re.DOTALL)

    assert [decode(body).type for body in bodies] == [type_of(event) for event in EVENT_TYPES]


@pytest.mark.parametrize("event", EVENT_TYPES, ids=type_of)
def test_the_schemas_take_what_is_a_message_and_nothing_else(event):
    """A recorded body meets its schema; one that lacks its type or its data, or is of another type, does not."""
    schema = {"$ref": f"#/components/schemas/{event.__name__}", "components": DOCUMENT["components"]}
    validator = jsonschema.Draft202012Validator(schema)
    body = recorded(event)[0]
    without = [{name: value for name, value in body.items() if name != missing} for missing in ("type", "data", "id")]

    assert all(validator.is_valid(one) for one in recorded(event))
    assert not any(validator.is_valid(one) for one in [*without, body | {"type": "radqueue.other.v1"}])


def test_every_reference_of_the_document_leads_somewhere():
    """All that the AsyncAPI document refers to is in it."""
    for pointer in set(re.findall(r"\$ref: '#/([^']+)'", (DOCS / "asyncapi.yaml").read_text())):
        found = DOCUMENT
        for name in pointer.split("/"):
            found = found[name]

        assert found


def test_every_message_is_sent_and_received():
    """Each event is an operation of who sends it and of each service whose queue it goes to; S3 sends its own."""
    ends = {"send": [], "receive": []}
    for operation in DOCUMENT["operations"].values():
        ends[operation["action"]] += [message["$ref"].rpartition("/")[2] for message in operation["messages"]]
    expected = sorted(event.__name__ for event in EVENT_TYPES for _ in event.queues)

    assert sorted(ends["send"]) == expected
    assert sorted(ends["receive"]) == sorted([*expected, "S3Notification"])
    (example,) = DOCUMENT["components"]["messages"]["S3Notification"]["examples"]
    assert isinstance(decode(json.dumps(example["payload"])), ObjectsCreated)
