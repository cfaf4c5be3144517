"""tiers: many adapters of different popularity on a device tier that holds a few, compared with one that holds all.

Two servers run at once, with the same adapters, and take turns with the same requests. Host memory holds all adapters
in both.
"""

import argparse
import asyncio
import random
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loadtests.adapter_client import AdapterClient
from loadtests.bench.adapter_copy import memory_bytes
from loadtests.bench.report import conditions, percentile, say, table, verdict
from loadtests.completion_stream import complete_all, prompts
from loadtests.random_adapter import RANK, adapter_file, number_file
from loadtests.server_process import Model, running_server

DEFAULTS = {"rounds": 3, "requests": 96, "max_tokens": 48, "adapters": 64}
GOAL = 0.85  # of the tokens per second of the server that holds all


class Round(NamedTuple):
    """One round on one server."""

    tokens_per_second: float
    first_seconds: list[float]  # to the first token of each request
    loads: float
    evictions: float


def add_options(add: Any) -> None:
    add("--resident", type=int, default=8, help="adapters that the smaller device tier holds")
    add("--popularity", type=float, default=1.0, help="Zipf exponent of the adapters' popularity")
    add("--at-a-time", type=int, default=8, help="requests at a time")


def run(chosen: argparse.Namespace, model: Model, scratch: Path) -> str:
    names = [f"bench-{number}" for number in range(chosen.adapters)]
    room = str(chosen.adapters * memory_bytes(model, RANK) + 2**20)
    arguments = ["--model", str(model.directory), "--host-adapter-bytes", room, "--data-directory", str(scratch)]
    arguments += shlex.split(chosen.server_args)
    say("starting a server that holds all adapters")
    with running_server([*arguments, "--adapter-bytes", room]) as whole:
        each = upload(whole, model, names)
        say(f"starting a server whose device tier holds {chosen.resident} of {each} bytes")
        with running_server([*arguments, "--adapter-bytes", str(chosen.resident * each)]) as small:
            load_all(small, names, "host")
            results = asyncio.run(measure(chosen, names, {"small": small, "all": whole}))
            stated = conditions(model, small, *load_conditions(chosen, each))
    return f"{rows_table(chosen, results)}\n\n{stated}"


def upload(url: str, model: Model, names: Sequence[str]) -> int:
    """Upload an adapter under each name and load it to the device; return the bytes of one there."""
    say(f"uploading {len(names)} adapters")
    file = adapter_file(model.config, 0)
    with AdapterClient(url) as client:
        for number, name in enumerate(names):
            number_file(file, number)
            client.put(name, file, preload=False)
    load_all(url, names, "device")
    with AdapterClient(url) as client:
        return round(client.metrics().tier("bytes_used")) // len(names)


def load_all(url: str, names: Sequence[str], tier: str) -> None:
    """Load all adapters to a tier, so that no later load reads a file."""
    with AdapterClient(url) as client:
        for name in names:
            client.load(name, tier)


async def measure(chosen: argparse.Namespace, names: Sequence[str], urls: dict[str, str]) -> dict[str, list[Round]]:
    """Return each server's rounds; in each, both answer the same requests, and they take turns to be first."""
    results: dict[str, list[Round]] = {word: [] for word in urls}
    for url in urls.values():
        await complete_all(url, jobs(chosen, names, "warm up")[: chosen.at_a_time], chosen.at_a_time, chosen.max_tokens)
    for number in range(chosen.rounds):
        say(f"round {number + 1} of {chosen.rounds}: {chosen.requests} requests, {chosen.at_a_time} at a time")
        for word in sorted(urls, reverse=number % 2 == 0):
            results[word].append(await one_round(chosen, urls[word], jobs(chosen, names, number)))
    return results


def jobs(chosen: argparse.Namespace, names: Sequence[str], seed: object) -> list[tuple[str, str]]:
    """Return (adapter, prompt) jobs, adapters by popularity; the same seed gives the same jobs."""
    models = random.Random(f"{seed}").choices(names, zipf_weights(len(names), chosen.popularity), k=chosen.requests)
    return list(zip(models, prompts(chosen.requests, chosen.prompt_words, seed), strict=True))


def zipf_weights(count: int, exponent: float) -> list[float]:
    """Return the weights by which each of `count` adapters is chosen, by rank."""
    return [1 / rank**exponent for rank in range(1, count + 1)]


async def one_round(chosen: argparse.Namespace, url: str, requests: Sequence[tuple[str, str]]) -> Round:
    with AdapterClient(url) as client:
        before = client.metrics()
        timings, seconds = await complete_all(url, requests, chosen.at_a_time, chosen.max_tokens)
        after = client.metrics()
    loads, evictions = (
        after.value("rootstock_adapter_loads_total") - before.value("rootstock_adapter_loads_total"),
        after.tier("evictions_total") - before.tier("evictions_total"),
    )
    tokens = sum(timing.tokens for timing in timings)
    return Round(tokens / seconds, [timing.first_seconds for timing in timings], loads, evictions)


def rows_table(chosen: argparse.Namespace, results: dict[str, list[Round]]) -> str:
    head = ["device tier holds", "tok/s", f"of the one that holds all (goal ≥ {GOAL:.0%})"]
    head += ["first token p50, ms", "p99, ms", "longest wait, ms", "loads", "evictions"]
    words = {"all": f"all {chosen.adapters}", "small": f"{chosen.resident} of {chosen.adapters}"}
    speeds = {word: statistics.median(each.tokens_per_second for each in rounds) for word, rounds in results.items()}
    rows = []
    for word, rounds in sorted(results.items()):
        ratio = speeds[word] / speeds["all"]
        waits = [1000 * seconds for each in rounds for seconds in each.first_seconds]
        shown = "" if word == "all" else verdict(f"{ratio:.0%}", met=ratio >= GOAL)
        figures = [statistics.median(waits), percentile(waits, 0.99), max(waits)]
        figures += [sum(each.loads for each in rounds), sum(each.evictions for each in rounds)]
        rows.append([words[word], f"{speeds[word]:.1f}", shown, *(f"{figure:.0f}" for figure in figures)])
    return table(head, rows)


def load_conditions(chosen: argparse.Namespace, each: int) -> tuple[str, ...]:
    return (
        f"Adapters: {chosen.adapters} random ones of rank {RANK}, all seven projections, {each / 1e6:.1f} MB of device "
        f"memory each; Zipf({chosen.popularity:g}) popularity; all of them in host memory on both servers.",
        f"Load: streamed /v1/completions, greedy, {chosen.prompt_words} random words each, no two alike, "
        f"{chosen.max_tokens} new tokens, {chosen.requests} requests a round, {chosen.at_a_time} at a time.",
        f"Rounds: {chosen.rounds}; the same requests to both servers, which take turns to be first while the other one "
        "is idle; the median of tok/s; first tokens, loads and evictions on the device over all rounds.",
    )
