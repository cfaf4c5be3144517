"""A conversation with the base model, and adapters that check it: the steps of an agent's pipeline."""

import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import httpx

from loadtests.completion_stream import StreamFailed, cached_tokens


class Call(NamedTuple):
    """One streamed answer."""

    prompt_tokens: int
    cached_tokens: int  # tokens of the prompt that were in the server's prefix cache
    first_seconds: float  # to the first token
    text: str


class Conversation:
    """The messages of a user and the base model. Calls raise StreamFailed or httpx.HTTPError.

    Only conversations of the same `salt` share cached K/V. With `exact_length`, every answer has its `max_tokens`.
    """

    def __init__(self, client: httpx.Client, base: str, salt: str, *, exact_length: bool = False) -> None:
        self.messages: list[dict[str, str]] = []
        self._client, self._base = client, base
        self._always = {"cache_salt": salt, "temperature": 0, "ignore_eos": exact_length}

    def say(self, text: str, max_tokens: int) -> Call:
        """Send the user's next message; add it and the base model's answer to the conversation."""
        self.messages.append({"role": "user", "content": text})
        call = self._chat(self._base, max_tokens)
        self.messages.append({"role": "assistant", "content": call.text})
        return call

    def check(self, adapter: str, max_tokens: int, *, activated: bool) -> Call:
        """Have an adapter answer after the conversation's last message, without adding the answer.

        For an aLoRA adapter (`activated`), its invocation replaces the assistant's header.
        """
        return self._chat(adapter, max_tokens, **({"alora": {"on_missing": "append"}} if activated else {}))

    def _chat(self, model: str, max_tokens: int, **more: Any) -> Call:
        body = {"model": model, "messages": self.messages, "max_tokens": max_tokens, **self._always, **more}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        start, first, text = time.perf_counter(), None, ""
        with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.is_error:
                raise StreamFailed(f"{model}: {response.status_code} {response.read().decode()[:300]}")
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise StreamFailed(f"{model}: {event['error']}")
                if event["choices"]:
                    first = first or time.perf_counter() - start
                    text += event["choices"][0]["delta"].get("content") or ""
                elif first:
                    return Call(event["usage"]["prompt_tokens"], cached_tokens(event["usage"]), first, text)
        raise StreamFailed(f"{model}: the stream ended without its usage")


def hit_rate(calls: Sequence[Call]) -> float:
    """Return the share of all prompt tokens that were in the prefix cache."""
    return sum(call.cached_tokens for call in calls) / sum(call.prompt_tokens for call in calls)


def prefilled(calls: Sequence[Call]) -> int:
    """Return how many prompt tokens the server computed."""
    return sum(call.prompt_tokens - call.cached_tokens for call in calls)
