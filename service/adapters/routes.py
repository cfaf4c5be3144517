"""Adapters over HTTP: upload, import, list, load, unload, pin, delete."""

from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from runtime.messages import Tier
from service.access import who
from service.adapters.events import adapter_event
from service.adapters.publish import UploadOptions, remove, start_import, upload
from service.adapters.queries import ON_MISSING, DeleteQuery, ImportQuery, PutQuery, WaitQuery, new_name, read_condition
from service.adapters.schemas import AdapterList, adapter_resource, find_adapter, list_adapters
from service.catalog.record import AdapterVersion, Condition, OnMissing
from service.catalog.seen import GENERATION_HEADER, Seen, least_generation
from service.catalog.versions import no_adapter
from service.errors import RequestError
from service.http import (
    NoQuery,
    decode_json,
    encode_json,
    json_response,
    read_body,
    read_json,
    read_query,
    until_disconnect,
)
from service.keys.caller import caller_of
from service.services import Services, services_of


class AdapterSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An adapter that the server is to fetch from a source."""

    name: str
    src: Annotated[str, Meta(description="an s3://, hf:// or file:// URL, or an absolute path on the server")]
    preload: Annotated[bool, Meta(description="load it to the device at once")] = True
    pin: Annotated[
        bool | None, Meta(description="pin it to the device, or unpin it; null keeps the pin of the name")
    ] = None
    revision: Annotated[str | None, Meta(description="a branch, tag or commit; for hf:// only")] = None
    ephemeral: Annotated[bool, Meta(description="keep it in memory only")] = False
    alora_on_missing: Annotated[OnMissing | None, Meta(description=ON_MISSING)] = None


class AdapterLoad(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tier that the adapter is to be loaded into."""

    tier: Tier
    pin: Annotated[bool | None, Meta(description="true pins it in the tier, false unpins it")] = None


class AdapterUnload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    tier: Annotated[Tier, Meta(description="its memory in this tier and in every faster one is freed")]


class AdapterChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields that PATCH changes."""

    pinned: Annotated[bool, Meta(description="true pins it to the device, or keeps the tier that it is pinned in")]


async def put_adapter(request: Request) -> Response:
    services = services_of(request)
    name = new_name(request.path_params["name"], services.settings.served_name, caller_of(request))
    query = read_query(request, PutQuery)
    options = UploadOptions(query.preload, query.pin, query.ephemeral, query.alora_on_missing)
    version, created = await upload(services, request, name, options, read_condition(request))
    return _shown(services, version, 201 if created else 200)


async def post_adapter(request: Request) -> Response:
    services, query, caller = services_of(request), read_query(request, ImportQuery), caller_of(request)
    body = await _source(request, query)
    name = new_name(body.name, services.settings.served_name, caller)
    source = services.sources.checked(body.src, body.revision)
    options = UploadOptions(body.preload, body.pin, body.ephemeral, body.alora_on_missing)
    job = await start_import(request, name, source, options, read_condition(request))
    if not query.wait:
        return json_response(find_adapter(services, name, caller), 202)
    version, created = await services.imports.result(job)
    return _shown(services, version, 201 if created else 200)


async def get_adapters(request: Request) -> Response:
    read_query(request, NoQuery)
    services = services_of(request)
    stats = await services.engine.recent_stats()
    return json_response(AdapterList(adapters=list_adapters(services, caller_of(request), stats)))


async def get_adapter(request: Request) -> Response:
    read_query(request, NoQuery)
    name, services, least = request.path_params["name"], services_of(request), least_generation(request.headers)
    if services.imports.get(name) is None:
        await Seen(services.catalog, caller_of(request)).know(name, least)
    adapter = find_adapter(services, name, caller_of(request), await services.engine.recent_stats())
    if adapter is None:
        raise no_adapter(name)
    return json_response(adapter, headers=_identity(adapter.digest, adapter.generation))


async def load_adapter(request: Request) -> Response:
    services, query = services_of(request), read_query(request, WaitQuery)
    body = await read_json(request, AdapterLoad, services.bodies)
    name, catalog = await _known_name(request, Condition()), services.catalog
    if body.pin is not None:
        await _pin(request, name, body.tier if body.pin else None, Condition())
    if not query.wait:
        return _shown(services, await catalog.load(name, body.tier, wait=False), 202)
    return await until_disconnect(request, _loaded(request, name, body.tier))


async def _loaded(request: Request, name: str, tier: Tier) -> Response:
    services = services_of(request)
    with adapter_event("load", name, who(request)) as event:
        version = await services.catalog.load(name, tier, wait=True)
        event.note(version, tier=tier)
    return _shown(services, version)


async def _pin(request: Request, name: str, tier: Tier | None, condition: Condition) -> AdapterVersion:
    """Pin an adapter in a tier, or unpin it (None)."""
    with adapter_event("unpin" if tier is None else "pin", name, who(request)) as event:
        version = await services_of(request).catalog.set_pin(name, tier, condition, caller_of(request))
        event.note(version, tier=tier)
    return version


async def unload_adapter(request: Request) -> Response:
    read_query(request, NoQuery)
    services = services_of(request)
    body = await read_json(request, AdapterUnload, services.bodies)
    name = await _known_name(request, Condition())
    with adapter_event("unload", name, who(request)) as event:
        version = await services.catalog.unload(name, body.tier)
        event.note(version, tier=body.tier)
    return _shown(services, version)


async def patch_adapter(request: Request) -> Response:
    read_query(request, NoQuery)
    services = services_of(request)
    body = await read_json(request, AdapterChange, services.bodies)
    condition = read_condition(request)
    name = await _known_name(request, condition)
    version = services.catalog.versions.resolve(name)
    tier: Tier = "device" if version is None or version.record.pin is None else version.record.pin
    version = await _pin(request, name, tier if body.pinned else None, condition)
    return _shown(services, version)


async def delete_adapter(request: Request) -> Response:
    query = read_query(request, DeleteQuery)
    await remove(request, request.path_params["name"], read_condition(request), force=query.force)
    return Response(status_code=204)


routes = [
    Route("/adapters", get_adapters, methods=["GET"]),
    Route("/adapters", post_adapter, methods=["POST"]),
    Route("/adapters/{name:adapter}", put_adapter, methods=["PUT"]),
    Route("/adapters/{name:adapter}", get_adapter, methods=["GET"]),
    Route("/adapters/{name:adapter}", patch_adapter, methods=["PATCH"]),
    Route("/adapters/{name:adapter}", delete_adapter, methods=["DELETE"]),
    # No other POST goes to a name, so that one which ends in /load is not in the way
    Route("/adapters/{name:adapter}/load", load_adapter, methods=["POST"]),
    Route("/adapters/{name:adapter}/unload", unload_adapter, methods=["POST"]),
]


async def _source(request: Request, query: ImportQuery) -> AdapterSource:
    """What is to be imported: the body, or SageMaker's query with an empty body. Raises RequestError."""
    bodies = services_of(request).bodies
    given = {name: getattr(query, name) for name in ("name", "src", "preload", "pin")}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return await read_json(request, AdapterSource, bodies)
    if await read_body(request, bodies):
        param = next(iter(given))
        raise RequestError("invalid_query", f"{param} is in the query, and there is a body: send one of them", param)
    return decode_json(encode_json(given), AdapterSource)


async def _known_name(request: Request, condition: Condition) -> str:
    """The name in the path, looked up in the store where memory does not know it, or says that the condition fails.

    Raises RequestError if the caller does not see it, or while its first import runs.
    """
    name: str = request.path_params["name"]
    services = services_of(request)
    seen = Seen(services.catalog, caller_of(request))
    seen.require(name)
    if seen.resolve(name) is None:
        services.imports.require_idle(name)
    await seen.know(name, least_generation(request.headers))
    await seen.reconsider(name, condition)
    return name


def _shown(services: Services, version: AdapterVersion, status: int = 200) -> Response:
    headers = _identity(version.digest, version.generation)
    return json_response(adapter_resource(services, version), status, headers)


def _identity(digest: str | None, generation: int | None) -> dict[str, str]:
    """The headers that say which content an answer shows; none while a first import runs."""
    return {} if digest is None else {"ETag": f'"{digest}"', GENERATION_HEADER: str(generation)}
