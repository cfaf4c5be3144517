"""vLLM's calls that stop the engine for a while, or clear its cache; and those that it can only be asked about."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.errors import RequestError
from service.http import json_response, read_query
from service.services import Services, services_of


class PauseQuery(msgspec.Struct, frozen=True, kw_only=True):
    mode: Annotated[
        Literal["abort", "keep", "wait"],
        Meta(description="abort ends all requests, keep stops them until the engine is resumed; wait is not supported"),
    ] = "abort"
    clear_cache: Annotated[bool, Meta(description="with abort: drop all cached K/V as well")] = True
    wait_for_inflight_requests: Annotated[bool, Meta(description="the same as the mode wait")] = False


class Paused(msgspec.Struct, frozen=True, kw_only=True):
    is_paused: bool


class Sleeping(msgspec.Struct, frozen=True, kw_only=True):
    is_sleeping: Literal[False] = False


class WorldSize(msgspec.Struct, frozen=True, kw_only=True):
    world_size: Literal[1] = 1  # one engine process on one device


class Status(msgspec.Struct, frozen=True, kw_only=True):
    status: Literal["paused", "resumed"]


async def pause(request: Request) -> Response:
    """New requests queue while the engine is paused, as many as may run and wait."""
    services, query = services_of(request), read_query(request, PauseQuery)
    if query.mode == "wait" or query.wait_for_inflight_requests:
        param = "mode" if query.mode == "wait" else "wait_for_inflight_requests"
        raise RequestError("unsupported_parameter", f"{param}: waiting is not supported: use mode=keep or abort", param)
    await services.engine.pause()
    if query.mode == "abort":
        message = "the engine was paused, which ended all requests: send this one again after /resume"
        services.engine.end_requests("generation_paused", message, prefixes=False)
        if query.clear_cache:
            await _drop_everything(services)
    return json_response(Status(status="paused"))


async def resume(request: Request) -> Response:
    await services_of(request).engine.resume()
    return json_response(Status(status="resumed"))


async def is_paused(request: Request) -> Response:
    return json_response(Paused(is_paused=services_of(request).engine.paused))


async def reset_prefix_cache(request: Request) -> Response:
    await _drop_everything(services_of(request))
    return Response()


async def sleep(request: Request) -> Response:
    message = (
        "the engine does not give the memory of its weights back: use POST /pause to stop it, POST /reset_prefix_cache "
        "to drop K/V, and POST /adapters/{name}/unload for the memory of an adapter"
    )
    raise RequestError("not_implemented", message)


async def is_sleeping(request: Request) -> Response:
    return json_response(Sleeping())


async def wake_up(request: Request) -> Response:
    """It never sleeps, so it is awake."""
    return Response()


async def get_world_size(request: Request) -> Response:
    return json_response(WorldSize())


routes = [
    Route("/pause", pause, methods=["POST"]),
    Route("/resume", resume, methods=["POST"]),
    Route("/is_paused", is_paused, methods=["GET"]),
    Route("/reset_prefix_cache", reset_prefix_cache, methods=["POST"]),
    Route("/sleep", sleep, methods=["POST"]),
    Route("/wake_up", wake_up, methods=["POST"]),
    Route("/is_sleeping", is_sleeping, methods=["GET"]),
    Route("/get_world_size", get_world_size, methods=["GET"]),
]


async def _drop_everything(services: Services) -> None:
    """Drop the K/V of the base and of every adapter that has any, and end what is held of them."""
    stats = await services.engine.stats()
    for namespace in {None, *(digest or None for digest in stats.namespaces)}:
        await services.engine.prefixes.drop_namespace(namespace)
