"""What the service writes to standard error: log records, and text for the person who started it."""

import logging
import sys
import time
from collections.abc import Mapping

from runtime.config import LogFormat, LogLevel
from runtime.output.logs import Field, cut, fields_of, write_lines, writes_json

PACKAGES = ("service", "runtime", "storage")
OWN_HANDLERS = ("transformers", "huggingface_hub")  # libraries that write lines of their own beside ours
MOST_VALUE = 200  # characters of a field: paths and names come from clients
_said = logging.getLogger("service")


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
            record.fields = {**fields_of(record), "left_out": self._left_out}  # such lines before this one
            self._left_out = 0
        return True


def set_up(level: LogLevel, form: LogFormat = "text") -> None:
    """Log records of our packages from `level` upwards, and those of libraries from warnings upwards."""
    number = logging.getLevelNamesMapping()[level.upper()]
    write_lines(form, max(number, logging.WARNING))
    for package in PACKAGES:
        logging.getLogger(package).setLevel(number)
    for library in map(logging.getLogger, OWN_HANDLERS):
        library.handlers.clear()
        library.propagate = True
        library.setLevel(max(number, logging.WARNING))
    # Its warnings are advice to programs on how to call it, which no operator can follow
    logging.getLogger("transformers").setLevel(max(number, logging.ERROR))


def log_event(log: logging.Logger, message: str, fields: Mapping[str, Field]) -> None:
    """Log what has happened, with those fields that have a value; texts are cut to a bounded length."""
    if log.isEnabledFor(logging.INFO):
        shown = {
            name: cut(value, MOST_VALUE) if isinstance(value, str) else value
            for name, value in fields.items()
            if value is not None
        }
        log.info(message, extra={"fields": shown})


def shows_bars() -> bool:
    """Whether progress may be shown as bars: to a person, not in a log."""
    return sys.stderr.isatty() and not writes_json()


def say(text: str, level: int = logging.INFO) -> None:
    """Write the banner, progress or a refusal: text for a person, on standard error, without a timestamp.

    Where the log is JSON, its first paragraph is a line of the log, so that all lines are JSON.
    """
    if writes_json():
        _said.log(level, "%s", " ".join(text.strip().split("\n\n")[0].split()))
    else:
        print(text, file=sys.stderr, flush=True)
