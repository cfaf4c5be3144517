"""One tier of adapter memory: a buffer of bytes, the extents in it, and which of them may be evicted."""

import itertools
import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.host_to_device import page_locked as page_locked_memory
from runtime.adapters.adapter import LAST, Adapter
from runtime.adapters.arena import Arena, aligned
from runtime.adapters.layout import Layout
from runtime.adapters.prefault import AHEAD_BYTES
from runtime.messages import Tier, TierStats

_log = logging.getLogger(__name__)

PINNED_SHARE = 2  # pins may take 1/2 of a tier: the rest stays for the other adapters


@dataclass(eq=False, slots=True)
class Entry:
    """An adapter's copy in a tier."""

    adapter: Adapter
    offset: int  # bytes
    size: int  # bytes
    layout: Layout | None = None  # None while the extent is being filled
    sites: Any = None  # views of the extent, made when they are first used
    references: int = 0
    last_use: int = 0  # in the order of uses
    in_use_until: int = 0  # the poll after which its references are given back, at the latest


class AdapterTier:
    """Owns one buffer; each adapter in it is one extent, laid out the same in every tier.

    Eviction takes the least recently used adapters, and never one that is referenced, pinned or held for a place in
    line before the load's. Pinned adapters are placed at the top end, where they fragment the rest less. Only one
    thread calls the methods; it hands extents to other threads to fill.
    """

    def __init__(
        self, name: Tier, capacity_bytes: int, dtype: torch.dtype, device: torch.device | str, *, page_locked: bool
    ) -> None:
        self.name: Tier = name
        self.loads = self.evictions = self.hits = self.misses = 0
        self._arena = Arena(capacity_bytes)
        elements = self._arena.capacity // dtype.itemsize
        self.memory = (
            page_locked_memory(elements, dtype) if page_locked else torch.empty(elements, dtype=dtype, device=device)
        )
        self._reached = 0  # where the extents from the bottom have ended at most
        self._prefaulted = 0  # the end of what `ahead` has returned
        self._entries: dict[str, Entry] = {}  # by digest
        self._gap: int | None = None  # computed by `gap`; None after a change
        self._pins: dict[str, int] = {}  # bytes, by digest; promised whether the adapter has been loaded yet or not
        self._evicted: list[str] = []  # since `take_evicted`
        # Loads (place in line, size) that found no room. A later one that is as large finds none either, until
        # memory becomes free.
        self._refused: list[tuple[int, int]] = []
        self._uses = itertools.count(1)

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
        """The digests of the resident adapters."""
        return [digest for digest, entry in self._entries.items() if entry.layout is not None]

    @property
    def digests(self) -> list[str]:
        """The digests of all adapters that have an extent, filled or not."""
        return list(self._entries)

    def holds(self, digest: str) -> bool:
        """Whether a complete copy is here."""
        entry = self._entries.get(digest)
        return entry is not None and entry.layout is not None

    def references(self, digest: str) -> int:
        entry = self._entries.get(digest)
        return 0 if entry is None else entry.references

    def may_drop(self, digest: str) -> bool:
        """Whether a complete copy is here that is neither referenced nor pinned."""
        return self.holds(digest) and not self.references(digest) and digest not in self._pins

    # Room

    def limit(self, digest: str) -> int:
        """The largest size in bytes that an adapter may have beside the pins of others."""
        return self.capacity_bytes - self.bytes_pinned + self._pins.get(digest, 0)

    def gap(self) -> int:
        """The most bytes in one piece between the pinned adapters that are here."""
        if self._gap is None:
            unpinned = {entry.offset for digest, entry in self._entries.items() if digest not in self._pins}
            self._gap = self._arena.largest(unpinned)
        return self._gap

    def cannot_hold(self, digest: str, size: int) -> str | None:
        """Why there is no room for an adapter even if all others are evicted that may be; None if there is."""
        limit = self.limit(digest)
        if size > limit:
            pinned = f", of which {self.capacity_bytes - limit} are pinned" if limit < self.capacity_bytes else ""
            return f"it takes {size} bytes, and {self.name} adapter memory has {self.capacity_bytes}{pinned}"
        if digest not in self._entries and size > self.gap():
            return (
                f"it takes {size} bytes, and the adapters pinned in {self.name} memory leave at most {self.gap()} of "
                f"its {self.capacity_bytes} in one piece: unpin one of them, and pin it again once this one is loaded"
            )
        return None

    def reserve(self, adapter: Adapter, size: int, place: int) -> bool:
        """Take an extent for a load with a place in line, after evicting what that takes; False if it cannot now."""
        assert adapter.digest not in self._entries, f"{adapter.digest} has its extent in {self.name} memory"
        if any(place >= refused_place and size >= refused_size for refused_place, refused_size in self._refused):
            return False
        high = adapter.digest in self._pins
        offset = None if high else self._arena.allocate(size)
        if offset is None:
            window = self._arena.window(size, self._evictable(place), high=high)
            if window is None:
                self._refused.append((place, size))
                return False
            self._evict(window.victims, adapter.digest)
            offset = self._arena.allocate(size, high=high)
            assert offset is not None
        if not high:
            self._reached = max(self._reached, offset + size)
        self._gap = None
        self._entries[adapter.digest] = Entry(adapter, offset, size)
        return True

    def _evict(self, offsets: Collection[int], newcomer: str) -> None:
        at = {entry.offset: digest for digest, entry in self._entries.items()}
        for offset in offsets:
            _log.debug("evicted adapter %s from %s memory, for adapter %s", at[offset], self.name, newcomer)
            self.drop(at[offset])
            self.evictions += 1
            self._evicted.append(at[offset])

    def draining(self, size: int, place: int) -> set[str]:
        """The adapters in use that have to leave to make room for a load: of all choices, that which is free first."""
        values = {}
        for digest, entry in self._entries.items():
            if digest in self._pins:
                continue
            held_for = entry.adapter.held_for(self.name)
            if entry.references:
                values[entry.offset] = entry.in_use_until
            elif entry.layout is None or (held_for is not None and held_for <= place):
                values[entry.offset] = LAST  # it is used before the load, for an unknown time
            else:
                values[entry.offset] = 0
        window = self._arena.window(size, values)
        victims = set() if window is None else set(window.victims)
        return {digest for digest, entry in self._entries.items() if entry.references and entry.offset in victims}

    def ahead(self) -> Tensor:
        """The memory that the next adapters will be written to, without what earlier calls returned; may be empty."""
        start = self._prefaulted
        self._prefaulted = max(start, min(self._reached + AHEAD_BYTES, self.capacity_bytes))
        return self.memory[start // self.itemsize : self._prefaulted // self.itemsize]

    def look_again(self) -> None:
        """Memory may have become evictable: loads that found no room try again."""
        self._refused.clear()

    def take_evicted(self) -> list[str]:
        """The adapters that have been evicted since the last call."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def _evictable(self, place: int) -> dict[int, int]:
        """The offsets that a load with a place in line may evict; the smallest values are evicted first.

        The least recently used come first. Copies that are held for later places come last, the latest place first.
        """
        evictable = {}
        for digest, entry in self._entries.items():
            if entry.layout is None or entry.references or digest in self._pins:
                continue
            held_for = entry.adapter.held_for(self.name)
            if held_for is None:
                evictable[entry.offset] = entry.last_use
            elif held_for > place:
                evictable[entry.offset] = 2 * LAST - held_for
        return evictable

    # Entries

    def extent(self, digest: str) -> Tensor:
        """An adapter's extent, in the tier's dtype."""
        entry = self._entries[digest]
        start = entry.offset // self.memory.itemsize
        return self.memory[start : start + entry.size // self.memory.itemsize]

    def layout(self, digest: str) -> Layout:
        """The layout of a resident adapter."""
        layout = self._entries[digest].layout
        assert layout is not None, f"{digest} is not in {self.name} memory"
        return layout

    def first_element(self, digest: str) -> int:
        """Where an adapter's extent begins in `memory`."""
        return self._entries[digest].offset // self.memory.itemsize

    def sites(self, digest: str) -> Any:
        """The weights of a resident adapter by site index, as its layout has them: views of its extent."""
        entry = self._entries[digest]
        if entry.sites is None:
            entry.sites = self.layout(digest).views(self.extent(digest))
        return entry.sites

    def publish(self, digest: str, layout: Layout) -> None:
        """An adapter's extent has been filled."""
        entry = self._entries[digest]
        assert entry.layout is None, f"{digest} is in {self.name} memory already"
        entry.layout, entry.last_use = layout, next(self._uses)
        self.loads += 1
        self.look_again()

    def drop(self, digest: str) -> None:
        """Free an adapter's extent, filled or not."""
        entry = self._entries.pop(digest)
        assert not entry.references, f"{digest} is in use in {self.name} memory"
        self._arena.free(entry.offset)
        self._gap = None
        self.look_again()

    def acquire(self, digest: str, until: int = 0) -> None:
        """Reference a copy, at the longest until a poll: it is not evicted before `release`."""
        entry = self._entries[digest]
        assert entry.layout is not None, f"{digest} is not in {self.name} memory"
        entry.in_use_until = max(until, entry.in_use_until) if entry.references else until
        entry.references += 1
        entry.last_use = next(self._uses)

    def release(self, digest: str) -> None:
        """Give back one reference."""
        entry = self._entries[digest]
        assert entry.references > 0, f"{digest} is released more often than it was acquired"
        entry.references -= 1
        self.look_again()

    # Pins

    def pinned(self, digest: str) -> bool:
        return digest in self._pins

    def pin(self, digest: str, size: int) -> str | None:
        """Promise an adapter its bytes until `unpin`; returns why that is impossible, None if it is done."""
        most = self.capacity_bytes // PINNED_SHARE
        if self.bytes_pinned + aligned(size) > most:
            return (
                f"it takes {size} bytes; {self.bytes_pinned} of the {most} that pins may take in {self.name} memory are"
            )
        if not self.holds(digest) and (reason := self.cannot_hold(digest, size)) is not None:
            return reason
        self._pins[digest] = aligned(size)
        self._gap = None
        return None

    def unpin(self, digest: str) -> None:
        """End a pin, if there is one."""
        self._pins.pop(digest, None)
        self._gap = None
        self.look_again()

    # Reports

    def stats(self) -> TierStats:
        """A snapshot of the tier, with its counters since start."""
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
        offsets = [entry.offset for entry in self._entries.values()]
        assert len(set(offsets)) == len(offsets), "two adapters have one extent"
        assert set(offsets) == self._arena.offsets, "an extent belongs to no adapter"
        assert self.bytes_pinned <= self.capacity_bytes // PINNED_SHARE
        for digest, entry in self._entries.items():
            assert entry.adapter.digest == digest
            assert entry.references >= 0
            assert entry.layout is not None or not entry.references
