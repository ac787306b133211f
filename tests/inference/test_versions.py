"""New versions of MAPs, and a new routing table, while a worker runs."""

import asyncio
import json
import textwrap
import threading
import time
import uuid
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import pytest_asyncio
import structlog
import yaml

from services.inference.__main__ import open_ecr, serve
from services.inference.package.engine import Inspected
from services.inference.package.manifests import Needs
from services.inference.serving import gpus
from services.inference.serving.bounds import serving_of
from services.inference.serving.fleet import Fleet
from services.inference.serving.gpus import MIB, Gpu, Share
from services.inference.serving.place import Place
from services.inference.serving.runner import MapRunner, Run, Study
from services.inference.serving.sources import Sources
from services.inference.serving.table import WatchedTable
from services.inference.serving.versions import Rejection, Served, Versions
from services.inference.settings import InferenceSettings
from shared.child import ChildFailed
from shared.config import Misconfigured
from shared.errors import Unavailable
from shared.messages import InferenceCompleted, MapRejected, MapUpdated, decode
from shared.metrics import Metrics
from tests.inference.conftest import NOW

# A MAP that needs nothing but pydicom: with `isolation: process` it is a program like any other.
GOOD = textwrap.dedent(
    '''
    """Writes one secondary capture of its input."""

    import os
    from pathlib import Path

    from pydicom import dcmread
    from pydicom.uid import SecondaryCaptureImageStorage, generate_uid

    source = dcmread(sorted(Path(os.environ["HOLOSCAN_INPUT_PATH"]).iterdir())[0])
    source.SOPClassUID = source.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    source.SOPInstanceUID = source.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    source.SeriesInstanceUID = generate_uid()
    source.save_as(Path(os.environ["HOLOSCAN_OUTPUT_PATH"]) / "capture.dcm")
    '''
)
WRONG_PATIENT = GOOD.replace("source.save_as", "source.PatientID = 'somebody else'\nsource.save_as")
NO_DICOMWEB = "maps: [{name: m, source: m, when: {Rows: 1}, push: dicomweb}]"
TIMEOUT_S = 120
ACCOUNT, REGION = "123456789012", "us-east-1"

pytestmark = pytest.mark.asyncio(loop_scope="session")


class Folder:
    """A routing table with one MAP, its program and its golden study, in a folder."""

    def __init__(self, root, series):
        self.root = root
        self.table = {
            "name": "m",
            "source": "m",
            "when": {"Modality": "CT"},
            "isolation": "process",
            "golden": "golden",
        }
        (root / "m").mkdir()
        (root / "golden").mkdir()
        for index, content in enumerate(series):
            (root / "golden" / f"{index}.dcm").write_bytes(content)
        self.program(GOOD)
        self.write()

    def program(self, text):
        (self.root / "m" / "app.py").write_text(text)

    def write(self, *others, **changes):
        """Write the table, with changes to its MAP, and with other MAPs."""
        maps = [self.table | changes, *others] if changes.get("name", "m") else list(others)
        (self.root / "maps.yaml").write_text(yaml.safe_dump({"maps": maps}))


@pytest.fixture
def folder(tmp_path, series_files):
    return Folder(tmp_path, series_files())


class Remembered:
    """A CloudWatch that remembers."""

    def __init__(self):
        self.sent = []

    async def put_metric_data(self, **request):
        self.sent += request["MetricData"]


@pytest_asyncio.fixture(loop_scope="session")
async def start(worker, clients, folder):
    """Begin a fleet as a worker does at its start; its bucket's folder of versions is emptied at the end."""
    runners = []

    async def begin(table=None, **sources):
        table = Place(str(table or folder.root / "maps.yaml"), clients.s3)
        found = Sources(folder.root, lambda region: open_ecr(clients, region), **sources)
        cloudwatch = Remembered()
        metrics = Metrics(cloudwatch)
        fleet = Fleet(
            table=WatchedTable(place=table, require=worker.targets.require, metrics=metrics),
            sources=found,
            versions=Versions(objects=worker.objects, publish=worker.publish, clock=lambda: NOW),
            gpus=Share(folder.root / "gpus", ()),
            metrics=metrics,
        )
        await fleet.begin()
        serving = {name: serving_of(one.route) for name, one in fleet.maps.items()}
        runner = MapRunner((one.map for one in fleet.maps.values()), serving=serving)
        runners.append(runner)
        return SimpleNamespace(fleet=fleet, runner=runner, cloudwatch=cloudwatch, metrics=metrics)

    yield begin
    for runner in runners:
        await runner.stop()
    for key in await worker.keys("maps/"):
        await worker.objects.delete(f"maps/{key}")


