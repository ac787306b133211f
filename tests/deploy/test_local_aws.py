"""The one endpoint of AWS on one machine: topology, S3, SQS and the process itself."""

# ruff: noqa: S310 - every URL opened here is the local endpoint's

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from aiobotocore.session import get_session
from botocore.exceptions import ClientError

from deploy.topology import Topology, create

ROOT = Path(__file__).parents[2]


def scope(service):
    """Return an Authorization header that routes a request to a service; signatures are not checked here."""
    return (
        f"AWS4-HMAC-SHA256 Credential=local/20260101/us-east-1/{service}/aws4_request, SignedHeaders=host, Signature=0"
    )


@pytest.fixture
def queue(aws_client, request):
    """A queue of the test's own; its URL."""
    sqs = aws_client("sqs")
    url = sqs.create_queue(QueueName=request.node.name.replace("[", "-").replace("]", ""))["QueueUrl"]
    yield url
    sqs.delete_queue(QueueUrl=url)


def test_each_queue_has_the_described_attributes_and_a_dead_letter_queue(aws_client):
    """All four queues redrive to their own `-dlq` after 50 receives, and hide a message for two minutes."""
    sqs = aws_client("sqs")
    for queue in Topology.load().queues.values():
        attributes = sqs.get_queue_attributes(
            QueueUrl=sqs.get_queue_url(QueueName=queue.name)["QueueUrl"], AttributeNames=["All"]
        )["Attributes"]
        redrive = json.loads(attributes["RedrivePolicy"])

        assert attributes["VisibilityTimeout"] == "120"
        assert redrive["deadLetterTargetArn"].endswith(f":{queue.name}-dlq")
        assert int(redrive["maxReceiveCount"]) == 50


