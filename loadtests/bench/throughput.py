"""throughput: the base, one adapter and four adapters mixed, with one request at a time and with several.

The adapters are random, of rank 16, on all projections, those of experts too. --peer measures another OpenAI-compatible
server too. The two servers take turns, load by load, so that both have the same conditions. With --adapters 0 only the
base is measured, for a peer that cannot take the adapters, and with 1 the base and one adapter.
"""

import argparse
import asyncio
import shlex
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from loadtests.adapter_client import AdapterClient
from loadtests.bench.report import conditions, say, table
from loadtests.completion_stream import Load, Measurement, complete, measure
from loadtests.random_adapter import RANK, adapter_file, write_adapter
from loadtests.server_process import Model, running_server

DEFAULTS = {"requests": 4, "rounds": 1, "max_tokens": 48, "adapters": 4}
ADAPTERS = ("bench-a", "bench-b", "bench-c", "bench-d")
ADAPTER_WORDS = {0: "base", 1: "one adapter", 4: "four adapters mixed"}


class Target(NamedTuple):
    """A server to measure."""

    url: str
    models: Sequence[str]  # its names for the base and the four adapters


class Row(NamedTuple):
    concurrency: int
    adapters: int
    ours: Measurement
    peer: Measurement | None


def add_options(add: Any) -> None:
    add("--peer", help="another server's URL")
    add("--peer-models", default="base,a,b,c,d", help="its names for the base and four adapters")
    add("--peer-load", action="store_true", help="load the adapters into the peer as vLLM's API does")
    add("--concurrency", type=int, nargs="+", default=[1, 8])


def run(chosen: argparse.Namespace, model: Model, scratch: Path) -> str:
    with ExitStack() as stack:
        if not (url := chosen.url):
            say("starting a server")
            arguments = ["--model", str(model.directory), *shlex.split(chosen.server_args)]
            url = stack.enter_context(running_server(arguments))
        ours = upload(url, model, chosen.adapters)
        peer = load_peer(chosen, model, scratch) if chosen.peer else None
        rows = asyncio.run(measure_all(chosen, ours, peer))
        stated = conditions(model, url, *load_conditions(chosen))
    return f"{rows_table(rows)}\n\n{stated}"


def upload(url: str, model: Model, adapters: int) -> Target:
    with AdapterClient(url) as client:
        for seed, name in enumerate(ADAPTERS[:adapters]):
            client.put(name, adapter_file(model.config, seed))
        return Target(url, [client.base(), *ADAPTERS[:adapters]])


def load_peer(chosen: argparse.Namespace, model: Model, scratch: Path) -> Target:
    """Return the peer; with --peer-load, first have it load the same adapters from files, by vLLM's API."""
    target = Target(chosen.peer, chosen.peer_models.split(",")[: 1 + chosen.adapters])
    if chosen.peer_load:
        for seed, name in enumerate(ADAPTERS[: chosen.adapters]):
            write_adapter(scratch / name, model.config, seed)
            body = {"lora_name": target.models[seed + 1], "lora_path": str(scratch / name)}
            httpx.post(f"{target.url}/v1/load_lora_adapter", json=body, timeout=120).raise_for_status()
    return target


async def measure_all(chosen: argparse.Namespace, ours: Target, peer: Target | None) -> list[Row]:
    for target in (ours, peer):
        if target:
            await warm_up(target, chosen.max_tokens)
    rows = []
    for concurrency in chosen.concurrency:
        for adapters in (count for count in ADAPTER_WORDS if count <= chosen.adapters):
            rounds = [await one_round(chosen, concurrency, adapters, seed, ours, peer) for seed in range(chosen.rounds)]
            columns = list(zip(*rounds, strict=True))
            rows.append(Row(concurrency, adapters, middle(columns[0]), middle(columns[1]) if peer else None))
    return rows


async def warm_up(target: Target, max_tokens: int) -> None:
    """Send one request to each model, which makes the adapters resident and tunes the kernels."""
    async with httpx.AsyncClient(base_url=target.url, timeout=600) as client:
        for model in target.models:
            await complete(client, model, "warm up", max_tokens)


async def one_round(
    chosen: argparse.Namespace, concurrency: int, adapters: int, seed: int, ours: Target, peer: Target | None
) -> list[Measurement]:
    """Measure one load on our server and then on the peer, with the same prompts; every load has different ones."""
    results = []
    for target in (ours, peer) if peer else (ours,):
        load = Load(
            models=target.models[1 : 1 + adapters] or target.models[:1],
            concurrency=concurrency,
            requests=max(8, chosen.requests * concurrency),
            prompt_words=chosen.prompt_words,
            max_tokens=chosen.max_tokens,
            seed=1000 * concurrency + 10 * seed + adapters,
        )
        say(f"measuring {target.url}: {load.requests} requests, {concurrency} at a time, {ADAPTER_WORDS[adapters]}")
        results.append(await measure(target.url, load))
    return results


def middle(measured: Sequence[Measurement]) -> Measurement:
    return Measurement(*(statistics.median(column) for column in zip(*measured, strict=True)))


def rows_table(rows: Sequence[Row]) -> str:
    """Return the table; percentages refer to the same server's base at the same concurrency."""
    head = ["at a time", "model", "tok/s", "of base (goal ≥ 90%)", "between tokens, ms", "first token, ms"]
    if rows[0].peer:
        head += ["peer tok/s", "of its base", "between tokens, ms", "first token, ms", "ours / peer"]
    base, lines = rows[0], []
    for row in rows:
        base = row if row.adapters == 0 else base
        cells = [str(row.concurrency), ADAPTER_WORDS[row.adapters], *figures(row.ours, base.ours)]
        if row.peer and base.peer:
            ratio = row.ours.tokens_per_second / row.peer.tokens_per_second
            cells += [*figures(row.peer, base.peer), f"{ratio:.2f}×"]
        lines.append(cells)
    return table(head, lines)


def figures(measured: Measurement, base: Measurement) -> list[str]:
    return [
        f"{measured.tokens_per_second:.1f}",
        f"{measured.tokens_per_second / base.tokens_per_second:.0%}",
        f"{measured.gap_milliseconds:.1f}",
        f"{measured.first_milliseconds:.0f}",
    ]


def load_conditions(chosen: argparse.Namespace) -> tuple[str, ...]:
    adapters = f"random, rank {RANK}, all projections, bfloat16 on disk" if chosen.adapters else "none"
    return (
        f"Adapters: {adapters}.",
        f"Load: streamed /v1/completions, greedy, {chosen.prompt_words} random words each, no two alike, "
        f"{chosen.max_tokens} new tokens, {chosen.requests} requests per unit of concurrency and at least 8; "
        f"medians of latencies, {chosen.rounds} round(s).",
    )
