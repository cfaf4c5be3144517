"""Which adapters are resident, in an arena of bytes: one contiguous extent each, packed at its own ranks."""

import itertools
import time
from collections.abc import Callable, Sequence

import torch

from kernels.reference.grouped_lora import SiteWeights
from runtime.adapter_loader import AdapterLoader, Finished, Measured, Source
from runtime.arena import Arena
from runtime.messages import AdapterState
from runtime.models.config import ModelConfig
from runtime.registered_adapter import FIRST_RETRY_SECONDS, RegisteredAdapter

LONGEST_RETRY_SECONDS = 60.0
GRACE_POLLS = 4  # steps that a newcomer is safe from eviction, so that whoever waited for it gets to use it


class AdapterUnavailable(Exception):
    """An adapter cannot be used; the message says why."""


class UnknownAdapter(AdapterUnavailable):
    """The digest was never registered, or has been retired."""


class AdapterFailed(AdapterUnavailable):
    """The adapter could not be loaded."""


class AdapterPool:
    """Owns the arena and every adapter's residency; loads on other threads, evicts the least recently used.

    All methods are for the engine's thread and none of them waits, but for `wait`. An adapter that is
    referenced is never evicted. `dtype` is the arena's: float32 on a CPU whatever the model's dtype, for its
    small products are twice as fast in it as in bfloat16. `clock` is in seconds.
    """

    def __init__(
        self,
        model: ModelConfig,
        capacity_bytes: int,
        dtype: torch.dtype,
        device: torch.device | str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.loads = self.evictions = self.hits = self.misses = 0
        self._arena = Arena(capacity_bytes)
        self._memory = torch.empty(self._arena.capacity // dtype.itemsize, dtype=dtype, device=device)
        self._loader: AdapterLoader[RegisteredAdapter] = AdapterLoader(model)
        self._adapters: dict[str, RegisteredAdapter] = {}
        self._states: list[AdapterState] = []
        self._uses = itertools.count(1)
        self._polls = 0
        self._clock = clock

    @property
    def capacity_bytes(self) -> int:
        return self._arena.capacity

    @property
    def bytes_used(self) -> int:
        return self._arena.used

    @property
    def resident(self) -> list[str]:
        """The digests of the adapters that are resident, retired ones that are still in use among them."""
        return [adapter.digest for adapter in self._adapters.values() if adapter.state == "resident"]

    @property
    def on_change(self) -> Callable[[], None] | None:
        """Called from a loader thread when `poll` has something to do."""
        return self._loader.on_change

    @on_change.setter
    def on_change(self, callback: Callable[[], None] | None) -> None:
        self._loader.on_change = callback

    # ------------------------------------------------------------------ known adapters

    def register(self, digest: str, source: Source) -> None:
        """Make a canonical file known. Again for a known digest: a retired or failed one gets a new start."""
        adapter = self._adapters.get(digest)
        if adapter is None:
            adapter = self._adapters[digest] = RegisteredAdapter(digest=digest, source=source)
            self._measure(adapter)
            return
        adapter.source, adapter.retired = source, False
        if adapter.state == "failed":
            adapter.retry_seconds = FIRST_RETRY_SECONDS
            self._measure(adapter)

    def retire(self, digest: str) -> None:
        """Forget a digest at once, and free its memory when its last reference is released."""
        adapter = self._adapters.get(digest)
        if adapter is not None and not adapter.retired:
            adapter.retired = True
            self._drop_if_unused(adapter)

    # ------------------------------------------------------------------ use

    def prefetch(self, digest: str) -> None:
        """Start loading an adapter if there is room. Raises UnknownAdapter, AdapterFailed."""
        adapter = self._known(digest)
        if adapter.state == "registered":
            self._start(adapter)

    def acquire(self, digest: str) -> bool:
        """Reference an adapter if it is resident; otherwise see to it that it will be, and return False.

        False means that a load is on its way or that memory is held by adapters in use: ask again after a
        later `poll`. Raises UnknownAdapter, AdapterFailed.
        """
        adapter = self._known(digest)
        if adapter.state != "resident":
            self.misses += not adapter.missed
            adapter.missed = True
            if adapter.state == "registered":
                self._start(adapter)
            return False
        self.hits += not adapter.missed
        adapter.missed = False
        adapter.references += 1
        adapter.last_use = next(self._uses)
        return True

    def release(self, digest: str) -> None:
        """Give back one reference that `acquire` took."""
        adapter = self._adapters[digest]
        assert adapter.references > 0, f"{digest} is released more often than it was acquired"
        adapter.references -= 1
        if adapter.retired:
            self._drop_if_unused(adapter)

    def lookup(self, digest: str) -> Sequence[SiteWeights | None]:
        """The weights of a referenced adapter, by site index."""
        sites = self._adapters[digest].sites
        assert sites is not None, f"{digest} is not resident"
        return sites

    def lacks_room(self, digest: str) -> bool:
        """Whether an adapter is kept from loading by what others in use hold."""
        adapter = self._adapters.get(digest)
        if adapter is None or adapter.state != "registered" or adapter.measured is None:
            return False
        return not self._arena.would_fit(self._size(adapter.measured), self._evictable())

    # ------------------------------------------------------------------ once a step

    def poll(self) -> list[AdapterState]:
        """Publish the loads that have finished; returns every change of residency since the last call."""
        self._polls += 1
        for result in self._loader.take():
            adapter = result.key
            adapter.busy = False
            if result.reason is not None:
                self._fail(adapter, result.reason)
            elif result.measured is not None:
                self._take_measures(adapter, result.measured)
            else:
                self._publish(adapter, result)
            if adapter.retired:
                self._drop_if_unused(adapter)
        states, self._states = self._states, []
        return states

    def wait(self, timeout: float | None = None) -> bool:
        """Block until a job of the loader has finished, for an engine that has nothing else to do.

        Returns at once when none is under way; False when `poll` has nothing new.
        """
        return self._loader.wait(timeout)

    def close(self) -> None:
        """Stop the loader's threads, after the job that each of them is at."""
        self._loader.close()

    def check(self) -> None:
        """Recount the invariants between adapters, their extents and the jobs under way."""
        self._arena.check()
        held = [adapter.offset for adapter in self._adapters.values() if adapter.offset is not None]
        assert len(set(held)) == len(held), "two adapters have one extent"
        assert self._arena.would_fit(self._arena.capacity, held), "an extent belongs to no adapter"
        for adapter in self._adapters.values():
            adapter.check()

    # ------------------------------------------------------------------ inside

    def _known(self, digest: str) -> RegisteredAdapter:
        adapter = self._adapters.get(digest)
        if adapter is None or adapter.retired:
            raise UnknownAdapter(f"adapter {digest} is not registered")
        if adapter.state == "failed":
            if self._clock() < adapter.retry_at:
                raise AdapterFailed(f"adapter {digest} failed to load: {adapter.reason}")
            self._measure(adapter)
        return adapter

    def _measure(self, adapter: RegisteredAdapter) -> None:
        adapter.state, adapter.busy = "registered", True
        self._loader.measure(adapter, adapter.source)

    def _take_measures(self, adapter: RegisteredAdapter, measured: Measured) -> None:
        adapter.measured = measured
        size = self._size(measured)
        if size > self._arena.capacity:
            self._fail(adapter, f"it takes {size} bytes, and adapter memory has {self._arena.capacity}")
        elif adapter.wanted and not adapter.retired:
            self._start(adapter)
        adapter.wanted = False

    def _size(self, measured: Measured) -> int:
        return measured.layout.elements * self._memory.itemsize

    def _start(self, adapter: RegisteredAdapter) -> None:
        """Start to load a registered adapter, if it has been measured and if there is room."""
        if adapter.measured is None:
            adapter.wanted = True
            return
        offset = self._reserve(self._size(adapter.measured))
        if offset is None:
            return
        adapter.state, adapter.offset, adapter.busy = "loading", offset, True
        self._states.append(AdapterState(digest=adapter.digest, state="loading"))
        self._loader.pack(adapter, adapter.source, adapter.measured, self._extent(adapter))

    def _reserve(self, size: int) -> int | None:
        """An extent, evicting as many as it takes but nobody in vain."""
        offset = self._arena.allocate(size)
        if offset is None and self._arena.would_fit(size, evictable := self._evictable()):
            for adapter in sorted(evictable.values(), key=lambda adapter: adapter.last_use):
                self._evict(adapter)
                offset = self._arena.allocate(size)
                if offset is not None:
                    break
        return offset

    def _evictable(self) -> dict[int, RegisteredAdapter]:
        """Resident adapters that nobody references, by offset.

        Newcomers are spared, unless nothing is loading or in use: then no later event would make room.
        """
        idle = {
            adapter.offset: adapter
            for adapter in self._adapters.values()
            if adapter.idle and adapter.offset is not None
        }
        if any(adapter.state == "loading" or adapter.references for adapter in self._adapters.values()):
            return {offset: adapter for offset, adapter in idle.items() if adapter.safe_until < self._polls}
        return idle

    def _extent(self, adapter: RegisteredAdapter) -> torch.Tensor:
        assert adapter.offset is not None
        assert adapter.measured is not None
        start = adapter.offset // self._memory.itemsize
        return self._memory[start : start + adapter.measured.layout.elements]

    def _publish(self, adapter: RegisteredAdapter, result: Finished[RegisteredAdapter]) -> None:
        assert adapter.measured is not None
        adapter.state, adapter.retry_seconds = "resident", FIRST_RETRY_SECONDS
        adapter.sites = result.sites
        adapter.last_use = next(self._uses)
        adapter.safe_until = self._polls + GRACE_POLLS
        self.loads += 1
        size = self._size(adapter.measured)
        self._states.append(
            AdapterState(digest=adapter.digest, state="resident", bytes=size, load_seconds=result.seconds)
        )

    def _fail(self, adapter: RegisteredAdapter, reason: str) -> None:
        self._give_back(adapter)
        adapter.state, adapter.reason = "failed", reason
        adapter.measured = None
        adapter.missed = adapter.wanted = False
        adapter.retry_at = self._clock() + adapter.retry_seconds
        adapter.retry_seconds = min(2 * adapter.retry_seconds, LONGEST_RETRY_SECONDS)
        self._states.append(AdapterState(digest=adapter.digest, state="failed", reason=reason))

    def _evict(self, adapter: RegisteredAdapter) -> None:
        self._give_back(adapter)
        adapter.state = "registered"
        self.evictions += 1
        self._states.append(AdapterState(digest=adapter.digest, state="registered"))

    def _give_back(self, adapter: RegisteredAdapter) -> None:
        if adapter.offset is not None:
            self._arena.free(adapter.offset)
        adapter.offset = adapter.sites = None

    def _drop_if_unused(self, adapter: RegisteredAdapter) -> None:
        if adapter.references or adapter.busy:
            return
        self._give_back(adapter)
        del self._adapters[adapter.digest]
        self._states.append(AdapterState(digest=adapter.digest, state="retired"))
