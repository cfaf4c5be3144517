"""POST /tokenize and /detokenize, as vLLM has them: a prompt's or a conversation's token ids, and back."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from service.catalog.record import AdapterVersion
from service.catalog.seen import Seen, least_generation
from service.errors import RequestError
from service.http import json_response, read_json, until_disconnect
from service.keys.caller import caller_of
from service.openai.conversations import template_fields
from service.openai.models import find_version, know
from service.openai.prompts import encoding_of
from service.openai.sampling_params import check_token_ids
from service.openai.schemas import Count, Name, TokenizeRequest
from service.services import Services, services_of

MAX_CONTEXTS = 4  # that a text may fill; who counts tokens wants to know how much too long it is
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenized(msgspec.Struct, frozen=True, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class TokenizerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What clients that tokenize themselves have to know; vLLM shows the tokenizer's configuration."""

    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    model: Name | None = None
    tokens: list[Count]


class Detokenized(msgspec.Struct, frozen=True, kw_only=True):
    prompt: str  # the special tokens included


async def tokenize(request: Request) -> Response:
    services = services_of(request)
    body = await read_json(request, TokenizeRequest, services.bodies)
    return await until_disconnect(request, _tokenize(services, body, await _version(body.model, request)))


async def _tokenize(services: Services, body: TokenizeRequest, version: AdapterVersion | None) -> Response:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError(
            "invalid_field", "expected either prompt or messages", "messages" if body.prompt else "prompt"
        )
    if body.messages is not None:
        fields, encoding = template_fields(body), encoding_of(body, contexts=MAX_CONTEXTS)
        token_ids = await services.prompts.encode_chat(body.messages, version, body.tools or (), fields, encoding)
    else:
        assert body.prompt is not None
        token_ids = await services.prompts.encode_text(body.prompt, encoding_of(body, contexts=MAX_CONTEXTS))
    names = None
    if body.return_token_strs:
        names = [services.tokenizer.token_bytes(i).decode(errors="replace") for i in token_ids]
    return json_response(
        Tokenized(
            count=len(token_ids),
            max_model_len=services.max_model_len,
            tokens=token_ids,
            token_strs=names,
        )
    )


async def tokenizer_info(request: Request) -> Response:
    services = services_of(request)
    tokenizer = services.tokenizer
    tokens = {name: tokenizer.special_tokens.get(name) for name in SPECIAL_TOKENS}
    info = TokenizerInfo(
        tokenizer_class=tokenizer.kind,
        vocab_size=services.vocab_size,
        model_max_length=services.max_model_len,
        chat_template=services.settings.chat_template or tokenizer.chat_templates.get("default"),
        **tokens,
    )
    return json_response(info)


async def detokenize(request: Request) -> Response:
    services = services_of(request)
    body = await read_json(request, DetokenizeRequest, services.bodies)
    await _version(body.model, request)
    check_token_ids(body.tokens, services.vocab_size, "tokens")
    return json_response(Detokenized(prompt=await services.tokenizer.shown_long(body.tokens)))


async def _version(name: str | None, request: Request) -> AdapterVersion | None:
    """The adapter of that name. Adapters share the base's tokenizer, but may have a chat template of their own."""
    least = least_generation(request.headers)
    if name is None:
        return None
    services = services_of(request)
    base, versions = services.settings.served_name, Seen(services.catalog, caller_of(request))
    await know([name], base, versions, least)
    return find_version(name, base, versions, "model")
