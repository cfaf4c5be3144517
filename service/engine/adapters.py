"""What the engine is told of adapters, and what it says of them."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from runtime.messages import (
    AdapterState,
    FailAdapter,
    LoadAdapter,
    PinsSet,
    Refusal,
    RegisterAdapter,
    RetireAdapter,
    SetPins,
    Tier,
    UnloadAdapter,
)
from service.engine.connection import Connection
from service.metrics import Metrics


class StateChange(NamedTuple):
    """What the engine says of an adapter now, and what it said last."""

    now: AdapterState
    before: AdapterState | None


class EngineAdapters:
    """Remembers which adapters the engine must know and pin, so that a new engine can be told all of it again."""

    def __init__(self, connection: Connection, metrics: Metrics) -> None:
        self.states: dict[str, AdapterState] = {}  # by digest: the engine's last word on each adapter
        self.changes: asyncio.Queue[StateChange] = asyncio.Queue()  # every word, for the owner of the files
        self._connection, self._metrics = connection, metrics
        self._paths: dict[str, Path] = {}
        self._stages: dict[str, dict[str, tuple[float, float]]] = {}  # by digest: those of its last load, or fetch
        self._pins: dict[str, Tier] = {}  # by digest: the last wish
        self._had_engine = False

    def register(self, digest: str, path: Path) -> None:
        """Tell the engine, and every later one, where an adapter's canonical file is, or will be once it is fetched."""
        self._paths[digest] = path
        self._connection.send(RegisterAdapter(digest=digest, path=str(path)))

    def retire(self, digest: str) -> None:
        """Forget an adapter; requests that run on it finish."""
        self._paths.pop(digest, None)
        self._stages.pop(digest, None)
        self._pins.pop(digest, None)
        self.states.pop(digest, None)
        self._connection.send(RetireAdapter(digest=digest))

    def fetched(self, digest: str, began: float, ended: float) -> None:
        """The file of an adapter was fetched from a remote store in this time, by the system's monotonic clock."""
        if digest in self._paths:
            self._stages[digest] = {"fetch": (began, ended)}

    def stages_of(self, digest: str | None) -> Mapping[str, tuple[float, float]]:
        """When each stage of an adapter's last load began and ended, on the system's monotonic clock."""
        return self._stages.get(digest or "", {})

    def fail(self, digest: str, reason: str) -> None:
        """Tell the engine that a file which it asked for cannot be fetched."""
        self._connection.send(FailAdapter(digest=digest, reason=reason))

    def prefetch(self, digest: str, tier: Tier = "device") -> None:
        """Start to load an adapter into a tier."""
        self._connection.send(LoadAdapter(digest=digest, tier=tier))

    async def load(self, digest: str, tier: Tier) -> None:
        """Load an adapter into a tier; returns when it is there. Raises EngineError with the reason if it fails."""
        request_id = self._connection.new_id()
        await self._connection.ask(request_id, LoadAdapter(request_id=request_id, digest=digest, tier=tier))

    async def unload(self, digest: str, tier: Tier) -> None:
        """Free an adapter's memory in a tier and above it. Raises EngineError if it is in use or pinned."""
        request_id = self._connection.new_id()
        await self._connection.ask(request_id, UnloadAdapter(request_id=request_id, digest=digest, tier=tier))

    async def set_pins(self, pins: Mapping[str, Tier]) -> dict[str, Refusal]:
        """Pin exactly these adapters, by digest, now and in every later engine; returns those that the engine refuses.

        Raises EngineError if the engine has died. Before the first engine has started, the pins are only remembered.
        """
        self._pins = dict(pins)
        if not self._had_engine:
            return {}
        request_id = self._connection.new_id()
        answer = await self._connection.ask(request_id, SetPins(request_id=request_id, pins=self._pins))
        assert isinstance(answer, PinsSet)
        return answer.refused

    def tell_all(self) -> None:
        """Make a new engine know everything that the last one knew."""
        self._had_engine = True
        for digest, path in self._paths.items():
            self._connection.send(RegisterAdapter(digest=digest, path=str(path)))
        if self._pins:
            self._connection.send(SetPins(request_id=self._connection.new_id(), pins=self._pins))

    def lost(self) -> None:
        """The engine died, and with it every state."""
        self.states.clear()

    def on_state(self, event: AdapterState) -> None:
        if event.stages:
            self._metrics.loaded(event.seconds)
        if event.state == "retired" or event.digest not in self._paths:
            self.states.pop(event.digest, None)
            return
        if event.stages:
            self._stages[event.digest] = {**self._stages.get(event.digest, {}), **event.stages}
        self.changes.put_nowait(StateChange(event, self.states.get(event.digest)))
        self.states[event.digest] = event
