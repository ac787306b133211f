"""The parts of the docs that are made from the code: `make docs` writes them, and a test compares.

A page has each of them between two comments, `<!-- generated: NAME -->` and `<!-- /generated -->`.
"""

import configparser
import re
from collections.abc import Callable
from pathlib import Path

from tests.docs import events
from tests.docs.layout import LAYOUT
from tests.docs.markdown import DOCS, ROOT, pages, table

BLOCK = re.compile(r"(?P<begin><!-- generated: (?P<name>\w+) -->\n)(.*?)(?P<end><!-- /generated -->)", re.DOTALL)
DECISION = re.compile(r"# (?P<number>\d+)\. (?P<title>.+)\n\n(?P<date>\d{4}-\d\d-\d\d), (?P<status>.+)\.\n")
MOST_NAMED = 6
"""Modules that an import rule names one by one."""


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


def layout() -> str:
    """Return the table of the bucket's keys."""
    return table(("key", "what it is", "written by"), ((f"`{one.pattern}`", one.holds, one.writer) for one in LAYOUT))


def imports() -> str:
    """Return the import rules, from `.importlinter`."""
    config = configparser.ConfigParser()
    config.read(ROOT / ".importlinter")
    contracts = [config[name] for name in config.sections() if name.startswith("importlinter:contract:")]
    return "".join(f"- {one['name']}: {_rule(one)}.\n" for one in contracts)


def _rule(contract: configparser.SectionProxy) -> str:
    if contract["type"] == "layers":
        return " > ".join(re.sub(r"(\w+)", r"`\1`", layer) for layer in contract["layers"].split("\n")[1:])
    if contract["type"] == "independence":
        return _named(contract["modules"])
    return f"{_named(contract['source_modules'])} must not import {_named(contract['forbidden_modules'])}"


def _named(modules: str) -> str:
    names = modules.split()
    return ", ".join(f"`{name}`" for name in names) if len(names) <= MOST_NAMED else f"{len(names)} modules"


BLOCKS: dict[str, Callable[[], str]] = {
    "decisions": decisions,
    "layout": layout,
    "imports": imports,
    "messages": events.messages,
    "queues": events.queues,
    "reference": events.reference,
    "parts": events.parts,
}


def files() -> dict[Path, str]:
    """Return everything that is made from the code, as it is to be."""
    made = {page: BLOCK.sub(_regenerated, page.read_text()) for page in pages()}
    return made | {DOCS / "asyncapi.yaml": events.asyncapi()}


def _regenerated(found: re.Match[str]) -> str:
    return f"{found['begin']}\n{BLOCKS[found['name']]()}\n{found['end']}"
