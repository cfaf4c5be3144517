"""How many names requests may have read from the store, beside those that are followed anyway."""

import time
from collections.abc import Callable

LOOKUPS_PER_SECOND = 20  # and as many at once after a rest: a stranger's guesses cost a server no more reads than that
MOST_UNDER_WAY = 8  # of the storage's 16 threads, which a store that does not answer would block


class Lookups:
    """Counts the reads of names that requests have asked for.

    Names that the store did not have are not remembered: one that is uploaded to another server a moment later has to
    be found here.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left, self._at = float(LOOKUPS_PER_SECOND), clock()
        self._under_way = 0

    def begin(self) -> bool:
        """Count a read that is to begin now; False if it must not. `end` follows each that may."""
        now = self._clock()
        self._left = min(LOOKUPS_PER_SECOND, self._left + (now - self._at) * LOOKUPS_PER_SECOND)
        self._at = now
        if self._left < 1 or self._under_way >= MOST_UNDER_WAY:
            return False
        self._left -= 1
        self._under_way += 1
        return True

    def end(self) -> None:
        """A read has ended, in whichever way."""
        self._under_way -= 1
