"""Settings are read once, and what is wrong with them is told by name, without values."""

import contextlib
import io
import json
import logging
import os

import pytest

from shared import log
from shared.config import Misconfigured, ServiceSettings, load


def test_settings_come_from_variables_of_their_name():
    """A field is read from its name in capitals after the prefix; what is not set has its default."""
    settings = load(ServiceSettings, {"RADQUEUE_BUCKET": "b", "RADQUEUE_SLOTS": "3", "SLOTS": "4"})

    assert (settings.bucket, settings.slots, settings.poll_s) == ("b", 3, 20)


def test_every_wrong_setting_is_told_in_one_go():
    """The error names each variable and what it is for, not the value, which may be a secret."""
    with pytest.raises(Misconfigured) as wrong:
        load(ServiceSettings, {"RADQUEUE_SLOTS": "hunter2", "RADQUEUE_POLL_S": "60"})

    first, second = str(wrong.value).splitlines()
    assert first.startswith("RADQUEUE_SLOTS: ")
    assert "Messages handled at the same time." in first
    assert second.startswith("RADQUEUE_POLL_S: ")
    assert "hunter2" not in str(wrong.value)


def test_an_empty_name_is_told():
    """A variable that was set to nothing is no name of a bucket or a queue."""
    with pytest.raises(Misconfigured, match=r"RADQUEUE_BUCKET: .*\nRADQUEUE_TRAINING_QUEUE: "):
        load(ServiceSettings, {"RADQUEUE_BUCKET": "", "RADQUEUE_TRAINING_QUEUE": ""})


def test_every_setting_says_what_it_is_for():
    """No field is without its line."""
    assert all(field.description for field in ServiceSettings.model_fields.values())


@pytest.fixture
def lines():
    """What is logged during the test, as JSON documents."""
    stream = io.StringIO()
    log.setup("test", stream=stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    log.setup("test")
    logging.captureWarnings(capture=False)


def test_an_exception_is_logged_by_type_and_place_without_its_text(lines):
    """The words of an exception, and of what caused it, stay out of the log."""
    try:
        try:
            raise KeyError("DOE^JANE")
        except KeyError as cause:
            raise ValueError("DOE^JANE") from cause
    except ValueError as error:
        log.get_logger().error("it.failed", exc_info=error)

    (line,) = lines()
    assert line["error_type"] == "ValueError"
    assert [place for place in line["traceback"] if not place.startswith("test_config.py:")] == [
        "KeyError",
        "ValueError",
    ]
    assert "DOE" not in json.dumps(line)


def test_a_broken_log_ends_no_work():
    """Where standard error cannot be written any more, logging does nothing."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffering=1) as broken:  # noqa: PTH123 - a pipe
        log.setup("test", stream=broken)
        log.get_logger().info("nobody.reads", filler="x" * 100_000)
        log.setup("test")
        logging.captureWarnings(capture=False)
        with contextlib.suppress(OSError):
            broken.flush()


def test_a_library_that_logs_is_named_but_not_quoted(lines):
    """Library messages may hold keys and values; only logger, severity and place are kept."""
    logging.getLogger("some.library").warning("could not read %s", "DOE^JANE")

    (line,) = lines()
    assert (line["event"], line["logger"], line["severity"]) == ("library.logged", "some.library", "WARNING")
    assert "DOE" not in json.dumps(line)
