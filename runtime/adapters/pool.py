"""Which adapters are resident, in host and in device memory: the engine's door to loading, eviction and pins."""

import itertools
import sys
import time
from bisect import insort
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from runtime.adapters.adapter import FIRST_RETRY_SECONDS, Adapter, State
from runtime.adapters.errors import AdapterFailed, UnknownAdapter
from runtime.adapters.events import AdapterEvents
from runtime.adapters.layout import LayOut, Layout, layout_adapter
from runtime.adapters.loader import AdapterLoader, Content, Source
from runtime.adapters.loads import AdapterLoads
from runtime.adapters.pins import AdapterPins
from runtime.adapters.tier import AdapterTier
from runtime.messages import AdapterState, Answer, PinsSet, Tier
from runtime.models.config import ModelConfig
from runtime.parallel.followers import Followers


class AdapterPool:
    """Owns the adapters and the two tiers of memory; loads on other threads, evicts the least recently used.

    Only the engine's thread calls the methods. None of them waits, except `wait`; `poll` returns what has happened. A
    request goes through `prefetch`, `acquire` and `release`, or through `prefetch` and `cancel`. An adapter is never
    evicted while it is referenced or pinned, and while a request waits for it only for a request that came earlier.
    """

    def __init__(
        self,
        model: ModelConfig,
        device_bytes: int,
        host_bytes: int,
        # Of both tiers: the weights', or uint8 for extents of bytes in which each adapter keeps its own.
        dtype: torch.dtype,
        device: torch.device | str,
        max_rank: int = sys.maxsize,  # of a module; an adapter with a higher one fails to load
        lay_out: LayOut = layout_adapter,  # as the runner's kernels read adapters
        clock: Callable[[], float] = time.monotonic,  # seconds
    ) -> None:
        page_locked = torch.device(device).type == "cuda"
        self.host = AdapterTier("host", host_bytes, dtype, "cpu", page_locked=page_locked)
        self.device = AdapterTier("device", device_bytes, dtype, device, page_locked=False)
        self._adapters: dict[str, Adapter] = {}  # by digest
        # Places in line: of those who come, from 1 on; of preempted requests, before all others.
        self._places, self._front_places = itertools.count(1), itertools.count(-1, -1)
        self._events = AdapterEvents(self.device, self.host)
        self.loads = AdapterLoads(model, self.host, self.device, max_rank, lay_out, self._events, clock)
        self._pins = AdapterPins(self._adapters, self.loads, self._events, self._next_place)
        self.pacer = self.loads.loader.pacer  # keeps the loads out of the way of the steps

    def watch(self, on_change: Callable[[], None]) -> None:
        """Call `on_change`, from any thread, whenever `poll` has something to do."""
        self.loads.loader.on_change = on_change

    def lead(self, followers: Followers) -> None:
        """Have the other ranks load and copy their parts of adapters along with this one."""
        self.loads.loader.followers = followers

    @property
    def digests(self) -> list[str]:
        """The adapters that are registered, or retired and still in use."""
        return list(self._adapters)

    @property
    def missing(self) -> dict[str, str]:
        """The adapters that wait for their file, and why it cannot be used, by digest."""
        return {digest: adapter.problem for digest, adapter in self._adapters.items() if adapter.state is State.MISSING}

    @property
    def arena(self) -> Tensor:
        """All of the device's adapter memory, flat."""
        return self.device.memory

    @property
    def loader(self) -> AdapterLoader[Adapter]:
        """Lays out canonical files in memory, lends memory for them, and works in the background."""
        return self.loads.loader

    # Known adapters

    def register(self, digest: str, source: Source) -> None:
        """Make a canonical file known; it is read when it is needed.

        For a known digest: its file has been fetched again, or a retired or failed adapter starts anew.
        """
        size = source.layout.elements * self.host.itemsize if isinstance(source, Content) else None
        adapter = self._adapters.get(digest)
        if adapter is None:
            adapter = self._adapters[digest] = Adapter(digest=digest, source=source, size=size)
        else:
            adapter.source, adapter.size = source, adapter.size or size
            if adapter.job is not None:
                adapter.job.outdated = True
            if adapter.state is State.RETIRED:
                adapter.revive()
            elif adapter.state is State.FAILED:
                adapter.forgive()
                adapter.retry_seconds = FIRST_RETRY_SECONDS
                self._pins.reload(adapter)
            elif adapter.state is State.MISSING:
                self.loads.refetched(adapter)
            self._pins.decide(adapter)  # an adapter in memory has a known size
        self._events.touch(adapter)

    def retire(self, digest: str) -> None:
        """Forget a digest at once; its memory is freed with its last reference."""
        adapter = self._adapters.get(digest)
        if adapter is not None and adapter.state is not State.RETIRED:
            self.loads.retire(adapter)
            self._pins.retire(adapter)
            self._events.touch(adapter)
            self._drop_if_unused(adapter)

    def fail(self, digest: str, reason: str) -> None:
        """The file that an adapter waits for cannot be fetched: its load fails."""
        adapter = self._adapters.get(digest)
        if adapter is not None and adapter.state is State.MISSING:
            self.loads.fail(adapter, reason)
            self._pins.decide(adapter)

    # Requests

    def prefetch(self, digest: str) -> None:
        """A request that needs an adapter has been queued: load it, and keep the request's place in line.

        Raises UnknownAdapter, AdapterFailed.
        """
        adapter = self._known(digest)
        adapter.waiting.append(self._next_place())
        if not self.device.holds(digest):
            self.loads.ask(adapter, "device")
            if adapter.failure is not None:
                adapter.waiting.pop()
                raise _failed(adapter)

    def cancel(self, digest: str) -> None:
        """A request that called `prefetch` does not need the adapter any more."""
        adapter = self._adapters.get(digest)
        if adapter is not None and adapter.waiting:
            adapter.waiting.pop()

    def ready(self, digest: str) -> bool:
        """Whether a request may acquire an adapter now; otherwise the adapter is loaded.

        False also for a resident adapter that has to leave for a request which has waited too long: ask again after
        each `poll`. Raises UnknownAdapter, AdapterFailed.
        """
        adapter = self._known(digest)
        if self.device.holds(digest):
            return not self.loads.holds_back(adapter)
        if not adapter.waiting:
            adapter.waiting.append(self._next_place())
        self.device.misses += not adapter.missed
        adapter.missed = True
        self.loads.ask(adapter, "device", at_turn=True)
        if adapter.failure is not None:
            raise _failed(adapter)
        return False

    def acquire(self, digest: str, steps: int = 0) -> bool:
        """Reference an adapter if it is `ready`, for about so many steps at most; `release` gives it back."""
        if not self.ready(digest):
            return False
        adapter = self._adapters[digest]
        if adapter.waiting:
            del adapter.waiting[0]
        self.device.hits += not adapter.missed
        adapter.missed = False
        self.device.acquire(digest, self.loads.polls + steps)
        return True

    def release(self, digest: str, *, waits: bool = False) -> bool:
        """Give back a reference; `waits` if the request goes back to the queue, before all others.

        Returns whether it was given back: a retired adapter is never loaded again, so a request that waits keeps it.
        """
        adapter = self._adapters[digest]
        if waits and adapter.state is State.RETIRED:
            return False
        self.device.release(digest)
        if waits:
            insort(adapter.waiting, next(self._front_places))
        if adapter.state is State.RETIRED:
            self._drop_if_unused(adapter)
        return True

    def lookup(self, digest: str) -> Any:
        """The weights of a referenced adapter by site index, as its layout has them; valid until the next `poll`."""
        assert self.device.references(digest), f"{digest} is not referenced"
        return self.device.sites(digest)

    def placement(self, digest: str) -> tuple[Layout, int]:
        """A referenced adapter's layout, and the element of `arena` at which its extent begins."""
        assert self.device.references(digest), f"{digest} is not referenced"
        return self.device.layout(digest), self.device.first_element(digest)

    # Commands

    def load(self, digest: str, tier: Tier, request_id: str | None = None) -> None:
        """Load an adapter into a tier; with a request id, `poll` returns an answer when the load has ended.

        Refused as "unknown_adapter", "adapter_failed", or "load_cancelled" if it is unloaded meanwhile.
        """
        adapter = self._registered(digest)
        if adapter is None:
            if digest not in self._adapters:
                self._events.gone(digest)
            if request_id is not None:
                self._answer_unknown(request_id, digest)
            return
        if self._usable(adapter):
            self.loads.ask(adapter, tier, self._next_place())
        if request_id is not None:
            self.loads.answer_when_loaded(request_id, adapter, tier)
        self._events.touch(adapter)

    def unload(self, request_id: str, digest: str, tier: Tier) -> None:
        """Free the memory of an adapter in a tier and above it; `poll` returns the answer.

        Refused as "adapter_in_use", "adapter_pinned" or "unknown_adapter". A task under way ends first.
        """
        adapter = self._registered(digest)
        if adapter is None:
            self._answer_unknown(request_id, digest)
        elif (pinned := self._pins.tier(digest)) in (tier, "device"):
            self._events.answer(request_id, "adapter_pinned", f"adapter {digest} is pinned in {pinned} memory")
        elif self.device.references(digest):
            self._events.answer(request_id, "adapter_in_use", f"adapter {digest} is in use")
        else:
            self.loads.cancel(adapter)
            if adapter.job is None:
                self._free(adapter, tier)
            else:
                adapter.job.unload = tier
            self._pins.decide(adapter)
            self._events.answer(request_id)

    def set_pins(self, request_id: str, pins: Mapping[str, Tier]) -> None:
        """Pin exactly these adapters, by digest; `poll` returns PinsSet when all of it is decided."""
        for digest in pins:
            adapter = self._registered(digest)
            if adapter is not None:
                self._usable(adapter)
        self._pins.set(request_id, pins)

    # Once a step

    def poll(self) -> list[AdapterState | Answer | PinsSet]:
        """End the stages that have finished and start the next; returns all changes and answers since the last call."""
        self.loads.polls += 1
        if self.loads.quiet and not self._events:
            return []
        for adapter, job in self.loads.take():
            if adapter.state is State.RETIRED:
                self._drop_if_unused(adapter)
                continue
            if job.unload is not None:
                self._free(adapter, job.unload)
            self._pins.decide(adapter)
        self.loads.advance()
        for tier in (self.host, self.device):
            for digest in tier.take_evicted():
                if digest in self._adapters:
                    self._events.touch(self._adapters[digest])
        return self._events.take()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until a task of the loader has finished; False if `poll` has nothing new after `timeout` seconds.

        Returns at once when no task is under way.
        """
        return self.loads.loader.wait(timeout)

    def close(self) -> None:
        """Stop the loader's threads, each after its current task."""
        self.loads.loader.close()

    def check(self) -> None:
        """Recount the invariants between adapters, their extents and the loads."""
        for tier in (self.host, self.device):
            tier.check()
            for digest in tier.digests:
                adapter = self._adapters[digest]
                assert adapter.size is not None
                assert tier.holds(digest) or (adapter.job is not None and tier.name in adapter.job.filling)
        for digest, adapter in self._adapters.items():
            adapter.check()
            assert adapter.state is not State.RETIRED or adapter.job is not None or self.device.references(digest)
        self.loads.check()
        self._pins.check()

    def _next_place(self) -> int:
        return next(self._places)

    def _registered(self, digest: str) -> Adapter | None:
        adapter = self._adapters.get(digest)
        return None if adapter is None or adapter.state is State.RETIRED else adapter

    def _known(self, digest: str) -> Adapter:
        """An adapter that a request may use, or wait for. Raises UnknownAdapter, AdapterFailed."""
        adapter = self._registered(digest)
        if adapter is None:
            raise UnknownAdapter(f"adapter {digest} is not registered")
        if not self.device.holds(digest) and not self._usable(adapter):
            raise _failed(adapter)
        return adapter

    def _usable(self, adapter: Adapter) -> bool:
        """Whether no failure stands; one that is old enough for another try is forgotten."""
        if adapter.failure is not None and self.loads.clock() >= adapter.failure.retry_at:
            adapter.forgive()
            self._events.touch(adapter)
        return adapter.failure is None

    def _answer_unknown(self, request_id: str, digest: str) -> None:
        self._events.answer(request_id, "unknown_adapter", f"adapter {digest} is not registered")

    def _free(self, adapter: Adapter, tier: Tier) -> None:
        """Free an adapter's memory in a tier and above it, where nothing keeps it there."""
        for each in (self.host, self.device) if tier == "host" else (self.device,):
            if each.may_drop(adapter.digest):
                each.drop(adapter.digest)
        self._events.touch(adapter)

    def _drop_if_unused(self, adapter: Adapter) -> None:
        """Drop a retired adapter that nothing uses."""
        digest = adapter.digest
        if self.device.references(digest) or adapter.job is not None:
            return
        for tier in (self.host, self.device):
            if tier.holds(digest):
                tier.drop(digest)
        del self._adapters[digest]
        self._events.gone(digest)


def _failed(adapter: Adapter) -> AdapterFailed:
    return AdapterFailed(f"adapter {adapter.digest} failed to load: {adapter.problem}")
