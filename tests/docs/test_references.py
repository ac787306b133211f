"""What the docs point to is there: paths, modules, pages and headings."""

import re
from pathlib import Path

import pytest

from tests.docs.markdown import ROOT, pages

PACKAGES = ("services", "shared", "cli", "deploy", "radqueue", "tests")
TOPS = (*PACKAGES, "docs", "maps", ".ci")
PYTHON = {path.name for top in TOPS for path in (ROOT / top).rglob("*.py")}
MODULE = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:\.[A-Za-z_]\w*)+")
OF_OTHERS = {"mednist_classifier_monaideploy.py"}
"""Files of the App SDK's examples."""


@pytest.fixture(params=pages(), ids=lambda page: str(page.relative_to(ROOT)))
def page(request) -> Path:
    return request.param


def quoted(page: Path) -> list[str]:
    """Return what stands between backticks in a line of the page."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page.read_text())


def test_every_path_exists(page):
    """A path that begins with a folder of the repository, and a Python file's name alone, is that of a file in it."""
    paths = [text for text in quoted(page) if re.fullmatch(r"[\w./*-]+", text)]
    within = [text for text in paths if "/" in text and text.split("/")[0] in TOPS]
    names = {text for text in paths if re.fullmatch(r"\w+\.py", text)}

    assert not [text for text in within if not any(ROOT.glob(text.rstrip("/")))]
    assert not names - PYTHON - OF_OTHERS


def is_there(dotted: str) -> bool:
    """Tell whether there is such a module, or such a name in one."""
    *folders, name = dotted.split(".")
    place = ROOT.joinpath(*folders)
    if (place / name).is_dir() or (place / f"{name}.py").exists():
        return True
    for module in (place.with_suffix(".py"), place / "__init__.py"):
        if module.exists():
            return (
                re.search(rf"(?:\bclass |\bdef |\bimport .*|^\s*){name}\b", module.read_text(), re.MULTILINE)
                is not None
            )
    return len(folders) > 1 and is_there(".".join(folders))  # an attribute of a class


def test_every_module_exists(page):
    """A dotted name that begins with a package is a module, or a name in one, unless it is that of a message."""
    named = {text for text in quoted(page) if MODULE.fullmatch(text) and not re.search(r"\.v\d+$", text)}
    named |= set(re.findall(rf"-m ({MODULE.pattern})", page.read_text()))

    assert not [dotted for dotted in named if not is_there(dotted)]


def test_every_link_leads_somewhere(page):
    """A link within the repository leads to a file of it, and to a heading that is there."""
    links = [
        target.partition("#") for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in target
    ]
    files = [(page.parent / path if path else page, heading) for path, _, heading in links]

    assert not [file for file, _ in files if not file.exists()]
    assert not [heading for file, heading in files if heading and heading not in headings(file)]


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
