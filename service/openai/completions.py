"""POST /v1/completions."""

import time
from collections.abc import Sequence
from functools import partial

import msgspec
from starlette.datastructures import State
from starlette.requests import Request
from starlette.responses import Response

from runtime.messages import TokenLogprobs
from service.bodies import read_json
from service.catalog.record import AdapterVersion
from service.openai.generation import Delta
from service.openai.prompts import text_prompts
from service.openai.sampling import answer_length, sampling_params
from service.openai.schemas import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest, Usage
from service.openai.streaming import Inputs, answer
from service.openai.tokenizer import Tokenizer
from service.responses import ApiError

DEFAULT_MAX_TOKENS = 16  # OpenAI's
MAX_SEQUENCES = 1024  # prompts times choices of one request


async def completions(request: Request) -> Response:
    arrived = time.perf_counter()
    return await complete(
        request, await read_json(request, CompletionRequest, request.app.state.settings.max_body_bytes), arrived
    )


async def complete(request: Request, body: CompletionRequest, arrived: float) -> Response:
    """The answer to a decoded request."""
    return await answer(request, body, "cmpl", partial(prepare, request.app.state, body), arrived)


async def prepare(state: State, body: CompletionRequest, version: AdapterVersion | None, identity: str) -> Inputs:
    """Check a request and turn its prompts into tokens. Raises ApiError 400 naming the field."""
    prompts = await text_prompts(state, body.prompt, version, body.alora)
    if len(prompts) * (body.n or 1) > MAX_SEQUENCES:
        message = f"{len(prompts)} prompts with n={body.n or 1} are more than {MAX_SEQUENCES} sequences"
        raise ApiError(400, "too_many_sequences", message, "prompt")
    longest = max(len(prompt.token_ids) for prompt in prompts)
    max_tokens = answer_length(body.max_tokens, DEFAULT_MAX_TOKENS, longest, state.max_model_len, "prompt")
    params = sampling_params(body, max_tokens, body.logprobs, state.vocab_size)
    return Inputs(
        prompts,
        params,
        CompletionShape(identity, body.model, state.tokenizer, with_logprobs=params.logprobs is not None),
    )


class CompletionShape:
    """Words the answers of one request; `chunk` remembers how much text each choice has had."""

    def __init__(self, identity: str, model: str, tokenizer: Tokenizer, *, with_logprobs: bool):
        self._identity, self._model, self._tokenizer = identity, model, tokenizer
        self._with_logprobs = with_logprobs
        self._created = int(time.time())
        self._offsets: dict[int, int] = {}

    def chunk(self, delta: Delta) -> msgspec.Struct | None:
        if not (delta.text or delta.logprobs or delta.finish_reason):
            return None
        return self._completion([self._choice([delta])])

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        return self._completion([], usage)

    def whole(self, choices: list[list[Delta]], usage: Usage) -> msgspec.Struct:
        return self._completion([self._choice(deltas) for deltas in choices], usage)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        return Completion(id=self._identity, created=self._created, model=self._model, choices=choices, usage=usage)

    def _choice(self, deltas: Sequence[Delta]) -> CompletionChoice:
        return CompletionChoice(
            index=deltas[0].choice,
            text="".join(delta.text for delta in deltas),
            logprobs=self._logprobs(deltas) if self._with_logprobs else None,
            finish_reason=deltas[-1].finish_reason,
        )

    def _logprobs(self, deltas: Sequence[Delta]) -> CompletionLogprobs:
        """Offsets are into the text as it is given out: a token that is part of a character has that character's."""
        choice, text_of = deltas[0].choice, self._tokenizer.token_text
        entries: list[tuple[int, TokenLogprobs]] = []
        offsets: list[int] = []
        offset = self._offsets.get(choice, 0)
        for delta in deltas:
            found = list(zip(delta.token_ids, delta.logprobs or (), strict=False))
            entries += found
            offsets += [offset] * len(found)
            offset += len(delta.text)
        self._offsets[choice] = offset
        return CompletionLogprobs(
            tokens=[text_of(token_id) for token_id, _ in entries],
            token_logprobs=[entry.logprob for _, entry in entries],
            text_offset=offsets,
            top_logprobs=[
                {text_of(i): logprob for i, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)}
                for _, entry in entries
            ],
        )
