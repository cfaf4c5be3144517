"""Streamed completions as a client sees them: when each token came."""

import asyncio
import itertools
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import httpx

WORDS = """river stone market lantern copper window garden thunder paper silver engine orchard velvet harbor signal
ember meadow compass barrel winter canvas ladder marble saddle ribbon anchor kettle timber feather mirror bridge"""


class StreamFailed(RuntimeError):
    """The server answered with an error, or ended a stream without finishing it."""


class Timing(NamedTuple):
    """One completion: seconds to its first token, seconds between later ones, tokens made."""

    first_seconds: float
    gaps: list[float]
    tokens: int


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


def prompts(load: Load) -> list[str]:
    """Distinct prompts, so that no prefix cache answers; the same seed gives another server the same ones."""
    rng, words = random.Random(load.seed), WORDS.split()
    return [" ".join(rng.choices(words, k=load.prompt_words)) for _ in range(load.requests)]


async def complete(client: httpx.AsyncClient, model: str, prompt: str, max_tokens: int) -> Timing:
    """Stream one greedy completion of exactly `max_tokens` tokens. Raises StreamFailed."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start = time.perf_counter()
    arrivals: list[float] = []
    tokens = None
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise StreamFailed(f"{model}: {response.status_code} {(await response.aread()).decode()[:300]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise StreamFailed(f"{model}: {event['error']}")
            if event["choices"]:
                arrivals.append(time.perf_counter())
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    if not arrivals or tokens != max_tokens:
        raise StreamFailed(f"{model}: the stream ended with {tokens} tokens of {max_tokens}")
    return Timing(arrivals[0] - start, [later - earlier for earlier, later in itertools.pairwise(arrivals)], tokens)


async def measure(url: str, load: Load) -> Measurement:
    """Run a load and take it together: throughput over the whole run, medians of the latencies."""
    jobs = iter(list(zip(itertools.cycle(load.models), prompts(load), strict=False)))
    timings: list[Timing] = []
    limits = httpx.Limits(max_connections=load.concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def work(queue: Iterator[tuple[str, str]]) -> None:
            for model, prompt in queue:
                timings.append(await complete(client, model, prompt, load.max_tokens))

        start = time.perf_counter()
        await asyncio.gather(*(work(jobs) for _ in range(load.concurrency)))
        seconds = time.perf_counter() - start
    return Measurement(
        tokens_per_second=sum(timing.tokens for timing in timings) / seconds,
        first_milliseconds=1000 * statistics.median(timing.first_seconds for timing in timings),
        gap_milliseconds=1000 * statistics.median(gap for timing in timings for gap in timing.gaps),
    )
