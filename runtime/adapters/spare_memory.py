"""Memory of files that nobody reads any more, for the next ones: a page fault costs more than a copy."""

import weakref

import numpy as np

SPARE_BYTES = 192 << 20  # the largest piece that is kept: 175 MB are rank 16 of 8B weights in float32


class SpareMemory:
    """Keeps up to `count` pieces; of use to any number of threads. 39 MB took 8 ms to read into one, and 25 without."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._spare: list[np.ndarray] = []

    def take(self, size: int) -> np.ndarray:
        """So many bytes, with anything in them; they are kept for another once no array refers to them any more."""
        try:
            memory = self._spare.pop()
        except IndexError:
            memory = np.empty(0, np.uint8)
        if len(memory) < size:
            memory = np.frombuffer(bytearray(size), np.uint8)  # numpy's own would come in huge pages: see `touch`
        lent = memory[:size]
        weakref.finalize(lent, self._keep, memory).atexit = False
        # A part of an array refers to the array that owns the memory, past any between, but never past a memoryview.
        return np.frombuffer(lent.data, np.uint8)

    def _keep(self, memory: np.ndarray) -> None:
        if len(memory) <= SPARE_BYTES and len(self._spare) < self._count:
            self._spare.append(memory)