async def refused_tables(started):
    await started.metrics.flush()
    return sum(sum(one["Counts"]) for one in started.cloudwatch.sent if one["MetricName"] == "RoutingTablesRefused")


# Versions of a folder.


async def test_a_new_version_that_passes_its_golden_study_takes_over(worker, start, folder):
    """The next study runs with it, under its digest; that is announced once, with the version before."""
    started = await start()
    before = started.fleet.maps["m"].map.digest
    folder.program(GOOD + "# better\n")
    await started.fleet.look(started.runner)
    await started.fleet.look(started.runner)
    after = started.fleet.maps["m"].map.digest
    (event,) = worker.publish.events

    assert after != before
    assert isinstance(event, MapUpdated)
    assert (event.data.map, event.data.map_digest, event.data.previous_digest) == ("m", after, before)


@pytest.mark.parametrize(
    ("program", "reason_code"),
    [
        ("raise SystemExit(1)\n", "application_error"),
        ("pass\n", "no_output"),
        (WRONG_PATIENT, "attributes_differ"),
    ],
)
async def test_a_version_that_fails_its_golden_study_is_rejected(worker, start, folder, program, reason_code):
    """The one that served goes on; the rejection is announced once, stored, and told to nobody's patient."""
    started = await start()
    before = started.fleet.maps["m"]
    folder.program(program)
    await started.fleet.look(started.runner)
    await started.fleet.look(started.runner)
    (event,) = worker.publish.events
    stored = await worker.objects.get(f"maps/m/rejected/{event.data.map_digest}.json")

    assert started.fleet.maps["m"] == before
    assert isinstance(event, MapRejected)
    assert (event.data.reason_code, event.data.serving_digest) == (reason_code, before.map.digest)
    assert Rejection.model_validate_json(stored).reason_code == reason_code


async def test_a_version_that_was_rejected_is_tried_by_no_other_worker(worker, start, folder):
    """A worker that runs leaves it, and one that starts says why it does not."""
    first, second = await start(), await start()
    folder.program("pass\n")
    await first.fleet.look(first.runner)
    await second.fleet.look(second.runner)
    with pytest.raises(Misconfigured, match=r"m: this version was rejected \(no_output\)"):
        await start()

    assert len(worker.publish.events) == 1
    assert second.fleet.maps["m"].map.digest == first.fleet.maps["m"].map.digest


async def test_a_version_that_is_mended_takes_over(worker, start, folder):
    """A rejection is of that version alone."""
    started = await start()
    folder.program("pass\n")
    await started.fleet.look(started.runner)
    folder.program(GOOD + "# mended\n")
    await started.fleet.look(started.runner)

    assert [type(event) for event in worker.publish.events] == [MapRejected, MapUpdated]


async def test_a_golden_study_may_lie_in_s3(worker, start, folder, series_files):
    """A prefix is as good as a folder; one that holds nothing is told, and is no fault of the version."""
    prefix = f"golden/{uuid.uuid4().hex}/"
    for index, content in enumerate(series_files()):
        await worker.objects.put(f"{prefix}{index}.dcm", content)
    folder.write(golden=f"s3://{worker.objects.bucket}/{prefix}")
    started = await start()
    folder.program(GOOD + "# better\n")
    await started.fleet.look(started.runner)
    folder.write(golden=f"s3://{worker.objects.bucket}/{prefix}none/")
    folder.program(GOOD + "# still better\n")
    with structlog.testing.capture_logs() as lines:
        await started.fleet.look(started.runner)
    (updated,) = worker.publish.events

    assert isinstance(updated, MapUpdated)
    assert [line["reason"] for line in lines if line["event"] == "map.trial_undecided"] == ["no_golden_study"]
    assert [key for key in await worker.keys("maps/") if "rejected" in key] == []


async def test_a_golden_study_may_come_with_a_note(worker, start, folder):
    """What is no DICOM there is not given to the MAP, and does not end the trial."""
    (folder.root / "golden" / "README").write_text("A chest of a phantom.")
    started = await start()
    folder.program(GOOD + "# better\n")
    await started.fleet.look(started.runner)

    assert [type(event) for event in worker.publish.events] == [MapUpdated]


