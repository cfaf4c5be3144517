"""Prefixes whose K/V the engine holds, as far as the crossing to it is concerned."""

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from runtime.messages import DropNamespace, Failed, HoldPrefix, PrefixEnded, PrefixHeld, ReleasePrefix
from service.engine.adapters import EngineAdapters, RequestFailed, fail, succeed


class _Asked(NamedTuple):
    adapter: str | None
    prefix_id: str
    answer: "asyncio.Future[PrefixHeld]"


class EnginePrefixes(EngineAdapters):
    """Has the engine compute and hold prefixes; none of them outlives its engine.

    `on_prefix_ended` gets the id of each held prefix that ends without having been released, and a word for why.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on_prefix_ended: Callable[[str, str], None] | None = None
        self._asked: dict[str, _Asked] = {}
        self._held: dict[str, str | None] = {}  # by id: the adapter

    async def hold_prefix(self, command: HoldPrefix) -> PrefixHeld:
        """Return when the prefix is computed, and held; a caller who is cancelled holds nothing.

        Raises RequestFailed when the engine refuses it, fails at it, or dies.
        """
        self._require_engine()
        answer: asyncio.Future[PrefixHeld] = asyncio.get_running_loop().create_future()
        self._asked[command.request_id] = _Asked(command.adapter, command.prefix_id, answer)
        try:
            self._send(command)
            return await answer
        except asyncio.CancelledError:
            self.release_prefix(command.prefix_id)
            raise
        finally:
            del self._asked[command.request_id]

    def release_prefix(self, prefix_id: str) -> None:
        """Hold a prefix no longer."""
        self._held.pop(prefix_id, None)
        self._send(ReleasePrefix(prefix_id=prefix_id))

    async def drop_namespace(self, namespace: str | None) -> None:
        """Make the K/V of an adapter (a digest), or of the base, unfindable. Raises RequestFailed."""
        self._require_engine()
        await self._ask(number := self._number(), DropNamespace(request_id=number, namespace=namespace))

    # ------------------------------------------------------------------ for the client

    def _on_prefix(self, event: PrefixHeld | PrefixEnded | Failed) -> None:
        if isinstance(event, PrefixEnded):
            if event.prefix_id in self._held:
                self._tell_ended(event.prefix_id, event.reason)
            return
        asked = self._asked.get(event.request_id)
        if asked is None:
            return  # whoever asked is gone, and has released it
        if isinstance(event, Failed):
            fail(asked.answer, RequestFailed(event.code, event.message))
        else:
            self._held[event.prefix_id] = asked.adapter
            succeed(asked.answer, event)

    def _end_prefixes(self, failure: RequestFailed, digest: str | None) -> None:
        """Give up every prefix, held or being computed, or those on one adapter."""
        for asked in self._asked.values():
            if digest is None or asked.adapter == digest:
                self.release_prefix(asked.prefix_id)
                fail(asked.answer, failure)
        for prefix_id, adapter in list(self._held.items()):
            if digest is None or adapter == digest:
                self.release_prefix(prefix_id)
                self._tell_ended(prefix_id, failure.code)

    def _tell_ended(self, prefix_id: str, reason: str) -> None:
        self._held.pop(prefix_id, None)
        if self.on_prefix_ended is not None:
            self.on_prefix_ended(prefix_id, reason)
