"""Blocks of K/V cache: who holds them, and which of them can be found again by their key.

Block 0 is the null block: never allocated, always zero, what padding reads. Every other block is used
(referenced), cached (unreferenced, known by key, evictable once no known block follows it) or free.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from runtime.kv.block_keys import BlockIdentity, Salt
from runtime.kv.eviction import EvictableBlocks
from runtime.kv.prefix_index import BlockChildren


class BlockPool:
    """Counts references to `num_blocks` blocks and indexes those with known K/V; knows nothing of tensors.

    A known block's parent is known too, and whoever holds a block holds its parent, so that a chain is given up from
    its end on. `on_evict` hears of a known block before it is used for something else.
    """

    def __init__(self, num_blocks: int, prefix_cache: bool = True):
        assert num_blocks >= 2, "the null block and at least one other"
        self.num_blocks = num_blocks
        self.prefix_cache = prefix_cache
        self.on_evict: Callable[[int, BlockIdentity], None] | None = None
        self.evictions = 0
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, 0, -1))  # taken from the end
        self._known: dict[int, BlockIdentity] = {}
        self._index: dict[bytes, int] = {}
        self._children = BlockChildren()
        self._evictable = EvictableBlocks(num_blocks)
        self._cached = 0

    @property
    def available(self) -> int:
        """Blocks that `allocate` can hand out: free and cached ones."""
        return len(self._free) + self._cached

    def available_beside(self, blocks: Sequence[int]) -> int:
        """Blocks that `allocate` can hand out once `blocks` are shared."""
        return self.available - sum(self._references[block] == 0 for block in blocks)

    @property
    def used(self) -> int:
        return self.num_blocks - 1 - self.available

    @property
    def cached(self) -> int:
        return self._cached

    # ------------------------------------------------------------------ taking and giving back

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks with one reference each, evicting the least worth keeping; None if too few are left."""
        if count > self.available:
            return None
        while len(self._free) < count:
            self._evict()
        blocks = self._free[len(self._free) - count :]  # of those evicted now the first one first, as it is saved first
        del self._free[len(self._free) - count :]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Add one reference to each of `blocks`, which have been found and are about to be used."""
        for block in blocks:
            self._evictable.found(block)
            self._hold(block)

    def free(self, blocks: Sequence[int]) -> None:
        """Drop one reference from each of `blocks`."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} freed more often than taken"
            self._references[block] -= 1
            if self._references[block]:
                continue
            identity = self._known.get(block)
            if identity is None:
                self._free.append(block)
                continue
            self._cached += 1
            self._evictable.touch(block)
            if not self._children.any(identity.key):
                self._evictable.add(block)

    def _hold(self, block: int) -> None:
        if self._references[block] == 0:
            self._cached -= 1
            if block in self._evictable:
                self._evictable.remove(block)
        self._references[block] += 1

    # ------------------------------------------------------------------ finding

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix of `keys`, unreferenced: `share` them before anything else."""
        blocks: list[int] = []
        for key in keys:
            block = self._index.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def match_within(self, parent: bytes, token_ids: Sequence[int], salt: Salt | None) -> tuple[int, int]:
        """A block that begins as the one after `parent` would, and how many tokens of it are the same; 0 if none.

        Their K/V are good for whoever goes on so from `parent`; the block itself is not theirs: they copy from it.
        """
        return self._children.longest(parent, token_ids, salt)

    def register(self, block: int, identity: BlockIdentity, previous: int | None) -> int:
        """Make a computed block known; `previous` is the block that its holder has before it, None at the root.

        Returns the block to hold from now on: where the same K/V, or the same and more, are known already, that is the
        block that has them, and this one is given back. A block whose parent is not known stays unknown.
        """
        assert self._references[block] > 0, f"block {block} registered while nobody holds it"
        if not self.prefix_cache or not identity.token_ids or block in self._known:
            return block
        if previous is not None and self._index.get(identity.parent) != previous:
            return block
        known = self._index.get(identity.key)
        if known is None:
            known = self._children.extension(identity)
        if known is not None:
            self._hold(known)
            self.free([block])
            return known
        beginning = self._children.beginning(identity)
        if beginning is not None and self._references[beginning] == 0:
            self._forget(beginning)
        self._index[identity.key] = block
        self._known[block] = identity
        self._children.add(block, identity)
        self._evictable.begin(block, identity.key, previous)
        return block

    def knows(self, block: int) -> bool:
        """Whether a block can be found."""
        return block in self._known

    # ------------------------------------------------------------------ forgetting

    def drop_namespace(self, namespace: str | None) -> list[bytes]:
        """Make the blocks of a namespace, and all that follow them, unfindable; returns their keys."""
        dropped = [block for block, identity in self._known.items() if identity.namespace == namespace]
        return [key for block in dropped for key in self._forget_all_from(block)]

    def _forget_all_from(self, first: int) -> list[bytes]:
        """Forget a block and whatever is known after it, the last ones first; returns their keys."""
        if first not in self._known:
            return []
        branch = [first]
        for block in branch:
            branch += self._children.of(self._key(block))
        keys = [self._key(block) for block in branch]
        for block in reversed(branch):
            self._forget(block)
        return keys

    @property
    def keys(self) -> Iterable[bytes]:
        """Of all known blocks."""
        return self._index.keys()

    def _evict(self) -> None:
        block = self._evictable.choose()
        identity = self._known[block]
        if self.on_evict is not None:
            self.on_evict(block, identity)
        self.evictions += 1
        self._evictable.gone(block, identity.key)
        self._forget(block)

    def _forget(self, block: int) -> None:
        """Make a block unfindable; it must have no known children."""
        identity = self._known.pop(block)
        del self._index[identity.key]
        self._children.remove(block, identity)
        if self._references[block] == 0:
            self._cached -= 1
            self._evictable.remove(block)
            self._free.append(block)
        parent = self._index.get(identity.parent)
        if parent is not None and self._references[parent] == 0 and not self._children.any(identity.parent):
            self._evictable.add(parent)

    def _key(self, block: int) -> bytes:
        return self._known[block].key

    # ------------------------------------------------------------------ looking in

    def by_namespace(self) -> tuple[Counter[str | None], Counter[str | None]]:
        """How many known blocks of each namespace are used, and how many are cached."""
        used: Counter[str | None] = Counter()
        cached: Counter[str | None] = Counter()
        for block, identity in self._known.items():
            (used if self._references[block] else cached)[identity.namespace] += 1
        return used, cached

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Recount everything against the block tables of all that hold blocks."""
        counts = [0] * self.num_blocks
        for blocks in holders:
            for block in blocks:
                counts[block] += 1
            known = [block for block in blocks if block in self._known]
            parents = {self._index[i.parent] for i in map(self._known.get, known) if i and i.parent in self._index}
            assert parents <= set(blocks), "a block is held without the one before it"
        assert counts == self._references, "references differ from what is held"
        assert counts[0] == 0, "the null block is held"
        unknown = {b for b in range(1, self.num_blocks) if counts[b] == 0 and b not in self._known}
        assert set(self._free) == unknown
        assert len(self._free) == len(unknown)
        assert self._index == {identity.key: block for block, identity in self._known.items()}
        self._children.check(self._known)
        cached = [block for block in self._known if counts[block] == 0]
        assert self._cached == len(cached)
        ends = {block for block in cached if not self._children.any(self._key(block))}
        assert ends == {block for block in cached if block in self._evictable}
        assert len(ends) == len(self._evictable)
        assert not cached or ends, "nothing can be evicted although something is cached"
        self._evictable.check()
