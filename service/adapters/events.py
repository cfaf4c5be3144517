"""A line of the log for what a client does to an adapter: what, by whom, how long it took, and why it failed."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from runtime.output.logs import Field
from service.catalog.record import AdapterVersion
from service.errors import request_error
from service.logs import log_event

_log = logging.getLogger(__name__)


class AdapterEvent:
    """What is known of an event: the name first, then the version that it made or met."""

    def __init__(self, action: str, name: str, who: str | None) -> None:
        self.action = action
        self._began = time.monotonic()
        self._fields: dict[str, Field] = {"name": name, "who": who}

    def note(self, version: AdapterVersion | None = None, **fields: Field) -> None:
        """Note the version, and what else is to be said."""
        if version is not None:
            self._fields |= {"digest": version.digest, "bytes": version.record.bytes}
        self._fields |= fields

    def log(self, error: Exception | None) -> None:
        seconds = round(time.monotonic() - self._began, 3)
        if error is None:
            log_event(_log, f"adapter {self.action}", {**self._fields, "seconds": seconds})
            return
        known = request_error(error)
        code = type(error).__name__ if known is None else known.code
        failed = {"during": self.action, "code": code, "reason": str(error) if known is None else known.message}
        log_event(_log, "adapter failed", {**self._fields, **failed, "seconds": seconds})


@contextmanager
def adapter_event(action: str, name: str, who: str | None) -> Iterator[AdapterEvent]:
    """Log an event at the end of the block, or that it failed."""
    event = AdapterEvent(action, name, who)
    try:
        yield event
    except Exception as error:
        event.log(error)
        raise
    event.log(None)
