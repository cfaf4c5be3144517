"""Which adapters are resident, in host and in device memory: one contiguous extent each, packed at its own ranks."""

import sys
import time
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from kernels.cpu.grouped_lora import SiteWeights
from runtime.adapter_format.canonical import CanonicalFile
from runtime.adapters.answers import AdapterAnswers
from runtime.adapters.errors import AdapterFailed, UnknownAdapter
from runtime.adapters.layout import AdapterLayout
from runtime.adapters.loader import Content, Source
from runtime.adapters.loads import AdapterLoads
from runtime.adapters.pins import AdapterPins
from runtime.adapters.registered import FIRST_RETRY_SECONDS, RegisteredAdapter
from runtime.adapters.reports import AdapterReports
from runtime.adapters.spare_memory import SpareMemory
from runtime.adapters.tier import AdapterTier
from runtime.adapters.tier_entry import Claim
from runtime.messages import AdapterState, Answer, Tier
from runtime.models.config import ModelConfig


class AdapterPool:
    """Owns two tiers and every adapter's residency in them; loads on other threads, evicts the least recently used.

    All methods are for the engine's thread and none of them waits, but for `wait`; what becomes of a call comes out of
    `poll`. An adapter that is referenced or pinned is never evicted. `dtype` is the tiers': float32 on a CPU whatever
    the model's dtype, for its small products are twice as fast in it as in bfloat16. An adapter with a module of more
    than `max_rank` ranks fails its load. `clock` is in seconds.
    """

    def __init__(
        self,
        model: ModelConfig,
        device_bytes: int,
        host_bytes: int,
        dtype: torch.dtype,
        device: torch.device | str,
        max_rank: int = sys.maxsize,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        page_locked = torch.device(device).type == "cuda"
        self.host = AdapterTier("host", host_bytes, dtype, "cpu", page_locked=page_locked)
        self.device = AdapterTier("device", device_bytes, dtype, device, page_locked=False)
        self._tiers = (self.host, self.device)
        self._loads = AdapterLoads(model, self.host, self.device, max_rank, clock)
        self.pacer = self._loads.loader.pacer  # keeps the loads out of the way of whoever computes
        self._answers = AdapterAnswers(self.host, self.device)
        self._pins = AdapterPins(self._loads, self._answers)
        self._adapters: dict[str, RegisteredAdapter] = {}
        self._reports = AdapterReports((self.device, self.host), self._pins.tier)
        self._clock = clock
        self.host.on_evict = self.device.on_evict = self._gone

    @property
    def on_change(self) -> Callable[[], None] | None:
        """Called when `poll` has something to do, from any thread."""
        return self._loads.loader.on_change

    @on_change.setter
    def on_change(self, callback: Callable[[], None] | None) -> None:
        self._loads.loader.on_change = callback

    @property
    def digests(self) -> list[str]:
        """All that are known, or are retired and still in use."""
        return list(self._adapters)

    @property
    def wanted(self) -> dict[str, str]:
        """The adapters that wait for their file, and what is wrong with it."""
        return {digest: adapter.reason for digest, adapter in self._adapters.items() if adapter.wanted}

    # ------------------------------------------------------------------ known adapters

    @property
    def file_memory(self) -> SpareMemory:
        """Memory for the files of adapters that are registered from memory."""
        return self._loads.loader.memory

    def register(self, digest: str, source: Source) -> None:
        """Make a canonical file known, to be read when it is needed.

        Again for a known digest: its file has been brought, a retired or failed one gets a new start.
        """
        adapter = self._adapters.get(digest)
        size = source.layout.elements * self.host.itemsize if isinstance(source, Content) else None
        if adapter is None:
            adapter = self._adapters[digest] = RegisteredAdapter(digest=digest, source=source, size=size)
        else:
            adapter.source, adapter.size, adapter.retired = source, adapter.size or size, False
            adapter.registrations += 1
            if adapter.failed:
                adapter.start_anew()
                adapter.retry_seconds = FIRST_RETRY_SECONDS
                self._pins.load(adapter)
            if adapter.wanted:
                adapter.wanted, adapter.brought, adapter.reason = False, True, ""
                self._loads.enqueue(adapter)
        self._reports.touch(adapter)

    def add(self, digest: str, file: CanonicalFile) -> None:
        """Make a canonical file in memory known, of which nothing is left to read; its data is not to change.

        Raises InvalidAdapter as reading it would.
        """
        self.register(digest, self._loads.loader.content_of(file))

    def retire(self, digest: str) -> None:
        """Forget a digest at once, and free its memory when its last reference is released."""
        adapter = self._adapters.get(digest)
        if adapter is not None and not adapter.retired:
            adapter.retired = True
            self._pins.end(adapter, "unknown_adapter", f"adapter {digest} has been retired")
            self._loads.drop(adapter)
            self._answers.settle(adapter)
            self._reports.touch(adapter)
            self._drop_if_unused(adapter)

    def fail(self, digest: str, reason: str) -> None:
        """The file of an adapter that is wanted cannot be had: whoever waits for it need not wait any more."""
        adapter = self._adapters.get(digest)
        if adapter is not None and adapter.wanted:
            self._loads.fail(adapter, reason)
            self._settle(adapter)

    # ------------------------------------------------------------------ use

    def prefetch(self, digest: str) -> None:
        """Start loading an adapter that a request will use. Raises UnknownAdapter, AdapterFailed."""
        adapter = self._known(digest)
        if not self.device.holds(digest):
            adapter.expected = True
            self._loads.ask(adapter, "device", Claim.EXPECTED)
            self._reports.touch(adapter)
            self._refuse_failed(adapter)

    def acquire(self, digest: str) -> bool:
        """Reference an adapter if it is on the device; otherwise see to it that it will be, and return False.

        False means that a load is on its way, that its file is wanted or that memory is held by others: ask again after
        each `poll`, for what has come is kept for whoever does. Raises UnknownAdapter, AdapterFailed.
        """
        adapter = self._known(digest)
        if not self.device.holds(digest):
            self.device.misses += not adapter.missed
            adapter.missed = adapter.expected = True
            self._loads.ask(adapter, "device", Claim.AWAITED, at_turn=True)
            self._reports.touch(adapter)
            self._refuse_failed(adapter)
            return False
        self.device.hits += not adapter.missed
        adapter.missed = adapter.expected = False
        self.device.claim(digest, Claim.NONE)
        self.device.acquire(digest)
        return True

    def release(self, digest: str) -> None:
        """Give back one reference that `acquire` took."""
        adapter = self._adapters[digest]
        self.device.release(digest)
        if adapter.retired:
            self._drop_if_unused(adapter)

    def lookup(self, digest: str) -> Sequence[SiteWeights | None]:
        """The weights of a referenced adapter, by site index; good until the next `poll`."""
        adapter = self._adapters[digest]
        assert self.device.references(digest), f"{digest} is not referenced"
        if adapter.sites is None:
            assert adapter.layout is not None
            adapter.sites = adapter.layout.views(self.device.extent(digest))
        return adapter.sites

    def placement(self, digest: str) -> tuple[AdapterLayout, int]:
        """A referenced adapter's layout, and the element of `arena` at which its extent begins; good as of `lookup`."""
        layout = self._adapters[digest].layout
        assert self.device.references(digest), f"{digest} is not referenced"
        assert layout is not None
        return layout, self.device.first_element(digest)

    @property
    def arena(self) -> Tensor:
        """All of the device's adapter memory, flat."""
        return self.device.memory

    def lacks_room(self, digest: str, leaving: Collection[str] = ()) -> bool:
        """Whether an adapter is kept from the device by what others in use hold, but for those that are `leaving`."""
        adapter = self._adapters.get(digest)
        if adapter is None or adapter.failed or adapter.busy or adapter.size is None or self.device.holds(digest):
            return False
        return self.device.lacks_room(adapter.size, Claim.AWAITED, leaving)

    # ------------------------------------------------------------------ commands

    def load(self, digest: str, tier: Tier, request_id: str | None = None) -> None:
        """Start to bring an adapter into a tier; with a request id `poll` answers when that has ended.

        Refused as "unknown_adapter", "adapter_failed", or "load_cancelled" if it is unloaded meanwhile.
        """
        adapter = self._adapters.get(digest)
        if adapter is None or adapter.retired:
            adapter = RegisteredAdapter(digest=digest, source=b"", dropped=True)  # of which a report is all there is
        elif adapter.may_be_used(self._clock()):
            self._loads.ask(adapter, tier, Claim.AWAITED)
        if request_id is not None:
            self._answers.expect(request_id, adapter, tier)
        self._reports.touch(adapter)

    def unload(self, request_id: str, digest: str, tier: Tier) -> None:
        """Give back the memory of an adapter on the device, or in both tiers; answered by `poll`.

        Refused as "adapter_in_use", "adapter_pinned" or "unknown_adapter". A load under way is dropped when it ends.
        """
        adapter = self._adapters.get(digest)
        if adapter is None or adapter.retired:
            self._answers.unknown(request_id, digest)
        elif (pinned := self._pins.tier(adapter)) in {tier, "device"}:
            self._answers.give(request_id, "adapter_pinned", f"adapter {digest} is pinned in {pinned} memory")
        elif self.device.references(digest):
            self._answers.give(request_id, "adapter_in_use", f"adapter {digest} is in use")
        else:
            self._loads.drop(adapter)
            adapter.unload = tier
            self._settle(adapter)
            self._answers.give(request_id)

    def pin(self, request_id: str, digest: str, tier: Tier | None) -> None:
        """Load an adapter into a tier and never evict it from there; None ends that. Answered by `poll`, once decided.

        Refused as "pins_full", "adapter_failed" or "unknown_adapter".
        """
        adapter = self._adapters.get(digest)
        if adapter is None or adapter.retired:
            self._answers.unknown(request_id, digest)
        elif tier is None:
            self._pins.end(adapter, "superseded", "the adapter was unpinned before the pin was decided on")
            self._answers.give(request_id)
        else:
            adapter.may_be_used(self._clock())
            self._pins.ask(request_id, adapter, tier)
        if adapter is not None:
            self._reports.touch(adapter)

    # ------------------------------------------------------------------ once a step

    def poll(self) -> list[AdapterState | Answer]:
        """Take in what the loader has finished and start what is next; all changes and answers since the last call."""
        for adapter in self._loads.take():
            self._settle(adapter)
        for adapter in [*self._loads.advance(), *self._pins.rearrange()]:
            self._reports.touch(adapter)
        return [*self._reports.take(), *self._answers.take()]

    def wait(self, timeout: float | None = None) -> bool:
        """Block until a job of the loader has finished, for an engine that has nothing else to do.

        Returns at once when none is under way; False when `poll` has nothing new.
        """
        return self._loads.wait(timeout)

    def close(self) -> None:
        """Stop the loader's threads, after the job that each of them is at."""
        self._loads.loader.close()

    def check(self) -> None:
        """Recount the invariants between adapters, their extents and the jobs under way."""
        for tier in self._tiers:
            tier.check()
            for digest in tier.digests:
                adapter = self._adapters[digest]
                assert adapter.size is not None
                assert tier.holds(digest) or tier.name in adapter.filling
        self._loads.check()
        self._pins.check()
        for adapter in self._adapters.values():
            adapter.check()
            assert not adapter.pins or self._loads.under_way(adapter)
            assert not adapter.retired or adapter.busy or self.device.references(adapter.digest)

    # ------------------------------------------------------------------ inside

    def _known(self, digest: str) -> RegisteredAdapter:
        adapter = self._adapters.get(digest)
        if adapter is None or adapter.retired:
            raise UnknownAdapter(f"adapter {digest} is not registered")
        if not self.device.holds(digest):
            self._refuse_failed(adapter)
        return adapter

    def _refuse_failed(self, adapter: RegisteredAdapter) -> None:
        if not adapter.may_be_used(self._clock()):
            raise AdapterFailed(f"adapter {adapter.digest} failed to load: {adapter.reason}")

    def _settle(self, adapter: RegisteredAdapter) -> None:
        """A stage has ended, or a load: do what waits for that."""
        self._reports.touch(adapter)
        self._answers.settle(adapter)
        if adapter.retired:
            self._drop_if_unused(adapter)
            return
        if adapter.unload is not None and not adapter.busy:
            tiers, adapter.unload = self._tiers if adapter.unload == "host" else (self.device,), None
            for tier in tiers:
                if tier.may_leave(adapter.digest):
                    self._drop_from(adapter, tier)
        self._pins.decide(adapter)

    def _drop_from(self, adapter: RegisteredAdapter, tier: AdapterTier) -> None:
        tier.drop(adapter.digest)
        self._gone(adapter.digest)

    def _gone(self, digest: str) -> None:
        adapter = self._adapters[digest]
        if not self.device.holds(digest):
            adapter.sites = None
            if not self.host.holds(digest) and not adapter.busy:
                adapter.layout = None
        self._reports.touch(adapter)

    def _drop_if_unused(self, adapter: RegisteredAdapter) -> None:
        if self.device.references(adapter.digest) or adapter.busy:
            return
        for tier in self._tiers:
            if tier.holds(adapter.digest):
                self._drop_from(adapter, tier)
        del self._adapters[adapter.digest]
        adapter.dropped = True
        self._reports.touch(adapter)
