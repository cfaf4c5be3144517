"""POST /inference/v1/generate, as vLLM has it: token ids in, token ids out."""

import time
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from service.errors import RequestError
from service.http import encode_json, read_json
from service.openai.completions import TextCompletion
from service.openai.generation import Delta
from service.openai.known_fields import Refused, decode_request
from service.openai.models import Adapters
from service.openai.schemas import (
    ChatLogprobs,
    CompletionRequest,
    Count,
    FinishReason,
    Name,
    TokenLogprob,
    TopLogprob,
    Usage,
    asks_for_nothing,
)
from service.openai.streaming import Inputs, answer
from service.services import Services, services_of

UNBUILT = {
    "stream": Refused((False,), "use /v1/completions, whose prompt may be token ids"),
    "features": Refused(({}, []), "only text is supported"),
    "kv_transfer_params": Refused(({},), "leave it out"),
}


class TokensRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt of token ids. The fields of `sampling_params` are those of a completion."""

    token_ids: Annotated[list[Count], Meta(min_length=1)]
    sampling_params: dict[str, Any]
    model: Name | None = None  # None: the base
    request_id: str | None = None
    stream: bool | None = None
    cache_salt: str | None = None
    features: Any = None
    kv_transfer_params: Any = None


class TokensChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    token_ids: list[int]
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class TokensAnswer(msgspec.Struct, frozen=True, kw_only=True):
    request_id: str
    choices: list[TokensChoice]
    usage: Usage


async def generate(request: Request) -> Response:
    arrived, services = time.perf_counter(), services_of(request)
    body = await read_json(request, TokensRequest, services.bodies)
    for field, refused in UNBUILT.items():
        value = getattr(body, field)
        if not asks_for_nothing(value, refused.harmless):
            raise RequestError("unsupported_parameter", f"{field} is not supported: {refused.instead}", field)
    return await answer(request, services, TokenGeneration(services, body), arrived)


class TokenGeneration:
    """A completion of token ids whose answer is token ids."""

    built: Sequence[str] = ()

    def __init__(self, services: Services, body: TokensRequest) -> None:
        fields: dict[str, Any] = {"prompt": body.token_ids, "stream": False, "cache_salt": body.cache_salt}
        fields["model"] = body.model or services.settings.served_name
        try:
            self.body = decode_request(encode_json(body.sampling_params | fields), CompletionRequest)
        except RequestError as error:
            raise _in_vllms_words(error) from None
        self._completion = TextCompletion(services, self.body)
        self._tokenizer, self._request_id = services.tokenizer, body.request_id
        self.id = self._completion.id

    async def inputs(self, adapters: Adapters) -> Inputs:
        try:
            return await self._completion.inputs(adapters)
        except RequestError as error:
            raise _in_vllms_words(error) from None

    def chunk(self, delta: Delta) -> msgspec.Struct | None:
        raise AssertionError("it is never streamed")

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        raise AssertionError("it is never streamed")

    def whole(self, choices: list[list[Delta]], usage: Usage) -> msgspec.Struct:
        found = [self._choice(deltas) for deltas in choices]
        return TokensAnswer(request_id=self._request_id or self.id, choices=found, usage=usage)

    def _choice(self, deltas: Sequence[Delta]) -> TokensChoice:
        return TokensChoice(
            index=deltas[0].choice,
            token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
            logprobs=None if self.body.logprobs is None else self._logprobs(deltas),
            finish_reason=deltas[-1].finish_reason,
        )

    def _logprobs(self, deltas: Sequence[Delta]) -> ChatLogprobs:
        content = []
        for delta in deltas:
            for token_id, entry in zip(delta.token_ids, delta.logprobs or (), strict=False):
                top = [
                    TopLogprob(**self._named(other), logprob=logprob)
                    for other, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
                ]
                content.append(TokenLogprob(**self._named(token_id), logprob=entry.logprob, top_logprobs=top))
        return ChatLogprobs(content=content, refusal=None)

    def _named(self, token_id: int) -> dict[str, Any]:
        return {"token": f"token_id:{token_id}", "bytes": list(self._tokenizer.token_bytes(token_id))}


def _in_vllms_words(error: RequestError) -> RequestError:
    """A refusal of the completion with the field that vLLM's client sent."""
    param = error.param or ""
    return RequestError(error.code, error.message, "token_ids" if param == "prompt" else f"sampling_params.{param}")
