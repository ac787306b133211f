import json
import os
import re
import socket
import subprocess
import sys
import tomllib
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import boto3
import pytest
from typer.testing import CliRunner

from cli.client import Client, now
from cli.main import app
from cli.study import results, uploads
from cli.training.requests import parse_override, training_request
from services.inference.records import result_prefix
from shared.dicom import instance_key
from shared.messages import InferenceRequested, InferenceTask, SeriesRef, TrainingRequested, decode
from shared.operations.refused import Refused
from shared.phantom import write_ct_series
from tests.conftest import ROOT


@pytest.fixture
def invoke(local_aws, monkeypatch):
    """Run a command in this process against the local AWS."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments):
        return CliRunner(env=local_aws.environ).invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def client(local_aws):
    return Client(local_aws.environ)


def test_a_bucket_that_is_not_there_is_told(local_aws, tmp_path):
    """An upload says what to set, like every other command."""
    folder = write_ct_series(tmp_path / "ct", slices=1, size=16)
    told = CliRunner(env=local_aws.environ | {"RADQUEUE_BUCKET": "no-such-bucket"}).invoke(app, ["upload", str(folder)])

    assert told.exit_code == 1
    assert "has no bucket no-such-bucket: set RADQUEUE_BUCKET" in told.output


@pytest.fixture
def received(local_aws):
    """Take what is in a queue."""
    sqs = boto3.client(
        "sqs",
        endpoint_url=local_aws.endpoint_url,
        region_name=local_aws.region,
        aws_access_key_id="local",
        aws_secret_access_key="local",
    )

    def take(name):
        url = sqs.get_queue_url(QueueName=name)["QueueUrl"]
        bodies = []
        while messages := sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10).get("Messages"):
            bodies += [message["Body"] for message in messages]
            for message in messages:
                sqs.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
        return bodies

    return take


@pytest.mark.parametrize(
    "arguments",
    [
        ("upload",),
        ("upload", "x", "--no-such-option"),
        ("results", "1.2.3"),
        ("train",),
        ("up", "--service", "nonsense"),
        ("up", "--port", "70000"),
        ("train", "--dataset", "d", "--max-rounds", "0"),
        ("train", "--dataset", "d", "--set", "stepz=3"),
        ("train", "--dataset", "d", "--set", "imageSize=33"),
        ("train", "--dataset", "d", "--out", "x"),
        ("train", "--dataset", "a/b"),
        ("train", "--dataset", "d", "--request-id", "a b"),
        ("train", "--dataset", "d", "--metric", "kid"),
        ("train", "--dataset", "d", "--strategy", "luck"),
        ("train", "--dataset", "d", "--class", "a=x", "--class", "a=y"),
        ("generate", "m", "--out", "x", "--seed", str(2**63)),
        ("report", "2026-13"),
        ("report", "2999-01"),
        ("demo", "--data", "/no/such/folder"),
        ("--env", "/no/such/file", "status"),
    ],
)
def test_wrong_usage_exits_with_2(arguments):
    """What cannot be meant is told before anything is done."""
    result = CliRunner().invoke(app, list(arguments))

    assert result.exit_code == 2
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, "AWS_REGION is not set"),
        ({"AWS_REGION": "us-east-1"}, "AWS_ACCESS_KEY_ID is not set"),
        ({"AWS_REGION": "us-east-1", "RADQUEUE_SLOTS": "many"}, "RADQUEUE_SLOTS"),
    ],
)
def test_a_missing_environment_is_explained(radqueue, environ, said):
    """Without the standard variables the user reads which one is missing and how to get them; exit code 2."""
    done = radqueue("status", env=environ)

    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert ("radqueue up" in done.stderr) == ("AWS" in said)
    assert "Traceback" not in done.stderr


def test_an_endpoint_that_does_not_answer_is_said_in_one_sentence(radqueue, tmp_path):
    """A stopped `radqueue up` is no traceback; exit code 1."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    (tmp_path / "local.env").write_text(
        f"AWS_ENDPOINT_URL=http://127.0.0.1:{port}\nAWS_REGION=us-east-1\n"
        "AWS_ACCESS_KEY_ID=local\nAWS_SECRET_ACCESS_KEY=local\n"
    )
    done = radqueue("--env", "local.env", "status")

    assert (done.returncode, done.stdout) == (1, "")
    assert "does not answer" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_bucket_and_queues_are_told_by_their_setting(local_aws):
    """A wrong name leads to the variable that holds it."""
    wrong = CliRunner(env=local_aws.environ | {"RADQUEUE_BUCKET": "nobodys"}).invoke(
        app, ["results", "1.2", "--out", "x"]
    )
    lost = CliRunner(env=local_aws.environ | {"RADQUEUE_TRAINING_QUEUE": "nobodys"}).invoke(app, ["status"])

    assert (wrong.exit_code, lost.exit_code) == (1, 1)
    assert "RADQUEUE_BUCKET" in wrong.output
    assert "RADQUEUE_INGEST_QUEUE" in lost.output