def test_creating_the_topology_twice_changes_nothing(local_aws, aws_client, monkeypatch):
    """Creation is idempotent: the same data store comes back, and the notification is there once."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, local_aws.environ[name])
    queues = aws_client("sqs").list_queues()["QueueUrls"]

    assert create(Topology.load(), endpoint_url=local_aws.endpoint_url) == local_aws.datastore_id
    assert aws_client("sqs").list_queues()["QueueUrls"] == queues
    configuration = aws_client("s3").get_bucket_notification_configuration(Bucket=local_aws.bucket)
    assert len(configuration["QueueConfigurations"]) == 1


def test_the_environment_file_names_everything_that_a_client_needs(local_aws, aws_client):
    """The bucket, the data store and every queue that `local.env` names exist."""
    environ = local_aws.environ
    aws_client("s3").head_bucket(Bucket=environ["RADQUEUE_BUCKET"])
    datastore = aws_client("medical-imaging").get_datastore(datastoreId=environ["RADQUEUE_DATASTORE_ID"])
    for name, value in environ.items():
        if name.endswith("_QUEUE"):
            aws_client("sqs").get_queue_url(QueueName=value)

    assert datastore["datastoreProperties"]["datastoreStatus"] == "ACTIVE"
    assert environ["AWS_ENDPOINT_URL"] == local_aws.endpoint_url
    assert environ["AWS_REGION"] == environ["AWS_DEFAULT_REGION"] == "us-east-1"


def test_an_upload_reaches_the_ingest_queue_with_a_form_encoded_key(start_aws, aws_client, tmp_path):
    """Putting an object under `incoming/` wakes a waiting receive; other prefixes tell nobody."""
    aws = start_aws(tmp_path)
    s3, sqs = aws_client("s3", aws), aws_client("sqs", aws)
    url = sqs.get_queue_url(QueueName=aws.environ["RADQUEUE_INGEST_QUEUE"])["QueueUrl"]
    # S3 announces a new notification with a test event.
    (test_event,) = sqs.receive_message(QueueUrl=url)["Messages"]
    sqs.delete_message(QueueUrl=url, ReceiptHandle=test_event["ReceiptHandle"])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(sqs.receive_message, QueueUrl=url, WaitTimeSeconds=20)
        s3.put_object(Bucket=aws.bucket, Key="studies/1.dcm", Body=b"1")
        s3.put_object(Bucket=aws.bucket, Key="incoming/a b+ü.dcm", Body=b"22")
        (message,) = waiting.result()["Messages"]
    (record,) = json.loads(message["Body"])["Records"]

    assert json.loads(test_event["Body"])["Event"] == "s3:TestEvent"
    assert record["s3"]["object"]["key"] == "incoming%2Fa+b%2B%C3%BC.dcm"
    assert record["s3"]["bucket"]["name"] == aws.bucket
    assert "Messages" not in sqs.receive_message(QueueUrl=url)


def test_one_of_many_conditional_writers_wins(local_aws, aws_client):
    """Of 32 concurrent `If-None-Match: *` puts one is stored, and of 32 `If-Match` puts on its ETag one replaces it."""
    s3, key = aws_client("s3"), "tests/conditional"

    def put(number, **condition):
        try:
            body = str(number).encode()
            return s3.put_object(Bucket=local_aws.bucket, Key=key, Body=body, **condition)["ETag"]
        except ClientError as error:
            if error.response["Error"]["Code"] != "PreconditionFailed":
                raise
            return None

    with ThreadPoolExecutor(16) as pool:
        created = [etag for etag in pool.map(lambda n: put(n, IfNoneMatch="*"), range(32)) if etag]
        replaced = [etag for etag in pool.map(lambda n: put(n, IfMatch=created[0]), range(100, 132)) if etag]

    assert len(created) == 1
    assert len(replaced) == 1
    assert s3.head_object(Bucket=local_aws.bucket, Key=key)["ETag"] == replaced[0]


def test_a_message_goes_to_one_of_many_receivers(aws_client, queue):
    """Twenty concurrent receivers get each of 40 messages once."""
    sqs = aws_client("sqs")
    for start in range(0, 40, 10):
        entries = [{"Id": str(n), "MessageBody": str(n)} for n in range(start, start + 10)]
        sqs.send_message_batch(QueueUrl=queue, Entries=entries)
    with ThreadPoolExecutor(20) as pool:
        batches = pool.map(
            lambda _: sqs.receive_message(QueueUrl=queue, MaxNumberOfMessages=2).get("Messages", []), range(20)
        )
        bodies = [message["Body"] for batch in batches for message in batch]

    assert sorted(bodies, key=int) == [str(n) for n in range(40)]


def test_a_long_poll_waits_as_long_as_it_says_and_no_longer(aws_client, queue):
    """An empty queue answers a poll of one second after one second."""
    begin = time.monotonic()
    answer = aws_client("sqs").receive_message(QueueUrl=queue, WaitTimeSeconds=1)

    assert "Messages" not in answer
    assert 1.0 <= time.monotonic() - begin < 5.0


def test_a_delayed_message_is_hidden_until_its_time(aws_client, queue):
    """`DelaySeconds` hides a message from a receive at once, and a poll gets it when it is due."""
    sqs = aws_client("sqs")
    begin = time.monotonic()
    sqs.send_message(QueueUrl=queue, MessageBody="later", DelaySeconds=1)

    assert "Messages" not in sqs.receive_message(QueueUrl=queue)
    assert sqs.receive_message(QueueUrl=queue, WaitTimeSeconds=10)["Messages"][0]["Body"] == "later"
    assert time.monotonic() - begin >= 1.0


def test_a_message_that_is_not_deleted_comes_back(aws_client, queue):
    """After its visibility timeout a message is delivered again, with its receive count."""
    sqs = aws_client("sqs")
    sqs.send_message(QueueUrl=queue, MessageBody="again")
    (first,) = sqs.receive_message(QueueUrl=queue, VisibilityTimeout=1)["Messages"]

    assert "Messages" not in sqs.receive_message(QueueUrl=queue)
    (second,) = sqs.receive_message(QueueUrl=queue, WaitTimeSeconds=10, AttributeNames=["All"])["Messages"]
    assert second["MessageId"] == first["MessageId"]
    assert second["Attributes"]["ApproximateReceiveCount"] == "2"


def test_a_changed_visibility_of_zero_gives_the_message_back_at_once(aws_client, queue):
    """ChangeMessageVisibility 0 makes the message receivable, which is how a drain gives work away."""
    sqs = aws_client("sqs")
    sqs.send_message(QueueUrl=queue, MessageBody="back")
    (message,) = sqs.receive_message(QueueUrl=queue, VisibilityTimeout=600)["Messages"]
    sqs.change_message_visibility(QueueUrl=queue, ReceiptHandle=message["ReceiptHandle"], VisibilityTimeout=0)

    assert sqs.receive_message(QueueUrl=queue, WaitTimeSeconds=5)["Messages"][0]["Body"] == "back"


def test_a_stale_receipt_handle_deletes_nothing(aws_client, queue):
    """A worker whose visibility ran out cannot delete what another one is working on; its request still succeeds."""
    sqs = aws_client("sqs")
    sqs.send_message(QueueUrl=queue, MessageBody="mine")
    (first,) = sqs.receive_message(QueueUrl=queue, VisibilityTimeout=0)["Messages"]
    (second,) = sqs.receive_message(QueueUrl=queue, VisibilityTimeout=600, WaitTimeSeconds=5)["Messages"]

    def in_flight():
        name = "ApproximateNumberOfMessagesNotVisible"
        return sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=[name])["Attributes"][name]

    sqs.delete_message(QueueUrl=queue, ReceiptHandle=first["ReceiptHandle"])
    assert in_flight() == "1"
    sqs.delete_message(QueueUrl=queue, ReceiptHandle=second["ReceiptHandle"])
    assert in_flight() == "0"
    with pytest.raises(ClientError, match="ReceiptHandleIsInvalid"):
        sqs.delete_message(QueueUrl=queue, ReceiptHandle="never given out")


def test_a_message_received_too_often_moves_to_the_dead_letter_queue(aws_client, queue):
    """The redrive policy counts receives, also in long polls."""
    sqs = aws_client("sqs")
    dead = sqs.create_queue(QueueName="dead-letters")["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=dead, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    policy = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": 2})
    sqs.set_queue_attributes(QueueUrl=queue, Attributes={"RedrivePolicy": policy, "VisibilityTimeout": "0"})
    sqs.send_message(QueueUrl=queue, MessageBody="poison")
    received = [sqs.receive_message(QueueUrl=queue, WaitTimeSeconds=1).get("Messages", []) for _ in range(3)]

    assert [len(messages) for messages in received] == [1, 1, 0]
    assert sqs.receive_message(QueueUrl=dead, WaitTimeSeconds=5)["Messages"][0]["Body"] == "poison"


def test_the_query_protocol_of_sqs_polls_too(aws_client, queue, local_aws):
    """A client that speaks SQS's older form-encoded protocol waits for a message as well."""
    body = f"Action=ReceiveMessage&Version=2012-11-05&WaitTimeSeconds=10&QueueUrl={queue}".encode()
    headers = {"Authorization": scope("sqs"), "Content-Type": "application/x-www-form-urlencoded"}
    request = urllib.request.Request(local_aws.endpoint_url, body, headers)

    def receive():
        with urllib.request.urlopen(request) as response:
            return response.read()

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(receive)
        aws_client("sqs").send_message(QueueUrl=queue, MessageBody="old protocol")

        assert b"old protocol" in waiting.result()


