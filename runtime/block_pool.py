"""Blocks of K/V cache: who holds them, and which of them can be found again by their key.

Block 0 is the null block: never allocated, always zero, what padding reads. Every other block is used
(referenced by sequences), cached (unreferenced, findable by key, evictable) or free (unreferenced, no key).
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Counts references to `num_blocks` blocks and indexes full ones by key; knows nothing of tensors."""

    def __init__(self, num_blocks: int, prefix_cache: bool = True):
        assert num_blocks >= 2, "the null block and at least one other"
        self.num_blocks = num_blocks
        self.prefix_cache = prefix_cache
        self._references = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._namespaces: list[str | None] = [None] * num_blocks
        self._index: dict[bytes, int] = {}
        # Unreferenced blocks, next to be taken first: free ones in front, then cached ones by age.
        self._available: OrderedDict[int, None] = OrderedDict((block, None) for block in range(1, num_blocks))

    @property
    def available(self) -> int:
        """Blocks that `allocate` can hand out: free and cached ones."""
        return len(self._available)

    @property
    def used(self) -> int:
        return self.num_blocks - 1 - len(self._available)

    @property
    def cached(self) -> int:
        return sum(1 for block in self._available if self._keys[block] is not None)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks with one reference each, evicting the longest unused; None if there are too few."""
        if count > len(self._available):
            return None
        blocks = []
        for _ in range(count):
            block, _ = self._available.popitem(last=False)
            self._forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix of `keys`, unreferenced: `share` them before anything else."""
        blocks: list[int] = []
        for key in keys:
            block = self._index.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Add one reference to each of `blocks`."""
        for block in blocks:
            if self._references[block] == 0:
                del self._available[block]
            self._references[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Drop one reference from each of a sequence's `blocks`; tails become evictable before their prefixes."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} freed more often than taken"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._available[block] = None
                if self._keys[block] is None:
                    self._available.move_to_end(block, last=False)

    def register(self, block: int, key: bytes, namespace: str | None) -> None:
        """Make a full, computed block findable. `namespace` is the adapter whose K/V it holds, None the base's.

        When another block is already known by the key, that one stays the one to be found.
        """
        assert self._references[block] > 0, f"block {block} registered while nobody holds it"
        if not self.prefix_cache or key in self._index:
            return
        self._forget(block)
        self._index[key] = block
        self._keys[block] = key
        self._namespaces[block] = namespace

    def drop_namespace(self, namespace: str | None) -> int:
        """Make every block of a namespace unfindable; returns how many there were."""
        dropped = [b for b, key in enumerate(self._keys) if key is not None and self._namespaces[b] == namespace]
        for block in dropped:
            self._forget(block)
            if self._references[block] == 0:
                self._available.move_to_end(block, last=False)
        return len(dropped)

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._index[key]
            self._keys[block] = self._namespaces[block] = None

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Recount everything against the block tables of all sequences that hold blocks."""
        counts = [0] * self.num_blocks
        for blocks in holders:
            for block in blocks:
                counts[block] += 1
        assert counts == self._references, "references differ from what sequences hold"
        assert counts[0] == 0, "the null block is held"
        assert set(self._available) == {b for b in range(1, self.num_blocks) if counts[b] == 0}
        assert self._index == {key: b for b, key in enumerate(self._keys) if key is not None}
        free_seen_after_cached = False
        cached_seen = False
        for block in self._available:
            cached_seen |= self._keys[block] is not None
            free_seen_after_cached |= cached_seen and self._keys[block] is None
        assert not free_seen_after_cached, "a cached block would be evicted while a free one is left"
