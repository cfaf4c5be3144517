"""Background work between steps, so that a step need not share its cores."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE_SECONDS = 0.1  # then work runs beside the step: a long step must not stop all loads
NICENESS = 10  # of background threads, for the work that runs beside a step after all


class Pacer:
    """Makes background threads wait while a step computes.

    The threads of a step wait for each other at every product, so a background thread on one of their cores delays the
    whole step. Four streams of base tokens on two cores, beside adapters of 10 MB that load in a loop: the 99th
    percentile between tokens was 60 ms (45 without loads); with loads between steps it was 41 ms (42 without loads),
    and each load took twice as long.
    """

    def __init__(self, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.patience_seconds = patience_seconds
        self._gap = threading.Event()
        self._gap.set()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """A step computes inside: background work that has not begun waits."""
        self._gap.clear()
        try:
            yield
        finally:
            self._gap.set()

    def pause(self) -> None:
        """Wait until no step computes; background threads call it before each millisecond of work or less."""
        self._gap.wait(self.patience_seconds)


def yield_to_others(niceness: int = NICENESS) -> None:
    """Give the calling thread a lower priority than the threads that compute."""
    if sys.platform == "linux":  # on other systems a thread has no priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
