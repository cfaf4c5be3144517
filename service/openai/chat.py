"""POST /v1/chat/completions."""

import time
from collections.abc import Sequence
from uuid import uuid4

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from service.catalog.record import AdapterVersion
from service.errors import RequestError
from service.http import read_json
from service.openai.detokenizer import UNKNOWN
from service.openai.generation import Delta
from service.openai.sampling_params import answer_length, sampling_params
from service.openai.schemas import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from service.openai.streaming import Inputs, answer
from service.services import Services, services_of


async def chat_completions(request: Request) -> Response:
    arrived, services = time.perf_counter(), services_of(request)
    body = await read_json(request, ChatRequest, services.settings.max_body_bytes)
    return await answer(request, services, Chat(services, body), arrived)


class Chat:
    """One chat request: reads its fields, and formats its answer as OpenAI's API does."""

    def __init__(self, services: Services, body: ChatRequest):
        self.id, self.body = f"chatcmpl-{uuid4().hex}", body
        self._services, self._tokenizer = services, services.tokenizer
        self._created = int(time.time())
        self._begun: set[int] = set()  # the choices that have had a chunk

    async def inputs(self, version: AdapterVersion | None) -> Inputs:
        body, services = self.body, self._services
        if body.top_logprobs is not None and not body.logprobs:
            raise RequestError("invalid_field", "top_logprobs needs logprobs to be true", "top_logprobs")
        if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
            message = f"max_tokens ({body.max_tokens}) and max_completion_tokens ({body.max_completion_tokens}) differ"
            raise RequestError("invalid_field", message, "max_completion_tokens")
        prompt = await services.prompts.chat_prompt(body.messages, version, body.alora)
        asked = body.max_completion_tokens or body.max_tokens
        length_param = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
        length = len(prompt.token_ids)
        max_tokens = answer_length(asked, None, length, services.max_model_len, "messages", length_param)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        grammar = await services.grammars.of(body)
        return Inputs([prompt], sampling_params(body, max_tokens, logprobs, services.vocab_size, grammar))

    def chunk(self, delta: Delta) -> msgspec.Struct | None:
        if not (delta.text or delta.logprobs or delta.finish_reason):
            return None
        begins = delta.choice not in self._begun
        self._begun.add(delta.choice)
        choice = ChatChunkChoice(
            index=delta.choice,
            delta=ChatDelta(role="assistant" if begins else None, content=delta.text if delta.text or begins else None),
            logprobs=self._logprobs([delta]),
            finish_reason=delta.finish_reason,
        )
        return self._chunk([choice])

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        return self._chunk([], usage)

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(id=self.id, created=self._created, model=self.body.model, choices=choices, usage=usage)

    def whole(self, choices: list[list[Delta]], usage: Usage) -> msgspec.Struct:
        found = [self._choice(deltas) for deltas in choices]
        return ChatCompletion(id=self.id, created=self._created, model=self.body.model, choices=found, usage=usage)

    def _choice(self, deltas: Sequence[Delta]) -> ChatChoice:
        reason = deltas[-1].finish_reason
        assert reason is not None
        return ChatChoice(
            index=deltas[0].choice,
            message=ChatMessage(role="assistant", content="".join(delta.text for delta in deltas), refusal=None),
            logprobs=self._logprobs(deltas),
            finish_reason=reason,
        )

    def _logprobs(self, deltas: Sequence[Delta]) -> ChatLogprobs | None:
        if not self.body.logprobs:
            return None
        content = []
        for delta in deltas:
            for token_id, entry in zip(delta.token_ids, delta.logprobs or (), strict=False):
                token = self._tokenizer.token_text(token_id)
                top = [
                    TopLogprob(token=(text := self._tokenizer.token_text(i)), logprob=logprob, bytes=utf8(text))
                    for i, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
                ]
                content.append(TokenLogprob(token=token, logprob=entry.logprob, bytes=utf8(token), top_logprobs=top))
        return ChatLogprobs(content=content, refusal=None)


def utf8(token: str) -> list[int] | None:
    return None if UNKNOWN in token else list(token.encode())
