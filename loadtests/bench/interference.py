"""interference: how much loads and uploads of adapters slow streaming requests, in time between tokens.

Some base requests stream. Three kinds of stretches take turns: nothing else happens, adapters are loaded one after the
other from their files to the device, or new adapters are uploaded as a training loop does (ephemeral).
"""

import argparse
import asyncio
import shlex
import statistics
import time
from contextlib import ExitStack, aclosing
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from loadtests.adapter_client import AdapterClient
from loadtests.bench.background_loads import BackgroundLoads, Work
from loadtests.bench.report import change, conditions, medians, percentile, say, table, verdict
from loadtests.completion_stream import StreamFailed, events, prompts
from loadtests.random_adapter import RANK
from loadtests.server_process import Model, running_server

DEFAULTS = {"rounds": 6, "seconds": 10.0, "max_tokens": 4096, "adapters": 4}
GOAL = 1.10  # of the 99th percentile without loads and uploads
STRETCHES: dict[Work, str] = {"none": "nothing", "load": "unload, load", "put": "ephemeral PUT"}


class Stretch(NamedTuple):
    """The measurements of one stretch, in seconds."""

    gaps: list[float]  # between tokens
    arrivals: list[float]  # of each load or upload


def add_options(add: Any) -> None:
    add("--pause", type=float, default=0.25, help="seconds between one load or upload and the next")
    add("--streams", type=int, default=4, help="streaming base requests")


def run(chosen: argparse.Namespace, model: Model, scratch: Path) -> str:
    del scratch
    with ExitStack() as stack:
        if not (url := chosen.url):
            say("starting a server")
            arguments = ["--model", str(model.directory), *shlex.split(chosen.server_args)]
            url = stack.enter_context(running_server(arguments))
        background = stack.enter_context(BackgroundLoads(url, model, chosen.adapters, chosen.pause))
        with AdapterClient(url) as client:
            base = client.base()
        rounds = asyncio.run(measure(chosen, url, base, background))
        stated = conditions(
            model,
            url,
            f"Load: {chosen.streams} streamed greedy base completions of {chosen.prompt_words} prompt words, new ones "
            f"in each stretch of {chosen.seconds:g} s, which begins when all of them have their first token.",
            f"Adapters: {chosen.adapters} random ones of rank {RANK}, in turn, with {chosen.pause:g} s between the end "
            "of one and the start of the next; a second process on the same cores loads and uploads them.",
            f"Rounds: {chosen.rounds}, each with the stretches in a different order; medians of the rounds' "
            "percentiles.",
        )
    return f"{rows_table(rounds)}\n\n{stated}"


async def measure(
    chosen: argparse.Namespace, url: str, base: str, background: BackgroundLoads
) -> list[dict[Work, Stretch]]:
    """Measure all stretches of all rounds. Raises StreamFailed, CallFailed."""
    works = list(STRETCHES)
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        say("warming up")
        for work in works:
            await one_stretch(chosen, client, base, background, work, min(chosen.seconds, 2.0), f"warm up {work}")
        rounds = []
        for number in range(chosen.rounds):
            say(f"round {number + 1} of {chosen.rounds}")
            first = number % len(works)
            results = {}
            for work in works[first:] + works[:first]:
                seed = f"{number}/{work}"
                results[work] = await one_stretch(chosen, client, base, background, work, chosen.seconds, seed)
            rounds.append(results)
    return rounds


async def one_stretch(
    chosen: argparse.Namespace,
    client: httpx.AsyncClient,
    base: str,
    background: BackgroundLoads,
    work: Work,
    seconds: float,
    seed: str,
) -> Stretch:
    """Measure streams from their first tokens on, during `work`. Raises StreamFailed, CallFailed."""
    streams = [Stream(prompt) for prompt in prompts(chosen.streams, chosen.prompt_words, seed)]
    tasks = [asyncio.create_task(stream.follow(client, base, chosen.max_tokens)) for stream in streams]
    timer = asyncio.create_task(watch(streams, background, work, seconds))
    try:
        done, _ = await asyncio.wait([*tasks, timer], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in (*tasks, timer):
            task.cancel()
        await asyncio.gather(*tasks, timer, return_exceptions=True)
    arrivals = background.stop()
    gaps = [gap for stream in streams for gap in stream.gaps]
    if not gaps or (work != "none" and not arrivals):
        raise StreamFailed(f"{seconds:g} s are too short: they had {len(gaps)} tokens and {len(arrivals)} arrivals")
    return Stretch(gaps, arrivals)


class Stream:
    """Sends one request after the other and measures the time between tokens."""

    def __init__(self, prompt: str) -> None:
        self.gaps: list[float] = []  # seconds between tokens, of gaps that began while `recording`
        self.recording = False
        self.token = asyncio.Event()  # set at each token
        self._prompt = prompt

    async def follow(self, client: httpx.AsyncClient, model: str, max_tokens: int) -> None:
        """Stream until cancelled. Raises StreamFailed."""
        while True:
            last: float | None = None
            counts = False
            async with aclosing(events(client, model, self._prompt, max_tokens)) as stream:
                async for event in stream:
                    if event["choices"]:
                        now = time.perf_counter()
                        if last is not None and counts:
                            self.gaps.append(now - last)
                        last, counts = now, self.recording
                        self.token.set()


async def watch(streams: list[Stream], background: BackgroundLoads, work: Work, seconds: float) -> None:
    """Wait for every stream's first token, record the streams during `work`, and wait for their last gaps to end."""
    for stream in streams:
        await stream.token.wait()
    background.start(work)
    for stream in streams:
        stream.recording = True
    await asyncio.sleep(seconds)
    for stream in streams:
        stream.recording = False
        stream.token.clear()
    for stream in streams:
        await stream.token.wait()


def rows_table(rounds: list[dict[Work, Stretch]]) -> str:
    head = [
        "beside the streams",
        "between tokens p50, ms",
        "p99, ms",
        "p50 to nothing",
        "p99 to nothing (goal ≤ +10 %)",
    ]
    figures = {work: percentiles([results[work] for results in rounds]) for work in STRETCHES}
    base50, base99 = figures["none"]
    rows = []
    for work, words in STRETCHES.items():
        p50, p99 = figures[work]
        arrivals = [seconds for results in rounds for seconds in results[work].arrivals]
        row = [words, f"{1000 * p50:.1f}", f"{1000 * p99:.1f}"]
        if work == "none":
            row += ["", "", "", ""]
        else:
            row += [change(p50, base50), verdict(change(p99, base99), met=p99 <= GOAL * base99)]
            row += [f"{len(arrivals) / len(rounds):.0f}", f"{1000 * statistics.median(arrivals):.0f}"]
        rows.append([*row, str(sum(len(results[work].gaps) for results in rounds))])
    return table([*head, "arrivals a stretch", "each, ms", "gaps in all"], rows)


def percentiles(stretches: list[Stretch]) -> list[float]:
    """Return the medians over the rounds of the 50th and the 99th percentile, in seconds."""
    return medians([percentile(stretch.gaps, share) for share in (0.5, 0.99)] for stretch in stretches)
