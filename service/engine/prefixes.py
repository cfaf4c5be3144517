"""Prefixes whose K/V the engine computes and holds."""

import asyncio

from runtime.messages import DropNamespace, Failed, HoldPrefix, PrefixEnded, PrefixHeld, ReleasePrefix
from service.engine.connection import Connection, fail, succeed
from service.errors import EngineError


class HeldPrefix:
    """A prefix that the engine computes, and then holds until it is released or ends."""

    def __init__(self, command: HoldPrefix) -> None:
        loop = asyncio.get_running_loop()
        self.id, self.adapter = command.prefix_id, command.adapter
        self.computed: asyncio.Future[PrefixHeld] = loop.create_future()
        self.ended: asyncio.Future[str] = loop.create_future()  # why it ended without having been released


class EnginePrefixes:
    """Has the engine compute and hold prefixes; none of them outlives its engine."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._prefixes: dict[str, HeldPrefix] = {}  # by prefix id: computed, or being computed

    async def hold(self, command: HoldPrefix) -> tuple[PrefixHeld, HeldPrefix]:
        """Returns when the prefix is computed and held; a caller that is cancelled holds nothing.

        Raises EngineError when the engine refuses the prefix, fails at it, or dies.
        """
        self._connection.require()
        prefix = self._prefixes[command.prefix_id] = HeldPrefix(command)
        try:
            self._connection.send(command)
            return await prefix.computed, prefix
        except asyncio.CancelledError:
            self.release(command.prefix_id)
            raise
        except EngineError:
            self._prefixes.pop(command.prefix_id, None)
            raise

    def release(self, prefix_id: str) -> None:
        """Stop holding a prefix, or computing it."""
        self._prefixes.pop(prefix_id, None)
        self._connection.send(ReleasePrefix(prefix_id=prefix_id))

    async def drop_namespace(self, namespace: str | None) -> None:
        """Make the K/V of an adapter (a digest), or of the base, unfindable. Raises EngineError."""
        request_id = self._connection.new_id()
        await self._connection.ask(request_id, DropNamespace(request_id=request_id, namespace=namespace))

    def end(self, failure: EngineError, adapter: str | None = None) -> None:
        """Give up every prefix, held or being computed, or those of one adapter."""
        for prefix in list(self._prefixes.values()):
            if adapter is None or prefix.adapter == adapter:
                self.release(prefix.id)
                self._finish(prefix, failure)

    def on_event(self, event: PrefixHeld | PrefixEnded | Failed) -> None:
        prefix_id = event.request_id if isinstance(event, Failed) else event.prefix_id
        prefix = self._prefixes.get(prefix_id)
        if prefix is None:
            return  # its caller was cancelled, and has released it
        if isinstance(event, PrefixHeld):
            succeed(prefix.computed, event)
        elif isinstance(event, Failed):
            fail(prefix.computed, EngineError(event.code, event.message))
        else:
            del self._prefixes[prefix_id]
            succeed(prefix.ended, event.reason)

    def _finish(self, prefix: HeldPrefix, failure: EngineError) -> None:
        if prefix.computed.done():
            succeed(prefix.ended, failure.code)
        else:
            fail(prefix.computed, failure)
