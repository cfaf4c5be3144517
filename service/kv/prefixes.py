"""Which prefixes are held, of which adapter version, and why those that ended did."""

import time
from contextlib import ExitStack
from typing import NamedTuple
from uuid import uuid4

from runtime.messages import HoldPrefix, PrefixHeld
from service.catalog.record import AdapterVersion
from service.catalog.versions import AdapterView
from service.engine.adapters import RequestFailed
from service.engine.prefixes import EnginePrefixes
from service.openai.invocation import Prompt
from service.responses import ApiError

MAX_PREFIXES = 4096  # held at once: those that share their blocks would not meet the engine's bound
MAX_ENDED = 1000  # of which it is remembered why

REASONS = {
    "expired": "its time is over",
    "dropped": "its namespace was dropped",
    "released": "it was released",
    "adapter_retired": "its adapter was deleted",
    "adapter_deleted": "its adapter was deleted",
    "engine_died": "the engine died",
}


class Wanted(NamedTuple):
    """A prefix to be computed; `model` is what its client called the model, `version` the adapter that this is."""

    model: str
    version: AdapterVersion | None
    prompt: Prompt
    ttl_seconds: float
    cache_salt: str


class Prefix:
    """A prefix that is held, or being computed while `held` is None. Times are seconds since 1970."""

    def __init__(self, wanted: Wanted) -> None:
        self.id = f"prefix-{uuid4().hex}"
        self.wanted = wanted
        self.held: PrefixHeld | None = None
        self.created_at = self.expires_at = time.time()
        self.using = ExitStack()

    def command(self) -> HoldPrefix:
        prompt = self.wanted.prompt
        return HoldPrefix(
            request_id=self.id,
            prefix_id=self.id,
            token_ids=prompt.token_ids,
            ttl_seconds=self.wanted.ttl_seconds,
            adapter=prompt.adapter,
            invocation_start=prompt.activation,
            kv_is_base=prompt.shares_kv,
            cache_salt=self.wanted.cache_salt,
        )


class Prefixes:
    """Owns the held prefixes, and with each the use of the adapter version whose K/V it is."""

    def __init__(self, engine: EnginePrefixes, catalog: AdapterView) -> None:
        self._engine, self._catalog = engine, catalog
        self._prefixes: dict[str, Prefix] = {}
        self._ended: dict[str, str] = {}
        engine.on_prefix_ended = self._end

    async def hold(self, wanted: Wanted) -> Prefix:
        """Compute a prefix and hold it. Raises RequestFailed, and ApiError for an adapter that cannot be used."""
        if len(self._prefixes) >= MAX_PREFIXES:
            raise RequestFailed("prefixes_full", f"{MAX_PREFIXES} prefixes are held already")
        prefix = Prefix(wanted)
        self._prefixes[prefix.id] = prefix  # before the engine can say that it has ended
        try:
            if wanted.prompt.adapter is not None and wanted.version is not None:
                prefix.using.enter_context(self._catalog.using(wanted.version))
            prefix.held = await self._engine.hold_prefix(prefix.command())
        except BaseException:
            self._forget(prefix.id)
            raise
        prefix.expires_at = time.time() + wanted.ttl_seconds
        return prefix

    async def warm(self, wanted: Wanted) -> Prefix:
        """Compute a prefix and hold nothing: it stays as long as the cache keeps it. Raises as `hold` does."""
        prefix = await self.hold(wanted)
        self._engine.release_prefix(prefix.id)
        self._forget(prefix.id)
        return prefix

    def list(self) -> list[Prefix]:
        """Every prefix that is held, the oldest first."""
        self._expire()
        return [prefix for prefix in self._prefixes.values() if prefix.held is not None]

    def get(self, prefix_id: str) -> Prefix:
        """A prefix that is held. Raises ApiError 404, with the reason if it was held."""
        self._expire()
        prefix = self._prefixes.get(prefix_id)
        if prefix is not None and prefix.held is not None:
            return prefix
        reason = self._ended.get(prefix_id)
        why = "there is no such prefix" if reason is None else f"it is held no longer: {REASONS.get(reason, reason)}"
        raise ApiError(404, "prefix_not_found", f"prefix {prefix_id!r}: {why}", "id")

    def release(self, prefix_id: str) -> None:
        """Hold a prefix no longer. Raises ApiError as `get` does."""
        self._release(self.get(prefix_id), "released")

    def close(self) -> None:
        """Let go of every adapter version."""
        for prefix_id in list(self._prefixes):
            self._forget(prefix_id)

    # ------------------------------------------------------------------ inside

    def _expire(self) -> None:
        """The engine says so too, but between two of its steps."""
        now = time.time()
        for prefix in list(self._prefixes.values()):
            if prefix.held is not None and prefix.expires_at <= now:
                self._release(prefix, "expired")

    def _release(self, prefix: Prefix, reason: str) -> None:
        self._engine.release_prefix(prefix.id)
        self._end(prefix.id, reason)

    def _end(self, prefix_id: str, reason: str) -> None:
        if self._forget(prefix_id):
            self._ended[prefix_id] = reason
            if len(self._ended) > MAX_ENDED:
                del self._ended[next(iter(self._ended))]

    def _forget(self, prefix_id: str) -> bool:
        prefix = self._prefixes.pop(prefix_id, None)
        if prefix is not None:
            prefix.using.close()
        return prefix is not None
