"""The container engine: its command lines, and, where podman is, images made of a few files."""

import io
import json
import os
import shutil
import socket
import subprocess
import tarfile
import time
import urllib.request
import uuid

import pytest

from services.inference.package import engine as engines
from services.inference.package.engine import Engine, EngineFailed, Mount, ecr_authorization, ecr_of
from services.inference.package.manifests import Needs
from services.inference.package.maps import load
from shared.config import Misconfigured

ECR = "123456789012.dkr.ecr.eu-central-1.amazonaws.com"
MANIFEST = {"command": '["python3", "/opt/holoscan/app"]', "timeout": 60}
LEGACY = {"command": "python3 -u /opt/monai/app/app.py", "timeout": 60, "working-directory": "/var/monai"}


@pytest.fixture(scope="session")
def podman() -> Engine:
    """A podman that works."""
    if shutil.which("podman") is None:
        pytest.skip("podman is not installed (deploy/test-system installs it)")
    try:
        return Engine.find("podman")
    except EngineFailed as failed:
        pytest.skip(str(failed))


@pytest.fixture
def image(podman):
    """Make images of files; they are gone at the end."""
    made = []

    def make(files, at="localhost"):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as archive:
            for path, text in files.items():
                member = tarfile.TarInfo(path.lstrip("/"))
                member.size = len(text.encode())
                archive.addfile(member, io.BytesIO(text.encode()))
        name = f"{at}/radqueue-{uuid.uuid4().hex}:1"
        import_ = [podman.program, "import", "--quiet", "--change", "ENV A=b=c", "--change", "USER 0", "-", name]
        subprocess.run(import_, input=content.getvalue(), check=True, capture_output=True, timeout=120)
        made.append(name)
        return name

    yield make
    if made:
        subprocess.run([podman.program, "rmi", "--force", *made], check=True, capture_output=True, timeout=120)


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry on this machine, without TLS; the place that images in it are named by."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("docker-registry is not installed (deploy/test-system installs it)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    storage = {"filesystem": {"rootdirectory": str(tmp_path / "registry")}}
    config = {"version": 0.1, "storage": storage, "http": {"addr": place}, "log": {"level": "error"}}
    (tmp_path / "registry.yml").write_text(json.dumps(config))
    (tmp_path / "registries.conf").write_text(f'[[registry]]\nlocation = "{place}"\ninsecure = true\n')
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(tmp_path / "registries.conf"))
    command = [program, "serve", str(tmp_path / "registry.yml")]
    with (tmp_path / "registry.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"http://{place}/v2/", timeout=5).close()
            break
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail((tmp_path / "registry.log").read_text())
            time.sleep(0.05)
    yield place
    process.kill()
    process.wait()


def arguments(kind="docker", **how):
    return Engine(kind, kind, ("--runtime", "runc")).run_command("image", ["python3", "-V"], name="n", **how)


def test_a_container_gets_nothing_that_it_does_not_need(tmp_path):
    """No network, a root that is read-only, no capability, no root user, and no folder but those that are named."""
    command = arguments(mounts=[Mount(tmp_path, "/work", writable=True), Mount(tmp_path, "/host")])
    text = " ".join(command)

    for one in ("--network none", "--read-only", "--init", "--rm", "--cap-drop ALL", "--log-driver none"):
        assert one in text
    assert command[command.index("--user") + 1].split(":")[0] not in {"", "0", "root"}
    assert f"type=bind,source={tmp_path},target=/work " in f"{text} "
    assert f"type=bind,source={tmp_path},target=/host,readonly" in text
    assert text.endswith("--runtime runc --entrypoint python3 image -V")


def test_limits_come_from_what_the_map_asks_for():
    """Processors, memory and shared memory are those of the manifests; processors no more than there are."""
    text = " ".join(arguments(needs=Needs(cpu=0.5, memory_bytes=1 << 30, shared_memory_bytes=1 << 20)))

    assert "--cpus 0.5" in text
    assert f"--memory {1 << 30}" in text
    assert f"--shm-size {1 << 20}" in text
    assert f"--cpus {os.cpu_count()} " in " ".join(arguments(needs=Needs(cpu=10_000)))
    assert "--memory" not in " ".join(arguments())


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("docker", ["--gpus", '"device=0,GPU-1"']),
        ("nerdctl", ["--gpus", '"device=0,GPU-1"']),
        ("podman", ["--device", "nvidia.com/gpu=0", "--device", "nvidia.com/gpu=GPU-1"]),
    ],
)
def test_gpus_are_given_as_each_engine_takes_them(kind, said):
    """Docker and nerdctl name devices in one word with quotes, podman by the Container Device Interface."""
    command = arguments(kind, gpus=["0", "GPU-1"])

    assert " ".join(said) in " ".join(command)
    assert "gpu" not in " ".join(arguments(kind)).lower()


def test_an_engine_that_does_not_answer_is_passed_over(tmp_path, monkeypatch):
    """A docker without its daemon is none; without any engine, the text says what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineFailed, match="no container engine was found: install docker, podman or nerdctl"):
        Engine.find()
    with pytest.raises(EngineFailed, match="lxc is no container engine"):
        Engine.find("lxc")
    for name, code in (("docker", 1), ("nerdctl", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name).chmod(0o755)

    assert Engine.find().kind == "nerdctl"
    with pytest.raises(EngineFailed, match="docker does not answer"):
        Engine.find("docker")


def test_an_image_of_ecr_is_told_by_its_registry():
    """The account and region are in the name; any other registry is not ECR's."""
    assert ecr_of(f"{ECR}/spleen:1") == ("123456789012", "eu-central-1")
    assert ecr_of("docker.io/library/python:3.12") is None
    assert ecr_of(f"evil.example/{ECR}/spleen:1") is None


