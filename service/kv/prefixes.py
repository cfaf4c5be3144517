"""Held prefixes: of which adapter version, until when, and why one is held no longer."""

import asyncio
import time
from contextlib import ExitStack
from typing import NamedTuple
from uuid import uuid4

from runtime.messages import HoldPrefix, PrefixHeld
from service.catalog.record import AdapterVersion
from service.catalog.versions import Versions
from service.engine.prefixes import EnginePrefixes, HeldPrefix
from service.errors import RequestError
from service.keys.caller import ANYONE, Caller
from service.openai.invocation import Prompt

MAX_PREFIXES = 4096  # held at once: the engine bounds blocks only, and prefixes may share theirs
MAX_ENDED = 1000  # ended prefixes whose reason is kept

REASONS = {
    "expired": "its time is over",
    "dropped": "its namespace was dropped",
    "released": "it was released",
    "adapter_retired": "its adapter was deleted",
    "adapter_deleted": "its adapter was deleted",
    "engine_died": "the engine died",
}


class PrefixSpec(NamedTuple):
    """A prefix to compute."""

    model: str  # as the client named it
    version: AdapterVersion | None  # the adapter that the model is; None: the base
    prompt: Prompt
    ttl_seconds: float
    cache_salt: str
    tenant: str = ""  # whose turn it is to compute; empty: that of the cache_salt
    owner: str | None = None  # the id of the key that holds it


class Ended(NamedTuple):
    """Why a prefix is held no longer, and the id of the key that held it."""

    reason: str
    owner: str | None


class Prefix:
    """A prefix that is held or is being computed. Times are seconds since 1970."""

    def __init__(self, spec: PrefixSpec) -> None:
        self.id = f"prefix-{uuid4().hex}"
        self.spec = spec
        self.held: PrefixHeld | None = None  # None while it is computed
        self.created_at = self.expires_at = time.time()
        self.using = ExitStack()  # the use of the adapter version
        self.timer: asyncio.Task[None] | None = None

    def command(self) -> HoldPrefix:
        """The message that makes the engine compute and hold the prefix."""
        prompt = self.spec.prompt
        return HoldPrefix(
            request_id=self.id,
            prefix_id=self.id,
            token_ids=prompt.token_ids,
            adapter=prompt.adapter,
            invocation_start=prompt.invocation_start,
            kv_is_base=prompt.kv_is_base,
            cache_salt=self.spec.cache_salt,
            tenant=self.spec.tenant,
        )


class Prefixes:
    """Owns the held prefixes and their time limits. Each one uses the adapter version of its K/V, like a request."""

    def __init__(self, engine: EnginePrefixes, versions: Versions) -> None:
        self._engine, self._versions = engine, versions
        self._prefixes: dict[str, Prefix] = {}
        self._ended: dict[str, Ended] = {}  # by prefix id, the oldest first

    async def hold(self, spec: PrefixSpec) -> Prefix:
        """Compute a prefix and hold it for its `ttl_seconds`. Raises RequestError."""
        prefix, handle = await self._compute(spec)
        prefix.expires_at = time.time() + spec.ttl_seconds
        prefix.timer = asyncio.create_task(self._watch(prefix, handle), name=prefix.id)
        return prefix

    async def warm(self, spec: PrefixSpec) -> Prefix:
        """Compute a prefix and hold nothing: the cache may evict its blocks. Raises RequestError."""
        prefix, _ = await self._compute(spec)
        self._engine.release(prefix.id)
        self._forget(prefix.id)
        return prefix

    def list(self, caller: Caller = ANYONE) -> list[Prefix]:
        """Every held prefix of a caller, the oldest first."""
        return [prefix for prefix in self._prefixes.values() if _of(prefix, caller)]

    def get(self, prefix_id: str, caller: Caller = ANYONE) -> Prefix:
        """A held prefix of a caller. Raises RequestError, with the reason if it held it before."""
        prefix = self._prefixes.get(prefix_id)
        if prefix is not None and _of(prefix, caller):
            return prefix
        ended = self._ended.get(prefix_id)
        reason = ended.reason if ended is not None and caller.owns(ended.owner) else None
        why = "there is no such prefix" if reason is None else f"it is held no longer: {REASONS.get(reason, reason)}"
        raise RequestError("prefix_not_found", f"prefix {prefix_id!r}: {why}", "id")

    def release(self, prefix_id: str, caller: Caller = ANYONE) -> None:
        """Stop holding a prefix. Raises RequestError as `get` does."""
        self._end(self.get(prefix_id, caller), "released")

    async def close(self) -> None:
        """Release every prefix."""
        timers = [prefix.timer for prefix in self._prefixes.values() if prefix.timer is not None]
        for prefix_id in list(self._prefixes):
            self._forget(prefix_id)
        await asyncio.gather(*timers, return_exceptions=True)

    async def _compute(self, spec: PrefixSpec) -> tuple[Prefix, HeldPrefix]:
        if len(self._prefixes) >= MAX_PREFIXES:
            raise RequestError("prefixes_full", f"{MAX_PREFIXES} prefixes are held already: release one first")
        prefix = Prefix(spec)
        self._prefixes[prefix.id] = prefix
        try:
            if spec.prompt.adapter is not None and spec.version is not None:
                prefix.using.enter_context(self._versions.using(spec.version))
            prefix.held, handle = await self._engine.hold(prefix.command())
        except BaseException:
            self._forget(prefix.id)
            raise
        return prefix, handle

    async def _watch(self, prefix: Prefix, handle: HeldPrefix) -> None:
        """Wait until a prefix expires, or until the engine ends it before that."""
        try:
            async with asyncio.timeout(prefix.spec.ttl_seconds):
                reason = await handle.ended
        except TimeoutError:
            reason = "expired"
        self._end(prefix, reason)

    def _end(self, prefix: Prefix, reason: str) -> None:
        if self._forget(prefix.id):
            self._engine.release(prefix.id)
            self._ended[prefix.id] = Ended(reason, prefix.spec.owner)
            if len(self._ended) > MAX_ENDED:
                del self._ended[next(iter(self._ended))]

    def _forget(self, prefix_id: str) -> bool:
        prefix = self._prefixes.pop(prefix_id, None)
        if prefix is not None:
            prefix.using.close()
            if prefix.timer is not None and prefix.timer is not asyncio.current_task():
                prefix.timer.cancel()
        return prefix is not None


def _of(prefix: Prefix, caller: Caller) -> bool:
    """Whether a prefix is held, and of the caller's."""
    return prefix.held is not None and caller.owns(prefix.spec.owner)
