"""Uploads and imports beside running requests: a small piece of work, then a pause."""

import time
from collections.abc import Callable

PIECE_BYTES = 1 << 20  # of work at a time: about 2 ms on one core
PAUSE_SECONDS = 0.03  # after each piece while requests run: one or two of their steps then have all cores
MAX_PAUSES = 40  # of one upload: bounds the time that a large one loses to 1.2 s


class Throttle:
    """Spreads the work of one upload or import over time while requests run.

    Requests run in another process, and its threads wait for each other at every product of matrices. An upload that
    takes a core from one of those threads delays all of them: four streams of base tokens on two cores had a 99th
    percentile of 80 ms between tokens instead of 26 beside uploads of 10 MB, and 33 ms with these pauses. Each upload
    then took 0.6 s instead of 0.05 to 0.1. Pieces and pauses of a third of the size did no better.
    """

    def __init__(self, busy: Callable[[], bool]) -> None:
        self._busy = busy  # whether any request runs
        self._pauses = 0

    def pause(self) -> None:
        """Pause after a piece of work. Blocks."""
        if self._pauses < MAX_PAUSES and self._busy():
            self._pauses += 1
            time.sleep(PAUSE_SECONDS)
