"""What docs/queue.md says is so."""

import re
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from shared.config import ServiceSettings
from shared.errors import Unavailable, Unprocessable
from shared.messages import ReportRequest, ReportRequested
from shared.metrics import METRICS, RADQUEUE
from shared.queue.fates import why_of

ROOT = Path(__file__).parent.parent.parent
GUIDE = (ROOT / "docs" / "queue.md").read_text()
STOP_TIMEOUT_S = 30


def table(title):
    """Return the rows of the table under a heading, as lists of cells without quotes."""
    section = GUIDE.partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def test_the_example_is_a_service(local_aws, own_queues, aws_client, tmp_path):
    """The code of the guide, as it stands there, handles a message, deletes it, and ends with 0 at SIGTERM."""
    code = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)[0]
    (tmp_path / "greeter.py").write_text(code)
    settings = {f"RADQUEUE_{name.upper()}": str(value) for name, value in own_queues}
    sqs = aws_client("sqs")
    url = sqs.get_queue_url(QueueName=own_queues.reporting_queue)["QueueUrl"]
    sent = ReportRequested.of("reports", ReportRequest(month="2026-11"), time=datetime(2026, 11, 2, tzinfo=UTC))
    sqs.send_message(QueueUrl=url, MessageBody=sent.body())
    process = subprocess.Popen(
        [sys.executable, tmp_path / "greeter.py"],
        env=local_aws.process_environ | settings | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=STOP_TIMEOUT_S)
    finally:
        process.kill()
    left = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]

    assert (said, process.returncode) == ("asked for 2026-11\n", 0), errors
    assert (left["ApproximateNumberOfMessages"], left["ApproximateNumberOfMessagesNotVisible"]) == ("0", "0")


def test_the_settings_are_the_runtime_s():
    """Every setting in the guide exists with the default that is told, and none is left out but names."""
    defaults = ServiceSettings()
    told = {name: default for name, default, _ in table("Settings")}
    names = {name for name in ServiceSettings.model_fields if not name.endswith("_queue")} - {"bucket", "work_dir"}

    assert set(told) == names
    assert {name: str(getattr(defaults, name)).lower() for name in told} == told


def test_the_metrics_are_the_declared_ones():
    """The guide names every metric that has a queue, with its unit, and no other."""
    declared = {one.name: one.unit for one in METRICS if one.namespace == RADQUEUE and "Queue" in one.dimensions}

    assert {name: unit for name, unit, _ in table("Metrics")} == declared


def test_only_the_text_of_unavailable_is_logged():
    """It is ours, and names what does not answer; any other exception may hold values."""
    assert why_of(Unavailable("DICOMweb answers HTTP 401")) == "DICOMweb answers HTTP 401"
    for other in (None, Unavailable(), ValueError("DOE^JANE"), Unprocessable("bad", "x")):
        assert why_of(other) is None
