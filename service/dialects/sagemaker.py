"""POST /invocations: chats, completions and LMI's generations under the one path that SageMaker knows."""

import time
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from service.dialects.lmi import LmiGeneration, lmi_request
from service.errors import RequestError
from service.http import decode_json, encode_json, read_body
from service.openai.chat import Chat
from service.openai.completions import TextCompletion
from service.openai.known_fields import decode_request
from service.openai.schemas import ChatRequest, CompletionRequest
from service.openai.streaming import Call, answer
from service.services import services_of

_Body = TypeVar("_Body", ChatRequest, CompletionRequest)
ADAPTER_HEADER = "X-Amzn-SageMaker-Adapter-Identifier"
FORMS = ("messages", "prompt", "inputs")  # of a chat, a completion, a generation of LMI


async def invocations(request: Request) -> Response:
    """What it is depends on the field that the body has; without `model` it is the base's."""
    arrived, services = time.perf_counter(), services_of(request)
    fields = decode_json(await read_body(request, services.bodies), dict[str, msgspec.Raw])
    forms = [form for form in FORMS if form in fields]
    if len(forms) != 1:
        message = "expected one of messages, for a chat, prompt, for a completion, and inputs, as LMI has it"
        raise RequestError("invalid_field", message, "messages")
    fields.setdefault("model", msgspec.Raw(encode_json(services.settings.served_name)))
    content = encode_json(fields)
    call: Call
    if forms == ["messages"]:
        call = Chat(services, _with_adapter(decode_request(content, ChatRequest), request))
    elif forms == ["prompt"]:
        call = TextCompletion(services, _with_adapter(decode_request(content, CompletionRequest), request))
    else:
        body, wanted = lmi_request(fields)
        call = LmiGeneration(services, _with_adapter(body, request), wanted)
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
