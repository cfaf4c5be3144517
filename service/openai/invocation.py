"""Where in its prompt an adapter begins to apply, and what becomes of a prompt that does not invoke its aLoRA."""

import asyncio
from collections.abc import Sequence
from typing import Literal, NamedTuple

from runtime.invocation import find_invocation
from service.catalog.record import AdapterRecord, AdapterVersion
from service.openai.schemas import Alora, OnMissing
from service.openai.tokenizer import Tokenizer
from service.responses import ApiError

Invocation = Literal["found", "appended", "base"]
LONG_PROMPT = 50_000  # tokens of a request from which on the search takes more than a few milliseconds
SHOWN_TOKENS = 64  # of an invocation in an error's message
SHOWN_PROMPTS = 64  # of one request in its answer's headers: proxies bound those


class Prompt(NamedTuple):
    """A prompt, and from which of its tokens on an adapter (a digest; None is the base) applies.

    `shares_kv`: the adapter's K/V are the base's. `invocation` is how an aLoRA's came to be there, or that the base
    runs instead; None for all other models.
    """

    token_ids: list[int]
    adapter: str | None = None
    activation: int = 0
    shares_kv: bool = False
    invocation: Invocation | None = None


def require_applicable(alora: Alora | None, version: AdapterVersion | None) -> None:
    """Raise ApiError 400 for `alora` in a request that is not to an aLoRA adapter."""
    if alora is not None and (version is None or version.record.invocation_tokens is None):
        model = "the base model" if version is None else f"adapter {version.name!r}, which is a plain LoRA"
        message = f"alora says what to do without an aLoRA's invocation, and this request is to {model}"
        raise ApiError(400, "alora_not_applicable", message, "alora")


async def activated(prompts: Sequence[list[int]], version: AdapterVersion | None) -> list[Prompt | None]:
    """Each prompt with the place where its adapter begins; None for one that does not invoke its aLoRA."""
    if version is None:
        return [Prompt(token_ids) for token_ids in prompts]
    if sum(map(len, prompts)) < LONG_PROMPT:
        return [_activated(token_ids, version.record) for token_ids in prompts]
    return await asyncio.to_thread(lambda: [_activated(token_ids, version.record) for token_ids in prompts])


def _activated(token_ids: list[int], record: AdapterRecord) -> Prompt | None:
    if record.invocation_tokens is None:
        return Prompt(token_ids, record.digest, 0, record.leaves_kv)
    start = find_invocation(token_ids, record.invocation_tokens)
    return None if start is None else Prompt(token_ids, record.digest, start, record.leaves_kv, "found")


def on_missing(alora: Alora | None) -> OnMissing:
    return "error" if alora is None else alora.on_missing


def without_invocation(
    token_ids: list[int], version: AdapterVersion, alora: Alora | None, tokenizer: Tokenizer, param: str
) -> Prompt:
    """What to run of a prompt that does not invoke its aLoRA. Raises ApiError 400 unless the request says what."""
    record, wanted = version.record, on_missing(alora)
    invocation = record.invocation_tokens or []
    if wanted == "base":
        return Prompt(token_ids, invocation="base")
    if wanted == "append":
        start = len(token_ids)  # the last match, however the two may overlap
        return Prompt([*token_ids, *invocation], record.digest, start, record.leaves_kv, "appended")
    cut = ", ..." if len(invocation) > SHOWN_TOKENS else ""
    shown = invocation[:SHOWN_TOKENS]
    message = (
        f"{param}: adapter {version.name!r} is an aLoRA, and the prompt does not have its invocation, the token ids "
        f"[{', '.join(map(str, shown))}{cut}], {tokenizer.shown(shown)!r}; put it there, or send alora.on_missing: "
        "append or base"
    )
    raise ApiError(400, "alora_invocation_missing", message, param)


def alora_headers(prompts: Sequence[Prompt]) -> dict[str, str]:
    """What was done about an aLoRA's invocation: one value a prompt, of the first ones; nothing for other models."""
    shown = prompts[:SHOWN_PROMPTS]
    if any(prompt.invocation is None for prompt in shown):
        return {}
    headers = {"x-alora-invocation": ", ".join(prompt.invocation or "" for prompt in shown)}
    if any(prompt.adapter is not None for prompt in shown):
        places = ("-" if prompt.adapter is None else str(prompt.activation) for prompt in shown)
        headers["x-alora-activation"] = ", ".join(places)
    return headers
