"""Extents of a byte range: first fit from the bottom, last fit from the top; neighbouring free extents are joined."""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import NamedTuple

ALIGNMENT = 256  # bytes; enough for every vector load, and fast to copy to a device


class Window(NamedTuple):
    """Contiguous bytes that become free when some extents are freed."""

    stop: int  # where the bytes end
    victims: list[int]  # the offsets of the extents to free


class Arena:
    """Allocates contiguous extents of `capacity` bytes; it knows offsets only, and its owner has the memory.

    Extents that stay for long are allocated `high`, from the top end, so that they fragment the rest less.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // ALIGNMENT * ALIGNMENT
        self.used = 0
        self._free: list[tuple[int, int]] = [(0, self.capacity)] if self.capacity else []  # (offset, size), by offset
        self._allocated: dict[int, int] = {}

    def allocate(self, size: int, *, high: bool = False) -> int | None:
        """The offset of `size` bytes: the start of the first free extent that has them, or the end of the last one."""
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
        """Free an extent and join it with the free extents beside it."""
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
        """Where `size` bytes would be contiguous if some of the extents at the offsets `evictable` were freed.

        The values of `evictable` say what each extent is worth. Chooses the window whose most valuable extent is worth
        least, and among equals the one that frees the fewest bytes, so that no extent is freed in vain; `high` chooses
        the last window instead. None if freeing all of them would not make room.
        """
        size = aligned(size)
        best: tuple[tuple[int, int], Window] | None = None
        run: deque[tuple[int, int, int]] = deque()  # offset, size and worth, -1 for a free extent
        total = 0
        free = dict(self._free)
        for offset, extent in sorted([*self._allocated.items(), *self._free]):
            worth = -1 if offset in free else evictable.get(offset)
            if worth is None:
                run.clear()
                total = 0
                continue
            run.append((offset, extent, worth))
            total += extent
            while total - run[0][1] >= size:
                total -= run.popleft()[1]
            if total >= size:
                lost = sum(part for _, part, worth in run if worth >= 0)
                key = (-offset, 0) if high else (max(worth for _, _, worth in run), lost)
                if best is None or key < best[0]:
                    best = key, Window(offset + extent, [start for start, _, worth in run if worth >= 0])
        return None if best is None else best[1]

    def largest(self, evictable: Collection[int]) -> int:
        """The most contiguous bytes there would be if the extents at the offsets `evictable` were freed."""
        longest = run = 0
        free = dict(self._free)
        for offset, size in sorted([*self._allocated.items(), *self._free]):
            run = run + size if offset in free or offset in evictable else 0
            longest = max(longest, run)
        return longest

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
        """The offsets of the allocated extents."""
        return set(self._allocated)


def aligned(size: int) -> int:
    """The bytes that an extent of `size` bytes takes."""
    return max(1, -(-size // ALIGNMENT)) * ALIGNMENT
