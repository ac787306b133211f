"""What crosses the boundary between a handler and the queue; anything else that is raised is a bug."""

import traceback
from pathlib import Path


class Unprocessable(ValueError):  # noqa: N818 - it states a fact about the message, as the contract names it
    """This message can never work: undecodable, of an unknown type, or about an object that is gone.

    `reason_code` is short snake_case: it becomes a log key, a metric dimension and the reason in the dead-letter queue,
    so it never holds a value that came from a message or a file.
    """

    def __init__(self, reason_code: str, detail: str = "") -> None:
        """State the reason; `detail` names a place (a field, a key's hash), never a value."""
        super().__init__(f"{reason_code}: {detail}" if detail else reason_code)
        self.reason_code = reason_code
        self.detail = detail


class Continue(Exception):  # noqa: N818 - it states a wish
    """The handler saved its state and wants to go on in a new message: SQS ends a lease after 12 hours."""


class Unavailable(RuntimeError):  # noqa: N818 - as above
    """Something the handler needs does not answer now, so the same message may work later.

    Its text is logged: it names what does not answer and how (`S3: SlowDown`), never a value.
    """


class Leased(Unavailable):
    """Another worker does it now: nothing is wrong, and the same message finds it done later."""


def place_of(error: BaseException) -> str:
    """Return `file.py:line` where `error` was raised; its text stays out, it may hold values of a file."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
