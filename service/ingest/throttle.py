"""Uploads beside running requests: a small piece of work, then a rest."""

import asyncio
import time
from collections.abc import Callable

PIECE_BYTES = 1 << 20  # of work at a time: about 2 ms on one core
REST_SECONDS = 0.03  # after each while requests run: a step of theirs or two do not share a core with one
MOST_RESTS = 40  # of one upload: a large one is not to take much longer than it must


class Pace:
    """Keeps one upload's work out of the way of requests that run, if any does: `busy` says so.

    They run in another process, which may use all cores, and whose threads wait for each other at every product, so
    whoever takes a core from one of them holds up all: four streams of base tokens on two cores had a 99th percentile
    of 80 ms between tokens instead of 26 beside uploads of 10 MB, and 33 with these rests. Each upload then takes
    0.6 s instead of 0.05 to 0.1. Pieces and rests of a third did no better.
    """

    def __init__(self, busy: Callable[[], bool]) -> None:
        self._busy = busy
        self._rests = 0

    def pause(self) -> None:
        """Rest after a piece of work, on a thread."""
        if self._is_due():
            time.sleep(REST_SECONDS)

    async def rest(self) -> None:
        """Rest after a piece of work, on the event loop."""
        if self._is_due():
            await asyncio.sleep(REST_SECONDS)

    def _is_due(self) -> bool:
        due = self._rests < MOST_RESTS and self._busy()
        self._rests += due
        return due
