"""How pydicom is kept from printing what it reads."""

import logging
import warnings


def silence() -> None:
    """Keep pydicom's warnings and log lines from echoing the values they stumble over; call it before parsing.

    Values are read as they are: a value that the standard forbids is no reason to lose an image.
    """
    from pydicom import config  # noqa: PLC0415 - loading it takes longer than all else of a command

    config.settings.reading_validation_mode = config.IGNORE
    logger = logging.getLogger("pydicom")
    logger.handlers = [logging.NullHandler()]
    logger.propagate = False
    logger.setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")
