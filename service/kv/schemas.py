"""The resources of the KV cache and of held prefixes."""

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
    """The blocks of the device: `total` is the sum of `used`, `cached` and `free`."""

    total: int
    used: Annotated[int, Meta(description="by running requests and held prefixes")]
    cached: Annotated[int, Meta(description="not in use, with K/V that a prompt can hit")]
    free: int
    held: Annotated[int, Meta(description="those of the used ones that are kept for held prefixes")]


class KvLookups(msgspec.Struct, frozen=True, kw_only=True):
    """Lookups in the prefix cache since the engine's start."""

    query_tokens: Annotated[int, Meta(description="tokens of prompts that were looked up")]
    hit_tokens: Annotated[int, Meta(description="those that were found")]
    hit_rate: Annotated[float | None, Meta(description="null before the first lookup")]


class KvHost(msgspec.Struct, frozen=True, kw_only=True):
    """Host memory for blocks that were evicted from the device. The counters begin at the engine's start."""

    bytes_total: int
    bytes_used: int
    blocks: int
    stores: Annotated[int, Meta(description="blocks that were offloaded to host memory")]
    hits: Annotated[int, Meta(description="blocks that were loaded back")]
    evictions: Annotated[int, Meta(description="blocks that host memory dropped")]


class KvShare(KvLookups, frozen=True, kw_only=True):
    """The share of one namespace: the K/V of the base, or of one adapter."""

    namespace: Annotated[str, Meta(description='"base", or the digest of an adapter')]
    kind: Annotated[
        Literal["base", "lora", "alora"] | None, Meta(description="null for an adapter that has lost its names")
    ]
    names: Annotated[list[str], Meta(description="all model names of it")]
    blocks_used: int
    blocks_cached: int
    blocks_host: Annotated[int, Meta(description="evicted from the device, and still in host memory")]


class KvCache(KvLookups, frozen=True, kw_only=True):
    """The KV cache, as of the last snapshot of the engine."""

    age_seconds: Annotated[float, Meta(description="since the snapshot")]
    block_size: Annotated[int, Meta(description="tokens a block")]
    blocks: Annotated[KvBlocks | None, Meta(description="null for a key without the scope admin")]
    host: Annotated[
        KvHost | None, Meta(description="null if host memory keeps no K/V, and for a key without the scope admin")
    ]
    namespaces: list[KvShare]


class PrefixRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A prefix to compute: either `messages` or a `prompt`."""

    model: Name
    messages: Annotated[
        Annotated[list[Message], Meta(min_length=1)] | None,
        Meta(description="a chat, to which the template adds no header of the assistant"),
    ] = None
    prompt: str | list[Count] | None = None
    ttl_seconds: Annotated[float, Meta(gt=0, le=MAX_TTL_SECONDS, description="how long the prefix is held")] = (
        TTL_SECONDS
    )
    pin: Annotated[
        bool, Meta(description="false: compute the prefix and hold nothing; the cache may evict its blocks")
    ] = True
    cache_salt: str | None = None
    alora: Alora | None = None


class HeldPrefix(msgspec.Struct, frozen=True, kw_only=True):
    """A computed prefix."""

    id: Annotated[str | None, Meta(description="null if it is not held")]
    model: str
    digest: Annotated[str | None, Meta(description="of the adapter; null for the base")]
    activation: Annotated[int | None, Meta(description="index of the first token that the adapter applies to")]
    invocation: Annotated[Invocation | None, Meta(description="what became of the invocation of an aLoRA")]
    tokens: int
    blocks: int
    cached_tokens: Annotated[int, Meta(description="those of the tokens that the cache had")]
    created_at: Annotated[float, Meta(description="seconds since 1970")]
    expires_at: Annotated[float | None, Meta(description="seconds since 1970; null if it is not held")]


class PrefixList(msgspec.Struct, frozen=True, kw_only=True):
    prefixes: list[HeldPrefix]


def held_prefix(prefix: Prefix, *, pinned: bool = True) -> HeldPrefix:
    held, spec = prefix.held, prefix.spec
    assert held is not None
    return HeldPrefix(
        id=prefix.id if pinned else None,
        model=spec.model,
        digest=None if spec.version is None else spec.version.digest,
        activation=None if spec.prompt.adapter is None else spec.prompt.invocation_start,
        invocation=spec.prompt.invocation,
        tokens=held.tokens,
        blocks=held.blocks,
        cached_tokens=held.cached_tokens,
        created_at=prefix.created_at,
        expires_at=prefix.expires_at if pinned else None,
    )


def kv_cache(
    stats: Stats, age_seconds: float, block_size: int, served_name: str, versions: Sequence[AdapterVersion]
) -> KvCache:
    """The resource of a snapshot. `served_name` is the name of the base, `versions` are the named adapters."""
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


def kv_of_adapters(
    stats: Stats, age_seconds: float, block_size: int, served_name: str, versions: Sequence[AdapterVersion]
) -> KvCache:
    """The resource for a key that may see these adapters only: without the base, whose K/V tell of all keys."""
    digests = {version.digest for version in versions}
    seen = {digest: share for digest, share in stats.namespaces.items() if digest in digests}
    whole = kv_cache(msgspec.structs.replace(stats, namespaces=seen), age_seconds, block_size, served_name, versions)
    shares = [share for share in whole.namespaces if share.kind != "base"]
    return msgspec.structs.replace(whole, blocks=None, host=None, namespaces=shares)


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
    """The share of the base, then of every adapter that has or had K/V."""
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
