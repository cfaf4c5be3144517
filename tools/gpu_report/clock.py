"""The time limit of a section: the section checks it between pieces of work, and is interrupted if it does not."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple


class OutOfTime(Exception):
    """A section's time is used up."""


class Clock(NamedTuple):
    """A deadline."""

    deadline: float  # by time.monotonic()

    @classmethod
    def of(cls, seconds: float) -> "Clock":
        return cls(time.monotonic() + seconds)

    @property
    def left(self) -> float:
        return max(self.deadline - time.monotonic(), 0.0)

    def check(self) -> None:
        """Raise OutOfTime after the deadline."""
        if not self.left:
            raise OutOfTime("its share of the time is used up")


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the body after so many seconds, at any Python instruction. For the main thread only."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"it did not stop by itself and was stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
