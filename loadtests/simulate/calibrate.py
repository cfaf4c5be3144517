"""Measures what an engine's steps and loads cost, over HTTP: `python -m loadtests.simulate.calibrate --out costs.json`.

Starts a server of the embedded model, or two at once with --beside: then each load runs on one of them alone, and then
on both at the same time. What the service and the client take of the same cores is in the figures.
"""

import argparse
import asyncio
import json
import os
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import httpx

from loadtests.adapter_client import AdapterClient, CallFailed
from loadtests.bench.report import cpu_name, say
from loadtests.completion_stream import StreamFailed, Timing, complete
from loadtests.random_adapter import RANK, adapter_file, number_file
from loadtests.server_process import Model, ServerFailed, find_model, running_server
from loadtests.simulate.costs import Costs, Limits, StepCosts, Transfer, Waits, as_fields

ROWS = (1, 4, 8, 16)  # decoding requests at a time
PROMPTS = (1, 16, 256, 1024)  # tokens; all but the last one fit into one step, and two have as many as rows
FEW_TIMES = 5  # that prompts of no more tokens than rows are measured: they take little
SHORT = 8  # tokens of a prompt whose attention costs nothing to speak of
LONG = 384  # tokens of a context whose attention is to be seen
LONG_TOKENS = 72  # of an answer: while some prompts are computed, others decode
AT_ONCE = 8  # requests at a time, for what adapters and long contexts cost
SEEN_SECONDS = 60  # for all servers to see what is in the store
RANKS = (RANK, 4 * RANK)  # of the adapters that are loaded, small and large
PATIENCE_SECONDS = 0.1  # of a load that gives way to a step (`runtime.background`)
INSTANT = 1e12  # bytes a second: what is not moved at all


class Figures(NamedTuple):
    """Seconds, as a client saw them."""

    decoding: Mapping[int, float]  # from token to token, by requests at a time, with short contexts
    long_context: float  # of AT_ONCE requests with LONG tokens each
    one_adapter: float  # of AT_ONCE requests with the same one
    adapters: float  # of AT_ONCE requests with an adapter each
    first: Mapping[int, float]  # to the first token, by the tokens of a lone prompt


