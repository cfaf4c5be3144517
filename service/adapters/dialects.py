"""vLLM's, SGLang's and Dynamo's calls to load and unload adapters, translated to imports and deletions.

As in all of them, unknown fields are ignored.
"""

from contextlib import suppress
from typing import Annotated, Literal

import msgspec
from blake3 import blake3
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from service.adapters.publish import UploadOptions, remove, start_import
from service.adapters.queries import new_name
from service.catalog.record import Condition
from service.catalog.seen import Seen
from service.errors import RequestError, answer_of, error_body, request_error
from service.http import json_response, read_json
from service.keys.caller import caller_of
from service.services import services_of
from storage.store import StoreError

OF_KEYS = {"name_outside_prefix", "disk_quota_exceeded", "pinned_quota_exceeded"}
LoraPath = Annotated[
    str, Meta(description="a source's URL, a path on the server, or organisation/repository of the Hugging Face hub")
]


class VllmLoad(msgspec.Struct, frozen=True, kw_only=True):
    lora_name: str
    lora_path: LoraPath
    load_inplace: Annotated[bool | None, Meta(description="replace an adapter of the same name")] = None


class VllmUnload(msgspec.Struct, frozen=True, kw_only=True):
    lora_name: str


class SglangLoad(msgspec.Struct, frozen=True, kw_only=True):
    lora_name: str
    lora_path: LoraPath
    pinned: Annotated[bool | None, Meta(description="pin it to the device")] = None
    load_inplace: Annotated[bool | None, Meta(description="replace an adapter of the same name, as in vLLM")] = None


class SglangUnload(msgspec.Struct, frozen=True, kw_only=True):
    lora_name: str


class SglangAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome. An error has the field `error` as well, as in every other answer."""

    success: bool
    error_message: str | None
    loaded_adapters: Annotated[dict[str, str], Meta(description="the sources of all adapters, by name")]


class DynamoSource(msgspec.Struct, frozen=True, kw_only=True):
    uri: Annotated[str, Meta(description="a source's URL, or a path on the server")]


class DynamoLoad(msgspec.Struct, frozen=True, kw_only=True):
    lora_name: str
    source: DynamoSource


class DynamoAnswer(msgspec.Struct, frozen=True, kw_only=True):
    status: Literal["success"] = "success"
    message: str
    lora_name: str
    lora_id: Annotated[int, Meta(description="a number that follows from the name")]


class DynamoList(msgspec.Struct, frozen=True, kw_only=True):
    status: Literal["success"] = "success"
    loras: Annotated[dict[str, int], Meta(description="the ids of all adapters, by name")]
    count: int


async def vllm_load(request: Request) -> Response:
    body = await read_json(request, VllmLoad, services_of(request).bodies)
    await _load(request, body.lora_name, body.lora_path, UploadOptions(), replace=bool(body.load_inplace))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def vllm_unload(request: Request) -> Response:
    body = await read_json(request, VllmUnload, services_of(request).bodies)
    await _unload(request, body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def sglang_load(request: Request) -> Response:
    try:
        body = await read_json(request, SglangLoad, services_of(request).bodies)
        await _load(
            request,
            body.lora_name,
            body.lora_path,
            UploadOptions(pin=bool(body.pinned)),
            replace=bool(body.load_inplace),
        )
    except RequestError as error:
        return _sglang_answer(request, error)
    return _sglang_answer(request)


async def sglang_unload(request: Request) -> Response:
    try:
        body = await read_json(request, SglangUnload, services_of(request).bodies)
        await _unload(request, body.lora_name)
    except RequestError as error:
        return _sglang_answer(request, error)
    return _sglang_answer(request)


async def dynamo_load(request: Request) -> Response:
    """Import an adapter; the same source under the same name is no fault, since Dynamo's operator asks repeatedly."""
    services = services_of(request)
    body = await read_json(request, DynamoLoad, services.bodies)
    name, uri = body.lora_name, body.source.uri
    await _seen(request).know(name)
    if not _is_from(request, name, uri):
        await _load(request, name, uri, UploadOptions(), replace=False, param="source.uri")
    return _dynamo_answer(name, "loaded")