def test_uploads_go_under_their_content_s_hash(invoke, client, received, tmp_path):
    """Folders are searched, hidden files left out, the same content sent once, and no file name is in a key."""
    folder = tmp_path / "Müller^Anna"
    write_ct_series(folder / "ct", slices=2, size=32)
    (folder / "again.dcm").write_bytes((folder / "ct" / "slice-001.dcm").read_bytes())
    (folder / ".DS_Store").write_bytes(b"hidden")
    result = invoke("upload", folder, "--dataset", "commands", "--json")
    told = json.loads(result.stdout)
    stored = {item.key for item in client.stored("incoming/commands/")}

    assert result.exit_code == 0
    assert {upload["key"] for upload in told["uploads"]} == stored
    assert all(re.fullmatch(r"incoming/commands/[0-9a-f]{64}\.dcm", key) for key in stored)
    assert len(stored) == 2
    assert len(received("radqueue-ingest")) >= 2


def test_the_version_is_the_project_s(radqueue):
    """It is read where it is declared, installed or not."""
    done = radqueue("--version")

    assert (done.returncode, done.stdout) == (
        0,
        f"{tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['version']}\n",
    )


def test_a_shell_completes_commands():
    """The script that `--install-completion` writes asks so; the answer is one command per line."""
    asked = {"_RADQUEUE_COMPLETE": "complete_bash", "COMP_WORDS": "radqueue re", "COMP_CWORD": "1"}
    command = [Path(sys.executable).with_name("radqueue")]
    done = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True, check=True)

    assert set(done.stdout.split()) == {"redrive", "report", "results", "retry"}


