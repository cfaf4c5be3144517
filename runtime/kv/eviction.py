"""Which known block goes next: the one whose next use is thought to be furthest away."""

import random
from collections import OrderedDict

SAMPLE = 16
MEMORY = 4  # blocks that went are remembered, so many times as many as there are: they may come back after that long
# What is overdue by this much is over. With less, turns that are a little late are; with more, what is over stays.
LATE = 1.5
FADING = 0.97  # of an interval at each shorter one: a turn's calls come close together, and the next turn far from them
NEWS = 0.02  # how much each interval counts in what is usual


class EvictableBlocks:
    """Blocks that may be evicted now, in no order, and how the next one is chosen.

    Time is counted in uses of blocks. A block's interval is how long it went unused between two uses; what is used
    in turns is used again an interval after its last use, so that of a working set larger than the cache a part
    stays and is found at each turn, where the least recently used would be just what comes next. A block that has
    not been used for longer than that is thought to stay unused for as long again: it goes before others
    the older it is, as do conversations that have ended. A new block has the interval of the one before it, or the
    usual one. The choice is among a random sample, in constant time.
    """

    def __init__(self, num_blocks: int, seed: int = 0) -> None:
        self._blocks: list[int] = []
        self._places: dict[int, int] = {}
        self._last_use = [0] * num_blocks
        self._interval = [0.0] * num_blocks  # 0: not known
        self._usual_interval = 0.0
        self._now = 0
        self._random = random.Random(seed)
        self._gone: OrderedDict[bytes, tuple[int, float]] = OrderedDict()  # last use and interval

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: int) -> bool:
        return block in self._places

    def add(self, block: int) -> None:
        self._places[block] = len(self._blocks)
        self._blocks.append(block)

    def remove(self, block: int) -> None:
        place, last = self._places.pop(block), self._blocks.pop()
        if last != block:
            self._blocks[place] = last
            self._places[last] = place

    # ------------------------------------------------------------------ what happens to blocks

    def begin(self, block: int, key: bytes, previous: int | None = None) -> None:
        """A block has become known by a key, maybe once more; `previous` is the one before it."""
        self._interval[block] = 0.0 if previous is None else self._interval[previous]
        if key in self._gone:
            self._last_use[block], self._interval[block] = self._gone.pop(key)
            self.found(block)
        self.touch(block)

    def found(self, block: int) -> None:
        """A block is used again."""
        interval = max(self._now - self._last_use[block], FADING * self._interval[block])
        self._interval[block] = interval
        self._usual_interval += NEWS * (interval - self._usual_interval)

    def touch(self, block: int) -> None:
        """A block is in use until now."""
        self._now += 1
        self._last_use[block] = self._now

    def gone(self, block: int, key: bytes) -> None:
        """A block went, and may come back under its key."""
        self._gone[key] = self._last_use[block], self._interval[block]
        if len(self._gone) > MEMORY * len(self._last_use):
            self._gone.popitem(last=False)

    # ------------------------------------------------------------------ choosing

    def choose(self) -> int:
        """The next one to go; there must be one."""
        count, draw = len(self._blocks), self._random.random
        return max((self._blocks[int(draw() * count)] for _ in range(SAMPLE)), key=self._wait)

    def _wait(self, block: int) -> float:
        """How long a block will stay unused, as far as one can tell."""
        unused = self._now - self._last_use[block]
        interval = self._interval[block] or self._usual_interval
        return interval - unused if unused <= LATE * interval else unused

    def check(self) -> None:
        assert self._places == {block: place for place, block in enumerate(self._blocks)}
        assert len(self._gone) <= MEMORY * len(self._last_use)
        assert all(last_use <= self._now for last_use in self._last_use)
