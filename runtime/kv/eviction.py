"""Which cached block is evicted next: the one whose next use is expected last."""

import random
from collections import OrderedDict

SAMPLE = 16  # evictable blocks that are compared for each eviction
MEMORY = 4  # evicted keys that are remembered, as a multiple of the number of blocks: they may be computed again
# A block unused for more than 1.5 times its interval is treated as dead. Lower values evict slow conversations; higher
# values keep finished ones.
LATE = 1.5
FADING = 0.97  # what is left of an interval at each shorter one: calls of one turn come close together, turns do not
WEIGHT = 0.02  # of each new interval in the usual interval


class EvictableBlocks:
    """The blocks that may be evicted now, and the choice among them.

    Time is counted in uses of blocks. A block's interval is the time between its last two uses; it is expected to be
    used again one interval after the last, or, once that is long past, after as much time again as it has been unused.
    A new block has the interval of the block before it, or the usual one. The choice is among a random sample, in
    constant time.

    Share of prompt tokens whose K/V are found with room for half of the blocks, against LRU: twelve conversations that
    return in turn, on an engine, 0.84 : 0.65, with two aLoRA checks after each turn 0.94 : 0.87; in random order
    0.82 : 0.84. In a simulated pipeline that does all turns and then all checks 0.53 : 0; in simulated chats with
    random pauses 0.72 : 0.79.
    """

    def __init__(self, num_blocks: int, seed: int = 0) -> None:
        self._blocks: list[int] = []
        self._places: dict[int, int] = {}  # of the blocks in that list
        self._now = 0
        self._last_use = [0] * num_blocks
        self._interval = [0.0] * num_blocks  # 0: unknown
        self._usual_interval = 0.0
        self._evicted: OrderedDict[bytes, tuple[int, float]] = OrderedDict()  # last use and interval, by key
        self._random = random.Random(seed)

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

    def register(self, block: int, key: bytes, previous: int | None = None) -> None:
        """A block became known, perhaps again. `previous` is the block before it, None if that has no interval here."""
        self._interval[block] = 0.0 if previous is None else self._interval[previous]
        if key in self._evicted:
            self._last_use[block], self._interval[block] = self._evicted.pop(key)
            self.reuse(block)
        self.touch(block)

    def reuse(self, block: int) -> None:
        """A known block is going to be used again."""
        interval = max(self._now - self._last_use[block], FADING * self._interval[block])
        self._interval[block] = interval
        self._usual_interval += WEIGHT * (interval - self._usual_interval)

    def touch(self, block: int) -> None:
        """A block has been in use until now."""
        self._now += 1
        self._last_use[block] = self._now

    def forget(self, block: int, key: bytes) -> None:
        """A block is evicted; its interval is kept for the case that its key becomes known again."""
        self._evicted[key] = self._last_use[block], self._interval[block]
        if len(self._evicted) > MEMORY * len(self._last_use):
            self._evicted.popitem(last=False)

    def choose(self) -> int:
        """The block to evict next; there must be one."""
        count, draw = len(self._blocks), self._random.random
        return max((self._blocks[int(draw() * count)] for _ in range(SAMPLE)), key=self._expected_wait)

    def _expected_wait(self, block: int) -> float:
        unused = self._now - self._last_use[block]
        interval = self._interval[block] or self._usual_interval
        return interval - unused if unused <= LATE * interval else unused

    def check(self) -> None:
        assert self._places == {block: place for place, block in enumerate(self._blocks)}
        assert len(self._evicted) <= MEMORY * len(self._last_use)
        assert all(last_use <= self._now for last_use in self._last_use)