async def test_a_folder_that_changed_while_no_worker_ran_is_tried_before_it_serves(worker, start, folder):
    """A good one takes over from what served; with a bad one the worker does not start."""
    first = await start()
    await first.fleet.start(first.runner)
    folder.program(GOOD + "# better\n")
    second = await start()
    await second.fleet.start(second.runner)
    (event,) = worker.publish.events
    folder.program("pass\n")
    third = await start()
    with pytest.raises(Misconfigured, match=r"m: this version was rejected \(no_output\)"):
        await third.fleet.start(third.runner)

    assert event.data.previous_digest == first.fleet.maps["m"].map.digest
    assert event.data.map_digest == second.fleet.maps["m"].map.digest


async def test_a_version_that_comes_back_is_another_event(worker, start, folder):
    """Each takeover is announced under an id of its own, and by all workers under the same."""
    first, second = await start(), await start()
    texts = [GOOD + "# better\n", GOOD, GOOD + "# better\n"]
    for days, text in enumerate(texts):
        for hours, one in enumerate((first, second)):
            now = NOW + timedelta(days=days, hours=hours)
            one.fleet.versions = replace(one.fleet.versions, clock=lambda now=now: now)
        folder.program(text)
        await first.fleet.look(first.runner)
        await second.fleet.look(second.runner)
    ids = [event.id for event in worker.publish.events]

    assert ids[::2] == ids[1::2]
    assert len(ids) == 6
    assert len(set(ids)) == 3


async def test_a_version_that_does_not_start_is_rejected_without_a_golden_study(worker, start, folder):
    """Importing it is the least that a new version must pass."""
    folder.write(isolation="warm", golden=None)
    started = await start()
    folder.program("import there_is_no_such_module\n")
    await started.fleet.look(started.runner)
    (event,) = worker.publish.events

    assert (type(event), event.data.reason_code) == (MapRejected, "not_started")


async def test_a_source_that_is_gone_changes_nothing(worker, start, folder):
    """What serves goes on, and the trouble is told."""
    started = await start()
    before = started.fleet.maps["m"]
    (folder.root / "m" / "app.py").rename(folder.root / "away.py")
    with structlog.testing.capture_logs() as lines:
        await started.fleet.look(started.runner)

    assert started.fleet.maps["m"] == before
    assert worker.publish.events == []
    assert [line["event"] for line in lines] == ["map.source_failed"]
    assert lines[0]["why"][0].startswith("maps.yaml: m: ")
    assert "neither app.py nor __main__.py" in lines[0]["why"][0]


async def test_a_study_that_waited_is_not_run_by_another_version(runner, study):
    """A request names the version: what was replaced meanwhile is asked for again under the digest that serves."""
    with pytest.raises(Unavailable, match="replaced"):
        await runner.run("capture", study(), digest="0" * 32)


# The routing table.


async def test_a_changed_route_holds_from_the_next_message_on(worker, start, folder):
    """Conditions and targets are followed at once: no version has changed, and none is tried."""
    started = await start()
    folder.write(when={"Modality": "MR"}, push="s3")
    await started.fleet.look(started.runner, sources=False)

    assert started.fleet.maps["m"].route.when == {"Modality": "MR"}
    assert started.fleet.maps["m"].route.push == "s3"
    assert worker.publish.events == []


@pytest.mark.parametrize("text", ["maps: [", "maps: [{name: m}]", NO_DICOMWEB, None])
async def test_a_broken_table_keeps_the_old_one_and_is_told_once(start, folder, text):
    """Whoever wrote it reads the place in the log; what a MAP would need that the worker lacks breaks it as well."""
    started = await start()
    before = dict(started.fleet.maps)
    path = folder.root / "maps.yaml"
    path.unlink() if text is None else path.write_text(text)
    with structlog.testing.capture_logs() as lines:
        await started.fleet.look(started.runner)
        await started.fleet.look(started.runner)

    assert started.fleet.maps == before
    assert [line["event"] for line in lines] == ["maps.refused"]
    assert lines[0]["why"][0].startswith("RADQUEUE_MAPS_FILE: " if text is None else "maps.yaml: ")
    assert await refused_tables(started) == 1


async def test_a_map_that_is_added_or_removed_is_followed(worker, start, folder):
    """A new MAP is tried as a new version is; one that is gone is run no more."""
    (folder.root / "other").mkdir()
    (folder.root / "other" / "app.py").write_text(GOOD + "# another\n")
    other = folder.table | {"name": "other", "source": "other"}
    started = await start()
    folder.write(other)
    await started.fleet.look(started.runner, sources=False)
    added = set(started.fleet.maps)
    folder.write(other, name="")
    await started.fleet.look(started.runner, sources=False)
    (event,) = worker.publish.events

    assert added == {"m", "other"}
    assert set(started.fleet.maps) == {"other"}
    assert (event.data.map, event.data.previous_digest) == ("other", None)
    with pytest.raises(Unavailable, match="replaced"):
        await started.runner.run("m", Study.make(folder.root / "study"))


