"""Memory that is faulted in before a load writes to it: a page fault costs more than the copy of the page.

Measured with four streams that decode while cold adapters of 20 MB load (SmolLM2's width, 2 busy cores, 6 rounds; in
decode steps, which the other load on the machine does not change): a first load took 40 steps with both parts, 53
without `prefault`, 46 without `SpareMemory` and 59 without either; a later load 27 with both and 32 without either.
"""

import ctypes
import mmap
import sys
import weakref

import numpy as np
from torch import Tensor

AHEAD_BYTES = 128 << 20  # of a tier, prefaulted for the next adapters: one of rank 64 has 78 MB
SPARE_BYTES = 192 << 20  # the largest piece that is kept: 175 MB are rank 16 of 8B weights in float32
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14; the mmap module does not name it
_C = ctypes.CDLL(None)  # once: each one is garbage that only a collection finds


def prefault(extent: Tensor) -> None:
    """Fault in a part of a tier's buffer, and block meanwhile; changes no content, and does nothing where it cannot.

    A first copy of 78 MB took 31 ms and a second one 4. Huge pages are no alternative: a first copy into them took
    8 ms, but 180 on a virtual machine whose host had reclaimed them.
    """
    if extent.device.type == "cpu" and sys.platform == "linux":
        start = extent.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        stop = extent.data_ptr() + extent.nbytes
        # Not `mmap.madvise`, which holds the interpreter's lock during the call.
        _C.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _POPULATE_WRITE)


class SpareMemory:
    """Lends memory for files, and keeps up to `count` pieces for the next files. Any thread may call it.

    Reading 39 MB took 8 ms into a piece that was kept, and 25 into new memory.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._spare: list[np.ndarray] = []

    def take(self, size: int) -> np.ndarray:
        """An array of `size` bytes with any content; its memory is kept once no array refers to it any more."""
        try:
            memory = self._spare.pop()
        except IndexError:
            memory = np.empty(0, np.uint8)
        if len(memory) < size:
            # Not from the heap, where free memory stays between other pieces; not numpy's, in huge pages (`prefault`).
            memory = np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
        lent = memory[:size]
        weakref.finalize(lent, self._keep, memory).atexit = False
        # A view refers to the array that owns its memory, across other views, but not across a memoryview.
        return np.frombuffer(lent.data, np.uint8)

    def _keep(self, memory: np.ndarray) -> None:
        if len(memory) <= SPARE_BYTES and len(self._spare) < self._count:
            self._spare.append(memory)
