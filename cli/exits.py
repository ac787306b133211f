"""How a command ends: its exit codes, and the sentence that says why."""

from typing import Never

import typer

from cli import show

EXIT_FAILED, EXIT_USAGE, EXIT_SIGNAL = 1, 2, 128
EXIT_CODES = (
    "Exit codes: 0 done; 1 it could not be had, and the text says why (also: one file of many was refused, a MAP "
    "failed, a training was not approved); 2 wrong usage or settings; 130 and 143 ended by a signal."
)


def end(why: str, code: int) -> Never:
    """Print why, and end with the code."""
    show.fail(why)
    raise typer.Exit(code)