async def test_a_map_that_comes_later_is_given_room_on_the_gpu_before_it_is_tried(start, folder, monkeypatch):
    """It waits while another worker has the memory; what serves goes on, and what is removed gives its share back."""
    monkeypatch.setattr(gpus, "installed", lambda: [Gpu("0", "GPU-a", 16_000 * MIB)])
    for name, mib in (("fits", 6_000), ("large", 90_000)):
        (folder.root / name).mkdir()
        (folder.root / name / "app.py").write_text(GOOD + f"# {name}\n")
        (folder.root / name / "app.yaml").write_text(f"resources: {{gpu: 1, gpuMemory: {mib}Mi}}\n")
    other = Share(folder.root / "gpus", ())
    assert other.cover([Needs(gpu=1, gpu_memory_bytes=12_000 * MIB)])
    started = await start()
    folder.write(*(folder.table | {"name": name, "source": name} for name in ("fits", "large")))
    with structlog.testing.capture_logs() as lines:
        await started.fleet.look(started.runner)
    why = {line["map"]: line["why"][0] for line in lines if line["event"] == "map.source_failed"}
    before = set(started.fleet.maps), started.fleet.gpus.devices
    other.close()
    await started.fleet.look(started.runner)
    after = set(started.fleet.maps), started.fleet.gpus.devices

    assert before == ({"m"}, ())
    assert after == ({"m", "fits"}, ("GPU-a",))
    assert "no room" in why["fits"]
    assert "the MAPs ask for 1 GPUs with 90000 MiB" in why["large"]
    assert not other.cover([Needs(gpu=1, gpu_memory_bytes=12_000 * MIB)])
    folder.write()
    await started.fleet.look(started.runner, sources=False)
    assert other.cover([Needs(gpu=1, gpu_memory_bytes=12_000 * MIB)])
    other.close()


async def test_a_map_that_is_put_back_serves_again(start, folder):
    """It is followed as one that is new, though its source is as it was."""
    (folder.root / "other").mkdir()
    (folder.root / "other" / "app.py").write_text(GOOD + "# another\n")
    other = folder.table | {"name": "other", "source": "other"}
    folder.write(other)
    started = await start()
    folder.write()
    await started.fleet.look(started.runner, sources=False)
    without = set(started.fleet.maps)
    folder.write(other)
    await started.fleet.look(started.runner, sources=False)

    assert without == {"m"}
    assert set(started.fleet.maps) == {"m", "other"}


class TryingRunner:
    """A runner that remembers; `good` says whether a version starts, `ends` how its next trials end instead."""

    def __init__(self):
        self.tried, self.installed, self.ends, self.good = [], [], [], True

    def use(self, gpus):
        assert gpus == ()

    async def start(self, name):
        return "cpu"

    async def try_out(self, found, study, serving):
        self.tried.append(found.digest)
        if not self.ends:
            return None if self.good else Run("application_error", 1.0)
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end

    async def install(self, found, serving):
        self.installed.append(found.digest)

    async def forget_tried(self, name):
        pass


@pytest.mark.parametrize(
    "end",
    [
        Unavailable("S3"),
        FileNotFoundError("app.py"),
        ChildFailed("crashed", "SIGKILL"),
        Run("gpu_lost", 1.0),
        Run("gpu_out_of_memory", 1.0),
        Run("out_of_memory", 1.0, where="kernel"),
        Run("crashed", 1.0, error_type="SIGKILL"),
    ],
    ids=repr,
)
async def test_a_trial_that_the_machine_ended_is_done_again_at_the_next_look(worker, start, folder, end):
    """It is told, and nothing is stored that would keep the version from serving."""
    started, trying = await start(), TryingRunner()
    trying.ends = [end]
    folder.program(GOOD + "# better\n")
    with structlog.testing.capture_logs() as lines:
        await started.fleet.look(trying)
    events, keys = list(worker.publish.events), await worker.keys("maps/")
    await started.fleet.look(trying, sources=False)
    tried_at_once = len(trying.tried)
    await started.fleet.look(trying)

    assert "map.source_failed" in [line["event"] for line in lines]
    assert (events, keys, tried_at_once) == ([], [], 1)
    assert trying.installed == [started.fleet.maps["m"].map.digest]


