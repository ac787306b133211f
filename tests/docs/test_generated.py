"""What the docs have from the code is what the code says."""

import re

from tests.docs.blocks import BLOCK, BLOCKS, DECISION, files
from tests.docs.markdown import DOCS, pages


def test_what_is_generated_is_up_to_date():
    """Every generated part is as `make docs` writes it."""
    stale = [path.name for path, text in files().items() if not path.exists() or path.read_text() != text]

    assert not stale, "run `make docs`"


def test_every_block_is_on_a_page():
    """Each block stands on one page, between its comments."""
    named = [found["name"] for page in pages() for found in BLOCK.finditer(page.read_text())]
    begun = [name for page in pages() for name in re.findall("<!-- generated: (.*) -->", page.read_text())]

    assert sorted(named) == sorted(begun) == sorted(BLOCKS)


def test_every_decision_has_a_date_and_a_status():
    """A page begins with its number, its title, its date and a status, and the number is that of its file."""
    for page in (DOCS / "decisions").glob("0*.md"):
        head = DECISION.match(page.read_text())

        assert head is not None, f"{page.name}: the third line is not such as `2026-11-21, accepted.`"
        assert re.fullmatch(r"accepted|superseded by \d+", head["status"]), page.name
        assert int(page.name[:4]) == int(head["number"])
