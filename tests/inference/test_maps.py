import pytest

from services.inference.maps import digest_of, load, models_of
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
    (other / ".git").write_text("d")

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
    with pytest.raises(Misconfigured, match=r"maps.yaml: m: its source .* is no folder"):
        load("m", tmp_path / "missing")
    with pytest.raises(Misconfigured, match=r"maps.yaml: m: .* holds neither app.py nor __main__.py"):
        load("m", tmp_path)