def test_an_upload_of_nothing_is_refused(invoke, tmp_path):
    """An empty folder, a path that is not there and a bad dataset name are told, and nothing is sent."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"x")

    wrong = (([tmp_path / "empty"], 1), ([tmp_path / "gone"], 1), ([tmp_path / "file", "--dataset", "../x"], 2))
    for arguments, code in wrong:
        result = invoke("upload", *arguments)

        assert result.exit_code == code
        assert result.stderr.startswith("radqueue: ")


def test_instances_are_known_by_the_keys_that_ingest_gives_them(tmp_path):
    """What is read from a file, or from a member of a zip, is where ingest stores it."""
    folder = write_ct_series(tmp_path / "ct", slices=2, size=32)
    archive = tmp_path / "study.zip"
    with zipfile.ZipFile(archive, "w") as made:
        for path in folder.iterdir():
            made.write(path)
        made.writestr("readme.txt", "no image")
    loose = [found for upload in uploads.collect([folder], "d") for found in uploads.instances(upload)[0]]
    (zipped,) = uploads.collect([archive], "d")
    keys = {instance_key(one.study_uid, one.series_uid, one.sop_instance_uid, one.sha) for one in loose}

    assert len(keys) == 2
    assert keys == {
        instance_key(one.study_uid, one.series_uid, one.sop_instance_uid, one.sha)
        for one in uploads.instances(zipped)[0]
    }


def test_status_counts_queues_and_dead_letters(invoke, client, received, local_aws):
    """What waits in a queue is counted there, and what died in its dead-letter queue."""
    received("radqueue-training")
    client.send(TrainingRequested.of("r", training_request("d", request_id="r"), time=now()))
    result = invoke("status", "--json")
    counts = json.loads(result.stdout)["queues"]

    assert result.exit_code == 0
    assert counts["training"] == {"visible": 1, "in_flight": 0, "delayed": 0, "dead": 0}
    assert invoke("status").exit_code == 0
    received("radqueue-training")


def test_train_sends_one_valid_request(invoke, client, received, tmp_path):
    """Options become a request of the contract; a dataset without data and a value out of range are refused."""
    received("radqueue-training")
    refused = invoke("train", "--dataset", "commands-empty")
    (tmp_path / "array.npy").write_bytes(b"any")
    client.upload(tmp_path / "array.npy", "datasets/commands/1.2.npy")
    wrong = invoke("train", "--dataset", "commands", "--set", "stepz=1", "--set", "imageSize=48", "--set", "steps=0")
    options = ("--threshold", 1.5, "--images", 4, "--set", "steps=80", "--set", "learningRate=1e-3")
    sent = invoke("train", "--dataset", "commands", *options, "--request-id", "r-1", "--json")
    (body,) = received("radqueue-training")
    request = decode(body)

    assert (refused.exit_code, wrong.exit_code, sent.exit_code) == (1, 2, 0)
    assert "no training data" in refused.output
    for why in ("stepz: unknown parameter", "imageSize: Value error, not a power of two", "steps: Input should be"):
        assert why in " ".join(wrong.output.split())
    assert "steps=250" in wrong.output
    assert json.loads(sent.stdout)["request_id"] == "r-1"
    assert isinstance(request, TrainingRequested)
    assert request.data.overrides == {"steps": 80, "learningRate": 0.001}
    assert (request.data.threshold, request.data.n_images, request.data.max_rounds) == (1.5, 4, 5)
    assert (request.data.data_uri, request.data.classes) == (None, {})


def test_train_takes_classes_and_an_address(invoke, client, received, tmp_path):
    """A dataset for each class must have data in the bucket; what lies at an address the trainer looks at."""
    received("radqueue-training")
    (tmp_path / "array.npy").write_bytes(b"any")
    client.upload(tmp_path / "array.npy", "datasets/commands-ill/1.2.npy")
    classes = ("--class", "ill=commands-ill", "--class", "commands-healthy")
    refused = invoke("train", "--dataset", "commands", *classes)
    wrong = invoke("train", "--dataset", "commands", "--data-uri", "/etc")
    sent = invoke("train", "--dataset", "commands", *classes, "--data-uri", "gs://ours/brains", "--json")
    (body,) = received("radqueue-training")
    asked = decode(body).data

    assert (refused.exit_code, wrong.exit_code, sent.exit_code) == (1, 2, 0)
    assert "no training data in the dataset commands-healthy" in " ".join(refused.output.split())
    assert "data_uri" in wrong.output
    assert asked.data_uri == "gs://ours/brains"
    assert asked.classes == {"ill": "commands-ill", "commands-healthy": "commands-healthy"}


def test_a_model_is_fetched_without_its_checkpoints(invoke, client, tmp_path):
    """`train --wait --out` of a finished training writes what it made, and exits with 1 if it is not approved."""
    told = {"approved": False, "why_not": "its relative distance 3 is above 2"}
    told |= {"generator_key": "g", "images_key": "i", "images_array_key": "a"}
    (tmp_path / "object").write_text(json.dumps({"told": told}))
    wanted = {"completed.json", "config.js", "generator.pt", "images.png", "images.dicom.zip", "rounds/1/config.2.js"}
    wanted |= {"card.md", "medigan.json", "manifest.json", "curves.png", "tensorboard/events.out.tfevents.0.radqueue"}
    for name in {*wanted, "lease.json", "rounds/1/checkpoint.2.pt", "progress.json.part"}:
        client.upload(tmp_path / "object", f"models/fetched/{name}")
    client.upload(tmp_path / "object", "datasets/commands-fetched/any.npy")
    asked = ("train", "--dataset", "commands-fetched", "--request-id", "fetched", "--wait")
    done = invoke(*asked, "--out", tmp_path / "out")
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}

    assert done.exit_code == 1
    assert "not approved: its rounds are used up and its relative distance 3 is above 2" in done.output
    assert files == wanted
    assert json.loads(invoke(*asked, "--json").stdout)["places"] == [f"s3://{client.bucket}/{key}" for key in "gia"]


def test_an_id_that_was_another_request_s_is_refused_at_once(invoke, client, received, tmp_path):
    """Options that differ from those of the same id are named, and nothing is sent; the same options are sent again."""
    received("radqueue-training")
    asked = ("train", "--dataset", "commands-taken", "--request-id", "taken", "--threshold", "3")
    (tmp_path / "object").write_bytes(b"any")
    client.upload(tmp_path / "object", "datasets/commands-taken/any.npy")
    before = {"request_id": "taken", "dataset": "commands-taken", "threshold": 3.0}
    (tmp_path / "object").write_text(json.dumps({"request": before}))
    client.upload(tmp_path / "object", "models/taken/options.json")
    refused = invoke(*asked[:-1], "4")
    n_sent = len(received("radqueue-training"))

    assert (refused.exit_code, n_sent) == (1, 0)
    assert "was made before, with another threshold" in " ".join(refused.output.split())
    assert invoke(*asked).exit_code == 0
    assert len(received("radqueue-training")) == 1


def test_a_folder_that_cannot_be_written_to_is_told_before_the_training(invoke, client, received, tmp_path):
    """A file where the folder should be is named in one sentence, and nothing is sent."""
    received("radqueue-training")
    (tmp_path / "object").write_bytes(b"any")
    client.upload(tmp_path / "object", "datasets/commands-out/any.npy")
    refused = invoke("train", "--dataset", "commands-out", "--wait", "--out", tmp_path / "object")

    assert refused.exit_code == 1
    assert "object: File exists" in "".join(refused.output.split("\n"))
    assert received("radqueue-training") == []


@pytest.mark.parametrize(
    "description",
    [
        "{",
        "[]",
        '{"sha256": "", "config": null}',
        '{"sha256": "", "config": {}, "seed": 1e30}',
        '{"sha256": "", "config": {}, "units": {"window": [5, 5]}}',
        '{"sha256": "", "config": {}, "units": {"window": [0, 1e999]}}',
    ],
)
def test_a_damaged_description_is_told(invoke, tmp_path, description):
    """A generator.json that is no description of a model ends in one sentence that names the file."""
    (tmp_path / "generator.pt").write_bytes(b"")
    (tmp_path / "generator.json").write_text(description)
    refused = invoke("generate", tmp_path, "--out", tmp_path / "out")

    assert refused.exit_code == 1
    assert "generator.json is damaged" in " ".join(refused.output.split())


def test_results_are_the_newest_of_each_series_and_map(invoke, local_aws, tmp_path):
    """Outputs of an older revision are not fetched; an unknown study is told apart from one without results."""
    s3 = boto3.client(
        "s3",
        endpoint_url=local_aws.endpoint_url,
        region_name=local_aws.region,
        aws_access_key_id="local",
        aws_secret_access_key="local",
    )

    def put(key, body):
        s3.put_object(Bucket=local_aws.bucket, Key=key, Body=body)

    def put_result(digest, uid, *, created, finished):
        revision_key = f"studies/1.2.77/1.2.77.1/revisions/{digest}.json"
        put(revision_key, json.dumps({"created": created, "warnings": ["gantry_tilt"]}).encode())
        prefix = f"results/1.2.77/1.2.77.1/{digest}/a_map@{'e' * 16}/"
        put(f"{prefix}attempts/x/{uid}.dcm", uid.encode())
        outputs = [{"sop_instance_uid": uid, "key": f"{prefix}attempts/x/{uid}.dcm"}]
        put(f"{prefix}attempts/x/files/0/report.txt", b"found nothing")
        files = [{"key": f"{prefix}attempts/x/files/0/report.txt"}]
        result = {"map": "a_map", "outcome": "completed", "outputs": outputs, "files": files, "time": finished}
        put(f"{prefix}result.json", json.dumps(result | {"inputs": [{"revision_key": revision_key}]}).encode())

    put("studies/1.2.78/1.2.78.1/any", b"")
    put_result("f" * 32, "1.1", created="2026-01-01T00:00:00Z", finished="2026-01-01T00:00:09Z")
    put_result("0" * 32, "1.2", created="2026-01-01T00:00:01Z", finished="2026-01-01T00:00:02Z")
    fetched = invoke("results", "1.2.77", "--out", tmp_path / "out", "--json")

    assert fetched.exit_code == 0
    assert [path.name for path in (tmp_path / "out").rglob("*.dcm")] == ["1.2.dcm"]
    assert (tmp_path / "out" / "1.2.77.1" / "a_map" / "1.2.dcm").read_bytes() == b"1.2"
    assert (tmp_path / "out" / "1.2.77.1" / "a_map" / "0" / "report.txt").read_bytes() == b"found nothing"
    assert json.loads(fetched.stdout)[0]["warnings"] == ["gantry_tilt"]
    assert "gantry_tilt: A tilted gantry" in invoke("results", "1.2.77", "--out", tmp_path / "out").output
    assert "has no results yet" in invoke("results", "1.2.78", "--out", tmp_path).output
    assert "is not known" in invoke("results", "1.2.79", "--out", tmp_path).output
    assert "no StudyInstanceUID" in invoke("results", "../x", "--out", tmp_path).output


def test_results_tell_why_there_are_none(invoke, client, tmp_path):
    """The newest outcome counts: a failure after a result ends with 1 and brings its log, one before it does not."""

    def put(key, document):
        (tmp_path / "object").write_text(json.dumps(document))
        client.upload(tmp_path / "object", key)

    def put_outcome(study, name, attempt, when, **told):
        prefix = f"results/{study}/{study}.1/{'f' * 32}/a_map@{attempt}/"
        revision = f"studies/{study}/{study}.1/revisions/{'f' * 32}.json"
        put(revision, {"created": "2026-01-01T00:00:00Z"})
        common = {"map": "a_map", "attempt": attempt, "inputs": [{"revision_key": revision}]}
        put(f"{prefix}{name}.json", common | {"time": f"2026-01-01T00:00:0{when}Z"} | told)
        put(f"{prefix}attempts/{attempt}/log.txt", "what it printed")

    done = {"outcome": "completed", "outputs": [], "files": []}
    failed = {"reason_code": "attributes_differ", "where": "PatientID", "error_type": ""}
    put_outcome("1.2.80", "result", "a", 1, **done)
    put_outcome("1.2.80", "failure", "b", 2, **failed)
    put_outcome("1.2.81", "failure", "a", 1, **failed)
    put_outcome("1.2.81", "result", "b", 2, **done)
    put_outcome("1.2.82", "result", "a", 1, **done)
    put_outcome("1.2.82", "failure", "a", 2, **failed)
    now, before, beside = (invoke("results", f"1.2.{n}", "--out", tmp_path / "out", "--json") for n in (80, 81, 82))
    (told,) = json.loads(now.stdout)
    folder = tmp_path / "out" / "1.2.80.1" / "a_map"

    assert (now.exit_code, before.exit_code, beside.exit_code) == (1, 0, 0)
    assert (told["outcome"], told["reason_code"], told["where"]) == ("failed", "attributes_differ", "PatientID")
    assert told["remedy"].startswith("Copy them exactly")
    assert told["files"] == [str(folder / "failure.json"), str(folder / "log.txt")]
    assert (folder / "log.txt").read_text() == '"what it printed"'
    printed = invoke("results", "1.2.80", "--out", tmp_path / "out")
    assert printed.exit_code == 1
    assert "failed: a_map: attributes_differ (PatientID): the attributes named are not those of" in printed.output


def test_what_failed_is_asked_for_again(invoke, client, received, tmp_path):
    """Where nothing came after the failure, by another event than before, which is one however often it is asked."""

    def put(key, text):
        (tmp_path / "object").write_text(text)
        client.upload(tmp_path / "object", key)

    study, made = "1.2.90", datetime(2026, 1, 1, tzinfo=UTC)
    revision = f"studies/{study}/{study}.1/revisions/{'f' * 32}.json"
    series = SeriesRef(study_uid=study, series_uid=f"{study}.1", digest="f" * 32, revision_key=revision)
    put(revision, json.dumps({"created": "2026-01-01T00:00:00Z"}))
    tasks = {name: InferenceTask(map=name, map_digest="e" * 32, inputs=(series,)) for name in ("bad", "mended")}
    before = {name: InferenceRequested.of(result_prefix(task), task, time=made) for name, task in tasks.items()}
    for name, task in tasks.items():
        told = {
            "request_id": before[name].id,
            "attempt": name,
            "reason_code": "deadline",
            "time": "2026-01-01T00:00:01Z",
        }
        put(f"{result_prefix(task)}failure.json", json.dumps(task.model_dump() | told))
    done = {"outcome": "completed", "outputs": [], "time": "2026-01-01T00:00:02Z"}
    put(f"{result_prefix(tasks['mended'])}result.json", json.dumps(tasks["mended"].model_dump() | done))
    received("radqueue-inference")
    asked = [invoke("retry", study) for _ in range(2)]
    first, second = map(decode, received("radqueue-inference"))

    assert [one.exit_code for one in asked] == [0, 0]
    assert (first.data, second.data) == (tasks["bad"], tasks["bad"])
    assert first.id == second.id != before["bad"].id
    assert f"asked for bad again on {study}.1" in asked[0].output


def test_a_retry_ends_with_what_came_after_the_failure(invoke, client, tmp_path):
    """An earlier outcome is not waited for, and a failure again ends with 1."""
    task = InferenceTask.model_validate(
        {
            "map": "m",
            "map_digest": "e" * 32,
            "inputs": [{"study_uid": "1.2.91", "series_uid": "1.2.91.1", "digest": "f" * 32, "revision_key": "x"}],
        }
    )

    def fail(attempt, when):
        told = {"attempt": attempt, "reason_code": "deadline", "time": f"2026-01-01T00:00:0{when}Z"}
        (tmp_path / attempt).write_text(json.dumps(task.model_dump() | told))
        client.upload(tmp_path / attempt, f"{result_prefix(task)}failure.json")

    fail("first", 1)
    early = invoke("retry", "1.2.91", "--wait", "--timeout", "0")
    failed = results.retry(client, "1.2.91")
    fail("second", 2)
    (came,) = results.wait_retried(client, "1.2.91", failed, 0)

    assert early.exit_code == 1
    assert "it goes on" in early.output
    assert came["attempt"] == "second"
    assert "nothing of study 1.2.77 failed" in invoke("retry", "1.2.77").output


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps=80", ("steps", 80)),
        ("learningRate=2e-4", ("learningRate", 0.0002)),
        ("flag=true", ("flag", True)),
        ("name=a=b", ("name", "a=b")),
        ("list=[1]", ("list", "[1]")),
    ],
)
def test_overrides_keep_their_type(text, expected):
    """A number stays a number, and what is no number, true or false is text."""
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["steps", "=80"])
def test_an_override_without_name_or_value_is_refused(text):
    """The user reads how to write it."""
    with pytest.raises(Refused, match="name=value"):
        parse_override(text)
