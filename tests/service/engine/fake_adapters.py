"""The fake engine's adapters: where each is, whose file is missing, who waits for it, which one is pinned."""

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from runtime.config import CPU_SIZES, EngineConfig
from runtime.messages import (
    AdapterState,
    Answer,
    EngineCode,
    Event,
    LoadAdapter,
    PinsSet,
    Refusal,
    SetPins,
    Tier,
    TierStats,
    UnloadAdapter,
)

ADAPTER_BYTES = 100  # of any adapter, in each tier


@dataclass
class FakeAdapter:
    """An adapter that the engine knows."""

    path: Path
    tier: Tier | None = None  # the highest that holds it
    pinned: Tier | None = None
    loads: list[LoadAdapter] = field(default_factory=list)  # they wait for its file
    failure: str | None = None  # why its file cannot be had, until it is registered again
    retired: bool = False  # it leaves when the last request on it has ended


@dataclass
class FakePins:
    """Pins that are not decided; without a request id, none."""

    request_id: str | None = None
    waiting: dict[str, Tier] = field(default_factory=dict)  # by digest: their files are missing
    refused: dict[str, Refusal] = field(default_factory=dict)


class FakeAdapters:
    """A load is done at once if the file is there. One adapter can be pinned."""

    def __init__(self, config: EngineConfig):
        self._known: dict[str, FakeAdapter] = {}
        self._bytes: dict[Tier, int] = {
            "device": config.sizes(CPU_SIZES).adapter_bytes,
            "host": config.host_adapter_bytes,
        }
        self._loads: dict[Tier, int] = {"device": 0, "host": 0}
        self._pins = FakePins()

    def _find(self, digest: str) -> FakeAdapter | None:
        adapter = self._known.get(digest)
        return None if adapter is None or adapter.retired else adapter

    def usable(self, digest: str) -> bool:
        """Whether a request can be queued for an adapter."""
        adapter = self._find(digest)
        return adapter is not None and adapter.failure is None

    def failure(self, digest: str) -> str:
        """Why an adapter is not usable."""
        adapter = self._find(digest)
        return f"adapter {digest} is not registered" if adapter is None else f"adapter {digest}: {adapter.failure}"

    def on_device(self, digest: str) -> bool:
        return digest in self._known and self._known[digest].tier == "device"

    def register(self, digest: str, path: Path) -> list[Event]:
        adapter = self._known.setdefault(digest, FakeAdapter(path))
        adapter.path, adapter.failure, adapter.retired = path, None, False
        loads, adapter.loads = adapter.loads, []
        events = [event for load in loads for event in self.load(load)] or [self._state(digest)]
        return [*events, *self._pin(digest), *self._decided()]

    def fail(self, digest: str, reason: str) -> list[Event]:
        adapter = self._find(digest)
        if adapter is None or not (adapter.loads or digest in self._pins.waiting):
            return []
        adapter.failure = reason
        state = AdapterState(digest=digest, state="failed", reason=reason)
        answers = self._refuse_loads(digest, "adapter_failed", reason)
        return [state, *answers, *self._pin(digest), *self._decided()]

    def retire(self, digest: str, in_use: Collection[str]) -> list[Event]:
        adapter = self._find(digest)
        if adapter is None:
            return []
        answers = self._refuse_loads(digest, "unknown_adapter", f"adapter {digest} has been retired")
        adapter.retired, adapter.pinned = True, None
        return [*self.drop_retired(in_use), *answers, *self._pin(digest), *self._decided()]

    def drop_retired(self, in_use: Collection[str]) -> list[Event]:
        """Forget the retired adapters on which no request runs."""
        dropped = [digest for digest, adapter in self._known.items() if adapter.retired and digest not in in_use]
        for digest in dropped:
            del self._known[digest]
        return [AdapterState(digest=digest, state="retired") for digest in dropped]

    def load(self, command: LoadAdapter) -> list[Event]:
        """Load an adapter into a tier; a command with a request id is answered."""
        digest, tier = command.digest, command.tier
        adapter = self._find(digest)
        if adapter is None:
            return _answer(command, "unknown_adapter", f"adapter {digest} is not registered")
        if adapter.failure is not None:
            return _answer(command, "adapter_failed", adapter.failure)
        if not adapter.path.exists():
            adapter.loads.append(command)
            return [AdapterState(digest=digest, state="missing", reason="the file is missing")]
        seconds = {} if adapter.tier else {"read": 0.01, "pack": 0.02}
        self._loads["host"] += adapter.tier is None
        if tier == "device" and adapter.tier != "device":
            self._loads["device"] += 1
            seconds["copy"] = 0.04
        adapter.tier = "device" if "device" in (tier, adapter.tier) else "host"
        began = time.monotonic()
        stages = {stage: (began, began + spent) for stage, spent in seconds.items()}
        return [self._state(digest, stages), *_answer(command)]

    def unload(self, command: UnloadAdapter, *, in_use: bool) -> list[Event]:
        adapter = self._find(command.digest)
        if adapter is None:
            return _answer(command, "unknown_adapter", f"adapter {command.digest} is not registered")
        if adapter.pinned in (command.tier, "device"):
            return _answer(command, "adapter_pinned", "it is pinned")
        if in_use:
            return _answer(command, "adapter_in_use", "it is in use")
        adapter.tier = "host" if command.tier == "device" and adapter.tier is not None else None
        return [self._state(command.digest), *_answer(command)]

    def set_pins(self, command: SetPins) -> list[Event]:
        """Pin what there is room for; answered once the files of all are there or cannot be had."""
        events = self._decided("superseded", "other pins were asked for")
        for digest, adapter in self._known.items():
            if adapter.pinned not in (None, command.pins.get(digest)):
                adapter.pinned = None
                events.append(self._state(digest))
        self._pins = FakePins(command.request_id, dict(command.pins))
        for digest in command.pins:
            events += self._pin(digest)
        return events + self._decided()

    def _pin(self, digest: str) -> list[Event]:
        """Pin an adapter, refuse it, or report that its file is missing; nothing if no pins wait for it."""
        tier = self._pins.waiting.get(digest)
        if tier is None:
            return []
        adapter = self._find(digest)
        if adapter is None:
            return self._refuse_pin(digest, "unknown_adapter", f"adapter {digest} is not registered")
        if adapter.failure is not None:
            return self._refuse_pin(digest, "adapter_failed", adapter.failure)
        if not adapter.path.exists():
            return [AdapterState(digest=digest, state="missing", reason="the file is missing")]
        if any(other.pinned for other in self._known.values() if other is not adapter):
            return self._refuse_pin(digest, "pins_full", "there is room for one")
        del self._pins.waiting[digest]
        adapter.pinned = tier
        return self.load(LoadAdapter(digest=digest, tier=tier))

    def _refuse_pin(self, digest: str, code: EngineCode, message: str) -> list[Event]:
        if self._pins.waiting.pop(digest, None) is not None:
            self._pins.refused[digest] = Refusal(code, message)
        return []

    def _decided(self, code: EngineCode | None = None, message: str = "") -> list[Event]:
        """The answer to the last pins if all are decided, or with a code, which refuses those that wait."""
        if code is not None:
            for digest in list(self._pins.waiting):
                self._refuse_pin(digest, code, message)
        if self._pins.request_id is None or self._pins.waiting:
            return []
        answer = PinsSet(request_id=self._pins.request_id, refused=self._pins.refused)
        self._pins = FakePins()
        return [answer]

    def stats(self, tier: Tier) -> TierStats:
        held = sorted(d for d, adapter in self._known.items() if adapter.tier in {"device", tier})
        pinned = [digest for digest in held if self._known[digest].pinned == tier]
        return TierStats(
            bytes_total=self._bytes[tier],
            bytes_used=ADAPTER_BYTES * len(held),
            bytes_pinned=ADAPTER_BYTES * len(pinned),
            adapters=held,
            loads=self._loads[tier],
            evictions=3,
            hits=2,
            misses=1,
        )

    def _refuse_loads(self, digest: str, code: EngineCode, message: str) -> list[Event]:
        loads, self._known[digest].loads = self._known[digest].loads, []
        return [event for load in loads for event in _answer(load, code, message)]

    def _state(self, digest: str, stages: dict[str, tuple[float, float]] | None = None) -> AdapterState:
        adapter = self._known[digest]
        return AdapterState(digest=digest, state="idle", tier=adapter.tier, pinned=adapter.pinned, stages=stages or {})


def _answer(command: LoadAdapter | UnloadAdapter, code: EngineCode | None = None, message: str = "") -> list[Event]:
    if command.request_id is None:
        return []
    return [Answer(request_id=command.request_id, code=code, message=message)]
