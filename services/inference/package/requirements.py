"""What an interpreter lacks of a `requirements.txt`: compared as pip does it, by PEP 508 and PEP 440.

Values in, values out.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

_NO_PART = re.compile(r"(^|\s)#.*|\s--(hash|config-settings|global-option)\b.*")
"""Comments, and options of a line."""


@dataclass(frozen=True, slots=True)
class Compared:
    """The requirements, by what there is."""

    met: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    """Each with the version that is there."""
    unread: list[str] = field(default_factory=list)
    """The lines that do not require a package by name: options, files, addresses."""


def compare(text: str, installed: Mapping[str, str], environment: Mapping[str, str]) -> Compared:
    """Compare a requirements file with the versions that are installed, by canonical name.

    `environment` are the values of PEP 508's markers; a requirement whose marker does not hold is left out.
    """
    compared = Compared()
    for line in _lines(text):
        try:
            wanted = Requirement(line)
        except InvalidRequirement:
            compared.unread.append(line)
            continue
        if wanted.marker is not None and not wanted.marker.evaluate(dict(environment)):
            continue
        there = installed.get(canonicalize_name(wanted.name))
        if there is None:
            compared.missing.append(str(wanted))
        elif wanted.specifier.contains(there, prereleases=True):
            compared.met.append(str(wanted))
        else:
            compared.differing.append(f"{wanted} (there is {there})")
    return compared


def _lines(text: str) -> Iterator[str]:
    for line in text.replace("\\\n", " ").splitlines():
        if said := _NO_PART.sub("", line).strip():
            yield said
