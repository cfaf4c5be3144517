"""interference: what adapters that arrive cost the requests that stream meanwhile, in time between tokens.

Some base requests stream; in stretches that take turns nothing else happens, adapters are loaded one after another
from their files to the device, or new ones are uploaded as a training loop does (ephemeral).
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
from loadtests.background_loads import BackgroundLoads, Work
from loadtests.completion_stream import StreamFailed, events, prompts
from loadtests.random_adapter import RANK
from loadtests.report import change, conditions, medians, percentile, say, table, verdict
from loadtests.server_process import Model, running_server

DEFAULTS = {"rounds": 6, "seconds": 10.0, "max_tokens": 4096, "adapters": 4}
GOAL = 1.10  # of the 99th percentile with nothing loading
STRETCHES: dict[Work, str] = {"none": "nothing", "load": "unload, load", "put": "ephemeral PUT"}


class Stretch(NamedTuple):
    """What one stretch measured: seconds between tokens, and the seconds of each load or upload."""

    gaps: list[float]
    arrivals: list[float]


def add_options(add: Any) -> None:
    add("--pause", type=float, default=0.25, help="seconds between one load or upload and the next")
    add("--streams", type=int, default=4, help="base requests that stream")


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
            f"in each stretch of {chosen.seconds:g} s, measured once all of them have their first token.",
            f"Adapters: {chosen.adapters} random ones of rank {RANK}, in turn, with {chosen.pause:g} s between the end "
            "of one and the next; loaded and sent by another process on the same cores.",
            f"Rounds: {chosen.rounds}, the stretches in another order in each; medians of the rounds' percentiles.",
        )
    return f"{rows_table(rounds)}\n\n{stated}"


async def measure(
    chosen: argparse.Namespace, url: str, base: str, background: BackgroundLoads
) -> list[dict[Work, Stretch]]:
    """All stretches of all rounds. Raises StreamFailed, CallFailed."""
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
    """Streams from their first tokens on, with `work` beside them."""
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
        raise StreamFailed(f"{seconds:g} s are too short: {len(gaps)} tokens and {len(arrivals)} arrivals came in them")
    return Stretch(gaps, arrivals)


class Stream:
    """One request after another; the seconds between its tokens that begin while `recording` are kept in `gaps`."""

    def __init__(self, prompt: str) -> None:
        self.gaps: list[float] = []
        self.recording = False
        self.token = asyncio.Event()
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
    """Wait for all streams, then record them for some seconds with the work beside, to the ends of their last gaps."""
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
    """The medians over the rounds of the 50th and the 99th percentile, in seconds."""
    return medians([percentile(stretch.gaps, share) for share in (0.5, 0.99)] for stretch in stretches)
