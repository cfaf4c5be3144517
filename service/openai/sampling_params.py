"""From a client's request to what the engine is asked: limits checked, defaults filled in."""

from collections.abc import Sequence
from typing import Any

import msgspec

from runtime.messages import SamplingParams
from service.errors import RequestError
from service.openai.schemas import HARMLESS, GenerationRequest


def refuse_unbuilt(body: msgspec.Struct, place: str = "") -> None:
    """Raise RequestError for a field that asks for something not built here, instead of ignoring it."""
    for field in body.__struct_fields__:
        if field in HARMLESS:
            value = getattr(body, field)
            if value is not None and value not in HARMLESS[field]:
                raise RequestError("unsupported_parameter", f"{place}{field} is not supported", f"{place}{field}")


def answer_length(
    asked: int | None,
    default: int | None,
    prompt: int,
    limit: int,
    param: str,
    length_param: str = "max_tokens",
) -> int:
    """How many tokens may be generated after a prompt of so many within a context of `limit` tokens.

    `default` None means the rest of the context; `param` is the field the prompt came from, `length_param` the one
    that asked for a length. Raises RequestError with the numbers.
    """
    room = limit - prompt
    if room < 1 or (asked or 0) > room:
        answer = f" and {asked} of {length_param}" if asked else ", which leaves none for an answer"
        message = f"the model's context is {limit} tokens; the prompt has {prompt}{answer}"
        raise RequestError("context_length_exceeded", message, length_param if room >= 1 else param)
    return asked or min(room, default or room)


def check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raise RequestError for an id that is not in the vocabulary."""
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
        message = f"{param}: token id {wrong} is not between 0 and {vocab_size - 1}"
        raise RequestError("invalid_token_id", message, param)


def sampling_params(
    body: GenerationRequest, max_tokens: int, logprobs: int | None, vocab_size: int, grammar: str | None
) -> SamplingParams:
    """The parameters of one request. Raises RequestError naming the field."""
    check_token_ids(body.stop_token_ids or (), vocab_size, "stop_token_ids")
    if (body.min_tokens or 0) > max_tokens:
        message = f"min_tokens ({body.min_tokens}) is more than max_tokens ({max_tokens})"
        raise RequestError("invalid_field", message, "min_tokens")
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        temperature=_given(body.temperature, 1.0),
        top_p=_given(body.top_p, 1.0),
        top_k=max(_given(body.top_k, 0), 0),  # -1 is off too, as in vLLM
        min_p=_given(body.min_p, 0.0),
        repetition_penalty=_given(body.repetition_penalty, 1.0),
        presence_penalty=_given(body.presence_penalty, 0.0),
        frequency_penalty=_given(body.frequency_penalty, 0.0),
        seed=body.seed,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        grammar=grammar,
    )


def stop_strings(body: GenerationRequest) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value
