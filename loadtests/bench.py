"""Benchmark: the base, one adapter, four adapters mixed, one request at a time and several at once.

`python -m loadtests.bench` starts a server and measures it; with --url it measures one that runs. The adapters are
random, of rank 16, on all seven projections, and are uploaded. --peer measures another OpenAI-compatible server in
turn with ours, load by load, so that both see the same machine.
"""

import argparse
import asyncio
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from loadtests.completion_stream import Load, Measurement, StreamFailed, complete, measure
from loadtests.random_adapter import RANK, write_adapter
from loadtests.server_process import ServerFailed, running_server

ADAPTERS = ("bench-a", "bench-b", "bench-c", "bench-d")
ADAPTER_WORDS = {0: "base", 1: "one adapter", 4: "four adapters mixed"}


class Target(NamedTuple):
    """A server under test, and what it calls the base and the four adapters."""

    url: str
    models: Sequence[str]


class Row(NamedTuple):
    concurrency: int
    adapters: int
    ours: Measurement
    peer: Measurement | None


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench", description=__doc__)
    parser.add_argument("--url", help="a server that runs; default: start one")
    parser.add_argument("--model", help="the served model's directory; default: the embedded model")
    parser.add_argument("--server-args", default="", help="more arguments for the server that is started")
    parser.add_argument("--peer", help="another server's URL")
    parser.add_argument("--peer-models", default="base,a,b,c,d", help="its names for the base and four adapters")
    parser.add_argument("--peer-load", action="store_true", help="load the adapters into the peer as vLLM's API does")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--requests", type=int, default=4, help="per unit of concurrency, and at least 8")
    parser.add_argument("--prompt-words", type=int, default=60)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=1, help="repetitions; medians are shown")
    chosen = parser.parse_args(argv)
    if chosen.peer and len(chosen.peer_models.split(",")) != 5:
        parser.error("--peer-models takes five names: the base's and four adapters'")
    return chosen


def model_directory(chosen: argparse.Namespace) -> Path:
    if chosen.model:
        return Path(chosen.model)
    command = [sys.executable, "-m", "service.default_model"]
    return Path(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())


def upload(url: str, adapters: Path) -> Target:
    """Upload the adapters, and find the base's name."""
    with httpx.Client(base_url=url, timeout=120) as client:
        for name in ADAPTERS:
            files = {file.name: file.read_bytes() for file in (adapters / name).iterdir()}
            answer = client.put(f"/adapters/{name}", files={key: (key, data) for key, data in files.items()})
            if answer.is_error:
                raise StreamFailed(f"upload of {name}: {answer.status_code} {answer.text[:300]}")
        cards = client.get("/v1/models").raise_for_status().json()["data"]
    return Target(url, [next(card["id"] for card in cards if not card["parent"]), *ADAPTERS])


def load_peer(chosen: argparse.Namespace, adapters: Path) -> Target:
    target = Target(chosen.peer, chosen.peer_models.split(","))
    if chosen.peer_load:
        for name, model in zip(ADAPTERS, target.models[1:], strict=True):
            body = {"lora_name": model, "lora_path": str(adapters / name)}
            httpx.post(f"{target.url}/v1/load_lora_adapter", json=body, timeout=120).raise_for_status()
    return target


async def warm_up(target: Target, max_tokens: int) -> None:
    """One request to each model: the adapters become resident, the kernels are chosen."""
    async with httpx.AsyncClient(base_url=target.url, timeout=600) as client:
        for model in target.models:
            await complete(client, model, "warm up", max_tokens)


async def run(chosen: argparse.Namespace, ours: Target, peer: Target | None) -> list[Row]:
    for target in (ours, peer):
        if target:
            await warm_up(target, chosen.max_tokens)
    rows = []
    for concurrency in chosen.concurrency:
        for adapters in (0, 1, 4):
            rounds = [await one_round(chosen, concurrency, adapters, seed, ours, peer) for seed in range(chosen.rounds)]
            columns = list(zip(*rounds, strict=True))
            rows.append(Row(concurrency, adapters, medians(columns[0]), medians(columns[1]) if peer else None))
    return rows


async def one_round(
    chosen: argparse.Namespace, concurrency: int, adapters: int, seed: int, ours: Target, peer: Target | None
) -> list[Measurement]:
    """Measure one load on our server, then on the peer, with the same prompts; no other load has them."""
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


def medians(measured: Sequence[Measurement]) -> Measurement:
    return Measurement(*(statistics.median(column) for column in zip(*measured, strict=True)))


def table(rows: Sequence[Row]) -> str:
    """Markdown; percentages are of the same server's base at the same concurrency."""
    head = ["at a time", "model", "tok/s", "of base", "between tokens, ms", "first token, ms"]
    if rows[0].peer:
        head += ["peer tok/s", "of its base", "between tokens, ms", "first token, ms", "ours / peer"]
    base = rows[0]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        base = row if row.adapters == 0 else base
        cells = [str(row.concurrency), ADAPTER_WORDS[row.adapters], *figures(row.ours, base.ours)]
        if row.peer and base.peer:
            ratio = row.ours.tokens_per_second / row.peer.tokens_per_second
            cells += [*figures(row.peer, base.peer), f"{ratio:.2f}×"]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def figures(measured: Measurement, base: Measurement) -> list[str]:
    return [
        f"{measured.tokens_per_second:.1f}",
        f"{measured.tokens_per_second / base.tokens_per_second:.0%}",
        f"{measured.gap_milliseconds:.1f}",
        f"{measured.first_milliseconds:.0f}",
    ]


def conditions(chosen: argparse.Namespace, directory: Path, config: dict[str, Any], ours: Target) -> str:
    dtype = config.get("dtype") or config.get("torch_dtype")
    versions = ", ".join(f"{name} {installed(name)}" for name in ("torch", "transformers"))
    return "\n".join(
        [
            f"- Machine: {cpu_name()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.2f} before; "
            f"{platform.system()} {platform.release()}, Python {platform.python_version()}, {versions}; "
            "the client runs on the same cores.",
            f"- Model: {directory.name} ({dtype}); server {httpx.get(ours.url + '/version').json()['version']}.",
            f"- Adapters: random, rank {RANK}, all seven projections, bfloat16 on disk.",
            f"- Load: streamed /v1/completions, greedy, {chosen.prompt_words} random words each, no two alike, "
            f"{chosen.max_tokens} new tokens, {chosen.requests} requests per unit of concurrency and at least 8; "
            f"medians of latencies, {chosen.rounds} round(s).",
        ]
    )


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def say(text: str) -> None:
    """Progress; standard output carries only the result."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    chosen = options()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory = model_directory(chosen)
        config = json.loads((directory / "config.json").read_text())
        say(f"making {len(ADAPTERS)} random adapters")
        for seed, name in enumerate(ADAPTERS):
            write_adapter(scratch / name, config, seed)
        if not chosen.url:
            say("starting a server")
            arguments = ["--model", str(directory), *shlex.split(chosen.server_args)]
            chosen.url = stack.enter_context(running_server(arguments))
        ours = upload(chosen.url, scratch)
        peer = load_peer(chosen, scratch) if chosen.peer else None
        stated = conditions(chosen, directory, config, ours)
        print(table(asyncio.run(run(chosen, ours, peer))), stated, sep="\n\n")


if __name__ == "__main__":
    try:
        main()
    except (StreamFailed, ServerFailed, httpx.HTTPError) as error:
        sys.exit(f"failed: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
