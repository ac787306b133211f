import json
import shutil
import sys

import pytest

from services.inference.package import maps
from services.inference.package.maps import digest_of, files_of, is_image, load, models_of
from shared.config import Misconfigured


def test_the_digest_depends_on_paths_and_content_alone(tmp_path):
    """Two folders with the same files are the same MAP; compiled and hidden files do not count."""
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        (folder / "models").mkdir(parents=True)
        (folder / "app.py").write_text("a")
        (folder / "models" / "m.ts").write_text("b")
    (other / "__pycache__").mkdir()
    (other / "__pycache__" / "app.pyc").write_text("c")
    (other / ".git").mkdir()
    (other / ".git" / "config").write_text("d")
    (other / "env").mkdir()
    (other / "env" / "pyvenv.cfg").write_text("e")

    assert digest_of(one) == digest_of(other)


@pytest.mark.parametrize("change", ["content", "name", "boundary"])
def test_the_digest_changes_with_the_map(tmp_path, change):
    """Another byte, another name, or the same bytes divided otherwise make another MAP."""
    (tmp_path / "app.py").write_text("ab")
    (tmp_path / "b.py").write_text("c")
    before = digest_of(tmp_path)
    if change == "content":
        (tmp_path / "app.py").write_text("aB")
    elif change == "name":
        (tmp_path / "b.py").rename(tmp_path / "c.py")
    else:
        (tmp_path / "app.py").write_text("a")
        (tmp_path / "b.py").write_text("bc")

    assert digest_of(tmp_path) != before


def test_a_map_without_models_has_no_model_folder(tmp_path):
    """A MAP may need no model; where it has them, they lie beside its program."""
    assert models_of(tmp_path) is None
    (tmp_path / "models").mkdir()

    assert models_of(tmp_path) == tmp_path / "models"


def test_a_source_that_is_no_map_is_told_at_the_start(tmp_path):
    """A folder that is not there, and one without a program, are named with the MAP."""
    with pytest.raises(Misconfigured, match=r"maps.yaml: m: its source .* does not exist"):
        load("m", tmp_path / "missing")
    with pytest.raises(Misconfigured, match=r"maps.yaml: m: .* holds neither app.py nor __main__.py"):
        load("m", tmp_path)


DEFINES = "from monai.deploy.core import Application\nclass A(Application):\n    pass\n"


def unpacked(folder, **app):
    """Lay what `extract` yields."""
    for name in ("app", "models/m", "config"):
        (folder / name).mkdir(parents=True)
    (folder / "app" / "__main__.py").write_text(DEFINES)
    (folder / "models" / "m" / "model.ts").write_text("m")
    command = [
        "python3",
        "-u",
        "/opt/holoscan/app/__main__.py",
        "--models=/opt/holoscan/models",
        "/opt/holoscan/models/m",
    ]
    document = {"command": json.dumps(command), "timeout": 30, "environment": {"A": "1", "HOLOSCAN_WORKDIR": "/var"}}
    (folder / "config" / "app.json").write_text(json.dumps(document | app))
    (folder / "config" / "pkg.json").write_text(json.dumps({"resources": {"memory": "2Gi"}}))
    (folder / "config" / "app.yaml").write_text("resources: {memory: 9Gi}\n")
    return folder


def test_an_application_folder_is_read_with_its_app_yaml(tmp_path):
    """A folder as in the SDK's examples names its program, models, configuration and needs."""
    (tmp_path / "models").mkdir()
    (tmp_path / "__main__.py").write_text("from app import A\n")
    (tmp_path / "app.py").write_text(DEFINES)
    (tmp_path / "app.yaml").write_text("resources: {cpu: 2, memory: 1Gi}\n")
    found = load("m", tmp_path)

    assert (found.application, found.models) == (str(tmp_path), str(tmp_path / "models"))
    assert found.command == (sys.executable, str(tmp_path / "__main__.py"))
    assert (found.needs.cpu, found.needs.memory_bytes, found.needs.timeout_s) == (2, 1 << 30, None)
    assert found.own_environment["HOLOSCAN_CONFIG_PATH"] == str(tmp_path / "app.yaml")
    assert found.own_environment["HOLOSCAN_MODEL_PATH"] == str(tmp_path / "models")


