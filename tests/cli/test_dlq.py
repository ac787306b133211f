import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import boto3
import pytest
from typer.testing import CliRunner

from cli import dlq
from cli.client import Client
from cli.main import app
from shared.errors import Unprocessable
from shared.messages import ReportRequest, ReportRequested
from shared.operations import dead_letters
from shared.queue import consume
from shared.queue.fates import dead_letter_attributes

ROOT = Path(__file__).parent.parent.parent
NAME = "Müller^Anna"
POISON = f'{{"specversion": "1.0", "type": "{NAME}", "PatientName": "{NAME}", "id": '
KILLED = """
import os, signal, sys
from cli.client import Client
from cli.main import app
from shared.operations import dead_letters

make, moment = Client._client, sys.argv.pop(1)

def client(self, service):
    made = make(self, service)
    made.meta.events.register(moment, lambda **_: os.kill(os.getpid(), signal.SIGKILL))
    return made

Client._client = client
dead_letters.HOLD_S = 1
app(prog_name="radqueue")
"""


def body(month="2026-11"):
    return ReportRequested.of("reports", ReportRequest(month=month), time=datetime(2026, 11, 2, tzinfo=UTC)).body()


class Queue:
    """The reporting queue of a test and its dead-letter queue."""

    def __init__(self, sqs, name):
        self.sqs = sqs
        self.url = sqs.get_queue_url(QueueName=name)["QueueUrl"]
        self.dead_url = sqs.get_queue_url(QueueName=f"{name}-dlq")["QueueUrl"]

    def bury(self, *bodies, reason="not_json", **attributes):
        told = {"reason_code": reason, "receive_count": "1"} | attributes if reason else attributes
        attributes = {name: {"DataType": "String", "StringValue": value} for name, value in told.items()}
        for one in bodies:
            self.sqs.send_message(QueueUrl=self.dead_url, MessageBody=one, MessageAttributes=attributes)

    def visible(self, url):
        """Receive what is visible, and leave it so: bodies and attributes."""
        found = []
        while True:
            asked = {"MaxNumberOfMessages": 10, "VisibilityTimeout": 30, "MessageAttributeNames": ["All"]}
            messages = self.sqs.receive_message(QueueUrl=url, **asked).get("Messages", [])
            if not messages:
                break
            found += messages
        for message in found:
            handle = message["ReceiptHandle"]
            self.sqs.change_message_visibility(QueueUrl=url, ReceiptHandle=handle, VisibilityTimeout=0)
        return found

    def bodies(self, url):
        return sorted(message["Body"] for message in self.visible(url))


@pytest.fixture
def queue(aws_client, own_queues):
    return Queue(aws_client("sqs"), own_queues.reporting_queue)


@pytest.fixture
def environ(local_aws, own_queues):
    """What names the test's queues to the command line."""
    names = {f"RADQUEUE_{name.upper()}": value for name, value in own_queues if name.endswith("_queue")}
    return local_aws.environ | names


@pytest.fixture
def invoke(environ):
    """Run a command in this process."""

    def run(*arguments):
        return CliRunner(env=environ).invoke(app, list(arguments))

    return run


def test_a_list_tells_reasons_and_leaves_everything_visible(invoke, queue):
    """Per reason: how many, since when, where and one example; afterwards every message can be received at once."""
    queue.bury(
        *(body(f"2026-{month:02}") for month in range(1, 13)), reason="bug", error_type="KeyError", where="a.py:3"
    )
    queue.bury("not json", reason="not_json")
    before = queue.bodies(queue.dead_url)
    done = invoke("dlq", "list", "reporting", "--json")
    (found,) = json.loads(done.stdout)["queues"]
    bug, undecodable = found["reasons"]

    assert done.exit_code == 0, done.output
    assert (found["messages"], found["looked_at"], found["complete"]) == (13, 13, True)
    assert (bug["reason"], bug["count"], bug["where"]) == ("bug", 12, [{"place": "KeyError a.py:3", "count": 12}])
    assert bug["sample"]["event_type"] == "radqueue.report.requested.v1"
    assert bug["sample"]["sent"] == bug["oldest"]
    assert (undecodable["reason"], undecodable["count"]) == ("not_json", 1)
    assert queue.bodies(queue.dead_url) == before


