"""Extents of a byte range: from the bottom first fit, from the top last fit, with neighbouring free extents joined."""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

ALIGNMENT = 256  # bytes; a vector load anywhere, and what device copies like best


class Window(NamedTuple):
    """Contiguous bytes that are free once the extents at the offsets `victims` are; it ends at `stop`."""

    stop: int
    victims: list[int]


class Arena:
    """Hands out contiguous extents of `capacity` bytes; it knows offsets only, the memory is its owner's.

    What stays for long is allocated `high`, from the top end, so that it does not lie between what comes and goes.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // ALIGNMENT * ALIGNMENT
        self.used = 0
        self._free: list[tuple[int, int]] = [(0, self.capacity)] if self.capacity else []  # (offset, size), by offset
        self._allocated: dict[int, int] = {}

    def allocate(self, size: int, *, high: bool = False) -> int | None:
        """The offset of `size` bytes: at the start of the first free extent that holds them, or the end of the last."""
        size = aligned(size)
        indices = range(len(self._free))
        for index in reversed(indices) if high else indices:
            offset, available = self._free[index]
            if available < size:
                continue
            rest = (offset, available - size) if high else (offset + size, available - size)
            self._free[index : index + 1] = [rest] if available > size else []
            taken = offset + available - size if high else offset
            self._allocated[taken] = size
            self.used += size
            return taken
        return None

    def free(self, offset: int) -> None:
        """Take an extent back and join it with the free ones that it touches."""
        size = self._allocated.pop(offset)
        self.used -= size
        index = bisect_left(self._free, (offset, size))
        if index < len(self._free) and self._free[index][0] == offset + size:
            size += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == offset:
            offset, before = self._free.pop(index - 1)
            size += before
        insort(self._free, (offset, size))

    def window(self, size: int, evictable: Mapping[int, int], *, high: bool = False) -> Window | None:
        """Where `size` bytes would be contiguous if some extents were freed, of those at the offsets `evictable`.

        Their values say when each was last used. The window whose latest used extent is the oldest is chosen, of those
        the one that frees the fewest bytes: so none is freed in vain. `high` takes the last window there is. None: even
        all of them would not make room.
        """
        size = aligned(size)
        best: tuple[tuple[int, int], Window] | None = None
        run: deque[tuple[int, int, int]] = deque()  # offset, size and last use, -1 for a free extent
        total = 0
        free = dict(self._free)
        for offset, extent in sorted([*self._allocated.items(), *self._free]):
            use = -1 if offset in free else evictable.get(offset)
            if use is None:
                run.clear()
                total = 0
                continue
            run.append((offset, extent, use))
            total += extent
            while total - run[0][1] >= size:
                total -= run.popleft()[1]
            if total >= size:
                lost = sum(part for _, part, use in run if use >= 0)
                key = (-offset, 0) if high else (max(use for _, _, use in run), lost)
                if best is None or key < best[0]:
                    best = key, Window(offset + extent, [start for start, _, use in run if use >= 0])
        return None if best is None else best[1]

    def check(self) -> None:
        """Recount: free and allocated extents tile the range, and no two free ones touch."""
        extents = sorted([*self._allocated.items(), *self._free])
        assert all(size > 0 for _, size in extents)
        assert sum(self._allocated.values()) == self.used
        assert sum(size for _, size in extents) == self.capacity
        assert all(sum(before) == after[0] for before, after in pairwise(extents))
        assert self._free == sorted(self._free)
        assert all(sum(before) < after[0] for before, after in pairwise(self._free))

    @property
    def offsets(self) -> set[int]:
        """Where the allocated extents begin."""
        return set(self._allocated)


def aligned(size: int) -> int:
    """The bytes that an extent of `size` bytes takes."""
    return max(1, -(-size // ALIGNMENT)) * ALIGNMENT
