import json

import pytest

from services.inference.package.manifests import BrokenMap, Needs, read_app_yaml, read_manifests, size_of

APP = {
    "apiVersion": "1.0.0",
    "command": '["python3", "/opt/holoscan/app"]',
    "environment": {"HOLOSCAN_INPUT_PATH": "input/", "OMP_NUM_THREADS": 4, "EMPTY": None},
    "input": {"path": "input/", "formats": None},
    "output": {"path": "output/", "formats": None},
    "timeout": 0,
    "workingDirectory": "/var/holoscan/",
}
PKG = {
    "applicationRoot": "/opt/holoscan/app",
    "modelRoot": "/opt/holoscan/models/",
    "models": {"spleen": "/opt/holoscan/models/spleen"},
    "resources": {"cpu": 1, "gpu": 1, "memory": "32Gi", "gpuMemory": "5Gi", "sharedMemory": "64Mi"},
}


def read(app=None, pkg=None, **how):
    return read_manifests(json.dumps(APP | (app or {})).encode(), json.dumps(PKG | (pkg or {})).encode(), **how)


def test_the_holoscan_packagers_manifests_are_read():
    """Command in a string, models in an object, null formats, timeout 0 and sizes with units mean what they say."""
    found = read()

    assert found.command == ("python3", "/opt/holoscan/app")
    assert (found.application, found.model_root) == ("/opt/holoscan/app", "/opt/holoscan/models")
    assert found.models == {"spleen": "/opt/holoscan/models/spleen"}
    assert (found.input, found.output, found.working_directory) == ("input", "output", "/var/holoscan")
    assert found.environment == {"HOLOSCAN_INPUT_PATH": "input/", "OMP_NUM_THREADS": "4"}
    assert found.needs == Needs(None, 1, 32 << 30, 1, 5 << 30, 64 << 20)


def test_the_manifests_of_app_sdk_0_are_read():
    """Keys with hyphens, a shell line as command, a list of models, and the working directory as root."""
    app = {
        "api-version": "0.1.0",
        "command": "/usr/bin/python3 -u '/opt/monai/app/main.py'",
        "input": {"path": "input", "formats": []},
        "output": {"path": "output", "format": {"data": "segmentation-image"}},
        "timeout": 600,
        "working-directory": "/var/monai",
    }
    pkg = {
        "application-root": "/var/monai/",
        "model-root": "/opt/monai/models",
        "models": [{"name": "spleen", "path": "/opt/monai/models/spleen"}],
        "resources": {"cpu": "500m", "gpu": 0, "memory": "1Gi"},
    }
    found = read_manifests(b"\xef\xbb\xbf" + json.dumps(app).encode(), json.dumps(pkg).encode(), family="monai")

    assert found.command == ("/usr/bin/python3", "-u", "/opt/monai/app/main.py")
    assert (found.application, found.working_directory) == ("/opt/monai/app", "/var/monai")
    assert found.models == {"spleen": "/opt/monai/models/spleen"}
    assert found.needs == Needs(timeout_s=600, cpu=0.5, memory_bytes=1 << 30)


@pytest.mark.parametrize(
    "command",
    ['["python3", "/opt/holoscan/app"]', ["python3", "/opt/holoscan/app"], "python3 /opt/holoscan/app"],
)
def test_a_command_is_read_however_it_is_written(command):
    """A list in a string, a list, and a line of a shell are the same command."""
    assert read({"command": command}).command == ("python3", "/opt/holoscan/app")


@pytest.mark.parametrize("models", [None, {}, []])
def test_a_map_may_have_no_models_and_say_so_in_many_ways(models):
    """Null, an empty object and an empty list all say that there is no model."""
    assert read(pkg={"models": models}).models == {}


def test_a_map_without_pkg_json_asks_for_nothing():
    """The package manifest is optional, and what it does not say is not made up."""
    found = read_manifests(json.dumps(APP).encode(), None)

    assert found.needs == Needs()
    assert (found.application, found.model_root) == ("/opt/holoscan/app", "/opt/holoscan/models")


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("32Gi", 32 << 30),
        ("500Mi", 500 << 20),
        ("1.5 GiB", 3 << 29),
        ("1GB", 10**9),
        ("2g", 2 * 10**9),
        ("1024", 1024),
        (4096, 4096),
        (None, None),
        (0, None),
        ("", None),
    ],
)
def test_sizes_are_read_in_binary_and_decimal_units(text, n_bytes):
    """Gi is 2**30 and G is 10**9, as Kubernetes has it; a size that is not said is none."""
    assert size_of(text) == n_bytes