async def dynamo_unload(request: Request) -> Response:
    name = request.path_params["name"]
    await _unload(request, name)
    return _dynamo_answer(name, "unloaded")


async def dynamo_list(request: Request) -> Response:
    loras = {version.name: _dynamo_id(version.name) for version in _seen(request).list()}
    return json_response(DynamoList(loras=loras, count=len(loras)))


routes = [
    Route("/v1/load_lora_adapter", vllm_load, methods=["POST"]),
    Route("/v1/unload_lora_adapter", vllm_unload, methods=["POST"]),
    Route("/load_lora_adapter", sglang_load, methods=["POST"]),
    Route("/unload_lora_adapter", sglang_unload, methods=["POST"]),
    Route("/v1/loras", dynamo_list, methods=["GET"]),
    Route("/v1/loras", dynamo_load, methods=["POST"]),
    Route("/v1/loras/{name:adapter}", dynamo_unload, methods=["DELETE"]),
]


async def _load(
    request: Request, name: str, path: str, options: UploadOptions, *, replace: bool, param: str = "lora_path"
) -> None:
    """Import an adapter; `param` is the field that its path came from."""
    services, caller = services_of(request), caller_of(request)
    try:
        source = services.sources.checked(_as_source(path))
        name = new_name(name, services.settings.served_name, caller)
        job = await start_import(request, name, source, options, Condition(if_none_match=not replace))
        await services.imports.result(job)
    except RequestError as error:
        raise _translated(error, name, param) from None


async def _unload(request: Request, name: str) -> None:
    try:
        await remove(request, name, Condition())
    except (RequestError, StoreError) as error:
        known = request_error(error)
        assert known is not None
        raise _translated(known, name) from None


def _seen(request: Request) -> Seen:
    return Seen(services_of(request).catalog, caller_of(request))


def _is_from(request: Request, name: str, path: str) -> bool:
    """Whether there is an adapter of a name that was imported from a path."""
    version, sources = _seen(request).resolve(name), services_of(request).sources
    with suppress(RequestError):
        return version is not None and version.record.source == sources.checked(_as_source(path)).url
    return False


def _as_source(path: str) -> str:
    return path if "://" in path or path.startswith("/") or "/" not in path else f"hf://{path}"


def _translated(error: RequestError, name: str, path_param: str = "lora_path") -> RequestError:
    """A refusal with vLLM's field, and with vLLM's status and message where it has one for this case."""
    param = {"src": path_param, "name": "lora_name"}.get(error.param or "", error.param)
    if error.code == "precondition_failed":
        return RequestError("adapter_exists", f"The lora adapter '{name}' has already been loaded.", "lora_name")
    if error.code == "name_is_base_model":
        return RequestError("lora_name_is_base_model", error.message, param)
    if error.code == "adapter_not_found":
        return RequestError(error.code, f"The lora adapter '{name}' cannot be found.", param)
    return RequestError(error.code, error.message, param)


def _sglang_answer(request: Request, error: RequestError | None = None) -> Response:
    """SGLang answers 200 or 400. A source that is not there is vLLM's 404.

    Failures of the server keep their status, and so do refusals because of the key.
    """
    loaded = {version.name: version.record.source for version in _seen(request).list()}
    message = None if error is None else error.message
    answer = SglangAnswer(success=error is None, error_message=message, loaded_adapters=loaded)
    if error is None:
        return json_response(answer)
    found = answer_of(error)
    body = {**msgspec.structs.asdict(answer), **msgspec.structs.asdict(error_body(error))}
    kept = found.status >= 500 or error.code == "source_not_found" or error.code in OF_KEYS
    return json_response(body, found.status if kept else 400, found.headers)


def _dynamo_answer(name: str, done: str) -> Response:
    message = f"LoRA adapter '{name}' {done} successfully"
    return json_response(DynamoAnswer(message=message, lora_name=name, lora_id=_dynamo_id(name)))


def _dynamo_id(name: str) -> int:
    return int.from_bytes(blake3(name.encode()).digest(4)) >> 1 or 1  # 31 bits, and never 0, which is the base there
