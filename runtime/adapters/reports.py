"""What is told of adapters: each change of state, tier or pin, once."""

from collections.abc import Callable

import msgspec

from runtime.adapters.registered import RegisteredAdapter
from runtime.adapters.tier import AdapterTier
from runtime.messages import AdapterState, Tier


class AdapterReports:
    """Collects the adapters that may have changed and makes one report of each; `tiers` are the highest first."""

    def __init__(self, tiers: tuple[AdapterTier, ...], pinned_in: Callable[[RegisteredAdapter], Tier | None]) -> None:
        self._tiers = tiers
        self._pinned_in = pinned_in
        self._touched: dict[RegisteredAdapter, None] = {}

    def touch(self, adapter: RegisteredAdapter) -> None:
        """Something of the adapter may have changed."""
        self._touched[adapter] = None

    def take(self) -> list[AdapterState]:
        """The changes since the last call, in the order in which the adapters were first touched."""
        touched, self._touched = self._touched, {}
        return [state for adapter in touched if (state := self._report(adapter)) is not None]

    def _report(self, adapter: RegisteredAdapter) -> AdapterState | None:
        held = [tier.name for tier in self._tiers if not adapter.dropped and tier.holds(adapter.digest)]
        state = AdapterState(
            digest=adapter.digest,
            state=adapter.state,
            tier=held[0] if held else None,
            pinned=self._pinned_in(adapter),
            reason=adapter.reason,
        )
        if state == adapter.reported and not adapter.seconds:
            return None
        adapter.reported = state
        seconds, adapter.seconds = adapter.seconds, {}
        return msgspec.structs.replace(state, seconds=seconds)