def test_a_program_may_be_one_file_under_any_name(tmp_path):
    """A file that is named, and the only file of a folder that defines an Application, are both the program."""
    (tmp_path / "classifier.py").write_text(DEFINES)
    (tmp_path / "other.py").write_text("A = 'Application'\n")

    assert load("m", tmp_path / "classifier.py").application == str(tmp_path / "classifier.py")
    assert load("m", tmp_path).command == (sys.executable, str(tmp_path / "classifier.py"))

    (tmp_path / "second.py").write_text(DEFINES)
    with pytest.raises(Misconfigured, match="nor one Python file that defines an Application"):
        load("m", tmp_path)


def test_a_program_that_is_one_file_is_made_of_what_it_imports(tmp_path):
    """Modules and packages that it imports, its settings and its models make its digest; its neighbours do not."""
    files = {
        "classifier.py": DEFINES + "import os\nfrom one import a\ndef later():\n    import package.part\n",
        "one.py": "import two\n",
        "two.py": "import classifier\n",
        "package/part.py": "from three import b\n",
        "package/data.json": "{}",
        "three.py": "",
        "app.yaml": "resources: {cpu: 1}\n",
        "models/m/model.ts": "m",
    }
    neighbours = ["other.py", "os.py.txt", "study/slice.dcm", "elsewhere/three.py"]
    for name in (*files, *neighbours):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(files.get(name, "something"))
    found = load("m", tmp_path / "classifier.py")

    assert {path.relative_to(tmp_path).as_posix() for path in files_of(tmp_path / "classifier.py")} == set(files)
    for name in neighbours:
        (tmp_path / name).write_text("something else")
    assert not found.changed()
    for name, text in files.items():
        (tmp_path / name).write_text(text + " ")
        assert found.changed(), name
        (tmp_path / name).write_text(text)
    assert not found.changed()


def test_models_behind_a_link_are_part_of_the_map(tmp_path):
    """Models are often links to one store; another model there is another MAP, and a link in a circle is no trouble."""
    (tmp_path / "map").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "map" / "app.py").write_text(DEFINES)
    (tmp_path / "store" / "model.ts").write_text("a")
    (tmp_path / "store" / "circle").symlink_to(tmp_path / "store")
    (tmp_path / "map" / "models").symlink_to(tmp_path / "store")
    found = load("m", tmp_path / "map")
    (tmp_path / "store" / "model.ts").write_text("b")

    assert found.changed()


@pytest.mark.parametrize("source", [".", "classifier.py"])
def test_a_copy_of_a_map_is_the_same_version_and_stays_it(tmp_path, source):
    """Program, modules, models and settings lie in the copy; what is no part of the MAP is within reach, as a link."""
    place, copy = tmp_path / "place", tmp_path / "copy"
    texts = {"classifier.py": DEFINES + "import one\n", "one.py": "", "models/m/model.ts": "m", "app.yaml": "{}"}
    for name, text in (texts | {".hidden": "h", "own/pyvenv.cfg": "", "own/bin/python": ""}).items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    copy.mkdir()
    found = load("m", place / source, python=str(place / "own/bin/python"))
    copied = found.copied_to(copy)
    for name in texts:
        (place / name).write_text("changed")

    assert found.changed()
    assert not copied.changed()
    assert {name: (copy / name).read_text() for name in texts} == texts
    assert copied == load("m", copy / source, python=found.python)
    assert (copy / ".hidden").readlink() == place / ".hidden"
    assert (copy / "own").readlink() == place / "own"


def test_a_folder_with_far_too_much_in_it_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """Somebody's home is no MAP; what to do is said."""
    (tmp_path / "app.py").write_text(DEFINES)
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("x" * 10)
    monkeypatch.setattr(maps, "MOST_FILES", 6)

    assert load("m", tmp_path)
    monkeypatch.setattr(maps, "MOST_FILES", 5)
    with pytest.raises(Misconfigured, match=r"maps.yaml: m: .* Name the folder of the application alone"):
        load("m", tmp_path)
    assert load("m", tmp_path / "app.py")
    monkeypatch.setattr(maps, "MOST_FILES", 6)
    monkeypatch.setattr(maps, "MOST_BYTES", 60)
    with pytest.raises(Misconfigured, match="holds more than a MAP should"):
        load("m", tmp_path)


