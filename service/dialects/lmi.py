"""LMI's generations, the format of SageMaker's and Hugging Face's containers: `inputs` and `parameters`."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from service.errors import RequestError
from service.http import decode_json, encode_json
from service.openai.completions import TextCompletion
from service.openai.generation import Delta
from service.openai.known_fields import decode_request
from service.openai.models import Adapters
from service.openai.schemas import CompletionRequest, Name, Usage
from service.openai.streaming import Inputs
from service.services import Services

MAX_NEW_TOKENS = 30  # LMI's default
RENAMED = {"max_new_tokens": "max_tokens", "stop_sequences": "stop", "ignore_eos_token": "ignore_eos"}
SAMPLING = {"temperature", "top_k", "top_p", "min_p"}  # without do_sample: one of them asks for sampling


class LmiRequest(msgspec.Struct, frozen=True, kw_only=True):
    inputs: str | list[str]
    parameters: dict[str, Any] | None = None  # see LmiParameters; all others are those of a completion
    stream: bool | None = None
    model: Name
    adapters: Name | list[Name] | None = None  # one for all inputs


class LmiParameters(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters that no completion has."""

    do_sample: bool | None = None  # None: whether any other parameter asks for sampling
    details: bool | None = None
    return_full_text: bool | None = None


class LmiToken(msgspec.Struct, frozen=True, kw_only=True):
    id: int
    text: str
    log_prob: float


class LmiDetails(msgspec.Struct, frozen=True, kw_only=True):
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    inputs: str
    tokens: list[LmiToken]


class LmiAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    generated_text: str
    details: LmiDetails | None = None


def lmi_request(fields: Mapping[str, msgspec.Raw]) -> tuple[CompletionRequest, LmiParameters]:
    """The completion that a body asks for, and what it wants besides. Raises RequestError."""
    body = decode_json(encode_json(fields), LmiRequest)
    if body.stream:
        message = "stream is not supported with inputs: send prompt instead of inputs and parameters"
        raise RequestError("unsupported_parameter", message, "stream")
    if isinstance(body.adapters, list) and len(body.adapters) != 1:
        message = "adapters: one adapter for all inputs is supported: send a request for each"
        raise RequestError("unsupported_parameter", message, "adapters")
    try:
        return _completion(body)
    except RequestError as error:
        raise _in_lmis_words(error) from None


def _in_lmis_words(error: RequestError) -> RequestError:
    """A refusal of the completion with the field that LMI's client sent."""
    names = {ours: theirs for theirs, ours in RENAMED.items()}
    param = error.param or ""
    return RequestError(
        error.code, error.message, "inputs" if param == "prompt" else f"parameters.{names.get(param, param)}"
    )


def _completion(body: LmiRequest) -> tuple[CompletionRequest, LmiParameters]:
    given = dict(body.parameters or {})
    wanted = decode_json(encode_json(given), LmiParameters)
    for name in LmiParameters.__struct_fields__:
        given.pop(name, None)
    samples = bool(SAMPLING & given.keys()) if wanted.do_sample is None else wanted.do_sample
    fields: dict[str, Any] = {"max_tokens": MAX_NEW_TOKENS}
    fields |= {RENAMED.get(name, name): value for name, value in given.items()}
    if not samples:
        fields["temperature"] = 0
    if wanted.details:
        fields["logprobs"] = 0
    adapter = body.adapters[0] if isinstance(body.adapters, list) else body.adapters
    fields |= {"model": body.model, "prompt": body.inputs, "adapter_id": adapter, "stream": False}
    completion = decode_request(encode_json(fields), CompletionRequest)
    if (completion.n or 1) > 1:
        raise RequestError("unsupported_parameter", "n is not supported with inputs: send a prompt instead", "n")
    return completion, wanted


class LmiGeneration:
    """A completion whose answer is LMI's: one object for one input, a list for a list."""

    built: Sequence[str] = ()

    def __init__(self, services: Services, body: CompletionRequest, wanted: LmiParameters) -> None:
        self._completion = TextCompletion(services, body)
        self._tokenizer, self._wanted = services.tokenizer, wanted
        self.id, self.body = self._completion.id, body

    async def inputs(self, adapters: Adapters) -> Inputs:
        try:
            return await self._completion.inputs(adapters)
        except RequestError as error:
            raise _in_lmis_words(error) from None

    def chunk(self, delta: Delta) -> msgspec.Struct | None:
        raise AssertionError("it is never streamed")

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        raise AssertionError("it is never streamed")

    def whole(self, choices: list[list[Delta]], usage: Usage) -> msgspec.Struct | Sequence[msgspec.Struct]:
        texts = [self.body.prompt] if isinstance(self.body.prompt, str) else [str(text) for text in self.body.prompt]
        answers = [self._answer(text, deltas) for text, deltas in zip(texts, choices, strict=True)]
        return answers[0] if isinstance(self.body.prompt, str) else answers

    def _answer(self, prompt: str, deltas: Sequence[Delta]) -> LmiAnswer:
        text = "".join(delta.text for delta in deltas)
        return LmiAnswer(
            generated_text=prompt + text if self._wanted.return_full_text else text,
            details=self._details(prompt, deltas) if self._wanted.details else None,
        )

    def _details(self, prompt: str, deltas: Sequence[Delta]) -> LmiDetails:
        token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
        logprobs = [entry.logprob for delta in deltas for entry in delta.logprobs or ()]
        reason: Literal["length", "eos_token", "stop_sequence"] = "length"
        if deltas[-1].finish_reason == "stop":
            stops = [self.body.stop] if isinstance(self.body.stop, str) else self.body.stop or ()
            said = self._tokenizer.shown(token_ids)  # with the stop string, which the text may lack
            reason = "stop_sequence" if any(stop and stop in said for stop in stops) else "eos_token"
        return LmiDetails(
            finish_reason=reason,
            generated_tokens=len(token_ids),
            inputs=prompt,
            tokens=[
                LmiToken(id=i, text=self._tokenizer.token_bytes(i).decode(errors="replace"), log_prob=logprob)
                for i, logprob in zip(token_ids, logprobs, strict=False)
            ],
        )
