"""One tier of adapter memory: a buffer of bytes, the extents in it, and which adapter is to stay or to go."""

import itertools
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from runtime.adapters.arena import Arena, Window, aligned
from runtime.adapters.tier_entry import Claim, Entry
from runtime.messages import Tier, TierStats

AHEAD_BYTES = 128 << 20  # of memory that are taken before they are needed: an adapter of rank 64 has 78 MB
PINNED_SHARE = 2  # pins may take one part in so many: the rest is for everybody


class AdapterTier:
    """Owns one buffer; an adapter is one extent of it, in the layout that every tier has.

    Makes room by evicting what was used least recently, never what is referenced or pinned. Pinned adapters lie at
    the top end. `on_evict` is told each digest. For one thread, which alone hands the extents to others.
    """

    def __init__(
        self, name: Tier, capacity_bytes: int, dtype: torch.dtype, device: torch.device | str, *, page_locked: bool
    ) -> None:
        self.name: Tier = name
        self.loads = self.evictions = self.hits = self.misses = 0
        self.on_evict: Callable[[str], None] = lambda digest: None
        self._arena = Arena(capacity_bytes)
        elements = self._arena.capacity // dtype.itemsize
        self.memory = torch.empty(elements, dtype=dtype, device=device, pin_memory=page_locked)
        self._reached = self._ahead = 0  # where the low extents have ended at most, and what `ahead` has given out
        self._entries: dict[str, Entry] = {}
        self._pins: dict[str, int] = {}  # bytes, which count from the promise on
        # The smallest size for which there was no room, until something changes, by `_window`'s other arguments.
        self._refused: dict[tuple[Claim, bool], int] = {}
        self._uses = itertools.count(1)
        self._ticks = 0
        self._newcomers_at = -1  # the tick in which the last one came

    @property
    def capacity_bytes(self) -> int:
        return self._arena.capacity

    @property
    def itemsize(self) -> int:
        """Bytes of one weight."""
        return self.memory.itemsize

    @property
    def bytes_used(self) -> int:
        return self._arena.used

    @property
    def bytes_pinned(self) -> int:
        return sum(self._pins.values())

    @property
    def adapters(self) -> list[str]:
        """The digests that the tier holds whole."""
        return [digest for digest, entry in self._entries.items() if entry.ready]

    @property
    def digests(self) -> list[str]:
        """Those that have an extent, filled or not."""
        return list(self._entries)

    def holds(self, digest: str) -> bool:
        """Whether the adapter is here, whole."""
        entry = self._entries.get(digest)
        return entry is not None and entry.ready

    def may_leave(self, digest: str) -> bool:
        """Whether there is a whole copy here that nobody uses and that is not pinned."""
        return self.holds(digest) and not self.references(digest) and digest not in self._pins

    def references(self, digest: str) -> int:
        entry = self._entries.get(digest)
        return 0 if entry is None else entry.references

    def tick(self) -> None:
        """Time passes, for newcomers that are spared."""
        self._ticks += 1
        self._refused.clear()

    @property
    def has_newcomers(self) -> bool:
        """Whether the next tick may let an adapter go that is not evicted before."""
        return self._newcomers_at == self._ticks

    # ------------------------------------------------------------------ room

    def limit(self, digest: str) -> int:
        """The largest size in bytes that an adapter may have, beside the pins of others."""
        return self.capacity_bytes - self.bytes_pinned + self._pins.get(digest, 0)

    def reserve(self, digest: str, size: int, claim: Claim) -> bool:
        """Take an extent for an adapter, evicting whom it takes and nobody in vain; False when there is no room now."""
        assert digest not in self._entries, f"{digest} has its extent in {self.name} memory"
        high = digest in self._pins
        offset = self._allocate(size, claim, high=high)
        if offset is None:
            return False
        if not high:
            self._reached = max(self._reached, offset + size)
        self._entries[digest] = Entry(offset, size)
        return True

    def ahead(self) -> Tensor:
        """What the next adapters will be written to and no earlier call has returned; may be empty."""
        start = self._ahead
        self._ahead = max(start, min(self._reached + AHEAD_BYTES, self.capacity_bytes))
        return self._view(start, self._ahead - start)

    def lacks_room(self, size: int, claim: Claim, leaving: Collection[str] = ()) -> bool:
        """Whether pins and what is in use keep an adapter of that size out, even when those `leaving` have left.

        Newcomers do not: they are not spared for long.
        """
        if not leaving:
            return self._window(size, claim, high=False, newcomers=True) is None
        evictable = self._evictable(claim, newcomers=True)
        for digest in leaving:
            if self.holds(digest) and digest not in self._pins:
                evictable[self._entries[digest].offset] = self._entries[digest].last_use
        return self._arena.window(size, evictable) is None

    def _allocate(self, size: int, claim: Claim, *, high: bool, above: int = -1) -> int | None:
        """An offset beyond `above`; `high` looks from the top end on, and evicts there, if others are idle there."""
        offset = None if high else self._arena.allocate(size)
        if offset is not None:
            return offset
        window = self._window(size, claim, high=high)
        if window is None or window.stop - aligned(size) <= above:
            return None
        for victim in window.victims:
            digest = next(digest for digest, entry in self._entries.items() if entry.offset == victim)
            self.drop(digest)
            self.evictions += 1
            self.on_evict(digest)
        return self._arena.allocate(size, high=high)

    def _window(self, size: int, claim: Claim, *, high: bool, newcomers: bool = False) -> Window | None:
        """Where there would be room; asked again while nothing has changed, it remembers that there is none."""
        if size >= self._refused.get((claim, newcomers), size + 1):
            return None
        window = self._arena.window(size, self._evictable(claim, newcomers=newcomers), high=high)
        if window is None:
            self._refused[claim, newcomers] = size
        return window

    def _evictable(self, claim: Claim, *, newcomers: bool = False) -> dict[int, int]:
        """When the entries that a load with this claim may evict were last used, by offset.

        Unless `newcomers` are to be among them, those are spared: always in the tick in which they came, in which who
        waits for one gets to acquire it, and then for a while, if anything is being filled or in use: without that no
        later event would make room.
        """
        others_work = any(not entry.ready or entry.references for entry in self._entries.values())
        return {
            entry.offset: entry.last_use
            for digest, entry in self._entries.items()
            if entry.ready
            and not entry.references
            and entry.target is None
            and entry.claim < claim
            and digest not in self._pins
            and (newcomers or not self._spared(entry, others_work))
        }

    def _spared(self, entry: Entry, others_work: bool) -> bool:
        return entry.chance_at == self._ticks or (others_work and entry.spared_until >= self._ticks)

    # ------------------------------------------------------------------ entries

    def extent(self, digest: str) -> Tensor:
        """An adapter's bytes, in the arena's dtype: whose is whose turn to write them, its caller knows."""
        entry = self._entries[digest]
        return self._view(entry.offset, entry.size)

    def first_element(self, digest: str) -> int:
        """Where an adapter's extent begins in `memory`."""
        return self._entries[digest].offset // self.memory.itemsize

    def publish(self, digest: str, claim: Claim = Claim.NONE, grace: int = 0) -> None:
        """Its extent has been filled; it is spared for `grace` ticks, if any, in which it can be acquired."""
        entry = self._entries[digest]
        assert not entry.ready, f"{digest} is in {self.name} memory already"
        entry.ready, entry.claim = True, claim
        entry.last_use, entry.spared_until = next(self._uses), self._ticks + grace
        if grace:
            entry.chance_at = self._newcomers_at = self._ticks
        self.loads += 1
        self._refused.clear()

    def drop(self, digest: str) -> None:
        """Give an adapter's extent back, filled or not."""
        entry = self._entries.pop(digest)
        assert not entry.references, f"{digest} is in use in {self.name} memory"
        assert entry.target is None, f"{digest} is being moved in {self.name} memory"
        self._arena.free(entry.offset)
        self._refused.clear()

    def claim(self, digest: str, claim: Claim) -> None:
        """Note how much a copy is waited for, if there is one."""
        if digest in self._entries:
            self._entries[digest].claim = claim
            self._refused.clear()

    def acquire(self, digest: str) -> None:
        """Reference a copy: until `release` it is not evicted."""
        entry = self._entries[digest]
        assert entry.ready, f"{digest} is not in {self.name} memory"
        entry.references += 1
        entry.chance_at = -1
        entry.last_use = next(self._uses)

    def release(self, digest: str) -> None:
        entry = self._entries[digest]
        assert entry.references > 0, f"{digest} is released more often than it was acquired"
        entry.references -= 1
        self._refused.clear()

    # ------------------------------------------------------------------ pins

    def pinned(self, digest: str) -> bool:
        return digest in self._pins

    def pin(self, digest: str, size: int) -> bool:
        """Promise an adapter its bytes for ever; False when pins would take more than their share."""
        if self.bytes_pinned + aligned(size) > self.capacity_bytes // PINNED_SHARE:
            return False
        self._pins[digest] = aligned(size)
        return True

    def unpin(self, digest: str) -> None:
        self._pins.pop(digest, None)
        self._refused.clear()

    def raise_pinned(self, digest: str) -> tuple[Tensor, Tensor] | None:
        """Reserve a higher extent for a pinned copy; what to copy to where before `flip`, None if there is none."""
        entry = self._entries.get(digest)
        if entry is None or not entry.ready or entry.target is not None or digest not in self._pins:
            return None
        entry.target = self._allocate(entry.size, Claim.AWAITED, high=True, above=entry.offset)
        if entry.target is None:
            return None
        return self._view(entry.offset, entry.size), self._view(entry.target, entry.size)

    def would_rise(self, digest: str) -> bool:
        """Whether a copy would lie higher if it were taken out and put in again."""
        entry = self._entries.get(digest)
        if entry is None or not entry.ready or entry.references or entry.target is not None:
            return False
        evictable = self._evictable(Claim.AWAITED) | {entry.offset: entry.last_use}
        window = self._arena.window(entry.size, evictable, high=True)
        return window is not None and window.stop - aligned(entry.size) > entry.offset

    def walled_off(self, size: int) -> bool:
        """Whether the pinned alone leave no room for an adapter of that size, whoever else leaves."""
        others = {entry.offset: 0 for digest, entry in self._entries.items() if digest not in self._pins}
        return self._arena.window(size, others) is None

    def flip(self, digest: str, *, moved: bool) -> None:
        """A copy is where it was to be moved to, or could not be moved: give the other extent back."""
        entry = self._entries[digest]
        assert entry.target is not None
        old, entry.offset = (entry.offset, entry.target) if moved else (entry.target, entry.offset)
        entry.target = None
        self._arena.free(old)
        self._refused.clear()

    # ------------------------------------------------------------------ looking in

    def stats(self) -> TierStats:
        return TierStats(
            bytes_total=self.capacity_bytes,
            bytes_used=self.bytes_used,
            bytes_pinned=self.bytes_pinned,
            adapters=self.adapters,
            loads=self.loads,
            evictions=self.evictions,
            hits=self.hits,
            misses=self.misses,
        )

    def check(self) -> None:
        """Recount the invariants between the entries and their extents."""
        self._arena.check()
        held = [entry.offset for entry in self._entries.values()]
        held += [entry.target for entry in self._entries.values() if entry.target is not None]
        assert len(set(held)) == len(held), "two adapters have one extent"
        assert set(held) == self._arena.offsets, "an extent belongs to no adapter"
        assert self.bytes_pinned <= self.capacity_bytes // PINNED_SHARE
        for entry in self._entries.values():
            assert entry.references >= 0
            assert entry.ready or not entry.references
            assert entry.ready or entry.target is None

    def _view(self, offset: int, size: int) -> Tensor:
        start = offset // self.memory.itemsize
        return self.memory[start : start + size // self.memory.itemsize]
