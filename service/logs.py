"""What the service writes to standard error: log records, and text for the person who started it."""

import logging
import sys
import time

from runtime.config import LOG_FORMAT, LogLevel

PACKAGES = ("service", "runtime", "storage")


class Few(logging.Filter):
    """Lets some records through and then one a second, for lines that clients without a key can cause."""

    def __init__(self, burst: int = 20) -> None:
        super().__init__()
        self._burst, self._allowed = burst, float(burst)
        self._filled_at = time.monotonic()
        self._left_out = 0

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        self._allowed = min(self._burst, self._allowed + now - self._filled_at)
        self._filled_at = now
        if self._allowed < 1:
            self._left_out += 1
            return False
        self._allowed -= 1
        if self._left_out:
            record.msg = f"{record.msg} ({self._left_out} such lines before it were left out)"
            self._left_out = 0
        return True


def set_up(level: LogLevel) -> None:
    """Log records of our packages from `level` upwards, and those of libraries from warnings upwards."""
    number = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=max(number, logging.WARNING), format=LOG_FORMAT)
    for package in PACKAGES:
        logging.getLogger(package).setLevel(number)


def say(text: str) -> None:
    """Write the banner, progress or a refusal: text for a person, on standard error, without a timestamp."""
    print(text, file=sys.stderr, flush=True)
