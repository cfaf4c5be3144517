"""What the service writes to standard error: log records, and text for the person who started it."""

import logging
import sys

from runtime.config import LOG_FORMAT, LogLevel

PACKAGES = ("service", "runtime", "storage")


def set_up(level: LogLevel) -> None:
    """Log records of our packages from `level` upwards, and those of libraries from warnings upwards."""
    number = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=max(number, logging.WARNING), format=LOG_FORMAT)
    for package in PACKAGES:
        logging.getLogger(package).setLevel(number)


def say(text: str) -> None:
    """Write the banner, progress or a refusal: text for a person, on standard error, without a timestamp."""
    print(text, file=sys.stderr, flush=True)
