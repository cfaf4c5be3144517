"""Which known block goes next: the least recently or the least often used of a sample, whichever has been right."""

import math
import random
from collections import OrderedDict
from typing import Literal

Rule = Literal["recency", "frequency"]

SAMPLE = 12
REGRET = 0.2  # how much of its share a rule loses at most for one block that it should have kept
LEAST_SHARE = 0.02  # of either rule: it can come back
FORGIVEN = 0.005  # what is left of a regret for a block that was evicted as many evictions ago as there are blocks


class EvictableBlocks:
    """Blocks that may be evicted now, in no order, and how the next one is chosen.

    The oldest is right to go for conversations that come and go. Where a working set larger than the cache is used in
    turns it is wrong: the oldest is just what comes next, and nothing would ever be found; there what was found often
    has to stay. So both rules are followed, each in its share; when a block comes back that one of them has evicted,
    that rule's share shrinks (as in LeCaR, Vietri et al. 2018). Each chooses from a random sample, in constant time.
    """

    def __init__(self, num_blocks: int, seed: int = 0) -> None:
        self._blocks: list[int] = []
        self._places: dict[int, int] = {}
        self._last_use = [0] * num_blocks
        self._uses = [0] * num_blocks
        self._now = 0
        self._random = random.Random(seed)
        self._recency_share = 0.5
        self._evicted: OrderedDict[bytes, tuple[Rule, int]] = OrderedDict()  # at most as many as there are blocks
        self._evictions = 0

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

    def begin(self, block: int, key: bytes) -> None:
        """A block has become known by a key, maybe once more."""
        self._uses[block] = 0
        self.touch(block)
        if key in self._evicted:
            self._regret(*self._evicted.pop(key))

    def found(self, block: int) -> None:
        """A block has been found again."""
        self._uses[block] += 1

    def touch(self, block: int) -> None:
        """A block is in use until now."""
        self._now += 1
        self._last_use[block] = self._now

    # ------------------------------------------------------------------ choosing

    def choose(self) -> tuple[int, Rule]:
        """The next one to go, and by which rule; there must be one."""
        count, draw = len(self._blocks), self._random.random
        sample = [self._blocks[int(draw() * count)] for _ in range(SAMPLE)]
        if draw() < self._recency_share:
            return min(sample, key=self._last_use.__getitem__), "recency"
        return min(sample, key=self._uses.__getitem__), "frequency"

    def evicted(self, key: bytes, rule: Rule) -> None:
        """A block was evicted by a rule: was that right?"""
        self._evictions += 1
        self._evicted[key] = rule, self._evictions
        if len(self._evicted) > len(self._uses):
            self._evicted.popitem(last=False)

    def _regret(self, rule: Rule, eviction: int) -> None:
        age = (self._evictions - eviction) / len(self._uses)
        kept = math.exp(-REGRET * FORGIVEN**age)
        recency, frequency = self._recency_share, 1 - self._recency_share
        if rule == "recency":
            recency *= kept
        else:
            frequency *= kept
        share = recency / (recency + frequency)
        self._recency_share = min(max(share, LEAST_SHARE), 1 - LEAST_SHARE)

    def check(self) -> None:
        assert self._places == {block: place for place, block in enumerate(self._blocks)}
        assert LEAST_SHARE <= self._recency_share <= 1 - LEAST_SHARE
        assert len(self._evicted) <= len(self._uses)
