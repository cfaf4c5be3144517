"""Weighted sums of adapters: composed when a request asks for one, and remembered for the next."""

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

from runtime.adapter_format.errors import InvalidAdapter
from runtime.adapter_format.mix import Mix
from service.catalog.blobs import REASONS, Blobs, Ingredient, Recipe
from service.catalog.record import AdapterRecord, AdapterVersion
from service.catalog.versions import Versions
from service.errors import RequestError
from storage.store import StoreError

MAX_MIXES = 64  # that are remembered while no request runs on them
MAX_BYTES = 1 << 30  # of their files; one larger mix may be the only one
MAX_COMPOSING = 32  # at once: they wait for each other
_Key = tuple[tuple[str, float], ...]  # digests and weights, sorted


class Weighted(NamedTuple):
    """One part of a mix."""

    name: str  # as the request has it
    version: AdapterVersion
    weight: float


class Mixes:
    """Owns the mixes that are remembered, the least recently used first; each holds one reference to its digest.

    A mix has no name and is not stored. Its key is what its parts are, not what they are called.
    """

    def __init__(self, blobs: Blobs, versions: Versions, max_rank: int) -> None:
        self._blobs, self._versions, self._max_rank = blobs, versions, max_rank
        self._mixes: OrderedDict[_Key, Mix] = OrderedDict()
        self._composing: dict[_Key, asyncio.Task[None]] = {}

    @asynccontextmanager
    async def using(self, parts: Sequence[Weighted]) -> AsyncIterator[AdapterVersion]:
        """The sum of weight·delta over adapters, as an adapter that is kept while one request runs on it.

        The caller keeps the parts in use. Raises RequestError: `invalid_mix` for parts that cannot be added up,
        `adapter_failed` if a part's file cannot be had, `queue_full` while too many other mixes are being composed.
        """
        _require_one_invocation(parts)
        parts = sorted(parts, key=lambda part: (part.version.digest, part.weight))
        key = tuple((part.version.digest, part.weight) for part in parts)
        while (mix := self._mixes.get(key)) is None or not self._blobs.here(mix.digest):
            if key not in self._composing:
                if len(self._composing) >= MAX_COMPOSING:
                    message = f"{MAX_COMPOSING} other mixes of adapters are being composed: try again later"
                    raise RequestError("queue_full", message, "adapters")
                self._composing[key] = asyncio.create_task(self._compose(key, parts))
                self._composing[key].add_done_callback(_heard)  # also if every client that waited has gone away
            await asyncio.shield(self._composing[key])
        self._mixes.move_to_end(key)
        version = AdapterVersion(_record(parts, mix, self._versions.base), ephemeral=True)
        with self._versions.using(version):
            yield version

    def sweep(self) -> None:
        """Forget the mixes of adapters that have no name any more and no requests."""
        for key, mix in list(self._mixes.items()):
            if not all(self._blobs.referenced(digest) for digest, _ in key):
                del self._mixes[key]
                self._blobs.release(mix.digest)

    async def close(self) -> None:
        """Stop composing; the files go with the scratch directory."""
        tasks = list(self._composing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def check(self) -> None:
        """Recount the references to all digests, those of mixes included. Call it only while no change is under way."""
        assert len(self._mixes) <= MAX_MIXES
        assert len(self._mixes) <= 1 or sum(mix.bytes for mix in self._mixes.values()) <= MAX_BYTES
        self._versions.check(Counter(mix.digest for mix in self._mixes.values()))

    async def _compose(self, key: _Key, parts: Sequence[Weighted]) -> None:
        """Remember a mix, in place of the one whose file is gone; forget the oldest beyond the bounds."""
        try:
            mix = await self._blobs.mix(_recipe(parts, self._max_rank))
        except InvalidAdapter as error:
            raise RequestError("invalid_mix", f"adapters cannot be added up: {error}", "adapters") from None
        except (StoreError, OSError) as error:
            reason = REASONS.get(type(error), "its file cannot be read")
            message = f"adapters: the mix cannot be composed, because of one of its adapters: {reason}"
            raise RequestError("adapter_failed", message, "adapters") from error
        finally:
            del self._composing[key]
        if (old := self._mixes.pop(key, None)) is not None:
            self._blobs.release(old.digest)
        self._mixes[key] = mix
        self.sweep()
        size = sum(each.bytes for each in self._mixes.values())
        while len(self._mixes) > MAX_MIXES or (size > MAX_BYTES and len(self._mixes) > 1):
            _, oldest = self._mixes.popitem(last=False)
            size -= oldest.bytes
            self._blobs.release(oldest.digest)


def _heard(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()


def _require_one_invocation(parts: Sequence[Weighted]) -> None:
    first = parts[0]
    for part in parts:
        if part.version.record.invocation_tokens != first.version.record.invocation_tokens:
            message = (
                f"adapters: {first.name!r} {_begins(first.version)} and {part.name!r} {_begins(part.version)}: "
                "mix plain LoRAs, or aLoRAs of one invocation, which begin at one place"
            )
            raise RequestError("invalid_mix", message, f"adapters.{part.name}")


def _begins(version: AdapterVersion) -> str:
    tokens = version.record.invocation_tokens
    if tokens is None:
        return "is a plain LoRA"
    return f"is an aLoRA with the invocation {tokens[:16]}{' and more tokens' if len(tokens) > 16 else ''}"


def _recipe(parts: Sequence[Weighted], max_rank: int) -> Recipe:
    ingredients = [Ingredient(part.version.digest, part.weight, part.version.record.bytes) for part in parts]
    return Recipe(tuple(ingredients), max_rank)


def _record(parts: Sequence[Weighted], mix: Mix, base: str) -> AdapterRecord:
    """What is known of a mix; its name is for messages only."""
    records = [part.version.record for part in parts]
    templates = {record.chat_template for record in records}
    return AdapterRecord(
        name=" + ".join(f"{part.weight:g} {part.name}" for part in parts),
        digest=mix.digest,
        generation=1,
        kind=records[0].kind,
        rank=mix.rank,
        targets=sorted({target for record in records for target in record.targets}),
        bytes=mix.bytes,
        source="mix",
        created_at=time.time(),
        pinned=False,
        warnings=[],
        base=base,
        invocation_tokens=records[0].invocation_tokens,
        leaves_kv=all(record.leaves_kv for record in records),
        chat_template=templates.pop() if len(templates) == 1 else None,
    )