async def test_a_table_in_s3_is_followed(worker, start, folder):
    """It is read again like a file; while S3 does not have it, the old one holds."""
    key = f"tables/{uuid.uuid4().hex}.yaml"
    await worker.objects.put(key, (folder.root / "maps.yaml").read_bytes())
    started = await start(f"s3://{worker.objects.bucket}/{key}")
    folder.write(when={"Modality": "MR"})
    await worker.objects.put(key, (folder.root / "maps.yaml").read_bytes())
    await started.fleet.look(started.runner, sources=False)
    await worker.objects.delete(key)
    await started.fleet.look(started.runner, sources=False)

    assert started.fleet.maps["m"].route.when == {"Modality": "MR"}


# Images in ECR.


class Engine:
    """A container engine that remembers what was pulled, and has a MAP in every image."""

    kind = "docker"

    def __init__(self):
        self.pulled = []

    def inspect(self, reference):
        if reference not in [pulled for pulled, _ in self.pulled]:
            return None
        return Inspected(id="f" * 64, digests=(reference,), environment={})

    def pull(self, reference, *, authorization=None):
        self.pulled.append((reference, authorization))

    def read_all(self, reference, paths):
        command = '["python3", "-u", "/opt/holoscan/app"]'
        return {"/etc/holoscan/app.json": json.dumps({"command": command}).encode()}


