"""The fake against the local AWS: the same calls, the same answers, where the local AWS is like AWS.

Left out because the local AWS differs from AWS there: stale and expired handles, the 12 hours, move tasks.
"""

import json
import uuid

from botocore.exceptions import ClientError

from shared.aws import connect
from tests.queue.fakesqs import FakeSqs
from tests.queue.world import client_of

VARYING = {
    "ResponseMetadata",
    "MessageId",
    "ReceiptHandle",
    "QueueUrl",
    "SenderId",
    "QueueArn",
    "MD5OfMessageAttributes",
}
"""What differs from run to run, and what the fake does not answer."""


async def transcript(sqs) -> list:
    """Make the calls, and return what was answered without what varies."""
    answers = []
    name = f"differential-{uuid.uuid4().hex[:8]}"

    async def call(operation: str, **arguments):
        try:
            answer = await getattr(sqs, operation)(**arguments)
            answers.append((operation, _plain(answer)))
        except ClientError as error:
            answers.append(
                (operation, error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"])
            )
            return {}
        return answer

    dlq = (await call("create_queue", QueueName=f"{name}-dlq"))["QueueUrl"]
    arn = (await call("get_queue_attributes", QueueUrl=dlq, AttributeNames=["QueueArn"]))["Attributes"]["QueueArn"]
    policy = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": 2})
    url = (await call("create_queue", QueueName=name, Attributes={"RedrivePolicy": policy}))["QueueUrl"]
    await call("get_queue_url", QueueName=name)
    await call("get_queue_url", QueueName=f"{name}-absent")
    counts = [
        "ApproximateNumberOfMessages",
        "ApproximateNumberOfMessagesNotVisible",
        "ApproximateNumberOfMessagesDelayed",
        "VisibilityTimeout",
    ]
    await call("receive_message", QueueUrl=url)
    await call("receive_message", QueueUrl=url, MaxNumberOfMessages=11)
    await call("send_message", QueueUrl=url, MessageBody="late", DelaySeconds=900)
    attributes = {"reason": {"DataType": "String", "StringValue": "bug"}}
    await call("send_message", QueueUrl=url, MessageBody="first", MessageAttributes=attributes)
    batch = [{"Id": str(number), "MessageBody": f"body {number}"} for number in range(3)]
    await call("send_message_batch", QueueUrl=url, Entries=batch)
    await call("get_queue_attributes", QueueUrl=url, AttributeNames=counts)
    found = await call(
        "receive_message",
        QueueUrl=url,
        MaxNumberOfMessages=10,
        MessageSystemAttributeNames=["ApproximateReceiveCount"],
        MessageAttributeNames=["All"],
    )
    handles = {message["Body"]: message["ReceiptHandle"] for message in found["Messages"]}
    await call("get_queue_attributes", QueueUrl=url, AttributeNames=counts)
    await call("receive_message", QueueUrl=url)
    await call("change_message_visibility", QueueUrl=url, ReceiptHandle=handles["first"], VisibilityTimeout=60)
    await call("change_message_visibility", QueueUrl=url, ReceiptHandle=handles["first"], VisibilityTimeout=43_201)
    await call("change_message_visibility", QueueUrl=url, ReceiptHandle="nonsense", VisibilityTimeout=60)
    entries = [{"Id": f"c{i}", "ReceiptHandle": handles[f"body {i}"], "VisibilityTimeout": 0} for i in range(3)]
    await call("change_message_visibility_batch", QueueUrl=url, Entries=entries)
    await call("get_queue_attributes", QueueUrl=url, AttributeNames=counts)
    again = await call("receive_message", QueueUrl=url, MaxNumberOfMessages=10)
    for message in again["Messages"]:
        await call(
            "change_message_visibility", QueueUrl=url, ReceiptHandle=message["ReceiptHandle"], VisibilityTimeout=0
        )
    await call("receive_message", QueueUrl=url)
    await call("get_queue_attributes", QueueUrl=dlq, AttributeNames=counts)
    await call("delete_message_batch", QueueUrl=url, Entries=[{"Id": "d", "ReceiptHandle": handles["first"]}])
    await call("delete_message", QueueUrl=url, ReceiptHandle=handles["first"])
    await call("delete_message_batch", QueueUrl=url, Entries=[{"Id": "d", "ReceiptHandle": "x"}] * 2)
    await call("send_message_batch", QueueUrl=url, Entries=[{"Id": str(i), "MessageBody": "x"} for i in range(11)])
    await call("get_queue_attributes", QueueUrl=url, AttributeNames=counts)
    return answers


def _plain(answer):
    """Drop what varies and lists that are empty, and sort what comes in any order."""
    if isinstance(answer, dict):
        return {key: _plain(value) for key, value in answer.items() if key not in VARYING and value != []}
    if isinstance(answer, list):
        return sorted((_plain(value) for value in answer), key=str)
    return answer


async def test_the_fake_answers_like_the_local_aws(local_aws, monkeypatch):
    """Thirty calls, from creation to dead letters, with their errors."""
    for name, value in local_aws.environ.items():
        monkeypatch.setenv(name, value)
    async with connect(local_aws.environ) as aws:
        expected = await transcript(aws.sqs)
    async with FakeSqs.serving() as fake, client_of(fake.url) as sqs:
        answered = await transcript(sqs)

    assert answered == expected
