"""The blocks of the K/V cache on the device: reference counts, the prefix cache and its eviction."""

from collections import Counter
from collections.abc import Iterable, KeysView, Sequence

from runtime.kv.block_keys import BlockIdentity, Salt
from runtime.kv.eviction import EvictableBlocks
from runtime.kv.log import KvLog
from runtime.kv.prefix_index import PrefixIndex


class BlockPool:
    """Counts the references to `num_blocks` blocks and keeps the prefix cache; knows no tensors.

    Block 0 is the null block: never allocated, always zero, read by padding. Every other block is used (referenced),
    cached (known, without a reference) or free. A holder of a known block also holds the known block before it, and a
    cached block can be evicted once no known block follows it: chains are evicted from their ends.
    """

    def __init__(self, num_blocks: int, prefix_cache: bool = True, log: KvLog | None = None):
        assert num_blocks >= 2, "the null block and at least one other"
        self.num_blocks = num_blocks
        self.prefix_cache = prefix_cache
        self.evictions = 0
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, 0, -1))  # allocated from the end
        self._index = PrefixIndex(log)
        self._evictable = EvictableBlocks(num_blocks)  # cached blocks that no known block follows
        self._cached = 0
        self._evicted: list[tuple[int, BlockIdentity]] = []

    @property
    def available(self) -> int:
        """Blocks that `allocate` can return: free and cached ones."""
        return len(self._free) + self._cached

    def available_beside(self, blocks: Sequence[int]) -> int:
        """Blocks that `allocate` can return once `blocks` are shared."""
        return self.available - sum(self._references[block] == 0 for block in blocks)

    @property
    def used(self) -> int:
        return self.num_blocks - 1 - self.available

    @property
    def cached(self) -> int:
        return self._cached

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks with one reference each, and evict cached ones for them; None if there are too few."""
        if count > self.available:
            return None
        while len(self._free) < count:
            self._evict()
        blocks = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Add one reference to each of `blocks`, which `match` or `match_within` returned."""
        for block in blocks:
            self._evictable.reuse(block)
            self._reference(block)

    def free(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each of `blocks`, which are in the order of their tokens."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} freed more often than taken"
            self._references[block] -= 1
            if self._references[block]:
                continue
            if block not in self._index:
                self._free.append(block)
                continue
            self._cached += 1
            self._evictable.touch(block)
            if not self._index.has_children(self._index[block].key):
                self._evictable.add(block)

    def _reference(self, block: int) -> None:
        if self._references[block] == 0:
            self._cached -= 1
            if block in self._evictable:
                self._evictable.remove(block)
        self._references[block] += 1

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix of `keys`, not referenced yet: `share` them before anything else."""
        return self._index.match(keys)

    def match_within(self, parent: bytes, token_ids: Sequence[int], salt: Salt | None) -> tuple[int, int]:
        """See PrefixIndex.match_within."""
        return self._index.match_within(parent, token_ids, salt)

    def register(self, block: int, identity: BlockIdentity, previous: int | None) -> int:
        """Make a computed block known. `previous` is the block before it in its holder's table, None for the first.

        If an equal or longer block is known already, the duplicate is freed and the known block is returned instead.
        A block whose parent is not known stays unknown.
        """
        assert self._references[block] > 0, f"block {block} is registered without a reference"
        if not self.prefix_cache or not identity.token_ids or block in self._index:
            return block
        if previous is not None and self._index.find(identity.parent) != previous:
            return block
        known = self._index.find(identity.key)
        if known is None:
            known = self._index.extension(identity)
        if known is not None:
            self._reference(known)
            self.free([block])
            return known
        beginning = self._index.beginning(identity)
        if beginning is not None and self._references[beginning] == 0:
            self._forget(beginning)
        self._index.add(block, identity)
        self._evictable.register(block, identity.key, previous)
        return block

    def knows(self, block: int) -> bool:
        """Whether requests can find a block."""
        return block in self._index

    def drop_namespace(self, namespace: str | None) -> list[bytes]:
        """Forget the blocks of a namespace and all blocks that follow them. Returns their keys."""
        keys: list[bytes] = []
        for first in self._index.in_namespace(namespace):
            if first in self._index:
                branch = [first, *self._index.after(self._index[first].key)]
                keys += [self._index[block].key for block in branch]
                for block in reversed(branch):
                    self._forget(block)
        return keys

    def take_evicted(self) -> list[tuple[int, BlockIdentity]]:
        """The blocks that were evicted since the last call, in order. Their K/V are intact until the next step."""
        evicted, self._evicted = self._evicted, []
        return evicted

    @property
    def keys(self) -> KeysView[bytes]:
        """The keys of all known blocks."""
        return self._index.keys

    def _evict(self) -> None:
        block = self._evictable.choose()
        identity = self._index[block]
        self._evictable.forget(block, identity.key)
        self._forget(block)
        self._evicted.append((block, identity))
        self.evictions += 1

    def _forget(self, block: int) -> None:
        """Make a block unknown; the blocks that follow it must be unknown already."""
        identity = self._index.remove(block)
        if self._references[block] == 0:
            self._cached -= 1
            self._evictable.remove(block)
            self._free.append(block)
        parent = self._index.find(identity.parent)
        if parent is not None and self._references[parent] == 0 and not self._index.has_children(identity.parent):
            self._evictable.add(parent)

    def by_namespace(self) -> tuple[Counter[str | None], Counter[str | None]]:
        """How many known blocks of each namespace are used, and how many are cached."""
        used: Counter[str | None] = Counter()
        cached: Counter[str | None] = Counter()
        for block in self._index:
            (used if self._references[block] else cached)[self._index[block].namespace] += 1
        return used, cached

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Recount everything against the blocks of all holders."""
        counts = [0] * self.num_blocks
        for blocks in holders:
            for block in blocks:
                counts[block] += 1
            parents = {self._index.find(self._index[block].parent) for block in blocks if block in self._index}
            assert parents - {None} <= set(blocks), "a block is held without the one before it"
        assert counts == self._references, "references differ from the blocks that are held"
        assert counts[0] == 0, "the null block is held"
        unknown = {block for block in range(1, self.num_blocks) if counts[block] == 0 and block not in self._index}
        assert set(self._free) == unknown
        assert len(self._free) == len(unknown)
        cached = {block for block in self._index if counts[block] == 0}
        assert self._cached == len(cached)
        ends = {block for block in cached if not self._index.has_children(self._index[block].key)}
        assert ends == {block for block in cached if block in self._evictable}
        assert len(ends) == len(self._evictable)
        assert not cached or ends, "no block can be evicted although some are cached"
        self._evictable.check()
        self._index.check()
