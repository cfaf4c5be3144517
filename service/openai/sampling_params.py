"""From a client's request to what the engine is asked: limits checked, defaults filled in."""

from collections.abc import Sequence
from typing import Any

import msgspec

from runtime.messages import SamplingParams
from service.errors import RequestError
from service.openai.schemas import HARMLESS, GenerationRequest, asks_for_nothing
from service.text.tokenizer import Tokenizer

MAX_BAD_CHARACTERS = 64 * 1024  # of all bad words, which are encoded at once


def refuse_unbuilt(body: msgspec.Struct, place: str = "", built: Sequence[str] = ()) -> None:
    """Raise RequestError for a field that asks for something not built here, instead of ignoring it.

    `built` are fields that this body's call knows, unlike others.
    """
    for field in body.__struct_fields__:
        if field in HARMLESS and field not in built:
            value = getattr(body, field)
            if not asks_for_nothing(value, HARMLESS[field]):
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
    if asked == 0 and room >= 0:
        return 0
    if room < 1 or (asked or 0) > room:
        # OpenAI's sentence: clients look for its beginning, and then shorten the prompt
        answer = f", and {asked} of {length_param} were asked for" if asked else ", which leaves none for the answer"
        message = (
            f"This model's maximum context length is {limit} tokens. However, the prompt has {prompt} tokens{answer}. "
            f"Please reduce the length of the {param}{f' or {length_param}' if asked else ''}."
        )
        raise RequestError("context_length_exceeded", message, length_param if room >= 1 else param)
    return asked or min(room, default or room)


def check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raise RequestError for an id that is not in the vocabulary."""
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
        message = f"{param}: token id {wrong} is not between 0 and {vocab_size - 1}"
        raise RequestError("invalid_token_id", message, param)


def sampling_params(
    body: GenerationRequest,
    max_tokens: int,
    logprobs: int | None,
    vocab_size: int,
    grammar: str | None,
    tokenizer: Tokenizer,
) -> SamplingParams:
    """The parameters of one request. Raises RequestError naming the field."""
    check_token_ids(body.stop_token_ids or (), vocab_size, "stop_token_ids")
    if body.spaces_between_special_tokens is False and not tokenizer.joins_special:
        message = (
            "spaces_between_special_tokens: this model's tokenizer puts spaces between special tokens; leave it out, "
            "or ask for return_token_ids and decode them yourself"
        )
        raise RequestError("unsupported_parameter", message, "spaces_between_special_tokens")
    if (body.min_tokens or 0) > max_tokens:
        message = f"min_tokens ({body.min_tokens}) is more than max_tokens ({max_tokens})"
        raise RequestError("invalid_field", message, "min_tokens")
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        temperature=0.0 if body.top_p == 0 else _given(body.temperature, 1.0),
        top_p=body.top_p or 1.0,
        top_k=max(_given(body.top_k, 0), 0),  # -1 is off too, as in vLLM
        min_p=_given(body.min_p, 0.0),
        repetition_penalty=_given(body.repetition_penalty, 1.0),
        presence_penalty=_given(body.presence_penalty, 0.0),
        frequency_penalty=_given(body.frequency_penalty, 0.0),
        seed=body.seed,
        stop_token_ids=tuple(dict.fromkeys((*(body.stop_token_ids or ()), *_special_stops(body, tokenizer)))),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        logit_bias=_logit_bias(body, vocab_size),
        allowed_token_ids=_allowed_token_ids(body, vocab_size, grammar),
        bad_words=_bad_words(body, tokenizer),
        grammar=grammar,
    )


def _logit_bias(body: GenerationRequest, vocab_size: int) -> dict[int, float]:
    biases = {}
    for key, bias in (body.logit_bias or {}).items():
        if not key.isascii() or not key.isdigit():
            raise RequestError("invalid_field", f"logit_bias: {key!r} is not a token id", "logit_bias")
        biases[int(key)] = bias
    check_token_ids(list(biases), vocab_size, "logit_bias")
    return biases


def _allowed_token_ids(body: GenerationRequest, vocab_size: int, grammar: str | None) -> tuple[int, ...]:
    if body.allowed_token_ids is None:
        return ()
    if not body.allowed_token_ids:
        raise RequestError("invalid_field", "allowed_token_ids must not be empty", "allowed_token_ids")
    if grammar is not None:
        message = "allowed_token_ids cannot be combined with a grammar, which might need other tokens: send one of them"
        raise RequestError("invalid_field", message, "allowed_token_ids")
    check_token_ids(body.allowed_token_ids, vocab_size, "allowed_token_ids")
    return tuple(dict.fromkeys(body.allowed_token_ids))


def _bad_words(body: GenerationRequest, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as tokens, at the beginning of a text and after a space."""
    if sum(map(len, body.bad_words or ())) > MAX_BAD_CHARACTERS:
        message = f"bad_words has more than {MAX_BAD_CHARACTERS} characters in all: send fewer or shorter words"
        raise RequestError("invalid_field", message, "bad_words")
    words = [text for word in body.bad_words or () for text in (word, f" {word.lstrip()}")]
    encoded = tokenizer.encode_all(words, add_special_tokens=False) if words else []
    return tuple(dict.fromkeys(tuple(token_ids) for token_ids in encoded if token_ids))


def _special_stops(body: GenerationRequest, tokenizer: Tokenizer) -> list[int]:
    """The tokens of stop strings that are one special token each: a text without special tokens never has them."""
    special = [text for text in stop_strings(body) if tokenizer.is_special(text)]
    return [token_id for [token_id] in tokenizer.encode_all(special, add_special_tokens=False)] if special else []


def stop_strings(body: GenerationRequest) -> tuple[str, ...]:
    given = [body.stop] if isinstance(body.stop, str) else body.stop or ()
    return tuple(text for text in given if text)


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value
