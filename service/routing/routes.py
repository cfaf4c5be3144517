"""GET /routing: what a router in front of several servers has to know of one of them, cheap enough to ask often."""

import asyncio
from contextlib import suppress
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from service.catalog.seen import Seen
from service.door.gate import Gate
from service.http import NoQuery, json_response, read_query
from service.keys.caller import ANYONE, Caller, caller_of
from service.services import Services, services_of

ENGINE_SECONDS = 0.05  # to wait for a new snapshot of the K/V cache; a router does not wait for a long step


class RoutedAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter that memory holds, or is about to."""

    tier: Annotated[
        Literal["device", "host"] | None, Meta(description="the fastest that holds it; null while its first load runs")
    ]
    loading: bool
    digest: str


class KvRoom(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks of the K/V cache; those that are not used can be had for new requests, the cached ones by eviction."""

    blocks: int
    used: int
    cached: Annotated[int, Meta(description="not in use, with K/V that a prompt can hit")]
    block_size: Annotated[int, Meta(description="tokens a block")]
    age_seconds: Annotated[float, Meta(description="since the engine's snapshot")]


class Routing(msgspec.Struct, frozen=True, kw_only=True):
    """The state of one server for a router. Sequences count: a request with n choices has n."""

    ready: Annotated[bool, Meta(description="a request would be served now: the engine runs, and nothing drains")]
    draining: bool
    places: Annotated[int, Meta(description="sequences that can run at one time")]
    running: int
    waiting: Annotated[int, Meta(description="sent to the engine, and without a place yet")]
    queue_seconds: Annotated[float, Meta(description="that a new request of the base would wait, by recent starts")]
    kv: Annotated[
        KvRoom | None,
        Meta(description="null for a key without the scope admin, and where the engine has not said anything yet"),
    ]
    adapters: Annotated[
        dict[str, RoutedAdapter],
        Meta(description="by name: those in device or host memory; any other that the store has is loaded from there"),
    ]
    prefixes: Annotated[
        list[str],
        Meta(
            description="with --routing-prefixes, for a key with the scope admin: hashes of the last base prompts "
            "whose K/V are cached, by role and text of their messages (`heads_of` in service/routing/heads.py)"
        ),
    ]


async def routing(request: Request) -> Response:
    read_query(request, NoQuery)
    gate: Gate = request.app.state.gate
    return json_response(await routing_of(services_of(request), gate, caller_of(request)))


async def routing_of(services: Services, gate: Gate, caller: Caller = ANYONE) -> Routing:
    """The state of a server as a caller sees it; it waits for nothing that takes long."""
    engine = services.engine
    with suppress(TimeoutError):
        async with asyncio.timeout(ENGINE_SECONDS):
            await engine.recent_stats()
    in_flight = engine.in_flight()
    return Routing(
        ready=engine.ready is not None and not engine.paused and not gate.closed,
        draining=gate.closed,
        places=engine.places,
        running=in_flight.running,
        waiting=in_flight.waiting,
        queue_seconds=round(engine.queue_seconds(), 3),
        kv=_kv(services) if "admin" in caller.scopes else None,
        adapters=_adapters(services, Seen(services.catalog, caller)),
        prefixes=services.heads.held() if services.heads is not None and "admin" in caller.scopes else [],
    )


def _kv(services: Services) -> KvRoom | None:
    engine = services.engine
    stats, ready = engine.last_stats, engine.ready
    if stats is None or ready is None:
        return None
    return KvRoom(
        blocks=stats.blocks_total,
        used=stats.blocks_used,
        cached=stats.blocks_cached,
        block_size=ready.block_size,
        age_seconds=round(engine.stats_age, 3),
    )


def _adapters(services: Services, seen: Seen) -> dict[str, RoutedAdapter]:
    """Those that the engine has spoken of last as resident or loading: no look at any other name or file."""
    found = {}
    for digest, state in services.engine.adapters.states.items():
        loading = state.state in ("missing", "loading")
        if state.tier is None and not loading:
            continue
        for name in services.catalog.versions.names_of(digest):
            if seen.resolve(name) is not None:
                found[name] = RoutedAdapter(tier=state.tier, loading=loading, digest=digest)
    return found
