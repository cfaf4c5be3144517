"""In which tier of adapter memory the named adapters are kept: pins, loads and unloads."""

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from runtime.messages import Tier
from service.catalog.files import AdapterStorage
from service.engine.adapters import EngineAdapters
from service.errors import EngineError

_log = logging.getLogger(__name__)
_PIN_SHARE = 0.5  # of the disk cache, as of each tier of memory: what is pinned must leave room for the rest


class Pin(NamedTuple):
    """What a name keeps in a tier: a digest, whose file has `size` bytes."""

    digest: str
    tier: Tier
    size: int


class Residency:
    """Owns which name pins which digest; a digest is pinned in the highest tier that any of its names asks for."""

    def __init__(self, storage: AdapterStorage, engine: EngineAdapters) -> None:
        self._files, self._disk, self._engine = storage.files, storage.disk, engine
        self._pins: dict[str, Pin] = {}  # granted, by name
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[None]] = set()

    async def pin(self, name: str, digest: str, tier: Tier | None, size: int) -> None:
        """Make a name pin a digest (of `size` bytes) in a tier, instead of what it pinned before, or nothing.

        Raises EngineError when there is no room to pin it in, and leaves everything as it was.
        """
        async with self._locked(f"name {name}"):
            before = self._pins.get(name)
            after = None if tier is None else Pin(digest, tier, size)
            if before == after:
                return
            digests = {pin.digest for pin in (before, after) if pin is not None}
            async with AsyncExitStack() as stack:
                for each in sorted(digests):  # in one order everywhere, so that no two wait for each other
                    await stack.enter_async_context(self._locked(each))
                try:
                    await self._replace(name, before, after)
                except EngineError as error:
                    raise EngineError(error.code, error.message, "pin") from error

    async def _replace(self, name: str, before: Pin | None, after: Pin | None) -> None:
        try:
            await self._change(name, after)
        except EngineError:
            if before is None or after is None or before.digest == after.digest:
                raise
            await self._change(name, None)  # its room may be what the new one needs
            try:
                await self._change(name, after)
            except EngineError:
                await self._restore(name, before)
                raise

    async def _restore(self, name: str, pin: Pin) -> None:
        try:
            await self._change(name, pin)
        except EngineError as error:
            _log.error("adapter %s is pinned no longer, another one took its room: %s", name, error)

    def pin_later(self, name: str, digest: str, tier: Tier | None, size: int) -> None:
        """`pin`, without waiting; a refusal goes to the log."""
        self._start(self._try_pin(name, digest, tier, size))

    async def load(self, digest: str, tier: Tier, *, wait: bool) -> None:
        """Start to bring a digest into a tier and, if asked, wait until it is there. Raises EngineError."""
        if not wait:
            self._engine.prefetch(digest, tier)
            return
        try:
            await self._engine.load(digest, tier)
        except EngineError as error:
            raise EngineError(error.code, error.message, "name") from error

    async def unload(self, digest: str, tier: Tier) -> None:
        """Give back a digest's memory in a tier and above. Raises EngineError when it is in use or pinned."""
        try:
            await self._engine.unload(digest, tier)
        except EngineError as error:
            raise EngineError(error.code, error.message, "name") from error

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def settle(self) -> None:
        """Wait until no change is under way."""
        while self._tasks:
            await asyncio.gather(*self._tasks)

    async def _change(self, name: str, pin: Pin | None) -> None:
        """Have the engine do what a name's new pin takes, then note it. Raises EngineError, before anything is done.

        The caller has the locks of the name and of both digests.
        """
        before = self._pins.get(name)
        changed = {digest: self._tier(digest, name, pin) for digest in {it.digest for it in (before, pin) if it}}
        for digest, tier in sorted(changed.items(), key=lambda item: item[1] is None):  # what may be refused first
            await self._apply(digest, self._tier(digest), tier, 0 if pin is None else pin.size)
        if pin is None:
            self._pins.pop(name, None)
        else:
            self._pins[name] = pin

    async def _apply(self, digest: str, was: Tier | None, now: Tier | None, size: int) -> None:
        if now is None and was is not None:
            with suppress(EngineError):  # the engine has forgotten it, or is no more: either way it is not pinned
                await self._engine.pin(digest, None)
            self._files.release(digest, pinned=True)
        elif now != was:
            if was is None:
                self._require_disk(size)
            await self._engine.pin(digest, now)
            if was is None:
                self._files.hold(digest, pinned=True)

    def _tier(self, digest: str, name: str | None = None, pin: Pin | None = None) -> Tier | None:
        """Where a digest is pinned; with a name, where it would be if the name had that pin."""
        pins = [other for owner, other in self._pins.items() if owner != name]
        tiers = {other.tier for other in (*pins, pin) if other is not None and other.digest == digest}
        return "device" if "device" in tiers else "host" if tiers else None

    def _require_disk(self, size: int) -> None:
        if self._disk is None:
            return
        pinned = size + sum({pin.digest: pin.size for pin in self._pins.values()}.values())
        if pinned > _PIN_SHARE * self._disk.capacity_bytes:
            message = (
                f"pinned adapters would take {pinned} bytes, and at most half of the disk cache's "
                f"{self._disk.capacity_bytes} may be pinned"
            )
            raise EngineError("pins_full", message)

    def _locked(self, what: str) -> asyncio.Lock:
        return self._locks.setdefault(what, asyncio.Lock())

    async def _try_pin(self, name: str, digest: str, tier: Tier | None, size: int) -> None:
        try:
            await self.pin(name, digest, tier, size)
        except EngineError as error:
            _log.error("adapter %s is not pinned: %s", name, error)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
