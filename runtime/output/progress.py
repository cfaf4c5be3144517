"""How far long work is, on standard error: a bar on a terminal, else now and then a line of the log."""

import io
import logging
import time
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

LINE_SECONDS = 5.0  # between two lines
T = TypeVar("T")
_log = logging.getLogger(__name__)


class Bar(tqdm):  # type: ignore[misc]
    """tqdm without its thread, which would stay."""

    monitor_interval = 0


class Lines(Bar):
    """tqdm whose states are lines of the log, the last one included; what is done soon has none."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._next_line = time.monotonic() + LINE_SECONDS
        super().__init__(
            *arguments, **{**options, "file": io.StringIO(), "mininterval": LINE_SECONDS, "disable": False}
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Log the state, if the last line is old enough or this is the end of a long work."""
        now, seconds = time.monotonic(), self.format_dict["elapsed"]
        if now >= self._next_line or (self.disable and seconds > LINE_SECONDS):
            self._next_line = now + LINE_SECONDS
            form = "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt}" if self.total else "{desc}: {n_fmt}"
            what = self.format_dict["prefix"].removesuffix(": ")
            state = self.format_meter(**{**self.format_dict, "prefix": what, "ncols": None, "bar_format": form})
            _log.info("%s, %.0f s", state.strip(), seconds)
        return True


def bar_class(*, bars: bool) -> type[Bar]:
    """The class of bars for libraries that make their own."""
    return Bar if bars else Lines


def progress(each: Iterable[T], what: str, *, bars: bool, unit: str) -> Iterable[T]:
    """The same items, while it is shown how many of them are done."""
    shown: Iterable[T] = bar_class(bars=bars)(each, desc=what, unit=unit)
    return shown
