"""What adapters need of the engine's client, without an engine: it remembers what it was told."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

from runtime.messages import AdapterState, Refusal, Tier
from service.engine.adapters import StateChange
from service.errors import EngineError


class AdapterEngine:
    """A test plays the engine's part with `want`, and sets `refuse` to the code of what comes next."""

    def __init__(self) -> None:
        self.adapters = self  # a client's part for adapters, and the rest that adapters need of a client
        self.changes: asyncio.Queue[StateChange] = asyncio.Queue()
        self.states: dict[str, AdapterState] = {}
        self.registered: dict[str, Path] = {}
        self.loads: list[tuple[str, Tier]] = []
        self.retired: list[str] = []
        self.fetches: list[tuple[str, float]] = []
        self.failed: dict[str, str] = {}
        self.pins: dict[str, Tier] = {}
        self.unloads: list[tuple[str, Tier]] = []
        self.ended: list[str | None] = []
        self.refuse: str | None = None
        self.most_pins = 100
        self.running = 0  # requests

    def busy(self) -> bool:
        return self.running > 0

    def want(self, digest: str) -> None:
        """Say that a registered adapter's file is not there, or not whole."""
        assert digest in self.registered
        del self.registered[digest]
        self.changes.put_nowait(StateChange(AdapterState(digest=digest, state="missing"), None))

    def settle(self, digest: str) -> None:
        """Say that the file has been read, or is not needed any more."""
        self.changes.put_nowait(StateChange(AdapterState(digest=digest, state="idle"), None))

    def register(self, digest: str, path: Path) -> None:
        self.registered[digest] = path

    def retire(self, digest: str) -> None:
        self.registered.pop(digest, None)
        self.pins.pop(digest, None)
        self.retired.append(digest)

    def fail(self, digest: str, reason: str) -> None:
        self.failed[digest] = reason

    def fetched(self, digest: str, began: float, ended: float) -> None:
        self.fetches.append((digest, ended - began))

    def prefetch(self, digest: str, tier: Tier = "device") -> None:
        self.loads.append((digest, tier))

    async def load(self, digest: str, tier: Tier) -> None:
        self.loads.append((digest, tier))
        self._refuse()

    async def set_pins(self, pins: Mapping[str, Tier]) -> dict[str, Refusal]:
        refused = {}
        self.pins = {digest: tier for digest, tier in self.pins.items() if pins.get(digest) == tier}
        for digest in pins.keys() - self.pins.keys():
            assert digest in self.registered, "an engine can only pin what it knows"
            if self.refuse is not None or len(self.pins) >= self.most_pins:
                refused[digest] = Refusal(self.refuse or "pins_full", "as the test has it")
            else:
                self.pins[digest] = pins[digest]
        return refused

    async def unload(self, digest: str, tier: Tier) -> None:
        self._refuse()
        self.unloads.append((digest, tier))

    async def recent_stats(self) -> None:
        """An engine that never says in time."""

    def end_requests(self, code: str, message: str, digest: str | None = None) -> None:
        self.ended.append(digest)

    def _refuse(self) -> None:
        if self.refuse is not None:
            raise EngineError(self.refuse, "as the test has it")
