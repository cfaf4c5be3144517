"""Extents of a byte range: first fit, with neighbouring free extents joined."""

from bisect import bisect_left, insort
from collections.abc import Collection
from itertools import pairwise

ALIGNMENT = 256  # bytes; a vector load anywhere, and what device copies like best


class Arena:
    """Hands out contiguous extents of `capacity` bytes; it knows offsets only, the memory is its owner's."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // ALIGNMENT * ALIGNMENT
        self.used = 0
        self._free: list[tuple[int, int]] = [(0, self.capacity)] if self.capacity else []  # (offset, size), by offset
        self._allocated: dict[int, int] = {}

    def allocate(self, size: int) -> int | None:
        """The offset of the first free extent that holds `size` bytes, None when there is none."""
        size = _aligned(size)
        for index, (offset, available) in enumerate(self._free):
            if available >= size:
                self._free[index : index + 1] = [(offset + size, available - size)] if available > size else []
                self._allocated[offset] = size
                self.used += size
                return offset
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

    def would_fit(self, size: int, freed: Collection[int]) -> bool:
        """Whether `size` bytes would be contiguous if the extents at the offsets `freed` were free."""
        fixed = [(offset, size) for offset, size in self._allocated.items() if offset not in freed]
        bounds = [(0, 0), *sorted(fixed), (self.capacity, 0)]
        return any(after[0] - sum(before) >= _aligned(size) for before, after in pairwise(bounds))

    def check(self) -> None:
        """Recount: free and allocated extents tile the range, and no two free ones touch."""
        extents = sorted([*self._allocated.items(), *self._free])
        assert all(size > 0 for _, size in extents)
        assert sum(self._allocated.values()) == self.used
        assert sum(size for _, size in extents) == self.capacity
        assert all(sum(before) == after[0] for before, after in pairwise(extents))
        assert self._free == sorted(self._free)
        assert all(sum(before) < after[0] for before, after in pairwise(self._free))


def _aligned(size: int) -> int:
    return max(1, -(-size // ALIGNMENT)) * ALIGNMENT
