"""The lines that a process logs to standard error: words, or JSON objects. Nobody outside can write one of his own."""

import json
import logging
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

from runtime.config import LogFormat

Field = str | int | float | bool | None  # None: there is nothing to say of it
MOST_MESSAGE, MOST_TRACEBACK = 4000, 40_000  # characters of a record; what stands in the middle is left out
PLAIN = re.compile(r"[\w./:@+={}-]+", re.ASCII)  # needs no quotes


def fields_of(record: logging.LogRecord) -> Mapping[str, Field]:
    """What a record says besides its message: the `fields` in its `extra`."""
    found: Mapping[str, Field] = getattr(record, "fields", {})
    return found


class TextLines(logging.Formatter):
    """`time LEVEL logger: message name=value …`; the lines of a traceback are indented."""

    def format(self, record: logging.LogRecord) -> str:
        said = "".join(f" {name}={_word(value)}" for name, value in fields_of(record).items())
        message = escaped(cut(record.getMessage(), MOST_MESSAGE))
        line = f"{self.formatTime(record)} {record.levelname} {record.name}: {message}{said}"
        for below in (self._traceback(record) or "").splitlines():
            line += f"\n    {escaped(below)}"
        return line

    def _traceback(self, record: logging.LogRecord) -> str | None:
        return None if not record.exc_info else cut(self.formatException(record.exc_info), MOST_TRACEBACK)


class JsonLines(TextLines):
    """An object a line: time, level, logger and message, the record's fields, and its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {"time": f"{whole}.{int(record.msecs):03}Z", "level": record.levelname.lower()}
        line |= {"logger": record.name, "message": cut(record.getMessage(), MOST_MESSAGE), **fields_of(record)}
        if (traceback := self._traceback(record)) is not None:
            line["traceback"] = traceback
        return json.dumps(line)  # ASCII: other characters may end a line for who reads it


LINES = {"text": TextLines, "json": JsonLines}


def write_lines(form: LogFormat, level: int | str) -> None:
    """Log from `level` upwards to standard error, unless logging is set up already."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LINES[form]())
    logging.basicConfig(level=level, handlers=[handler])


def writes_json() -> bool:
    """Whether the log is written as JSON."""
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers)


def cut(text: str, most: int) -> str:
    """A text of at most about so many characters, without its middle if it has more."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]} … {len(text) - most} characters … {text[-(most // 2) :]}"


def escaped(text: str) -> str:
    """A text on one line: what does not print is shown as in Python's literals."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _word(value: Field) -> str:
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) else json.dumps(value)
    return json.dumps(value)
