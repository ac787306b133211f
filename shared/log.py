"""Structured logs: one JSON document per line, an event name and keys, nothing about a patient.

Exception texts and library log messages may hold values of a file or an upload's key, so they never reach a log: an
exception is logged by type and place, a library's record by logger and place.
"""

import io
import logging
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, cast

import structlog
from structlog.typing import EventDict, WrappedLogger


def setup(service: str, *, stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Send the logs of this process to `stream` (standard error), with `service` in each line."""
    out = stream or sys.stderr
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _exception_without_text,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", _Sink(out))),
    )
    structlog.contextvars.bind_contextvars(service=service)
    logging.basicConfig(handlers=[_LibraryHandler(logging.WARNING)], level=logging.WARNING, force=True)
    logging.captureWarnings(capture=True)


def get_logger() -> Any:
    """Return the logger; keys bound with `structlog.contextvars` come along."""
    return structlog.get_logger()


def places_of(error: BaseException) -> list[str]:
    """Return the frames of `error` and of what caused it, innermost last, as `file.py:line function`."""
    places: list[str] = []
    current: BaseException | None = error
    while current is not None:
        frames = traceback.extract_tb(current.__traceback__)
        places[:0] = [type(current).__name__, *(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames)]
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return places


def _exception_without_text(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    given = event.pop("exc_info", None)
    error = given if isinstance(given, BaseException) else sys.exc_info()[1] if given else None
    if error is not None:
        event["error_type"] = type(error).__name__
        event["traceback"] = places_of(error)
    return event


class _Sink(io.TextIOBase):
    """A stream that may break: a full disk under the log, or a reader that went away, ends no work."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


class _LibraryHandler(logging.Handler):
    """Tells that a library logged, where, and the exception's type, but not its words."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        get_logger().warning(
            "library.logged",
            logger=record.name,
            severity=record.levelname,
            where=f"{Path(record.pathname).name}:{record.lineno}",
            exc_info=error,
        )
