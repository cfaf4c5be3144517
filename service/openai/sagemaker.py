"""POST /invocations: chats and completions under the one path that SageMaker knows."""

import time
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from service.errors import RequestError
from service.http import decode_json, encode_json, read_body
from service.openai.chat import Chat
from service.openai.completions import TextCompletion
from service.openai.schemas import ChatRequest, CompletionRequest
from service.openai.streaming import Call, answer
from service.services import services_of

_Body = TypeVar("_Body", ChatRequest, CompletionRequest)
ADAPTER_HEADER = "X-Amzn-SageMaker-Adapter-Identifier"


async def invocations(request: Request) -> Response:
    """A chat if the body has messages, a completion if it has a prompt; without `model` it is the base's."""
    arrived, services = time.perf_counter(), services_of(request)
    fields = decode_json(await read_body(request, services.settings.max_body_bytes), dict[str, msgspec.Raw])
    if ("messages" in fields) == ("prompt" in fields):
        raise RequestError("invalid_field", "expected either messages, for a chat, or a prompt", "messages")
    fields.setdefault("model", msgspec.Raw(encode_json(services.settings.served_name)))
    content = encode_json(fields)
    call: Call
    if "messages" in fields:
        call = Chat(services, _with_adapter(decode_json(content, ChatRequest), request))
    else:
        call = TextCompletion(services, _with_adapter(decode_json(content, CompletionRequest), request))
    return await answer(request, services, call, arrived)


def _with_adapter(body: _Body, request: Request) -> _Body:
    """The body with the adapter that the header names. Raises RequestError if the body names another one."""
    adapter = request.headers.get(ADAPTER_HEADER)
    if not adapter:
        return body
    if body.adapter_id not in (None, adapter):
        message = f"adapter_id {body.adapter_id!r} and {ADAPTER_HEADER} {adapter!r} are different adapters: name one"
        raise RequestError("conflicting_adapters", message, "adapter_id")
    return msgspec.structs.replace(body, adapter_id=adapter)
