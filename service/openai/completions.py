"""POST /v1/completions."""

import time
from collections.abc import Sequence
from uuid import uuid4

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from runtime.messages import TokenLogprobs
from service.errors import RequestError
from service.http import read_body
from service.openai.echo import EchoedPrompt
from service.openai.forms import grammar_of
from service.openai.generation import Delta
from service.openai.known_fields import decode_request
from service.openai.models import Adapters
from service.openai.prompts import encoding_of, number_of
from service.openai.sampling_params import answer_length, sampling_params
from service.openai.schemas import (
    MAX_SEQUENCES,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    Usage,
)
from service.openai.streaming import Inputs, answer
from service.services import Services, services_of

DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def completions(request: Request) -> Response:
    arrived, services = time.perf_counter(), services_of(request)
    body = decode_request(await read_body(request, services.bodies), CompletionRequest)
    return await answer(request, services, TextCompletion(services, body), arrived)


class TextCompletion:
    """One completion request: reads its fields, and formats its answer as OpenAI's API does."""

    built: Sequence[str] = ("echo", "prompt_logprobs", "return_token_ids")

    def __init__(self, services: Services, body: CompletionRequest):
        self.id, self.body = f"cmpl-{uuid4().hex}", body
        self._services, self._tokenizer = services, services.tokenizer
        self._created = int(time.time())
        self._prompts: list[EchoedPrompt] = []
        self._begun: set[int] = set()  # the choices that have had a delta
        self._offsets: dict[int, int] = {}  # by choice: the characters that it has had
        self._each = max(body.best_of or 1, body.n or 1)  # sequences for each prompt

    async def inputs(self, adapters: Adapters) -> Inputs:
        body, services = self.body, self._services
        if (sequences := number_of(body.prompt) * self._each) > MAX_SEQUENCES:
            what = f"best_of={self._each}" if self._each > (body.n or 1) else f"n={self._each}"
            message = f"{sequences // self._each} prompts with {what} are more than {MAX_SEQUENCES} sequences"
            raise RequestError("too_many_sequences", message, "prompt")
        versions = adapters.of_prompts(number_of(body.prompt))
        prompts = await services.prompts.text_prompts(
            body.prompt, versions, body.alora, encoding_of(body, body.max_tokens)
        )
        if body.best_of is not None and body.best_of < (body.n or 1):
            message = f"best_of ({body.best_of}) is less than n ({body.n}): generate at least as many as are given out"
            raise RequestError("invalid_field", message, "best_of")
        if body.stream and self._each > (body.n or 1):
            message = "best_of cannot be streamed, since the best are known in the end: leave out stream or best_of"
            raise RequestError("unsupported_parameter", message, "best_of")
        longest = max(len(prompt.token_ids) for prompt in prompts)
        max_tokens = answer_length(body.max_tokens, DEFAULT_MAX_TOKENS, longest, services.max_model_len, "prompt")
        grammar = await grammar_of(body, services.grammars)
        logprobs = 0 if body.logprobs is None and self._each > (body.n or 1) else body.logprobs  # to choose by
        params = sampling_params(body, max_tokens, logprobs, services.vocab_size, grammar, self._tokenizer)
        given = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        texts = [text if isinstance(text, str) else None for text in given[: len(prompts)]]
        self._prompts = [
            EchoedPrompt(prompt.token_ids, text, self._tokenizer) for prompt, text in zip(prompts, texts, strict=True)
        ]
        scored = [body.prompt_logprobs, body.logprobs if body.echo else None]
        alternatives = max((each for each in scored if each is not None), default=None)
        params = msgspec.structs.replace(params, prompt_logprobs=alternatives)
        return Inputs(prompts, params, body.skip_special_tokens is False, self._each)

    def chunk(self, delta: Delta) -> msgspec.Struct | None:
        tokens = delta.token_ids if self.body.return_token_ids else delta.logprobs
        if not (delta.text or tokens or delta.logprobs or delta.finish_reason or self._adds_prompt(delta)):
            return None
        return self._completion([self._choice([delta])])

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        return self._completion([], usage)

    def whole(self, choices: list[list[Delta]], usage: Usage) -> msgspec.Struct:
        each, given = self._each, self.body.n or 1
        answers = [self._choice(deltas) for deltas in choices]
        if each > given:
            likeliest: list[CompletionChoice] = []
            for first in range(0, len(choices), each):
                order = sorted(range(first, first + each), key=lambda choice: -_likelihood(choices[choice]))
                likeliest += [answers[choice] for choice in order[:given]]
            answers = [msgspec.structs.replace(answer, index=index) for index, answer in enumerate(likeliest)]
        return self._completion(answers, usage)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        return Completion(id=self.id, created=self._created, model=self.body.model, choices=choices, usage=usage)

    def _choice(self, deltas: Sequence[Delta]) -> CompletionChoice:
        body, choice = self.body, deltas[0].choice
        prompt = self._prompts[choice // self._each]
        if deltas[0].prompt_logprobs is not None:
            prompt.scores = deltas[0].prompt_logprobs
        begins = choice not in self._begun
        self._begun.add(choice)
        echoed = prompt if begins and body.echo else None
        found = None if body.logprobs is None else self._logprobs(deltas, echoed)
        return CompletionChoice(
            index=choice,
            text=("" if echoed is None else prompt.text) + "".join(delta.text for delta in deltas),
            logprobs=found,
            finish_reason=deltas[-1].finish_reason,
            prompt_token_ids=list(prompt.token_ids) if body.return_token_ids and begins else msgspec.UNSET,
            token_ids=[each for delta in deltas for each in delta.generated]
            if body.return_token_ids
            else msgspec.UNSET,
            prompt_logprobs=msgspec.UNSET
            if body.prompt_logprobs is None or not begins
            else prompt.logprobs(body.prompt_logprobs),
        )

    def _adds_prompt(self, delta: Delta) -> bool:
        """Whether a chunk of this delta is the first of its choice, and has something of the prompt."""
        return delta.choice not in self._begun and bool(self.body.echo or self.body.prompt_logprobs is not None)

    def _logprobs(self, deltas: Sequence[Delta], echoed: EchoedPrompt | None) -> CompletionLogprobs:
        """Of all generated tokens, the one that ended the answer included, as in vLLM.

        Offsets are into the text as it is given out: a token that is part of a character has that character's.
        """
        choice, name_of = deltas[0].choice, self._name
        entries: list[tuple[int, TokenLogprobs | None]] = []
        offsets: list[int] = []
        offset = self._offsets.get(choice, 0)
        if echoed is not None:
            entries += zip(echoed.token_ids, [None, *echoed.first(self.body.logprobs or 0)], strict=True)
            offsets += echoed.offsets
            offset = len(echoed.text)
        for delta in deltas:
            found = list(zip(delta.token_ids, delta.logprobs or (), strict=False))
            if delta.stop_token is not None and delta.stop_logprobs is not None:
                found.append((delta.stop_token, delta.stop_logprobs))
            entries += found
            offsets += [offset] * len(found)
            offset += len(delta.text)
        self._offsets[choice] = offset
        return CompletionLogprobs(
            tokens=[name_of(token_id) for token_id, _ in entries],
            token_logprobs=[None if entry is None else entry.logprob for _, entry in entries],
            text_offset=offsets,
            top_logprobs=[None if entry is None else self._top(token_id, entry) for token_id, entry in entries],
        )

    def _top(self, token_id: int, entry: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens and the chosen one, by name; of two with one name the likelier stays."""
        if not entry.top_ids:
            return {}
        top = {self._name(token_id): entry.logprob}
        for other, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True):
            top.setdefault(self._name(other), logprob)
        return dict(sorted(top.items(), key=lambda each: -each[1]))

    def _name(self, token_id: int) -> str:
        """A token's text; of a part of a character its bytes, as OpenAI names it, so that tokens can be told apart."""
        if self.body.return_tokens_as_token_ids:
            return f"token_id:{token_id}"
        own = self._tokenizer.token_bytes(token_id)
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)


def _likelihood(deltas: Sequence[Delta]) -> float:
    """The mean log-probability of a choice's tokens, the one that ended it included."""
    entries = [
        entry for delta in deltas for entry in (*(delta.logprobs or ()), delta.stop_logprobs) if entry is not None
    ]
    return sum(entry.logprob for entry in entries) / len(entries) if entries else 0.0
