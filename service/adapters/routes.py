"""Adapters over HTTP: upload, import, look, load, pin, take away."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from runtime.messages import Tier
from service.adapters.publish import Wishes, remove, start_import, translated_errors, upload
from service.adapters.queries import DeleteQuery, NoQuery, PutQuery, WaitQuery, new_name, read_condition, read_query
from service.adapters.resource import AdapterList, adapter_resource, find_adapter, list_adapters
from service.bodies import read_json
from service.catalog.catalog import Catalog
from service.catalog.record import AdapterVersion, Condition
from service.openai.streaming import until_disconnect
from service.responses import ApiError, json_response


class AdapterSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /adapters: a name, and where the server finds the bundle; `pin` left out keeps what is.

    `src` is an s3://, hf:// or file:// URL, or a path on the server; `revision` goes with hf:// only.
    """

    name: str
    src: str
    preload: bool = True
    pin: bool | None = None
    revision: str | None = None
    ephemeral: bool = False


class AdapterLoad(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`pin` true keeps the adapter in the tier from now on, false ends that."""

    tier: Tier
    pin: bool | None = None


class AdapterUnload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    tier: Tier


class AdapterChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What PATCH changes. A pin is to the device, unless the adapter is pinned to host memory already."""

    pinned: bool


async def put_adapter(request: Request) -> Response:
    name = new_name(request, request.path_params["name"])
    query = read_query(request, PutQuery)
    wishes = Wishes(query.preload, query.pin, query.ephemeral)
    version, created = await upload(request, name, wishes, read_condition(request))
    return _shown(request, version, 201 if created else 200)


async def post_adapter(request: Request) -> Response:
    state, query = request.app.state, read_query(request, WaitQuery)
    body = await read_json(request, AdapterSource, state.settings.max_body_bytes)
    name = new_name(request, body.name)
    source = state.sources.checked(body.src, body.revision)
    job = start_import(state, name, source, Wishes(body.preload, body.pin, body.ephemeral), read_condition(request))
    if not query.wait:
        return json_response(find_adapter(state, name), 202)
    version, created = await state.imports.result(job)
    return _shown(request, version, 201 if created else 200)


async def get_adapters(request: Request) -> Response:
    read_query(request, NoQuery)
    state = request.app.state
    return json_response(AdapterList(adapters=list_adapters(state, await state.engine.recent_stats())))


async def get_adapter(request: Request) -> Response:
    read_query(request, NoQuery)
    name, state = request.path_params["name"], request.app.state
    adapter = find_adapter(state, name, await state.engine.recent_stats())
    if adapter is None:
        raise ApiError(404, "adapter_not_found", f"there is no adapter {name!r}", "name")
    return json_response(adapter, headers=None if adapter.digest is None else {"ETag": f'"{adapter.digest}"'})


async def load_adapter(request: Request) -> Response:
    query = read_query(request, WaitQuery)
    body = await read_json(request, AdapterLoad, request.app.state.settings.max_body_bytes)
    name, catalog = _known_name(request), _catalog(request)
    async with translated_errors():
        if body.pin is not None:
            await catalog.set_pin(name, body.tier if body.pin else None, Condition())
        if not query.wait:
            return _shown(request, await catalog.load(name, body.tier, wait=False), 202)
        return await until_disconnect(request, _loaded(request, name, body.tier))


async def _loaded(request: Request, name: str, tier: Tier) -> Response:
    return _shown(request, await _catalog(request).load(name, tier, wait=True))


async def unload_adapter(request: Request) -> Response:
    read_query(request, NoQuery)
    body = await read_json(request, AdapterUnload, request.app.state.settings.max_body_bytes)
    return _shown(request, await _catalog(request).unload(_known_name(request), body.tier))


async def patch_adapter(request: Request) -> Response:
    read_query(request, NoQuery)
    body = await read_json(request, AdapterChange, request.app.state.settings.max_body_bytes)
    name, catalog = _known_name(request), _catalog(request)
    version = catalog.resolve(name)
    pinned = version is not None and version.record.pinned
    tier: Tier = version.record.pin_tier if version is not None and pinned else "device"
    async with translated_errors():
        version = await catalog.set_pin(name, tier if body.pinned else None, read_condition(request))
    return _shown(request, version)


async def delete_adapter(request: Request) -> Response:
    query = read_query(request, DeleteQuery)
    await remove(request.app.state, request.path_params["name"], read_condition(request), force=query.force)
    return Response(status_code=204)


routes = [
    Route("/adapters", get_adapters, methods=["GET"]),
    Route("/adapters", post_adapter, methods=["POST"]),
    Route("/adapters/{name}", put_adapter, methods=["PUT"]),
    Route("/adapters/{name}", get_adapter, methods=["GET"]),
    Route("/adapters/{name}", patch_adapter, methods=["PATCH"]),
    Route("/adapters/{name}", delete_adapter, methods=["DELETE"]),
    Route("/adapters/{name}/load", load_adapter, methods=["POST"]),
    Route("/adapters/{name}/unload", unload_adapter, methods=["POST"]),
]


def _catalog(request: Request) -> Catalog:
    catalog: Catalog = request.app.state.catalog
    return catalog


def _known_name(request: Request) -> str:
    """The name in the path. Raises ApiError 409 if it is imported and so means nothing yet."""
    name: str = request.path_params["name"]
    if _catalog(request).resolve(name) is None:
        request.app.state.imports.require_idle(name)
    return name


def _shown(request: Request, version: AdapterVersion, status: int = 200) -> Response:
    headers = {"ETag": f'"{version.digest}"'}
    return json_response(adapter_resource(request.app.state, version), status, headers)
