"""Background work in the gaps between steps, so that a step does not share its cores."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE_SECONDS = 0.1  # after which a piece of work is done beside a step: a long one must not stop all loads
NICENESS = 10  # of the threads that work in the background, for what they do beside a step after all


class Pacer:
    """Lets one side compute and others do small pieces of work while it does not.

    A step's threads wait for each other at every product, so whoever takes a core from one of them holds up all: four
    streams of base tokens on two cores, beside adapters of 10 MB that load in a loop, had a 99th percentile of 60 ms
    between tokens instead of 45, and 41 against 42 with their loads in the gaps; each then takes twice as long.
    """

    def __init__(self, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.patience_seconds = patience_seconds
        self._gap = threading.Event()
        self._gap.set()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """A step computes: pieces of work that have not begun wait."""
        self._gap.clear()
        try:
            yield
        finally:
            self._gap.set()

    def pause(self) -> None:
        """To be called before each piece, of a millisecond or less."""
        self._gap.wait(self.patience_seconds)


def yield_to_others(niceness: int = NICENESS) -> None:
    """Give the calling thread a lower priority than those that compute."""
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
