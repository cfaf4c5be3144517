"""The KV cache and held prefixes as clients see them."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from runtime.messages import HostKvStats, KvNamespace, Stats
from service.catalog.record import AdapterVersion
from service.kv.prefixes import Prefix
from service.openai.invocation import Invocation
from service.openai.schemas import Alora, Count, Message, Name

TTL_SECONDS, MAX_TTL_SECONDS = 300.0, 86_400.0


class KvBlocks(msgspec.Struct, frozen=True, kw_only=True):
    """`total` are `used` (by running requests and held prefixes), `cached` (free, and can be hit) and `free` ones.

    `held` are those of the used ones that are kept for prefixes.
    """

    total: int
    used: int
    cached: int
    free: int
    held: int


class KvLookups(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of prompts since the engine's start: looked for, and found; null before the first."""

    query_tokens: int
    hit_tokens: int
    hit_rate: float | None


class KvHost(msgspec.Struct, frozen=True, kw_only=True):
    """Host memory for evicted blocks; `stores`, `hits` and `evictions` are blocks since the engine's start."""

    bytes_total: int
    bytes_used: int
    blocks: int
    stores: int
    hits: int
    evictions: int


class KvShare(KvLookups, frozen=True, kw_only=True):
    """What one namespace has: "base", or an adapter's digest; `names` are all that it goes by as a model.

    `blocks_host` are evicted ones that host memory still has.
    """

    namespace: str
    kind: Literal["base", "lora", "alora"] | None
    names: list[str]
    blocks_used: int
    blocks_cached: int
    blocks_host: int


class KvCache(KvLookups, frozen=True, kw_only=True):
    """What GET /kv shows, as it was `age_seconds` ago; `host` is null without a host tier."""

    age_seconds: float
    block_size: int
    blocks: KvBlocks
    host: KvHost | None
    namespaces: list[KvShare]


class PrefixRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A prefix to compute: `messages`, laid out without the assistant's header, or a `prompt`.

    `pin` false computes it and holds nothing: it stays as long as the cache keeps it.
    """

    model: Name
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    prompt: str | list[Count] | None = None
    ttl_seconds: Annotated[float, Meta(gt=0, le=MAX_TTL_SECONDS)] = TTL_SECONDS
    pin: bool = True
    cache_salt: str | None = None
    alora: Alora | None = None


class HeldPrefix(msgspec.Struct, frozen=True, kw_only=True):
    """A prefix. `digest` is its adapter's, null for the base; times are seconds since 1970.

    `cached_tokens` of its `tokens` had been computed before. `activation` is where the adapter begins, `invocation`
    what became of an aLoRA's. One that is not held has neither `id` nor `expires_at`.
    """

    id: str | None
    model: str
    digest: str | None
    activation: int | None
    invocation: Invocation | None
    tokens: int
    blocks: int
    cached_tokens: int
    created_at: float
    expires_at: float | None


class PrefixList(msgspec.Struct, frozen=True, kw_only=True):
    prefixes: list[HeldPrefix]


def held_prefix(prefix: Prefix, *, pinned: bool = True) -> HeldPrefix:
    held, wanted = prefix.held, prefix.wanted
    assert held is not None
    return HeldPrefix(
        id=prefix.id if pinned else None,
        model=wanted.model,
        digest=None if wanted.version is None else wanted.version.digest,
        activation=None if wanted.prompt.adapter is None else wanted.prompt.invocation_start,
        invocation=wanted.prompt.invocation,
        tokens=held.tokens,
        blocks=held.blocks,
        cached_tokens=held.cached_tokens,
        created_at=prefix.created_at,
        expires_at=prefix.expires_at if pinned else None,
    )


def kv_cache(
    stats: Stats, age_seconds: float, block_size: int, served_name: str, versions: Sequence[AdapterVersion]
) -> KvCache:
    """A snapshot; `versions` are the named adapters, `served_name` is the base's."""
    query_tokens = sum(namespace.query_tokens for namespace in stats.namespaces.values())
    hit_tokens = sum(namespace.hit_tokens for namespace in stats.namespaces.values())
    return KvCache(
        age_seconds=round(age_seconds, 3),
        block_size=block_size,
        blocks=KvBlocks(
            total=stats.blocks_total,
            used=stats.blocks_used,
            cached=stats.blocks_cached,
            free=max(0, stats.blocks_total - stats.blocks_used - stats.blocks_cached),
            held=stats.blocks_held,
        ),
        query_tokens=query_tokens,
        hit_tokens=hit_tokens,
        hit_rate=_rate(hit_tokens, query_tokens),
        host=_host(stats.host_kv) if stats.host_kv.bytes_total else None,
        namespaces=_shares(stats.namespaces, served_name, versions),
    )


def _host(host: HostKvStats) -> KvHost:
    return KvHost(
        bytes_total=host.bytes_total,
        bytes_used=host.bytes_used,
        blocks=host.blocks,
        stores=host.stores,
        hits=host.loads,
        evictions=host.evictions,
    )


def _shares(
    namespaces: Mapping[str, KvNamespace], served_name: str, versions: Sequence[AdapterVersion]
) -> list[KvShare]:
    """The base first, then every adapter that has or had K/V."""
    found = []
    for digest in sorted({"", *namespaces}):
        share = namespaces.get(digest) or KvNamespace(blocks_used=0, blocks_cached=0, query_tokens=0, hit_tokens=0)
        named = [version for version in versions if version.digest == digest]
        kind = named[0].record.kind if named else None
        found.append(
            KvShare(
                namespace=digest or "base",
                kind=kind if digest else "base",
                names=[version.name for version in named] if digest else [served_name],
                blocks_used=share.blocks_used,
                blocks_cached=share.blocks_cached,
                blocks_host=share.blocks_host,
                query_tokens=share.query_tokens,
                hit_tokens=share.hit_tokens,
                hit_rate=_rate(share.hit_tokens, share.query_tokens),
            )
        )
    return found


def _rate(hit_tokens: int, query_tokens: int) -> float | None:
    return round(hit_tokens / query_tokens, 4) if query_tokens else None