def test_models_that_lie_elsewhere_are_part_of_the_map(tmp_path):
    """Models may be given; another model is another MAP, and one that is not there is told."""
    program, models = tmp_path / "program", tmp_path / "models"
    program.mkdir()
    models.mkdir()
    (program / "app.py").write_text(DEFINES)
    (models / "model.ts").write_text("a")
    found = load("m", program, models=models)

    assert found.models == str(models)
    assert not found.changed()
    (models / "model.ts").write_text("b")
    assert found.changed()
    with pytest.raises(Misconfigured, match=r"its models .* do not exist"):
        load("m", program, models=tmp_path / "nowhere")


def test_a_map_may_have_its_own_interpreter(tmp_path):
    """The interpreter is what the command starts with; one that is not there is told."""
    (tmp_path / "app.py").write_text(DEFINES)
    (tmp_path / "python3").write_text("")

    assert load("m", ".", relative_to=tmp_path, python="python3").command[0] == str(tmp_path / "python3")
    with pytest.raises(Misconfigured, match=r"its interpreter .* does not exist"):
        load("m", tmp_path, python=str(tmp_path / "missing"))


def test_an_unpacked_map_is_read_where_it_lies(tmp_path):
    """Paths of the image in its manifests become those of the folder; its manifests go before its app.yaml."""
    root = unpacked(tmp_path / "map")
    found = load("m", root)

    assert found.application == str(root / "app" / "__main__.py")
    assert found.command == (
        sys.executable,
        "-u",
        str(root / "app" / "__main__.py"),
        "--models=/opt/holoscan/models",
        str(root / "models" / "m"),
    )
    assert found.models == str(root / "models")
    assert (found.needs.timeout_s, found.needs.memory_bytes) == (30, 2 << 30)
    assert found.own_environment["A"] == "1"
    assert "HOLOSCAN_WORKDIR" not in found.own_environment
    assert found.own_environment["HOLOSCAN_CONFIG_PATH"] == str(root / "config" / "app.yaml")


def test_a_broken_unpacked_map_is_told_plainly(tmp_path):
    """What is missing or wrong is named with the MAP."""
    with pytest.raises(Misconfigured, match=r"maps.yaml: m: app.json: command: expected the program"):
        load("m", unpacked(tmp_path / "one", command=""))
    with pytest.raises(
        Misconfigured, match=r"app.json: command: starts .*/app/gone.py, where there is no Python program"
    ):
        load("m", unpacked(tmp_path / "two", command="python3 /opt/holoscan/app/gone.py"))
    shutil.rmtree(unpacked(tmp_path / "three") / "app")
    with pytest.raises(Misconfigured, match="has manifests, but no folder app"):
        load("m", tmp_path / "three")


def test_a_program_is_told_of_its_study_in_both_families_of_names(tmp_path):
    """Programs of App SDK 0.x read other variables than those of today."""
    (tmp_path / "app.py").write_text(DEFINES)
    said = load("m", tmp_path).environment("/in", "/out", "/work")

    assert said["HOLOSCAN_INPUT_PATH"] == said["MONAI_INPUTPATH"] == "/in"
    assert said["HOLOSCAN_OUTPUT_PATH"] == said["MONAI_OUTPUTPATH"] == "/out"
    assert said["HOLOSCAN_WORKDIR"] == said["MONAI_WORKDIR"] == "/work"
    assert "HOLOSCAN_MODEL_PATH" not in said


def test_a_source_names_an_image_by_its_tag(tmp_path):
    """A path that is there is a path, whatever it is called; otherwise a tag or a digest makes an image."""
    (tmp_path / "a:b").mkdir()

    assert is_image("registry/spleen:1.0")
    assert is_image("spleen@sha256:00")
    assert not is_image("spleen")
    assert not is_image("a:b", tmp_path)
