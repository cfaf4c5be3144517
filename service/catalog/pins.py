"""Which named adapters are pinned: one wish for all of them, which the engine and the disk cache follow."""

import asyncio
import logging
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import NamedTuple

from runtime.messages import Tier
from service.catalog.files import AdapterStorage
from service.engine.adapters import EngineAdapters
from service.errors import EngineError

_log = logging.getLogger(__name__)
_DISK_SHARE = 0.5  # of the disk cache: the rest stays for adapters that are not pinned


class Pin(NamedTuple):
    """What a name pins."""

    digest: str
    tier: Tier
    size: int  # bytes of the file


class Pins:
    """Owns which name pins which digest; a digest is pinned in the highest tier that one of its names asks for."""

    def __init__(self, storage: AdapterStorage, engine: EngineAdapters) -> None:
        self._files, self._disk, self._engine = storage.files, storage.disk, engine
        self._pins: dict[str, Pin] = {}  # by name, as granted
        self._later: dict[str, Pin | None] = {}  # by name, for the next change in the background
        self._changing: Counter[str] = Counter()  # the names of changes under way
        self._lock = asyncio.Lock()  # held from a change of the wish until it is decided
        self._background: asyncio.Task[None] | None = None

    async def pin(self, name: str, digest: str, tier: Tier | None, size: int) -> None:
        """Make a name pin a digest, whose file has `size` bytes, in a tier (None: nothing) instead of what it pinned.

        Raises EngineError if it cannot be pinned, and leaves everything as it was.
        """
        self._later.pop(name, None)  # this change is newer
        if tier is None and name not in self._pins and not self._changing[name]:
            return  # most uploads pin nothing: they do not wait for the pins of others
        refused = await self._change({name: None if tier is None else Pin(digest, tier, size)})
        if name in refused:
            raise refused[name]

    def pin_later(self, name: str, digest: str, tier: Tier | None, size: int) -> None:
        """`pin` without waiting; a refusal is logged."""
        self._later[name] = None if tier is None else Pin(digest, tier, size)
        if self._background is None or self._background.done():
            self._background = asyncio.get_running_loop().create_task(self._change_later())

    async def close(self) -> None:
        """Drop the changes that wait."""
        if self._background is not None:
            self._background.cancel()
            await asyncio.gather(self._background, return_exceptions=True)

    async def until_idle(self) -> None:
        """Wait until no change is under way."""
        if self._background is not None:
            await self._background

    async def _change_later(self) -> None:
        while self._later:
            changes, self._later = self._later, {}
            for name, error in (await self._change(changes)).items():
                _log.error("adapter %s is not pinned: %s", name, error)

    async def _change(self, changes: Mapping[str, Pin | None]) -> dict[str, EngineError]:
        """Change the pins of some names. Returns the refusals by name; a refused name keeps its old pin."""
        self._changing.update(changes.keys())
        try:
            async with self._lock:
                return await self._change_locked(changes)
        finally:
            self._changing.subtract(changes.keys())

    async def _change_locked(self, changes: Mapping[str, Pin | None]) -> dict[str, EngineError]:
        wish = dict(self._pins)
        refused: dict[str, EngineError] = {}
        for name, pin in changes.items():
            if pin is None:
                wish.pop(name, None)
            elif (full := self._disk_full({**wish, name: pin}, pin)) is not None:
                refused[name] = full
            else:
                wish[name] = pin
        if _tiers(wish) != _tiers(self._pins):
            by_digest = await self._ask(wish)
            changed = [name for name, pin in changes.items() if pin is not None and name not in refused]
            by_name = {name: by_digest[wish[name].digest] for name in changed if wish[name].digest in by_digest}
            if by_name:
                await self._go_back(wish, by_name)
                refused |= by_name
        self._hold_files(wish)
        self._pins = wish
        return refused

    async def _ask(self, wish: Mapping[str, Pin]) -> dict[str, EngineError]:
        """Tell the engine the whole wish; returns what it refuses, by digest: everything if there is no engine."""
        tiers = _tiers(wish)
        try:
            refused = await self._engine.set_pins(tiers)
        except EngineError as error:
            return {digest: EngineError(error.code, error.message, "pin") for digest in tiers}
        return {digest: EngineError(refusal.code, refusal.message, "pin") for digest, refusal in refused.items()}

    async def _go_back(self, wish: dict[str, Pin], names: Collection[str]) -> None:
        """Let names pin again what they pinned before, in the wish and in the engine."""
        for name in names:
            del wish[name]
            if name in self._pins:
                wish[name] = self._pins[name]
        with suppress(EngineError):  # there is no engine: the next one is told this wish
            for digest, refusal in (await self._engine.set_pins(_tiers(wish))).items():
                _log.error("adapter %s is pinned no longer: %s", digest, refusal.message)

    def _hold_files(self, wish: Mapping[str, Pin]) -> None:
        """Keep the files of pinned adapters in the disk cache."""
        before, after = _tiers(self._pins).keys(), _tiers(wish).keys()
        for digest in after - before:
            self._files.hold(digest, pinned=True)
        for digest in before - after:
            self._files.release(digest, pinned=True)

    def _disk_full(self, wish: Mapping[str, Pin], pin: Pin) -> EngineError | None:
        """Why the disk cache cannot keep the file of a pin as well."""
        if self._disk is None or pin.digest in _tiers(self._pins):
            return None
        pinned = sum({each.digest: each.size for each in wish.values()}.values())
        if pinned <= _DISK_SHARE * self._disk.capacity_bytes:
            return None
        message = (
            f"pinned adapters would take {pinned} bytes, and at most half of the disk cache's "
            f"{self._disk.capacity_bytes} may be pinned"
        )
        return EngineError("pins_full", message, "pin")


def _tiers(pins: Mapping[str, Pin]) -> dict[str, Tier]:
    """The tier of each digest: the highest that one of its names asks for."""
    tiers: dict[str, Tier] = {}
    for pin in pins.values():
        if tiers.get(pin.digest) != "device":
            tiers[pin.digest] = pin.tier
    return tiers
