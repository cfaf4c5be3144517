"""The calls by which tools made for vLLM and SGLang load and unload adapters: other words for our own.

As in both, unknown fields are ignored.
"""

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from service.adapters.publish import Wishes, remove, start_import
from service.adapters.queries import new_name
from service.bodies import read_json
from service.catalog.record import Condition
from service.responses import ApiError, error_body, json_response


class VllmLoad(msgspec.Struct, frozen=True, kw_only=True):
    """`lora_path` is a source's URL, a path on the server, or `organisation/repository` of the Hugging Face hub."""

    lora_name: str
    lora_path: str
    load_inplace: bool | None = None


class VllmUnload(msgspec.Struct, frozen=True, kw_only=True):
    lora_name: str


class SglangLoad(msgspec.Struct, frozen=True, kw_only=True):
    """`lora_path` as in `VllmLoad`."""

    lora_name: str
    lora_path: str
    pinned: bool | None = None


class SglangUnload(msgspec.Struct, frozen=True, kw_only=True):
    lora_name: str


class SglangAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`loaded_adapters` are the sources of all adapters, by name; an error comes with `error`, as everywhere."""

    success: bool
    error_message: str | None
    loaded_adapters: dict[str, str]


async def vllm_load(request: Request) -> Response:
    body = await read_json(request, VllmLoad, request.app.state.settings.max_body_bytes)
    await _load(request, body.lora_name, body.lora_path, Wishes(), replace=bool(body.load_inplace))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def vllm_unload(request: Request) -> Response:
    body = await read_json(request, VllmUnload, request.app.state.settings.max_body_bytes)
    await _unload(request, body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def sglang_load(request: Request) -> Response:
    try:
        body = await read_json(request, SglangLoad, request.app.state.settings.max_body_bytes)
        await _load(request, body.lora_name, body.lora_path, Wishes(pin=bool(body.pinned)), replace=False)
    except ApiError as error:
        return _sglang_answer(request, error)
    return _sglang_answer(request)


async def sglang_unload(request: Request) -> Response:
    try:
        body = await read_json(request, SglangUnload, request.app.state.settings.max_body_bytes)
        await _unload(request, body.lora_name)
    except ApiError as error:
        return _sglang_answer(request, error)
    return _sglang_answer(request)


routes = [
    Route("/v1/load_lora_adapter", vllm_load, methods=["POST"]),
    Route("/v1/unload_lora_adapter", vllm_unload, methods=["POST"]),
    Route("/load_lora_adapter", sglang_load, methods=["POST"]),
    Route("/unload_lora_adapter", sglang_unload, methods=["POST"]),
]


async def _load(request: Request, name: str, path: str, wishes: Wishes, *, replace: bool) -> None:
    state = request.app.state
    try:
        source = state.sources.checked(_as_source(path))
        condition = Condition(if_none_match=not replace)
        await state.imports.result(start_import(state, new_name(request, name), source, wishes, condition))
    except ApiError as error:
        raise _in_their_words(error, name) from None


async def _unload(request: Request, name: str) -> None:
    try:
        await remove(request.app.state, name, Condition())
    except ApiError as error:
        raise _in_their_words(error, name) from None


def _as_source(path: str) -> str:
    return path if "://" in path or path.startswith("/") or "/" not in path else f"hf://{path}"


def _in_their_words(error: ApiError, name: str) -> ApiError:
    """Our refusal with their field, and where they have a status and a sentence for it, with those."""
    param = {"src": "lora_path", "name": "lora_name"}.get(error.param or "", error.param)
    if error.code == "precondition_failed":
        message = f"The lora adapter '{name}' has already been loaded."
        return ApiError(400, "adapter_exists", message, "lora_name")
    if error.code == "name_is_base_model":
        return ApiError(400, error.code, error.message, param)
    if error.code == "adapter_not_found":
        return ApiError(404, error.code, f"The lora adapter '{name}' cannot be found.", param)
    return ApiError(error.status, error.code, error.message, param, error.headers)


def _sglang_answer(request: Request, error: ApiError | None = None) -> Response:
    """SGLang knows two statuses; ours say more where it is the server that could not."""
    loaded = {version.name: version.record.source for version in request.app.state.catalog.list()}
    message = None if error is None else error.message
    answer = SglangAnswer(success=error is None, error_message=message, loaded_adapters=loaded)
    if error is None:
        return json_response(answer)
    status = 400 if error.status < 500 else error.status
    return json_response({**msgspec.structs.asdict(answer), **error_body(error)}, status, error.headers)