class Prompts:
    """Prompts of token ids that no cache has."""

    def __init__(self, vocabulary: int, seed: object = 0) -> None:
        self._rng, self._vocabulary = random.Random(f"{seed}"), vocabulary

    def some(self, tokens: int) -> list[int]:
        return self._rng.choices(range(self._vocabulary // 2, self._vocabulary), k=tokens)


async def gap(urls: Sequence[str], prompts: Prompts, models: Sequence[str], context: int, tokens: int = 36) -> float:
    """Return the seconds from token to token of one request for each model, on all servers at the same time.

    Of the last third of the tokens of the first server's requests, when all prompts have been computed.
    """
    limits = httpx.Limits(max_connections=None)
    clients = [httpx.AsyncClient(base_url=url, timeout=600, limits=limits) for url in urls]
    try:
        calls = [complete(client, model, prompts.some(context), tokens) for client in clients for model in models]
        timings: list[Timing] = await asyncio.gather(*calls)
    finally:
        for client in clients:
            await client.aclose()
    return statistics.fmean(each for timing in timings[: len(models)] for each in timing.gaps[-tokens // 3 :])


async def first(urls: Sequence[str], prompts: Prompts, model: str, tokens: int) -> float:
    """Return the seconds to the first token of a lone prompt, on all servers at the same time; a median if short."""

    async def some(url: str) -> float:
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            await client.get("/health")  # the connection is made
            times = FEW_TIMES if tokens <= ROWS[-1] else 1
            found = [await complete(client, model, prompts.some(tokens), 2) for _ in range(times)]
            return statistics.median(each.first_seconds for each in found)

    return (await asyncio.gather(*map(some, urls)))[0]


async def one_round(urls: Sequence[str], prompts: Prompts, base: str, adapters: Sequence[str]) -> Figures:
    """Measure the first server, while the others do the same."""
    return Figures(
        decoding={rows: await gap(urls, prompts, [base] * rows, SHORT) for rows in ROWS},
        long_context=await gap(urls, prompts, [base] * AT_ONCE, LONG, LONG_TOKENS),
        one_adapter=await gap(urls, prompts, list(adapters[:1]) * AT_ONCE, SHORT),
        adapters=await gap(urls, prompts, adapters[:AT_ONCE], SHORT),
        first={tokens: await first(urls, prompts, base, tokens) for tokens in PROMPTS},
    )


class Rounds:
    """Measures servers that run, alone and beside each other, as often as it is asked."""

    def __init__(self, urls: Sequence[str], model: Model, base: str, adapters: Sequence[str]) -> None:
        """`adapters` are in the store of all servers."""
        self.alone: list[Figures] = []
        self.beside: list[Figures] = []
        self.adapter_bytes = 0.0  # of each, in memory
        self._urls, self._base, self._adapters = urls, base, adapters
        self._prompts = Prompts(model.config["vocab_size"])

    def measure(self) -> None:
        say(f"measuring steps, round {len(self.alone) + 1}")
        for url in self._urls:
            with AdapterClient(url) as client:
                for name in self._adapters[:AT_ONCE]:
                    client.load(name, "device")
                metrics = client.metrics()
                self.adapter_bytes = metrics.tier("bytes_used") / metrics.tier("adapters")
        given = (self._prompts, self._base, self._adapters)
        self.alone.append(asyncio.run(one_round(self._urls[:1], *given)))
        if len(self._urls) > 1:
            self.beside.append(asyncio.run(one_round(self._urls, *given)))

    def forget(self) -> None:
        """The first round only touched memory."""
        self.alone.clear()
        self.beside.clear()


def middle(rounds: Sequence[Figures]) -> Figures:
    """Return the medians."""
    return Figures(
        decoding={rows: statistics.median(each.decoding[rows] for each in rounds) for rows in ROWS},
        long_context=statistics.median(each.long_context for each in rounds),
        one_adapter=statistics.median(each.one_adapter for each in rounds),
        adapters=statistics.median(each.adapters for each in rounds),
        first={tokens: statistics.median(each.first[tokens] for each in rounds) for tokens in PROMPTS},
    )


def step_costs(found: Figures) -> tuple[StepCosts, float]:
    """Return the costs of steps, and the seconds of a request outside them.

    A prompt's row computes no logits and sends nothing, so a decoding row costs more: what is more from the fewest to
    the most decoding rows than from a prompt of as few to one of as many. Steps of a number of decoding rows that was
    measured take what was measured.
    """
    few, many, step, long = PROMPTS
    more = found.decoding[many] - found.decoding[few] - (found.first[many] - found.first[few])
    # Of steps that are shorter than what is noise here, no part may be longer than the whole
    decoding_row = max(0.0, min([more / (many - few), *(seconds / rows for rows, seconds in found.decoding.items())]))
    by_rows = [(rows, seconds - rows * decoding_row) for rows, seconds in found.decoding.items()]
    outside = max(0.0, found.first[few] - by_rows[0][1])
    by_rows.append((step, max(0.0, found.first[step] - outside)))
    tokens_attended = LONG + LONG_TOKENS * 5 / 6  # in the middle of the last third
    attended = (found.long_context - found.decoding[AT_ONCE]) / AT_ONCE / (tokens_attended - SHORT)
    adapter = max(0.0, (found.adapters - found.one_adapter) / (AT_ONCE - 1))
    adapter_row = max(0.0, (found.one_adapter - found.decoding[AT_ONCE] - adapter) / AT_ONCE)
    steps = long // step
    pairs = (found.first[long] - outside - steps * by_rows[-1][1]) / (long * long / 2)
    costs = StepCosts(by_rows, decoding_row, adapter_row, adapter, max(0.0, attended), max(0.0, pairs))
    return costs, outside


class LoadCosts(NamedTuple):
    """What reading an adapter from disk to host memory costs, and copying it to the device."""

    read: Transfer
    copy: Transfer
    waits: Waits
    conditions: Sequence[str]


def load_costs(urls: Sequence[str], model: Model, base: str, times: int = 4) -> LoadCosts:
    """Return the costs of the first server's loads, from an idle engine and one that computes steps.

    An engine's loads give way to its steps: what they take longer while AT_ONCE requests decode on each server is so
    many waits for a step.
    """
    say("measuring loads")
    sizes = {}
    with AdapterClient(urls[0]) as client:
        for rank in RANKS:
            file = adapter_file(model.config, rank, rank)
            sizes[rank] = len(file)
            for number in range(times):
                number_file(file, number)
                client.put(f"load-{rank}-{number}", file, preload=False)
        for rank in RANKS:
            client.load(f"load-{rank}-0", "device")  # memory is touched
            client.unload(f"load-{rank}-0", "host")
        idle = {rank: stage_seconds(client, rank, times) for rank in RANKS}
        prompts = Prompts(model.config["vocab_size"], "loads")
        busy, step = asyncio.run(loads_beside(urls, prompts, base, client, times))
        for rank in RANKS:
            for number in range(times):
                client.delete(f"load-{rank}-{number}")
    alone, beside = ([sums(stages[rank]) for rank in RANKS] for stages in (idle, busy))
    read, copy = (
        line([(sizes[rank], each[stage]) for rank, each in zip(RANKS, alone, strict=True)]) for stage in (0, 1)
    )
    # The adapter that requests use has the first rank.
    waits = [max(0.0, slow - quick) / step / sizes[RANK] for slow, quick in zip(beside[0], alone[0], strict=True)]
    said = (
        f"An adapter of {sizes[RANK] / 1e6:.1f} MB, read and packed, and copied: {alone[0][0]:.4f} and "
        f"{alone[0][1]:.4f} s while the engine was idle, {beside[0][0]:.4f} and {beside[0][1]:.4f} s while {AT_ONCE} "
        f"requests decoded, with {step:.4f} s a step (at most {PATIENCE_SECONDS:g} counted). Means of {times}."
    )
    return LoadCosts(read, copy, Waits(waits[0], waits[1], PATIENCE_SECONDS), [said])


def sums(stages: Mapping[str, float]) -> tuple[float, float]:
    """The seconds to host memory, and from there to the device."""
    return stages["read"] + stages["pack"], stages["copy"]


async def loads_beside(
    urls: Sequence[str], prompts: Prompts, base: str, client: AdapterClient, times: int
) -> tuple[dict[int, dict[str, float]], float]:
    """Load the adapters of each rank while requests decode, from when each has had an answer.

    Return the mean seconds of each stage, and of a wait for a step of the first server.
    """
    ended = False
    gaps: list[float] = []
    answered = asyncio.Semaphore(0)

    async def decode(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=600) as streams:
            while not ended:
                timing = await complete(streams, base, prompts.some(SHORT), 36)
                answered.release()
                if url == urls[0]:
                    gaps.extend(timing.gaps)

    async def all_answered() -> None:
        for _ in range(len(urls) * AT_ONCE):
            await answered.acquire()

    decoding = [asyncio.create_task(decode(url)) for url in urls for _ in range(AT_ONCE)]
    begun = asyncio.create_task(all_answered())
    try:
        await asyncio.wait([begun, *decoding], return_when=asyncio.FIRST_COMPLETED)  # or one of them has failed
        found = {rank: await asyncio.to_thread(stage_seconds, client, rank, times) for rank in RANKS}
    finally:
        ended = True
        begun.cancel()
        await asyncio.gather(*decoding)
    return found, statistics.fmean(min(gap, PATIENCE_SECONDS) for gap in gaps)


def stage_seconds(client: AdapterClient, rank: int, times: int) -> dict[str, float]:
    before = client.metrics()
    for number in range(times):
        client.load(f"load-{rank}-{number}", "device")
        client.unload(f"load-{rank}-{number}", "host")
    stages = client.metrics().load_stages(before)
    return {stage: seconds / count for stage, (seconds, count) in stages.items()}


def line(points: Sequence[tuple[float, float]]) -> Transfer:
    """Return the transfer that takes two measured times; without latency if the larger one took no longer."""
    (small, less), (large, more) = points
    if more <= less:
        return Transfer(0.0, large / more if more else INSTANT)
    speed = (large - small) / (more - less)
    return Transfer(max(0.0, less - small / speed), speed)


def costs_of(rounds: Rounds, loads: LoadCosts, model: Model, limits: Limits, conditions: Sequence[str]) -> Costs:
    """Return the costs by rounds that were measured; `loads` are what `load_costs` returned."""
    shape = model.config
    head = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    heads = shape.get("num_key_value_heads") or shape["num_attention_heads"]
    alone, beside = middle(rounds.alone), middle(rounds.beside) if rounds.beside else None
    steps, outside = step_costs(alone)
    steps_beside = None
    if beside is not None:
        steps_beside, outside = step_costs(beside)  # requests come while both compute
    return Costs(
        about=f"measured: {model.directory.name} on {len(os.sched_getaffinity(0))} cores of {cpu_name()}",
        measured=True,
        conditions=[
            *conditions,
            f"{datetime.now(UTC):%d %B %Y}, medians of {len(rounds.alone)} round(s); the client is on the same cores.",
            *described("Alone", alone),
            *(described("While the other server does the same", beside) if beside else ()),
            *loads.conditions,
            "The store is a local directory: nothing is downloaded.",
        ],
        steps=steps,
        beside=steps_beside,
        request_seconds=outside,
        loads_at_once=2,
        copy=loads.copy,
        read=loads.read,
        download=Transfer(0.0, INSTANT),
        kv_bytes_per_token=2 * shape["num_hidden_layers"] * heads * head * 2,
        adapter_bytes=rounds.adapter_bytes,
        limits=limits,
        waits=loads.waits,
    )


def upload(urls: Sequence[str], model: Model, names: Sequence[str]) -> str:
    """Put adapters into the store by way of the first server, and wait until all have seen them.

    Returns the base's name. Raises ServerFailed.
    """
    say(f"uploading {len(names)} adapters")
    file = adapter_file(model.config, 0)
    with AdapterClient(urls[0]) as client:
        for number, name in enumerate(names):
            number_file(file, number)
            client.put(name, file, preload=False)
        base = client.base()
    deadline = time.monotonic() + SEEN_SECONDS
    for url in urls:
        while len(httpx.get(f"{url}/adapters").raise_for_status().json()["adapters"]) < len(names):
            if time.monotonic() > deadline:
                raise ServerFailed(f"{url} has not seen the adapters of the store in {SEEN_SECONDS} seconds")
            time.sleep(0.2)
    return base


def described(when: str, found: Figures) -> list[str]:
    return [
        f"{when}, seconds from token to token: {shown(found.decoding)} at a time; of {AT_ONCE} with {LONG} tokens of "
        f"context {found.long_context:.4f}, with one adapter {found.one_adapter:.4f}, "
        f"with {AT_ONCE} {found.adapters:.4f}.",
        f"{when}, seconds to the first token of a lone prompt: {shown(found.first)} tokens.",
    ]


def shown(seconds: Mapping[int, float]) -> str:
    return ", ".join(f"{number}: {each:.4f}" for number, each in seconds.items())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.simulate.calibrate", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="file of the table")
    add("--beside", action="store_true", help="measure with and without a second server beside")
    add("--rounds", type=int, default=3)
    add("--model", help="the served model's directory; default: the embedded model")
    add("--server-args", default="", help="additional arguments of the servers")
    chosen = parser.parse_args(argv)
    model, count = find_model(chosen.model), 1 + chosen.beside
    with ExitStack() as stack:
        say(f"starting {count} server(s)")
        store = stack.enter_context(tempfile.TemporaryDirectory())
        given = ["--model", str(model.directory), "--data-directory", store, *shlex.split(chosen.server_args)]
        urls = [stack.enter_context(running_server(given)) for _ in range(count)]
        names = [f"calibrate-{number}" for number in range(AT_ONCE)]
        base = upload(urls, model, names)
        rounds = Rounds(urls, model, base, names)
        rounds.measure()
        rounds.forget()
        for _ in range(chosen.rounds):
            rounds.measure()
        started = f"{count} server(s) on one store, started with {chosen.server_args or 'no arguments'}."
        loads = load_costs(urls, model, base)
        write(costs_of(rounds, loads, model, Limits(), [started]), chosen.out)


def write(costs: Costs, path: Path) -> None:
    path.write_text(json.dumps(as_fields(costs), indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (CallFailed, StreamFailed, ServerFailed, httpx.HTTPError) as error:
        sys.exit(f"failed: {error}")