async def test_a_token_of_ecr_signs_in_to_its_registry_alone_and_does_not_stay(aws_client, monkeypatch, tmp_path):
    """The engine finds the token in a file that is gone afterwards; nothing is written to the user's configuration."""

    class Ecr:
        async def get_authorization_token(self):
            return aws_client("ecr").get_authorization_token()

    authorization = await ecr_authorization(Ecr())
    seen = tmp_path / "seen"
    (tmp_path / "podman").write_text(
        f'#!/bin/sh\ncat "$REGISTRY_AUTH_FILE" >{seen}; echo "$REGISTRY_AUTH_FILE" >{seen}.path\n'
    )
    (tmp_path / "podman").chmod(0o755)
    Engine("podman", str(tmp_path / "podman")).pull(f"{ECR}/spleen:1", authorization=authorization)

    assert json.loads(seen.read_text()) == {"auths": {ECR: {"auth": authorization}}}
    assert not os.path.exists((tmp_path / "seen.path").read_text().strip())  # noqa: PTH110 - a path in a file


def test_a_tool_that_fails_is_told_by_its_last_line_and_one_that_hangs_by_its_time(monkeypatch):
    """What an engine says last is what went wrong."""
    with pytest.raises(EngineFailed, match=r"sh -c: the reason$"):
        engines.run(["sh", "-c", "echo first >&2; echo the reason >&2; exit 3"])
    with pytest.raises(EngineFailed, match=r"sleep 60: no end after 0.1 s"):
        engines.run(["sleep", "60"], timeout_s=0.1)


def test_files_are_read_out_of_an_image_that_is_never_started(podman, image, tmp_path):
    """Single files and folders come out of an image that has not even a shell; what it lacks is told."""
    name = image({"/etc/holoscan/app.json": "{}", "/opt/holoscan/app/a/b.py": "b", "/opt/holoscan/models/m.ts": "m"})
    folders = {"/opt/holoscan/app": tmp_path / "app", "/opt/holoscan/docs": tmp_path / "docs"}

    assert podman.read(name, "/etc/holoscan/app.json") == b"{}"
    assert podman.read(name, "/etc/holoscan/pkg.json") is None
    assert podman.read_all(name, ["/etc/holoscan/app.json", "/no"]) == {"/etc/holoscan/app.json": b"{}"}
    assert podman.extract(name, folders) == ["/opt/holoscan/docs"]
    assert (tmp_path / "app" / "a" / "b.py").read_text() == "b"
    assert not (tmp_path / "docs").exists()


def test_an_image_that_was_pushed_is_pulled_as_what_it_was(podman, image, registry):
    """The digest that a push tells is the registry's, and a MAP that is pulled by another machine has it."""
    name = image({"/etc/holoscan/app.json": json.dumps(MANIFEST)}, at=registry)
    digest = podman.push(name)
    here = load("m", name, engine=podman).digest
    subprocess.run([podman.program, "rmi", "--force", name], check=True, capture_output=True)
    with pytest.raises(Misconfigured, match="is not on this machine"):
        load("m", name, engine=podman)
    podman.pull(name)

    assert digest.startswith("sha256:")
    assert here == load("m", name, engine=podman).digest == digest.removeprefix("sha256:")[:32]
    with pytest.raises(EngineFailed, match="podman pull"):
        podman.pull(f"{registry}/there-is-none:1")


def test_what_is_known_of_an_image_is_told(podman, image):
    """Id, digest, environment and user of an image; None for an image that is not here."""
    name = image({"/a": "a"})
    inspected = podman.inspect(name)

    assert len(inspected.id) == 64
    assert inspected.environment["A"] == "b=c"
    assert inspected.user == "0"
    assert inspected.digests[0].startswith(name.rpartition(":")[0] + "@sha256:")
    assert podman.inspect("localhost/there-is-none:1") is None


def test_a_map_is_read_out_of_an_image(podman, image):
    """The manifests of an image make a MAP; its digest is the one that a registry knows it by."""
    name = image({"/etc/holoscan/app.json": json.dumps(MANIFEST), "/opt/holoscan/app/__main__.py": ""})
    found = load("m", name, engine=podman)

    assert found.place is None
    assert not found.changed()
    assert found.digest == podman.inspect(name).digests[0].rpartition("sha256:")[2][:32]
    assert (found.python, found.command) == ("python3", ("python3", "/opt/holoscan/app"))
    assert (found.application, found.models) == ("/opt/holoscan/app", "/opt/holoscan/models")
    assert found.needs.timeout_s == 60
    assert found.image.id == podman.inspect(name).id


def test_a_map_of_app_sdk_0_is_read_out_of_an_image(podman, image):
    """The folders of the old layout are found as well."""
    name = image(
        {"/etc/monai/app.json": json.dumps(LEGACY), "/etc/monai/pkg.json": '{"application-root": "/var/monai"}'}
    )
    found = load("m", name, engine=podman)

    assert found.application == "/opt/monai/app/app.py"
    assert found.models == "/opt/monai/models"
    assert found.own_environment["MONAI_MODELPATH"] == "/opt/monai/models"


def test_an_image_that_is_no_map_is_told_plainly(podman, image):
    """An image without manifests, and one that is not here, are named with the MAP."""
    with pytest.raises(Misconfigured, match=r"maps.yaml: m: the image .* is no MAP: it has neither"):
        load("m", image({"/a": "a"}), engine=podman)
    with pytest.raises(Misconfigured, match=r"maps.yaml: m: the image .* is not on this machine; `podman pull"):
        load("m", "localhost/there-is-none:1", engine=podman)
