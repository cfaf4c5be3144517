"""Streams completions and measures when each token arrives at the client."""

import asyncio
import itertools
import json
import random
import statistics
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

import httpx

WORDS = """river stone market lantern copper window garden thunder paper silver engine orchard velvet harbor signal
ember meadow compass barrel winter canvas ladder marble saddle ribbon anchor kettle timber feather mirror bridge"""


class StreamFailed(RuntimeError):
    """The server answered with an error, or a stream was cut off."""


class Timing(NamedTuple):
    """The measurements of one completion."""

    first_seconds: float  # to the first token
    gaps: list[float]  # seconds between later tokens
    tokens: int  # generated
    prefilled: int  # tokens of the prompt that were not in the server's prefix cache, if it reports them


class Load(NamedTuple):
    """The completions to request."""

    models: Sequence[str]  # used in turn
    concurrency: int  # requests at a time
    requests: int  # in all
    prompt_words: int
    max_tokens: int
    seed: int


class Measurement(NamedTuple):
    tokens_per_second: float
    first_milliseconds: float
    gap_milliseconds: float


def prompts(count: int, words: int, seed: object) -> list[str]:
    """Return distinct prompts, which no prefix cache has; the same seed gives the same prompts for another server."""
    rng, choices = random.Random(f"{seed}"), WORDS.split()
    return [" ".join(rng.choices(choices, k=words)) for _ in range(count)]


async def events(
    client: httpx.AsyncClient, model: str, prompt: str | Sequence[int], max_tokens: int, more: Mapping[str, Any] = {}
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the events of a streamed greedy completion of exactly `max_tokens` tokens. Raises StreamFailed.

    `more` has further fields of the request.
    """
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **more,
    }
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise StreamFailed(f"{model}: {response.status_code} {(await response.aread()).decode()[:300]}")
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise StreamFailed(f"{model}: {event['error']}")
                yield event


async def complete(
    client: httpx.AsyncClient,
    model: str,
    prompt: str | Sequence[int],
    max_tokens: int,
    generated: list[int] | None = None,
) -> Timing:
    """Stream one completion to its end and measure it. Raises StreamFailed.

    `generated` takes the ids of the answer's tokens, which not every server can send.
    """
    start = time.perf_counter()
    arrivals: list[float] = []
    tokens, prefilled = None, 0
    more = {} if generated is None else {"return_token_ids": True}
    async with aclosing(events(client, model, prompt, max_tokens, more)) as stream:
        async for event in stream:
            if event["choices"]:
                arrivals.append(time.perf_counter())
                if generated is not None:
                    generated += event["choices"][0].get("token_ids") or []
            if usage := event.get("usage"):
                tokens = usage["completion_tokens"]
                prefilled = usage["prompt_tokens"] - cached_tokens(usage)
    if not arrivals or tokens != max_tokens:
        raise StreamFailed(f"{model}: the stream ended with {tokens} tokens of {max_tokens}")
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    return Timing(arrivals[0] - start, gaps, tokens, prefilled)


def cached_tokens(usage: Mapping[str, Any]) -> int:
    """Return how many tokens of a prompt were in the server's prefix cache; 0 if the server does not report it."""
    return (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


async def complete_all(
    url: str, jobs: Sequence[tuple[str, str]], concurrency: int, max_tokens: int
) -> tuple[list[Timing], float]:
    """Run (model, prompt) jobs, `concurrency` at a time; return their timings and the seconds for all of them.

    Raises StreamFailed.
    """
    timings: list[Timing] = []
    # A connection for each request: llama.cpp's server closes them after a stream without saying so.
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def work(queue: Iterator[tuple[str, str]]) -> None:
            for model, prompt in queue:
                timings.append(await complete(client, model, prompt, max_tokens))

        queue = iter(jobs)
        start = time.perf_counter()
        await asyncio.gather(*(work(queue) for _ in range(concurrency)))
        return timings, time.perf_counter() - start


async def measure(url: str, load: Load) -> Measurement:
    """Run a load; return the throughput over the whole run and the medians of the latencies. Raises StreamFailed."""
    texts = prompts(load.requests, load.prompt_words, load.seed)
    jobs = list(zip(itertools.cycle(load.models), texts, strict=False))
    timings, seconds = await complete_all(url, jobs, load.concurrency, load.max_tokens)
    return Measurement(
        tokens_per_second=sum(timing.tokens for timing in timings) / seconds,
        first_milliseconds=1000 * statistics.median(timing.first_seconds for timing in timings),
        gap_milliseconds=1000 * statistics.median(gap for timing in timings for gap in timing.gaps),
    )
