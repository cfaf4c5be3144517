"""What adapters need of the engine's client, without an engine: it remembers what it was told."""

from collections.abc import Callable
from pathlib import Path

from runtime.messages import AdapterState, Tier
from service.engine.adapters import RequestFailed


class AdapterEngine:
    """A test plays the engine's part with `want` and sets `refuse` to the code of what comes next."""

    def __init__(self) -> None:
        self.on_wanted: Callable[[str], None] | None = None
        self.on_settled: Callable[[str], None] | None = None
        self.adapter_states: dict[str, AdapterState] = {}
        self.registered: dict[str, Path] = {}
        self.loads: list[tuple[str, Tier]] = []
        self.retired: list[str] = []
        self.failed: dict[str, str] = {}
        self.pins: dict[str, Tier] = {}
        self.unloads: list[tuple[str, Tier]] = []
        self.ended: list[str | None] = []
        self.refuse: str | None = None
        self.running = 0  # requests

    def busy(self) -> bool:
        return self.running > 0

    def want(self, digest: str) -> None:
        """Say that a registered adapter's file is not there, or not whole."""
        assert digest in self.registered
        del self.registered[digest]
        assert self.on_wanted is not None
        self.on_wanted(digest)

    def settle(self, digest: str) -> None:
        """Say that the file has been read, or is not needed any more."""
        assert self.on_settled is not None
        self.on_settled(digest)

    def register_adapter(self, digest: str, path: Path) -> None:
        self.registered[digest] = path

    def retire_adapter(self, digest: str) -> None:
        self.registered.pop(digest, None)
        self.pins.pop(digest, None)
        self.retired.append(digest)

    def fail_adapter(self, digest: str, reason: str) -> None:
        self.failed[digest] = reason

    def load_adapter(self, digest: str, tier: Tier = "device") -> None:
        self.loads.append((digest, tier))

    async def bring_adapter(self, digest: str, tier: Tier) -> None:
        self.loads.append((digest, tier))
        self._refuse()

    async def pin_adapter(self, digest: str, tier: Tier | None) -> None:
        if tier is None:
            self.pins.pop(digest, None)
            return
        assert digest in self.registered, "an engine can only pin what it knows"
        self._refuse()
        self.pins[digest] = tier

    async def unload_adapter(self, digest: str, tier: Tier) -> None:
        self._refuse()
        self.unloads.append((digest, tier))

    async def recent_stats(self) -> None:
        """An engine that never says in time."""

    def end_requests(self, code: str, message: str, digest: str | None = None) -> None:
        self.ended.append(digest)

    def _refuse(self) -> None:
        if self.refuse is not None:
            raise RequestFailed(self.refuse, "as the test has it")
