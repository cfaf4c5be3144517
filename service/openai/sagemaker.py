"""POST /invocations: chats and completions under the one path that SageMaker knows."""

import time
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from service.bodies import decode_json, read_body
from service.openai.chat import chat
from service.openai.completions import complete
from service.openai.schemas import ChatRequest, CompletionRequest, GenerationRequest
from service.responses import ApiError, encode_json

_Body = TypeVar("_Body", bound=GenerationRequest)
ADAPTER_HEADER = "X-Amzn-SageMaker-Adapter-Identifier"


async def invocations(request: Request) -> Response:
    """A chat if the body has messages, a completion if it has a prompt; without `model` it is the base's."""
    arrived = time.perf_counter()
    settings = request.app.state.settings
    fields = decode_json(await read_body(request, settings.max_body_bytes), dict[str, msgspec.Raw])
    if ("messages" in fields) == ("prompt" in fields):
        raise ApiError(400, "invalid_field", "expected either messages, for a chat, or a prompt", "messages")
    fields.setdefault("model", msgspec.Raw(encode_json(settings.served_name)))
    content = encode_json(fields)
    if "messages" in fields:
        return await chat(request, _with_adapter(decode_json(content, ChatRequest), request), arrived)
    return await complete(request, _with_adapter(decode_json(content, CompletionRequest), request), arrived)


def _with_adapter(body: _Body, request: Request) -> _Body:
    """The body with the adapter that the header names. Raises ApiError 400 if it names another one itself."""
    adapter = request.headers.get(ADAPTER_HEADER)
    if not adapter:
        return body
    if body.adapter_id not in (None, adapter):
        message = f"adapter_id {body.adapter_id!r} and {ADAPTER_HEADER} {adapter!r} are different adapters: name one"
        raise ApiError(400, "conflicting_adapters", message, "adapter_id")
    return msgspec.structs.replace(body, adapter_id=adapter)
