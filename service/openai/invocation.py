"""aLoRA: where in a prompt an adapter begins to apply, and what runs if the prompt does not invoke it."""

import asyncio
from collections.abc import Sequence
from typing import Literal, NamedTuple

from runtime.invocation import find_invocation
from service.catalog.record import AdapterRecord, AdapterVersion, OnMissing
from service.errors import RequestError
from service.openai.schemas import Alora
from service.text.tokenizer import Tokenizer

Invocation = Literal["found", "appended", "base"]
LONG_PROMPT = 50_000  # tokens; the search in a longer request takes more than a few milliseconds
SHOWN_TOKENS = 64  # of an invocation in an error's message
SHOWN_PROMPTS = 64  # of one request in its answer's headers, which proxies bound


class Prompt(NamedTuple):
    """A prompt, and the place from which an adapter applies to it."""

    token_ids: list[int]
    adapter: str | None = None  # its digest; None: the base
    invocation_start: int = 0  # the index of the first token that the adapter applies to
    kv_is_base: bool = False  # the adapter leaves every K and V as the base's
    invocation: Invocation | None = None  # how an aLoRA's came to be there, or that the base runs; None: no aLoRA


def require_applicable(alora: Alora | None, versions: Sequence[AdapterVersion | None]) -> None:
    """Raise RequestError for `alora` in a request that is to no aLoRA adapter."""
    version = next(iter(versions), None)
    if alora is not None and not any(each is not None and each.record.invocation_tokens for each in versions):
        model = "the base model" if version is None else f"adapter {version.name!r}, which is a plain LoRA"
        message = f"alora says what to do without an aLoRA's invocation, and this request is to {model}"
        raise RequestError("alora_not_applicable", message, "alora")


async def invoked(prompts: Sequence[list[int]], versions: Sequence[AdapterVersion | None]) -> list[Prompt | None]:
    """Each prompt with the place where its adapter begins; None for a prompt that does not invoke its aLoRA."""
    records = [None if version is None else version.record for version in versions]
    if sum(map(len, prompts)) < LONG_PROMPT:
        return list(map(_invoked, prompts, records))
    return await asyncio.to_thread(lambda: list(map(_invoked, prompts, records)))


def _invoked(token_ids: list[int], record: AdapterRecord | None) -> Prompt | None:
    if record is None:
        return Prompt(token_ids)
    if record.invocation_tokens is None:
        return Prompt(token_ids, record.digest, 0, record.leaves_kv)
    start = find_invocation(token_ids, record.invocation_tokens)
    return None if start is None else Prompt(token_ids, record.digest, start, record.leaves_kv, "found")


def on_missing(alora: Alora | None, version: AdapterVersion, default: OnMissing) -> OnMissing:
    """What to do where the invocation is missing: what the request says, else its adapter's record, else `default`."""
    asked = None if alora is None else alora.on_missing
    return asked or version.record.alora_on_missing or default


def without_invocation(
    token_ids: list[int], version: AdapterVersion, wanted: OnMissing, tokenizer: Tokenizer, param: str
) -> Prompt:
    """What to run for a prompt that does not invoke its aLoRA. Raises RequestError if an error is wanted."""
    record = version.record
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
    raise RequestError("alora_invocation_missing", message, param)


def alora_headers(prompts: Sequence[Prompt]) -> dict[str, str]:
    """Headers that say what was done about an aLoRA's invocation, one value for each of the first prompts."""
    shown = prompts[:SHOWN_PROMPTS]
    if all(prompt.invocation is None for prompt in shown):
        return {}
    headers = {"x-alora-invocation": ", ".join(prompt.invocation or "-" for prompt in shown)}
    active = [prompt.invocation is not None and prompt.adapter is not None for prompt in shown]
    if any(active):
        places = (str(prompt.invocation_start) if here else "-" for prompt, here in zip(shown, active, strict=True))
        headers["x-alora-activation"] = ", ".join(places)
    return headers