def test_reasons_are_ordered_by_number_then_by_name(invoke, queue):
    """The most frequent reason comes first, and of equals the first by name."""
    for reason in ("undecodable", "not_json", "bug", "not_json"):
        queue.bury("x", reason=reason)
    (found,) = json.loads(invoke("dlq", "list", "reporting", "--json").stdout)["queues"]

    assert [(row["reason"], row["count"]) for row in found["reasons"]] == [
        ("not_json", 2),
        ("bug", 1),
        ("undecodable", 1),
    ]


def test_nothing_of_a_poison_body_is_shown(invoke, queue):
    """A body with a name in it, broken or well-formed, and attributes of unknown origin are not in the output."""
    queue.bury(POISON, POISON + '"1"}', reason="not_json")
    queue.bury(POISON + '"1"}', reason=NAME)
    queue.bury(POISON, reason=None, remark=NAME)
    texts = [invoke("dlq", "list", *more) for more in (("reporting",), ("reporting", "--json"))]
    texts.append(invoke("redrive", "reporting", "--dry-run", "--json"))
    texts.append(invoke("redrive", "reporting"))

    assert [done.exit_code for done in texts] == [0] * 4
    assert all("Anna" not in json.dumps(done.output, ensure_ascii=False) for done in texts)
    assert "not_json" in texts[0].stdout
    assert "unknown" in texts[0].stdout


async def test_what_the_runtime_dead_letters_is_listed_with_its_reason(aws, own_queues, queue, environ):
    """The reasons are the runtime's own, and all that it puts beside a message is known here."""
    stop = asyncio.Event()

    async def refuse(_) -> None:
        raise Unprocessable("object_gone", "3f2a")

    for sent in (body(), POISON):
        queue.sqs.send_message(QueueUrl=queue.url, MessageBody=sent)
    consuming = asyncio.create_task(
        consume({ReportRequested: refuse}, aws.sqs, own_queues.reporting_queue, settings=own_queues, stop=stop)
    )
    async with asyncio.timeout(30):
        while (await asyncio.to_thread(dlq.place_of, Client(environ), "reporting")).dead < 2:
            await asyncio.sleep(0.05)
    stop.set()
    await consuming
    (found,) = await asyncio.to_thread(dlq.listed, Client(environ), ["reporting"])
    told = {row["reason"]: row["where"] for row in found["reasons"]}

    assert told == {"object_gone": [{"place": "3f2a", "count": 1}], "not_json": []}
    assert (
        set(dead_letter_attributes(Unprocessable("x", "y"), 1)) | set(dead_letter_attributes(KeyError(), 3))
        == dead_letters.TOLD
    )


async def test_a_redrive_ends_although_all_fails_again(aws, own_queues, queue, invoke):
    """While a consumer sends every message back to the dead-letter queue, a redrive goes through it once."""
    stop = asyncio.Event()

    async def refuse(_) -> None:
        raise Unprocessable("object_gone")

    queue.bury("a", "b", *(body(f"2026-{month:02}") for month in range(1, 13)))
    consuming = asyncio.create_task(
        consume({ReportRequested: refuse}, aws.sqs, own_queues.reporting_queue, settings=own_queues, stop=stop)
    )
    async with asyncio.timeout(60):
        done = await asyncio.to_thread(invoke, "redrive", "reporting")
        while await asyncio.to_thread(queue.bodies, queue.url):
            await asyncio.sleep(0.05)
    stop.set()
    await consuming

    assert done.exit_code == 0, done.output
    assert "\n14 messages moved" in f"\n{done.stdout}"  # the consumer's log may stand before it
    assert len(queue.bodies(queue.dead_url)) == 14


def test_a_redrive_moves_everything_and_drops_the_reasons(invoke, queue):
    """Bodies arrive as they were, with their own attributes and without the reason; the dead-letter queue is empty."""
    sent = sorted(body(f"2026-{month:02}") for month in range(1, 13))
    queue.bury(*sent, reason="bug", error_type="KeyError", where="a.py:3", attempt="2")
    done = invoke("redrive", "reporting", "--json")
    told = json.loads(done.stdout)
    arrived = queue.visible(queue.url)

    assert done.exit_code == 0, done.output
    assert (told["how"], told["moved"], told["left"], told["reasons"]) == ("messages", 12, 0, {"bug": 12})
    assert "moved" in done.stderr
    assert sorted(message["Body"] for message in arrived) == sent
    assert [set(message["MessageAttributes"]) for message in arrived] == [{"attempt"}] * 12
    assert queue.bodies(queue.dead_url) == []


