"""Which blocks of K/V have left the device for host memory, and in which slot each is."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from runtime.kv.block_keys import BlockIdentity, Salt
from runtime.kv.eviction import EvictableBlocks
from runtime.kv.prefix_index import BlockChildren


class HostBlocks:
    """Indexes `num_slots` slots as BlockPool indexes the device's blocks; knows nothing of tensors.

    The block before one that is here is here as well, or on the device, or on its way there: whoever takes one away for
    good calls `drop_after`. Of those that none follows here, the least worth keeping gives way to a newcomer. With no
    slots at all nothing is kept.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.evictions = 0
        self._free = list(range(num_slots - 1, -1, -1))
        self._known: dict[int, BlockIdentity] = {}
        self._index: dict[bytes, int] = {}
        self._children = BlockChildren()
        self._evictable = EvictableBlocks(num_slots)

    def __len__(self) -> int:
        return len(self._known)

    def add(self, identity: BlockIdentity) -> int | None:
        """The slot for a block that leaves the device; None if its K/V are here already, or no slot may be used."""
        if (known := self._index.get(identity.key)) is not None:
            self._evictable.touch(known)
            return None
        if not self._free and not self._known:
            return None  # and so nothing is here that comes after it
        if not self._free:
            self._evict()
        slot = self._free.pop()
        parent = self._index.get(identity.parent)
        if parent is not None and parent in self._evictable:
            self._evictable.remove(parent)
        self._index[identity.key] = slot
        self._known[slot] = identity
        self._children.add(slot, identity)
        self._evictable.begin(slot, identity.key)
        if not self._children.any(identity.key):
            self._evictable.add(slot)
        return slot

    def take(self, slot: int) -> BlockIdentity:
        """Take out a block that goes elsewhere. Its slot is used for no other until it is freed."""
        self._evictable.gone(slot, self._known[slot].key)
        return self._remove(slot)

    def _remove(self, slot: int) -> BlockIdentity:
        identity = self._known.pop(slot)
        del self._index[identity.key]
        self._children.remove(slot, identity)
        if slot in self._evictable:
            self._evictable.remove(slot)
        parent = self._index.get(identity.parent)
        if parent is not None and not self._children.any(identity.parent):
            self._evictable.add(parent)
        return identity

    def free(self, slots: Iterable[int]) -> None:
        """Let slots that were taken be used again: what is in them has been asked for."""
        self._free += slots

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The slots of the longest prefix of `keys` that is here."""
        slots: list[int] = []
        for key in keys:
            slot = self._index.get(key)
            if slot is None:
                break
            slots.append(slot)
        return slots

    def match_within(self, parent: bytes, token_ids: Sequence[int], salt: Salt | None) -> tuple[int, int]:
        """As of BlockPool: a slot whose block begins as the one after `parent` would, and with how many tokens."""
        return self._children.longest(parent, token_ids, salt)

    def drop_namespace(self, namespace: str | None) -> None:
        """Forget the blocks of a namespace and all after them."""
        dropped = [identity for identity in self._known.values() if identity.namespace == namespace]
        self.drop_after(identity.key for identity in dropped)
        for identity in dropped:
            if identity.key in self._index:
                self._forget(self._index[identity.key])

    def drop_after(self, keys: Iterable[bytes]) -> None:
        """Forget all that comes after blocks, which are here or not."""
        after = [slot for key in keys for slot in self._children.of(key)]
        for slot in after:
            after += self._children.of(self._known[slot].key)
        for slot in dict.fromkeys(after):
            self._forget(slot)

    @property
    def keys(self) -> Collection[bytes]:
        """Of all that is here."""
        return self._index.keys()

    def by_namespace(self) -> Counter[str | None]:
        """How many blocks of each namespace are here."""
        return Counter(identity.namespace for identity in self._known.values())

    def _forget(self, slot: int) -> None:
        self._remove(slot)
        self._free.append(slot)

    def _evict(self) -> None:
        slot = self._evictable.choose()
        self.evictions += 1
        self.take(slot)
        self._free.append(slot)

    def check(self, elsewhere: Collection[bytes] = ()) -> None:
        """Recount. `elsewhere`, if given, are all keys on the device or on their way there, and the roots."""
        assert sorted([*self._free, *self._known]) == list(range(self.num_slots))
        assert self._index == {identity.key: slot for slot, identity in self._known.items()}
        parents = {identity.parent for identity in self._known.values()}
        assert not elsewhere or parents <= {*self._index, *elsewhere}, "an orphan"
        self._children.check(self._known)
        ends = {slot for slot, identity in self._known.items() if not self._children.any(identity.key)}
        assert ends == {slot for slot in self._known if slot in self._evictable}
        assert len(ends) == len(self._evictable)
        self._evictable.check()
