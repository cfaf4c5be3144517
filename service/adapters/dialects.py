"""vLLM's and SGLang's calls to load and unload adapters, translated to imports and deletions.

As in both, unknown fields are ignored.
"""

from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from service.adapters.publish import UploadOptions, remove, start_import
from service.adapters.queries import new_name
from service.catalog.record import Condition
from service.errors import RequestError, answer_of, error_body, request_error
from service.http import json_response, read_json
from service.services import services_of
from storage.store import StoreError

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


class SglangUnload(msgspec.Struct, frozen=True, kw_only=True):
    lora_name: str


class SglangAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome. An error has the field `error` as well, as in every other answer."""

    success: bool
    error_message: str | None
    loaded_adapters: Annotated[dict[str, str], Meta(description="the sources of all adapters, by name")]


async def vllm_load(request: Request) -> Response:
    body = await read_json(request, VllmLoad, services_of(request).settings.max_body_bytes)
    await _load(request, body.lora_name, body.lora_path, UploadOptions(), replace=bool(body.load_inplace))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def vllm_unload(request: Request) -> Response:
    body = await read_json(request, VllmUnload, services_of(request).settings.max_body_bytes)
    await _unload(request, body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def sglang_load(request: Request) -> Response:
    try:
        body = await read_json(request, SglangLoad, services_of(request).settings.max_body_bytes)
        await _load(request, body.lora_name, body.lora_path, UploadOptions(pin=bool(body.pinned)), replace=False)
    except RequestError as error:
        return _sglang_answer(request, error)
    return _sglang_answer(request)


async def sglang_unload(request: Request) -> Response:
    try:
        body = await read_json(request, SglangUnload, services_of(request).settings.max_body_bytes)
        await _unload(request, body.lora_name)
    except RequestError as error:
        return _sglang_answer(request, error)
    return _sglang_answer(request)


routes = [
    Route("/v1/load_lora_adapter", vllm_load, methods=["POST"]),
    Route("/v1/unload_lora_adapter", vllm_unload, methods=["POST"]),
    Route("/load_lora_adapter", sglang_load, methods=["POST"]),
    Route("/unload_lora_adapter", sglang_unload, methods=["POST"]),
]


async def _load(request: Request, name: str, path: str, options: UploadOptions, *, replace: bool) -> None:
    services = services_of(request)
    try:
        source = services.sources.checked(_as_source(path))
        name = new_name(name, services.settings.served_name)
        job = start_import(services, name, source, options, Condition(if_none_match=not replace))
        await services.imports.result(job)
    except RequestError as error:
        raise _translated(error, name) from None


async def _unload(request: Request, name: str) -> None:
    try:
        await remove(services_of(request), name, Condition())
    except (RequestError, StoreError) as error:
        known = request_error(error)
        assert known is not None
        raise _translated(known, name) from None


def _as_source(path: str) -> str:
    return path if "://" in path or path.startswith("/") or "/" not in path else f"hf://{path}"


def _translated(error: RequestError, name: str) -> RequestError:
    """A refusal with vLLM's field, and with vLLM's status and message where it has one for this case."""
    param = {"src": "lora_path", "name": "lora_name"}.get(error.param or "", error.param)
    if error.code == "precondition_failed":
        return RequestError("adapter_exists", f"The lora adapter '{name}' has already been loaded.", "lora_name")
    if error.code == "name_is_base_model":
        return RequestError("lora_name_is_base_model", error.message, param)
    if error.code == "adapter_not_found":
        return RequestError(error.code, f"The lora adapter '{name}' cannot be found.", param)
    return RequestError(error.code, error.message, param)


def _sglang_answer(request: Request, error: RequestError | None = None) -> Response:
    """SGLang answers 200 or 400. Failures of the server keep their own status, so that clients can retry."""
    loaded = {version.name: version.record.source for version in services_of(request).catalog.versions.list()}
    message = None if error is None else error.message
    answer = SglangAnswer(success=error is None, error_message=message, loaded_adapters=loaded)
    if error is None:
        return json_response(answer)
    found = answer_of(error)
    body = {**msgspec.structs.asdict(answer), **msgspec.structs.asdict(error_body(error))}
    return json_response(body, 400 if found.status < 500 else found.status, found.headers)
