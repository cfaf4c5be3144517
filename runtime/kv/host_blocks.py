"""Blocks of K/V that were offloaded to host memory, and the slot that holds each."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from runtime.kv.block_keys import BlockIdentity, Salt
from runtime.kv.eviction import EvictableBlocks
from runtime.kv.log import KvLog
from runtime.kv.prefix_index import PrefixIndex


class HostBlocks:
    """Indexes `num_slots` slots of host memory as BlockPool indexes the device's blocks; knows no tensors.

    The block before one that is here is here too, or on the device, or being reloaded: a caller that removes it for
    good calls `drop_after`. A block that no other follows here can be evicted. Without slots nothing is kept.
    """

    def __init__(self, num_slots: int, log: KvLog | None = None) -> None:
        self.num_slots = num_slots
        self.evictions = 0
        self._free = list(range(num_slots - 1, -1, -1))
        self._index = PrefixIndex(log, host=True)
        self._evictable = EvictableBlocks(num_slots)  # slots whose block no other follows here

    def __len__(self) -> int:
        return len(self._index)

    def add(self, identity: BlockIdentity) -> int | None:
        """The slot for a block that the device evicts; None if its K/V are here already, or no slot can be had."""
        known = self._index.find(identity.key)
        if known is not None:
            self._evictable.touch(known)
            return None
        if not self._free and not self._evictable:
            return None
        if not self._free:
            evicted = self._evictable.choose()
            self.evictions += 1
            self.remove(evicted)
            self.free([evicted])
        slot = self._free.pop()
        parent = self._index.find(identity.parent)
        if parent is not None and parent in self._evictable:
            self._evictable.remove(parent)
        self._index.add(slot, identity)
        self._evictable.register(slot, identity.key)
        if not self._index.has_children(identity.key):
            self._evictable.add(slot)
        return slot

    def remove(self, slot: int) -> BlockIdentity:
        """Remove a block that is evicted or is going to be reloaded. Its slot is not used again before `free`."""
        self._evictable.forget(slot, self._index[slot].key)
        return self._remove(slot)

    def _remove(self, slot: int) -> BlockIdentity:
        identity = self._index.remove(slot)
        if slot in self._evictable:
            self._evictable.remove(slot)
        parent = self._index.find(identity.parent)
        if parent is not None and not self._index.has_children(identity.parent):
            self._evictable.add(parent)
        return identity

    def free(self, slots: Iterable[int]) -> None:
        """Allow removed slots to be used again: the copies that read them have been ordered."""
        self._free += slots

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The slots of the longest prefix of `keys` that is here."""
        return self._index.match(keys)

    def match_within(self, parent: bytes, token_ids: Sequence[int], salt: Salt | None) -> tuple[int, int]:
        """See PrefixIndex.match_within; with slots for blocks."""
        return self._index.match_within(parent, token_ids, salt)

    def drop_namespace(self, namespace: str | None) -> None:
        """Forget the blocks of a namespace and all blocks that follow them."""
        for slot in self._index.in_namespace(namespace):
            if slot in self._index:
                self.drop_after([self._index[slot].key])
                self._forget(slot)

    def drop_after(self, keys: Iterable[bytes]) -> None:
        """Forget all blocks that follow the blocks of `keys`, wherever those are."""
        for key in keys:
            for slot in reversed(self._index.after(key)):
                self._forget(slot)

    @property
    def keys(self) -> Collection[bytes]:
        """The keys of all blocks that are here."""
        return self._index.keys

    def by_namespace(self) -> Counter[str | None]:
        """How many blocks of each namespace are here."""
        return Counter(self._index[slot].namespace for slot in self._index)

    def _forget(self, slot: int) -> None:
        self._remove(slot)
        self._free.append(slot)

    def check(self, elsewhere: Collection[bytes] = ()) -> None:
        """Recount. `elsewhere`, if given, are the keys on the device and being reloaded, and the roots."""
        assert sorted([*self._free, *self._index]) == list(range(self.num_slots))
        ends = {slot for slot in self._index if not self._index.has_children(self._index[slot].key)}
        assert ends == {slot for slot in self._index if slot in self._evictable}
        assert len(ends) == len(self._evictable)
        self._evictable.check()
        parents = {self._index[slot].parent for slot in self._index}
        assert not elsewhere or parents <= {*self._index.keys, *elsewhere}, "the block before one is nowhere"
        self._index.check()