def test_only_what_was_asked_for_is_moved(invoke, queue):
    """A reason and a maximum choose; the rest is visible in the dead-letter queue, and a dry run moves nothing."""
    bugs = [body(f"2026-{month:02}") for month in range(1, 13)]
    queue.bury("a", "b", reason="not_json")
    queue.bury(*bugs, reason="bug")
    queue.bury("c", reason="not_json")
    dry = json.loads(invoke("redrive", "reporting", "--reason", "bug", "--dry-run", "--json").stdout)
    untouched = queue.bodies(queue.dead_url), queue.bodies(queue.url)
    some = invoke("redrive", "reporting", "--reason", "bug", "--max", "11")

    assert (dry["moved"], dry["dry_run"], dry["left"]) == (12, True, 3)
    assert untouched == (sorted([*bugs, "a", "b", "c"]), [])
    assert some.exit_code == 0, some.output
    assert "11 messages with the reason bug moved to reporting" in some.stdout
    assert len(queue.bodies(queue.url)) == 11
    assert sorted(queue.bodies(queue.url) + queue.bodies(queue.dead_url)) == untouched[0]


@pytest.mark.parametrize(
    ("moment", "moved", "left"),
    [
        ("after-call.sqs.ReceiveMessage", [], ["a", "b"]),
        ("after-call.sqs.SendMessageBatch", ["a", "b"], ["a", "b"]),
        ("after-call.sqs.DeleteMessageBatch", ["a", "b"], []),
    ],
)
def test_a_redrive_that_is_killed_loses_nothing(invoke, queue, environ, *, moment, moved, left):
    """Killed between send and delete it leaves the messages in both queues; the next redrive finds what is left."""
    queue.bury("a", "b", reason="bug")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, moment, "redrive", "reporting", "--max", "2"],
        cwd=ROOT,
        env=os.environ | environ,
        capture_output=True,
        timeout=60,
        check=False,
    )
    after_kill = queue.bodies(queue.url)
    while left and not queue.bodies(queue.dead_url):
        time.sleep(0.1)
    still_there = queue.bodies(queue.dead_url)
    again = invoke("redrive", "reporting", "--max", "2")

    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (after_kill, still_there) == (moved, left)
    assert again.exit_code == 0
    assert (queue.bodies(queue.url), queue.bodies(queue.dead_url)) == (sorted(moved + left), [])


@pytest.fixture
def fake_sqs():
    """SQS as a process of its own that can move messages by itself; gives its URL."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.queue.fakesqs"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process.stdout.readline().split()[1]
        process.terminate()


def test_where_sqs_can_move_messages_it_does(fake_sqs, environ):
    """All of a queue is moved by one task of SQS's, to the queue by name, whoever had sent the messages there."""
    env = environ | {"AWS_ENDPOINT_URL": fake_sqs}
    name = environ["RADQUEUE_REPORTING_QUEUE"]
    sqs = boto3.client(
        "sqs", endpoint_url=fake_sqs, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x"
    )
    with contextlib.closing(sqs):
        dead = sqs.create_queue(QueueName=f"{name}-dlq")["QueueUrl"]
        arn = sqs.get_queue_attributes(QueueUrl=dead, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
        policy = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": 50})
        sqs.create_queue(QueueName=name, Attributes={"RedrivePolicy": policy})
        queue = Queue(sqs, name)
        sent = sorted(body(f"2026-{month:02}") for month in range(1, 13))
        queue.bury(*sent, reason="bug")
        result = CliRunner(env=env).invoke(app, ["redrive", "reporting", "--json"])
        told = json.loads(result.stdout)

        assert result.exit_code == 0, result.output
        assert (told["how"], told["moved"], told["complete"]) == ("move_task", 12, True)
        assert (queue.bodies(queue.url), queue.bodies(queue.dead_url)) == (sent, [])


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("dlq", "list", "nonsense"), 2, "there is no queue nonsense"),
        (("redrive", "nonsense"), 2, "there is no queue nonsense"),
        (("redrive", "reporting", "--max", "0"), 2, "--max"),
        (("redrive", "reporting", "--reason", "no_such_reason"), 0, "0 messages"),
        (("dlq", "list"), 0, "no messages"),
    ],
)
def test_what_cannot_be_done_is_said(invoke, arguments, code, said):
    """Wrong names are usage errors; empty queues are none."""
    done = invoke(*arguments)

    assert done.exit_code == code
    assert said in done.output
    assert "Traceback" not in done.stderr