@pytest.fixture
def repository(aws_client):
    """A repository in ECR, into whose tag images are put."""
    ecr = aws_client("ecr")
    name = f"maps/{uuid.uuid4().hex}"
    ecr.create_repository(repositoryName=name)

    def put(digest):
        manifest = json.dumps({"schemaVersion": 2, "config": {"digest": digest}, "layers": []})
        kind = "application/vnd.docker.distribution.manifest.v2+json"
        image = {"imageManifest": manifest, "imageManifestMediaType": kind, "imageDigest": digest}
        ecr.put_image(repositoryName=name, imageTag="prod", **image)
        return digest.removeprefix("sha256:")[:32]

    return SimpleNamespace(name=f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/{name}", put=put)


async def test_a_tag_that_moves_is_pulled_by_its_digest_tried_and_followed(worker, start, folder, repository):
    """The digest that ECR tells is the version; it is pulled once, signed in, and named by results."""
    engine, trying = Engine(), TryingRunner()
    folder.write(source=f"{repository.name}:prod", golden=None)
    first = repository.put(f"sha256:{'a' * 64}")
    started = await start(engine=lambda: engine)
    began = started.fleet.maps["m"].map
    await started.fleet.look(trying)
    second = repository.put(f"sha256:{'b' * 64}")
    await started.fleet.look(trying, sources=False)
    not_looked = list(trying.tried)
    await started.fleet.look(trying)
    await started.fleet.look(trying)
    (event,) = worker.publish.events

    assert (began.digest, not_looked) == (first, [])
    assert [reference for reference, _ in engine.pulled] == [
        f"{repository.name}@sha256:{'a' * 64}",
        f"{repository.name}@sha256:{'b' * 64}",
    ]
    assert all(authorization for _, authorization in engine.pulled)
    assert trying.tried == trying.installed == [second]
    assert started.fleet.maps["m"].map.digest == second
    assert event.data.source == f"{repository.name}@sha256:{'b' * 64}"


async def test_a_worker_that_starts_after_a_rejection_takes_the_version_that_served(start, folder, repository):
    """A tag that points to a bad version brings no worker down: the last good digest is run."""
    engine, trying = Engine(), TryingRunner()
    folder.write(source=f"{repository.name}:prod", golden=None)
    repository.put(f"sha256:{'a' * 64}")
    started = await start(engine=lambda: engine)
    good = repository.put(f"sha256:{'b' * 64}")
    await started.fleet.look(trying)
    trying.good = False
    folder.write(source=f"{repository.name}:prod", golden="golden")
    repository.put(f"sha256:{'c' * 64}")
    await started.fleet.look(trying)
    later = await start(engine=lambda: engine)

    assert trying.installed == [good]
    assert started.fleet.maps["m"].map.digest == good
    assert later.fleet.maps["m"].map.digest == good


async def test_a_worker_that_starts_serves_what_served_and_tries_the_tag_afterwards(worker, start, folder, repository):
    """A tag that moved while no worker ran is followed like one that moves meanwhile; the first start is remembered."""
    engine, trying = Engine(), TryingRunner()
    folder.write(source=f"{repository.name}:prod", golden=None)
    good = repository.put(f"sha256:{'a' * 64}")
    started = await start(engine=lambda: engine)
    await started.fleet.start(trying)
    record = Served.model_validate_json(await worker.objects.get("maps/m/serving.json"))
    new = repository.put(f"sha256:{'b' * 64}")
    later = await start(engine=lambda: engine)
    began = later.fleet.maps["m"].map.digest
    await later.fleet.start(trying)
    tried_at_start = list(trying.tried)
    await later.fleet.look(trying)

    assert (record.map_digest, record.source) == (good, f"{repository.name}@sha256:{'a' * 64}")
    assert (began, tried_at_start) == (good, [])
    assert trying.tried == trying.installed == [new]
    assert later.fleet.maps["m"].map.digest == new


async def test_the_engine_is_looked_for_beside_the_event_loop(start, folder, repository):
    """Finding it asks a daemon that may take minutes to answer."""
    engine, on_loop = Engine(), []

    def find():
        on_loop.append(threading.current_thread() is threading.main_thread())
        return engine

    folder.write(source=f"{repository.name}:prod", golden=None)
    repository.put(f"sha256:{'a' * 64}")
    await start(engine=find)
    folder.write(source=f"sha256:{'f' * 64}", golden=None)
    with pytest.raises(Misconfigured):
        await start(engine=find)

    assert len(on_loop) >= 2
    assert not any(on_loop)


async def test_an_ecr_that_does_not_have_the_tag_changes_nothing(worker, start, folder, repository, aws_client):
    """What serves goes on, and is looked for again."""
    engine, trying = Engine(), TryingRunner()
    folder.write(source=f"{repository.name}:prod", golden=None)
    digest = repository.put(f"sha256:{'a' * 64}")
    started = await start(engine=lambda: engine)
    name = repository.name.partition("/")[2]
    aws_client("ecr").batch_delete_image(repositoryName=name, imageIds=[{"imageTag": "prod"}])
    await started.fleet.look(trying)

    assert started.fleet.maps["m"].map.digest == digest
    assert worker.publish.events == []


# The whole worker.


@pytest.fixture
def queues(aws_client, own_queues):
    """The worker's queues, as its neighbours see them."""
    sqs = aws_client("sqs")

    def url(role):
        return sqs.get_queue_url(QueueName=getattr(own_queues, f"{role}_queue"))["QueueUrl"]

    def send(event):
        sqs.send_message(QueueUrl=url("inference"), MessageBody=event.body())

    def receive():
        """Return the next event for the reporter."""
        until = time.monotonic() + TIMEOUT_S
        while time.monotonic() < until:
            for message in sqs.receive_message(QueueUrl=url("reporting"), WaitTimeSeconds=2).get("Messages", []):
                sqs.delete_message(QueueUrl=url("reporting"), ReceiptHandle=message["ReceiptHandle"])
                return decode(message["Body"])
        return pytest.fail("nothing came")

    return SimpleNamespace(send=send, receive=receive, names=own_queues.model_dump(exclude={"slots"}))


@pytest.fixture
def settings(local_aws, queues, folder):
    """Those of a worker that looks at its MAPs all the time."""
    more = {"maps_file": str(folder.root / "maps.yaml"), "datastore_id": local_aws.datastore_id}
    more |= {"maps_look_s": 0.05, "map_versions_look_s": 0.05, "work_dir": folder.root / "work"}
    return InferenceSettings.model_validate(queues.names | more)


async def test_a_worker_moves_over_to_a_new_version_without_a_restart(worker, clients, settings, queues, folder):
    """The study before is the old version's, the study after the new one's, and both say so."""
    stop = asyncio.Event()
    serving = asyncio.create_task(serve(settings, clients, Metrics(clients.cloudwatch), stop))
    queues.send(worker.ready(await worker.store_series()))
    before = await asyncio.to_thread(queues.receive)
    folder.program(GOOD + "# better\n")
    updated = await asyncio.to_thread(queues.receive)
    queues.send(worker.ready(await worker.store_series()))
    after = await asyncio.to_thread(queues.receive)
    stop.set()
    await asyncio.wait_for(serving, TIMEOUT_S)

    assert [type(event) for event in (before, updated, after)] == [InferenceCompleted, MapUpdated, InferenceCompleted]
    assert updated.data.previous_digest == before.data.map_digest
    assert updated.data.map_digest == after.data.map_digest != before.data.map_digest
    assert f"@{after.data.map_digest}/" in after.data.result_key
