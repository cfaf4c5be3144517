"""Prompts of requests, as text, token ids or messages, made token ids for their model."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from starlette.datastructures import State

from service.catalog.record import AdapterVersion
from service.openai.invocation import Prompt, activated, on_missing, without_invocation
from service.openai.sampling import answer_length, check_token_ids, refuse_unbuilt
from service.openai.schemas import Alora, Message
from service.openai.tokenizer import InvalidChat, Tokenizer
from service.responses import ApiError


async def text_prompts(
    state: State, prompt: str | list[str | int | list[int]], version: AdapterVersion | None, alora: Alora | None
) -> list[Prompt]:
    """The prompts of a completion, each activated by itself. Raises ApiError 400."""
    prompts = await encode_prompts(prompt, state.tokenizer, state.vocab_size)
    answer_length(None, None, max(map(len, prompts)), state.max_model_len, "prompt")  # before they are searched
    found = []
    for token_ids, place in zip(prompts, await activated(prompts, version), strict=True):
        if place is None:
            assert version is not None
            place = without_invocation(token_ids, version, alora, state.tokenizer, "prompt")
        found.append(place)
    return found


async def chat_prompt(
    state: State, messages: Sequence[Message], version: AdapterVersion | None, alora: Alora | None
) -> Prompt:
    """A conversation up to where the assistant's answer begins. Raises ApiError 400.

    An invocation that is to be appended stands in place of the assistant's header.
    """
    token_ids = await _encode_chat(state, messages, generation_prompt=True)
    [prompt] = await activated([token_ids], version)
    if prompt is not None:
        return prompt
    assert version is not None
    if on_missing(alora) == "append":
        token_ids = await _encode_chat(state, messages, generation_prompt=False)
    return without_invocation(token_ids, version, alora, state.tokenizer, "messages")


async def chat_prefix(
    state: State, messages: Sequence[Message], version: AdapterVersion | None, alora: Alora | None
) -> Prompt:
    """What a later request with these messages begins with, whatever follows them. Raises ApiError 400."""
    whole = await _encode_chat(state, messages, generation_prompt=False)
    answered = await _encode_chat(state, messages, generation_prompt=True)
    # A template may end a conversation with what is not there when it goes on, and so may the tokenizer with a token
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(whole, answered, strict=False))
    shared = _some([token_id for token_id, _ in pairs])
    place, later = await activated([shared, answered], version)
    if later is not None and (place is None or place.activation < later.activation):
        # The assistant's header invokes: whatever is said before it, an earlier one among it, will be the base's
        if on_missing(alora) == "append":
            return later
        return later._replace(token_ids=shared, activation=min(later.activation, len(shared)))
    if place is not None:
        return place
    assert version is not None
    base = whole if on_missing(alora) == "append" else shared
    return without_invocation(base, version, alora, state.tokenizer, "messages")


async def encode_prompts(
    prompt: str | list[str | int | list[int]], tokenizer: Tokenizer, vocab_size: int
) -> list[list[int]]:
    """The token ids of a prompt in any of its four forms. Raises ApiError 400."""
    if isinstance(prompt, str):
        prompts = await tokenizer.encode_texts([prompt])
    elif all(isinstance(item, str) for item in prompt):
        prompts = await tokenizer.encode_texts([item for item in prompt if isinstance(item, str)])
    elif all(isinstance(item, int) for item in prompt):
        prompts = [[item for item in prompt if isinstance(item, int)]]
    elif all(isinstance(item, list) for item in prompt):
        prompts = [item for item in prompt if isinstance(item, list)]
    else:
        raise ApiError(400, "invalid_field", "prompt: strings, token ids and lists of them cannot be mixed", "prompt")
    if not prompts or not all(prompts):
        raise ApiError(400, "empty_prompt", "prompt: a prompt needs at least one token", "prompt")
    for token_ids in prompts:
        check_token_ids(token_ids, vocab_size, "prompt")
    return prompts


async def _encode_chat(state: State, messages: Sequence[Message], *, generation_prompt: bool) -> list[int]:
    for index, turn in enumerate(messages):
        refuse_unbuilt(turn, f"messages[{index}].")
    try:
        plain = [_plain(message) for message in messages]
        token_ids: list[int] = await state.tokenizer.encode_chat(plain, generation_prompt)
    except InvalidChat as error:
        raise ApiError(400, "invalid_chat", str(error), "messages") from None
    check_token_ids(_some(token_ids), state.vocab_size, "messages")
    return token_ids


def _some(token_ids: list[int]) -> list[int]:
    if not token_ids:
        raise ApiError(400, "empty_prompt", "messages: the chat template makes no tokens of them", "messages")
    return token_ids


def _plain(message: Message) -> Mapping[str, Any]:
    """A message as chat templates know it: content is one string."""
    content = message.content
    text = content if isinstance(content, str) else "\n".join(part.text for part in content)
    found = {"role": message.role, "content": text}
    return found if message.name is None else {**found, "name": message.name}
