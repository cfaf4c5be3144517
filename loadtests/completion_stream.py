"""Streamed completions as a client sees them: when each token came."""

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
    """The server answered with an error, or ended a stream without finishing it."""


class Timing(NamedTuple):
    """One completion: seconds to its first token, seconds between later ones, tokens made.

    `prefilled` are the tokens of the prompt that the server did not find in its cache, if it says.
    """

    first_seconds: float
    gaps: list[float]
    tokens: int
    prefilled: int


class Load(NamedTuple):
    """What to ask for: `requests` completions, `concurrency` of them at a time, the models taken in turn."""

    models: Sequence[str]
    concurrency: int
    requests: int
    prompt_words: int
    max_tokens: int
    seed: int


class Measurement(NamedTuple):
    tokens_per_second: float
    first_milliseconds: float
    gap_milliseconds: float


def prompts(count: int, words: int, seed: object) -> list[str]:
    """Distinct prompts, so that no prefix cache answers; the same seed gives another server the same ones."""
    rng, choices = random.Random(f"{seed}"), WORDS.split()
    return [" ".join(rng.choices(choices, k=words)) for _ in range(count)]


async def events(
    client: httpx.AsyncClient, model: str, prompt: str | Sequence[int], max_tokens: int
) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a streamed greedy completion of exactly `max_tokens` tokens, as they come. Raises StreamFailed."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
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


async def complete(client: httpx.AsyncClient, model: str, prompt: str | Sequence[int], max_tokens: int) -> Timing:
    """Stream one completion to its end. Raises StreamFailed."""
    start = time.perf_counter()
    arrivals: list[float] = []
    tokens, prefilled = None, 0
    async with aclosing(events(client, model, prompt, max_tokens)) as stream:
        async for event in stream:
            if event["choices"]:
                arrivals.append(time.perf_counter())
            if usage := event.get("usage"):
                tokens = usage["completion_tokens"]
                prefilled = usage["prompt_tokens"] - cached_tokens(usage)
    if not arrivals or tokens != max_tokens:
        raise StreamFailed(f"{model}: the stream ended with {tokens} tokens of {max_tokens}")
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    return Timing(arrivals[0] - start, gaps, tokens, prefilled)


def cached_tokens(usage: Mapping[str, Any]) -> int:
    """The tokens of a prompt that were in the server's cache; 0 from a server that does not say."""
    return (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


async def complete_all(
    url: str, jobs: Sequence[tuple[str, str]], concurrency: int, max_tokens: int
) -> tuple[list[Timing], float]:
    """Run (model, prompt) jobs, so many at a time, and say how many seconds all of them took. Raises StreamFailed."""
    timings: list[Timing] = []
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def work(queue: Iterator[tuple[str, str]]) -> None:
            for model, prompt in queue:
                timings.append(await complete(client, model, prompt, max_tokens))

        queue = iter(jobs)
        start = time.perf_counter()
        await asyncio.gather(*(work(queue) for _ in range(concurrency)))
        return timings, time.perf_counter() - start


async def measure(url: str, load: Load) -> Measurement:
    """Run a load and take it together: throughput over the whole run, medians of the latencies."""
    texts = prompts(load.requests, load.prompt_words, load.seed)
    jobs = list(zip(itertools.cycle(load.models), texts, strict=False))
    timings, seconds = await complete_all(url, jobs, load.concurrency, load.max_tokens)
    return Measurement(
        tokens_per_second=sum(timing.tokens for timing in timings) / seconds,
        first_milliseconds=1000 * statistics.median(timing.first_seconds for timing in timings),
        gap_milliseconds=1000 * statistics.median(gap for timing in timings for gap in timing.gaps),
    )
