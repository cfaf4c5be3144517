"""Adapters over HTTP: upload, look, take away."""

import asyncio
import errno
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from runtime.adapter_format import AdapterSummary, canonicalise
from runtime.invalid_adapter import InvalidAdapter
from service.adapter_version import NAME_PATTERN, AdapterVersion, Condition, Upload
from service.base_tensors import base_tensors
from service.bodies import read_json
from service.bundle import Bundle
from service.catalog import Catalog
from service.responses import ApiError, json_response
from service.sources import copy_bundle
from service.uploads import read_bundle
from storage.store import StoreError, StoreFull

_T = TypeVar("_T")
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_NAME = re.compile(NAME_PATTERN)
_ETAGS = re.compile(r'\s*("[^"]*"|\*)\s*(?:,|$)')


class PutQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`pin` left out keeps what the name has."""

    pin: bool | None = None
    preload: bool = True
    ephemeral: bool = False


class DeleteQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    force: bool = False


class NoQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class AdapterSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /adapters: a name, and where the server finds the bundle; `pin` as in `PutQuery`."""

    name: str
    src: str
    preload: bool = True
    pin: bool | None = None
    revision: str | None = None
    ephemeral: bool = False


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """What GET /adapters/{name} shows. Times are seconds since 1970; `reason` says why the state is `failed`."""

    name: str
    digest: str
    generation: int
    kind: Literal["lora", "alora"]
    rank: int
    targets: list[str]
    bytes: int
    source: str
    created_at: float
    last_used_at: float | None
    pinned: bool
    ephemeral: bool
    tier: Literal["device", "host", "disk", "remote"]
    state: Literal["loading", "ready", "draining", "failed"]
    reason: str | None
    requests_in_flight: int
    warnings: list[str]


class AdapterList(msgspec.Struct, frozen=True, kw_only=True):
    adapters: list[Adapter]


async def put_adapter(request: Request) -> Response:
    name = _checked_name(request, request.path_params["name"])
    query = _query(request, PutQuery)
    condition = _condition(request)
    catalog: Catalog = request.app.state.catalog
    catalog.require(name, condition, ephemeral=query.ephemeral)  # before gigabytes are read in vain
    async with _translated_errors(), catalog.staging(query.ephemeral) as directory:
        bundle = await read_bundle(request, directory, request.app.state.settings.max_upload_bytes)
        summary, file = await asyncio.to_thread(_checked_bundle, request, bundle)
        upload = Upload(summary, file, "upload", query.ephemeral, query.preload, query.pin)
        return await _publish(request, name, upload, condition)


async def post_adapter(request: Request) -> Response:
    _query(request, NoQuery)
    settings, catalog = request.app.state.settings, request.app.state.catalog
    source = await read_json(request, AdapterSource, settings.max_body_bytes)
    name = _checked_name(request, source.name)
    if source.revision is not None:
        raise ApiError(400, "unsupported_revision", "revision goes with hf:// sources only", "revision")
    condition = _condition(request)
    catalog.require(name, condition, ephemeral=source.ephemeral)
    async with _translated_errors(), catalog.staging(source.ephemeral) as directory:
        bundle = await asyncio.to_thread(
            copy_bundle, source.src, settings.file_roots, directory, settings.max_upload_bytes
        )
        summary, file = await asyncio.to_thread(_checked_bundle, request, bundle)
        upload = Upload(summary, file, source.src, source.ephemeral, source.preload, source.pin)
        return await _publish(request, name, upload, condition)


async def get_adapters(request: Request) -> Response:
    _query(request, NoQuery)
    versions = request.app.state.catalog.list()
    return json_response(AdapterList(adapters=[_resource(request, version) for version in versions]))


async def get_adapter(request: Request) -> Response:
    _query(request, NoQuery)
    name = request.path_params["name"]
    catalog: Catalog = request.app.state.catalog
    version = catalog.resolve(name) or catalog.draining(name)
    if version is None:
        raise ApiError(404, "adapter_not_found", f"there is no adapter {name!r}", "name")
    return json_response(_resource(request, version), headers={"ETag": f'"{version.digest}"'})


async def delete_adapter(request: Request) -> Response:
    query = _query(request, DeleteQuery)
    async with _translated_errors():
        await request.app.state.catalog.delete(request.path_params["name"], _condition(request), force=query.force)
    return Response(status_code=204)


routes = [
    Route("/adapters", get_adapters, methods=["GET"]),
    Route("/adapters", post_adapter, methods=["POST"]),
    Route("/adapters/{name}", put_adapter, methods=["PUT"]),
    Route("/adapters/{name}", get_adapter, methods=["GET"]),
    Route("/adapters/{name}", delete_adapter, methods=["DELETE"]),
]


