"""Which adapters are pinned, and in which tier."""

from runtime.adapters.answers import AdapterAnswers
from runtime.adapters.loads import AdapterLoads
from runtime.adapters.registered import RegisteredAdapter
from runtime.adapters.tier import PINNED_SHARE
from runtime.adapters.tier_entry import Claim
from runtime.messages import EngineCode, Tier


class AdapterPins:
    """Decides on pins, once an adapter's size is known, and keeps the pinned towards the top end of their tier.

    A pin stands until it is ended or the adapter is retired; if the adapter fails, its bytes stay promised.
    """

    def __init__(self, loads: AdapterLoads, answers: AdapterAnswers) -> None:
        self._loads = loads
        self._answers = answers
        self._pinned: dict[RegisteredAdapter, Tier] = {}
        self._to_raise: dict[RegisteredAdapter, Tier] = {}

    def tier(self, adapter: RegisteredAdapter) -> Tier | None:
        """Where an adapter is pinned."""
        return self._pinned.get(adapter)

    def ask(self, request_id: str, adapter: RegisteredAdapter, tier: Tier) -> None:
        """Pin an adapter, which is read for its size first if that is not known."""
        adapter.pins.append((request_id, tier))
        self.decide(adapter)

    def end(self, adapter: RegisteredAdapter, code: EngineCode, message: str) -> None:
        """Unpin an adapter; who has asked for a pin and has no answer yet gets this one."""
        self._unpin(adapter)
        for request_id, _ in adapter.pins:
            self._answers.give(request_id, code, message)
        adapter.pins = []

    def decide(self, adapter: RegisteredAdapter) -> None:
        """Answer the pins that wait for the adapter's size, if it is known now or has turned out not to be had."""
        if adapter.pins and adapter.size is None and not adapter.failed:
            self._loads.enqueue(adapter)
            return
        pins, adapter.pins = adapter.pins, []
        for request_id, tier in pins:
            refusal = None if adapter.size is None or adapter.failed else self._pin(adapter, tier, adapter.size)
            if refusal is not None:
                self._answers.give(request_id, "pins_full", refusal)
            elif adapter.failed:
                self._unpin(adapter)
                self._answers.failed(request_id, adapter)
            else:
                self._answers.give(request_id)

    def load(self, adapter: RegisteredAdapter) -> None:
        """Load a pinned adapter if it is not where it is pinned."""
        tier = self._pinned.get(adapter)
        if tier is not None:
            self._loads.ask(adapter, tier, Claim.AWAITED)

    def rearrange(self) -> list[RegisteredAdapter]:
        """Move up what has been pinned low, and if a load lacks room, whatever can go higher: it may join its room.

        Returns the adapters that have left a tier for that.
        """
        for adapter, tier in list(self._to_raise.items()):
            if not adapter.busy:
                del self._to_raise[adapter]
                self._loads.raise_pinned(adapter, tier)
        left = []
        for name, size in self._loads.lacking_room().items():
            pinned = [adapter for adapter, tier in self._pinned.items() if tier == name and not adapter.busy]
            if not any(self._loads.raise_pinned(adapter, name) for adapter in pinned):
                left += self._put_in_again(name, size, pinned)
        return left

    def _put_in_again(self, name: Tier, size: int, pinned: list[RegisteredAdapter]) -> list[RegisteredAdapter]:
        """Where the pinned bar a load and no hole among them holds one of them, move one up through the other tier.

        For the time of a copy it cannot be used; what it holds is never lost.
        """
        tiers = self._loads.tiers
        other: Tier = "host" if name == "device" else "device"
        for adapter in pinned if tiers[name].walled_off(size) else []:
            if adapter.failed or not tiers[name].would_rise(adapter.digest):
                continue
            if tiers[other].holds(adapter.digest):
                tiers[name].drop(adapter.digest)
                adapter.sites = None
                self._loads.ask(adapter, name, Claim.AWAITED)
                return [adapter]
            if adapter.size is not None and adapter.size <= tiers[other].limit(adapter.digest):
                self._loads.ask(adapter, other, Claim.AWAITED)
                return []
        return []

    def check(self) -> None:
        for adapter, tier in self._pinned.items():
            assert self._loads.tiers[tier].pinned(adapter.digest)
            assert not adapter.retired
        assert self._to_raise.keys() <= self._pinned.keys()

    def _pin(self, adapter: RegisteredAdapter, name: Tier, size: int) -> str | None:
        """Why an adapter cannot be pinned, None if it is."""
        if self._pinned.get(adapter) == name:
            return None
        tier = self._loads.tiers[name]
        if not tier.pin(adapter.digest, size):
            most = tier.capacity_bytes // PINNED_SHARE
            return f"it takes {size} bytes; {tier.bytes_pinned} of the {most} that pins may take in {name} memory are"
        self._unpin(adapter)
        self._pinned[adapter] = self._to_raise[adapter] = name
        self._loads.ask(adapter, name, Claim.AWAITED)
        return None

    def _unpin(self, adapter: RegisteredAdapter) -> None:
        tier = self._pinned.pop(adapter, None)
        self._to_raise.pop(adapter, None)
        if tier is not None:
            self._loads.tiers[tier].unpin(adapter.digest)