async def test_aiobotocore_streams_a_file_up_and_down(local_aws, tmp_path):
    """A body above the size of every buffer, sent with `Expect: 100-continue`, comes back byte for byte."""
    path, content = tmp_path / "large", b"0123456789abcdef" * 600_000
    path.write_bytes(content)
    async with get_session().create_client(
        "s3",
        endpoint_url=local_aws.endpoint_url,
        region_name=local_aws.region,
        aws_access_key_id="local",
        aws_secret_access_key="local",
    ) as s3:
        with path.open("rb") as file:
            await s3.put_object(Bucket=local_aws.bucket, Key="tests/large", Body=file)
        response = await s3.get_object(Bucket=local_aws.bucket, Key="tests/large")
        async with response["Body"] as stream:
            received = await stream.read()
        await s3.put_object(Bucket=local_aws.bucket, Key="tests/empty", Body=b"")
        head = await s3.head_object(Bucket=local_aws.bucket, Key="tests/empty")

    assert received == content
    assert head["ContentLength"] == 0


def test_a_connection_serves_several_requests(local_aws):
    """Connections are kept alive, also after an error whose body the server had not read."""
    address = ("127.0.0.1", int(local_aws.endpoint_url.rpartition(":")[2]))
    answers = []
    with socket.create_connection(address) as connection, connection.makefile("rb") as stream:
        for method, path, body in (
            ("POST", "/datastore/none/studies", b"x" * 100_000),
            ("GET", f"/{local_aws.bucket}?list-type=2&max-keys=0", b""),
        ):
            head = f"{method} {path} HTTP/1.1\r\nHost: local\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            answers.append(stream.readline())
            length = 0
            while (line := stream.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            stream.read(length)

    assert [answer.split()[1] for answer in answers] == [b"404", b"200"]


def test_a_chunked_upload_is_stored_whole(local_aws, aws_client):
    """A body of unknown length arrives in chunks, and the connection serves the next request."""
    connection = http.client.HTTPConnection(local_aws.endpoint_url.removeprefix("http://"))
    path, signed = f"/{local_aws.bucket}/tests/chunked", {"Authorization": scope("s3")}
    with contextlib.closing(connection):
        chunks = iter([b"a" * 70_000, b"b", b"c" * 70_000])
        connection.request("PUT", path, chunks, {"Transfer-Encoding": "chunked", **signed}, encode_chunked=True)
        with connection.getresponse() as response:
            response.read()
        connection.request("GET", path, headers=signed)
        with connection.getresponse() as response:
            content = response.read()

    assert content == b"a" * 70_000 + b"b" + b"c" * 70_000


def test_a_poll_whose_client_died_takes_no_message(aws_client, queue, local_aws):
    """A message that comes after a waiting client was killed goes to the next one at once."""
    sqs = aws_client("sqs")
    body = json.dumps({"QueueUrl": queue, "WaitTimeSeconds": 20, "VisibilityTimeout": 600})
    head = f"POST / HTTP/1.1\r\nHost: local\r\nAuthorization: {scope('sqs')}\r\n"
    head += "Content-Type: application/x-amz-json-1.0\r\nX-Amz-Target: AmazonSQS.ReceiveMessage\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(local_aws.endpoint_url.rpartition(":")[2]))) as connection:
        connection.sendall((head + body).encode())
        connection.shutdown(socket.SHUT_WR)
        # The server hangs up once it has noticed.
        answer = connection.recv(1)
    sqs.send_message(QueueUrl=queue, MessageBody="for the living")

    assert answer == b""
    assert sqs.receive_message(QueueUrl=queue, WaitTimeSeconds=5)["Messages"][0]["Body"] == "for the living"


def test_an_upload_that_is_cut_off_stores_nothing(local_aws, aws_client):
    """A client that dies in the middle of a put leaves no object behind."""
    address = ("127.0.0.1", int(local_aws.endpoint_url.rpartition(":")[2]))
    head = f"PUT /{local_aws.bucket}/tests/cut-off HTTP/1.1\r\nHost: local\r\nAuthorization: {scope('s3')}\r\n"
    head += "Content-Length: 1000\r\n\r\n"
    with socket.create_connection(address) as connection:
        connection.sendall(head.encode() + b"half")
        connection.shutdown(socket.SHUT_WR)
        # The server closes its side without an answer when it has noticed.
        answer = connection.recv(4096)

    assert answer == b""
    with pytest.raises(ClientError, match="404"):
        aws_client("s3").head_object(Bucket=local_aws.bucket, Key="tests/cut-off")


@pytest.mark.parametrize(
    ("service", "call"),
    [
        ("cloudwatch", lambda c: c.put_metric_data(Namespace="n", MetricData=[{"MetricName": "m", "Value": 1}])),
        ("ecr", lambda c: c.describe_repositories(repositoryNames=["radqueue-maps"])),
        ("ssm", lambda c: c.put_parameter(Name="p", Value="v", Type="String", Overwrite=True)),
        ("stepfunctions", lambda c: c.list_state_machines()),
        ("iam", lambda c: c.list_roles()),
    ],
)
def test_the_other_services_answer_on_the_same_endpoint(aws_client, service, call):
    """Each service is found by its credential scope."""
    answer = call(aws_client(service))

    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 200


def _run(*arguments):
    command = [sys.executable, "-m", "deploy.local", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


def test_an_operation_that_is_missing_is_refused_and_not_tried_again(aws_client):
    """What moto lacks is refused with 400 and a code of AWS's: after a server error a client would ask again."""
    asked = {"SourceArn": "arn:aws:sqs:us-east-1:123456789012:radqueue-ingest-dlq"}
    with pytest.raises(ClientError) as refused:
        aws_client("sqs").start_message_move_task(**asked)

    assert refused.value.response["Error"]["Code"] == "InvalidAction"
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 400


def test_a_taken_port_is_said_so(local_aws, tmp_path):
    """The second process on a port explains itself and exits with 2."""
    ended = _run("--port", local_aws.endpoint_url.rpartition(":")[2], "--dir", tmp_path)

    assert ended.returncode == 2
    assert "is taken" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_folder_in_use_is_said_so(local_aws):
    """Two processes never write to the same folder."""
    ended = _run("--port", 0, "--dir", local_aws.directory)

    assert ended.returncode == 2
    assert "in use" in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly_while_clients_wait(start_aws, aws_client, tmp_path, number):
    """A stop answers the long polls in progress, ends with exit code 0 and says nothing on stderr."""
    aws = start_aws(tmp_path)
    sqs = aws_client("sqs", aws)
    url = sqs.get_queue_url(QueueName="radqueue-training")["QueueUrl"]
    begun = threading.Event()
    sqs.meta.events.register("before-send.sqs.ReceiveMessage", lambda **_: begun.set())
    begin = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(sqs.receive_message, QueueUrl=url, WaitTimeSeconds=20)
        begun.wait()
        aws.process.send_signal(number)
        _, errors = aws.process.communicate(timeout=30)
        waiting.exception()

    assert aws.process.returncode == 0
    assert errors == ""
    assert time.monotonic() - begin < 15