async def _publish(request: Request, name: str, upload: Upload, condition: Condition) -> Response:
    version, created = await request.app.state.catalog.publish(name, upload, condition)
    headers = {"ETag": f'"{version.digest}"'}
    return json_response(_resource(request, version), 201 if created else 200, headers)


def _checked_bundle(request: Request, bundle: Bundle) -> tuple[AdapterSummary, Path]:
    """Check a bundle completely and write its canonical file beside it; blocks."""
    state = request.app.state
    target = bundle.weights.with_name("canonical.safetensors")
    summary = canonicalise(
        bundle.weights,
        bundle.config,
        state.model_config,
        target,
        max_rank=state.settings.engine.max_lora_rank,
        base_model_names=(state.settings.served_name, state.settings.engine.model),
        base_tensor=base_tensors(state.settings.engine),
    )
    if summary.kind == "alora":
        message = "alora_invocation_tokens: aLoRA adapters are not served yet, only plain LoRA is"
        raise ApiError(422, "alora_unsupported", message, "alora_invocation_tokens")
    return summary, target


def _resource(request: Request, version: AdapterVersion) -> Adapter:
    catalog: Catalog = request.app.state.catalog
    engine = request.app.state.engine.adapter_states.get(version.digest)
    record, reason = version.record, catalog.failure(version)
    tier: Literal["device", "host", "disk"] = "host" if version.ephemeral else "disk"
    state: Literal["loading", "ready", "draining", "failed"] = "ready"
    if engine is not None and engine.state == "resident":
        tier = "device"
    elif engine is not None and engine.state == "loading":
        state = "loading"
    elif engine is not None and engine.state == "failed":
        reason = reason or engine.reason
    if reason is not None:
        state = "failed"
    if catalog.resolve(version.name) is not version:
        state = "draining"
    return Adapter(
        name=record.name,
        digest=record.digest,
        generation=record.generation,
        kind=record.kind,
        rank=record.rank,
        targets=record.targets,
        bytes=record.bytes,
        source=record.source,
        created_at=record.created_at,
        last_used_at=version.last_used_at,
        pinned=record.pinned,
        ephemeral=version.ephemeral,
        tier=tier,
        state=state,
        reason=reason,
        requests_in_flight=version.requests,
        warnings=record.warnings,
    )


def _checked_name(request: Request, name: str) -> str:
    if not _NAME.match(name):
        message = "name must be 1 to 128 letters, digits, '.', '_' or '-', and begin with a letter or a digit"
        raise ApiError(400, "invalid_name", message, "name")
    if name == request.app.state.settings.served_name:
        raise ApiError(409, "name_is_base_model", f"{name!r} is the base model's name", "name")
    return name


def _query(request: Request, kind: type[_T]) -> _T:
    """The query as a Struct of booleans; ApiError 400 for an unknown name, a repeated one or another value."""
    query = request.query_params
    for name, _ in query.multi_items():
        if len(query.getlist(name)) > 1:
            raise ApiError(400, "invalid_query", f"the query has {name!r} more than once", name)
    try:
        return msgspec.convert(dict(query), kind, strict=False)
    except msgspec.ValidationError as error:
        place = re.search(r"unknown field `(.*)`|at `\$\.(.*)`", str(error))
        param = (place[1] or place[2]) if place else None
        raise ApiError(400, "invalid_query", f"the query is not accepted: {error}", param) from None


def _condition(request: Request) -> Condition:
    match, none_match = request.headers.get("if-match"), request.headers.get("if-none-match")
    if none_match not in (None, "*"):
        raise ApiError(400, "invalid_header", "If-None-Match must be *", "If-None-Match")
    if match is None:
        return Condition(None, none_match is not None)
    if not re.fullmatch(f"(?:{_ETAGS.pattern})+", match):
        raise ApiError(400, "invalid_header", "If-Match must be * or digests in double quotes", "If-Match")
    digests = frozenset(tag.strip('"') for tag in _ETAGS.findall(match))
    return Condition(digests, none_match is not None)


@asynccontextmanager
async def _translated_errors() -> AsyncIterator[None]:
    try:
        yield
    except InvalidAdapter as error:
        raise ApiError(422, "invalid_adapter", str(error), error.field) from error
    except StoreFull as error:
        raise ApiError(507, "storage_full", "there is no room left to keep adapters") from error
    except StoreError as error:
        raise ApiError(503, "storage_unavailable", "the adapter store does not work") from error
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise ApiError(507, "storage_full", "there is no room left to keep adapters") from error
        raise
