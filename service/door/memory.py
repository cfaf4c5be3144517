"""Memory that large requests have used, given back to the system."""

import asyncio
import ctypes
import gc
import logging

LARGE_BODY = 1 << 20  # bytes; smaller requests leave memory that the next ones use
LEAST_SECONDS = 1.0  # between two returns
_log = logging.getLogger(__name__)


class MemoryReturn:
    """Gives freed memory back after large requests, which the allocator keeps otherwise. Belongs to one event loop."""

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None

    def soon(self) -> None:
        """Give it back when the request that ends now is gone."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LEAST_SECONDS, self._now)

    def _now(self) -> None:
        self._timer = None
        asyncio.get_running_loop().run_in_executor(None, give_back)


def give_back() -> None:
    """Return freed memory to the system, where the C library can: glibc's malloc_trim, of all its arenas."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
