"""The parts of the docs that are made from the code: `make docs` writes them, and a test compares.

A page has each of them between two comments, `<!-- generated: NAME -->` and `<!-- /generated -->`.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"(?P<begin><!-- generated: (?P<name>\w+) -->\n)(.*?)(?P<end><!-- /generated -->)", re.DOTALL)
DECISION = re.compile(r"# (?P<number>\d+)\. (?P<title>.+)\n\n(?P<date>\d{4}-\d\d-\d\d), (?P<status>.+)\.\n")
STATUS = re.compile(r"accepted|superseded by \d+")


def table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    titles = tuple(titles)
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def decisions() -> str:
    """Return the index of the decisions, from the heads of their pages."""
    heads = {page.name: DECISION.match(page.read_text()) for page in sorted((DOCS / "decisions").glob("0*.md"))}
    return table(
        ("number", "decision", "date", "status"),
        (
            (head["number"], f"[{head['title']}]({name})", head["date"], head["status"])
            for name, head in heads.items()
            if head is not None
        ),
    )


BLOCKS: dict[str, Callable[[], str]] = {"decisions": decisions}


def regenerated(page: str) -> str:
    """Return a page with its generated blocks made anew."""
    return BLOCK.sub(lambda found: f"{found['begin']}\n{BLOCKS[found['name']]()}\n{found['end']}", page)


def files() -> dict[Path, str]:
    """Return everything that is made from the code, as it is to be."""
    return {page: regenerated(page.read_text()) for page in pages()}


def pages() -> list[Path]:
    """Return every page of the documentation."""
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