@pytest.mark.parametrize(
    ("app", "pkg", "complaint"),
    [
        ({"command": None}, {}, "app.json: command: expected the program and its arguments"),
        ({"command": []}, {}, "app.json: command: expected"),
        ({"command": "python3 'app"}, {}, "app.json: command: has a quote that does not end"),
        ({"input": {"path": 3}}, {}, "app.json: input.path: expected a path"),
        ({"environment": ["A=1"]}, {}, "app.json: environment: expected an object"),
        ({"timeout": "soon"}, {}, "app.json: timeout: expected seconds"),
        ({}, {"models": "spleen"}, "pkg.json: models: expected an object"),
        ({}, {"models": [{"name": "spleen"}]}, "pkg.json: models: expected a name and a path"),
        ({}, {"resources": {"memory": "lots"}}, "pkg.json: resources.memory: expected a size"),
        ({"timeout": -1}, {}, "app.json: timeout: expected seconds, 0 or more"),
        ({"timeout": float("nan")}, {}, "app.json: timeout: expected seconds"),
        ({"timeout": True}, {}, "app.json: timeout: expected seconds"),
        ({}, {"resources": {"gpu": "one"}}, "pkg.json: resources.gpu: expected a number, 0 or more"),
        ({}, {"resources": {"gpu": float("inf")}}, "pkg.json: resources.gpu: expected a number"),
        ({}, {"resources": {"gpu": -1}}, "pkg.json: resources.gpu: expected a number"),
        ({}, {"resources": {"gpu": 0.5}}, "pkg.json: resources.gpu: expected a whole number"),
        ({}, {"resources": {"gpu": "500m"}}, "pkg.json: resources.gpu: expected a whole number"),
        ({}, {"resources": {"cpu": float("nan")}}, "pkg.json: resources.cpu: expected a number"),
        ({}, {"resources": {"memory": -4}}, "pkg.json: resources.memory: expected a size"),
        ({}, {"resources": {"memory": "9" * 400}}, "pkg.json: resources.memory: expected a size"),
        ({}, {"resources": [1]}, "pkg.json: resources: expected keys"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_said_by_file_and_key(app, pkg, complaint):
    """A broken manifest is refused, in words that lead to the place."""
    with pytest.raises(BrokenMap) as caught:
        read(app, pkg)

    assert complaint in str(caught.value)


def test_keys_that_mean_nothing_are_told_by_their_file():
    """A slip in a key asks for nothing, and is seen; all spellings of a known key are known."""
    found = read({"time-out": 3, "working-directory": "/w", "timeouts": 3}, {"resources": {"gpu_memory": 1, "gpus": 2}})
    needs, _ = read_app_yaml(b"model_path: x\nresources: {memmory: 3Gi, gpu: 1}\n")

    assert found.needs.unknown == ("app.json: timeouts", "pkg.json: resources: gpus")
    assert needs.unknown == ("app.yaml: resources: memmory",)


def test_a_manifest_that_is_no_json_is_refused_with_its_line():
    """A comma too many is found by its line."""
    with pytest.raises(BrokenMap, match=r"app\.json, line 3: is not JSON"):
        read_manifests(b'{\n "command": [],\n}', None)
    with pytest.raises(BrokenMap, match=r"app\.json: expected an object"):
        read_manifests(b"[]", None)


def test_an_app_yaml_says_what_the_application_asks_for():
    """The section `resources` of a folder says what pkg.json says of an image; an empty file says nothing."""
    text = (
        b"%YAML 1.2\n---\napplication:\n  title: T\n  version: 1.0\nresources:\n  cpu: 1\n  gpu: 1\n  gpuMemory: 7Gi\n"
    )
    needs, application = read_app_yaml(text)

    assert needs == Needs(cpu=1, gpu=1, gpu_memory_bytes=7 << 30)
    assert application == {"title": "T", "version": 1.0}
    assert read_app_yaml(b"") == (Needs(), {})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"a: b: c", "app.yaml, line 1: is not YAML"),
        (b"- a", "app.yaml: expected sections"),
        (b"application: spleen", "app.yaml: application: expected keys"),
        (b"resources: {memory: much}", "app.yaml: resources.memory: expected a size"),
        (b"resources: {gpu: .inf}", "app.yaml: resources.gpu: expected a number"),
        (b"resources: {cpu: .nan}", "app.yaml: resources.cpu: expected a number"),
        (b"application: {timeout: -.inf}", "app.yaml: application.timeout: expected seconds"),
    ],
)
def test_what_is_wrong_with_an_app_yaml_is_said(text, complaint):
    """A broken app.yaml is refused, in words that lead to the place."""
    with pytest.raises(BrokenMap) as caught:
        read_app_yaml(text)

    assert complaint in str(caught.value)
