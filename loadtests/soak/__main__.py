"""A server with little memory under mixed traffic, which fails if anything grows: `python -m loadtests.soak`.

It starts a server whose adapters, K/V and host memory are far smaller than what the traffic uses, and samples each
second what the service and its engine hold: anonymous memory, descriptors, threads, and by /metrics blocks and
adapters. After a warm-up, in which caches fill, each series is to be flat: the soak fails with the reason if one rises
faster than its limit. Then the traffic ends, all adapters are deleted and all K/V dropped, and no request, block or
adapter may be left that was not there before the first one.
"""

import argparse
import asyncio
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx

from loadtests.adapter_client import AdapterClient, CallFailed
from loadtests.api_key import add_api_key, asking_for
from loadtests.bench.report import say, table
from loadtests.server_process import Model, Server, ServerFailed, find_model, started_server
from loadtests.soak.judge import Growth, Limit, growth, not_back
from loadtests.soak.processes import children_of, engine_of, held_by
from loadtests.soak.traffic import KINDS, Refused, Traffic

LITTLE_MEMORY = ["--adapter-bytes", "40M", "--host-adapter-bytes", "64M", "--kv-cache-bytes", "96M"]
LITTLE_MEMORY += ["--host-kv-bytes", "32M", "--collect-after-seconds", "60"]
# Of each series that is judged. An engine that was flat rose by 0.04 MB a minute, one that grew by 100 (BENCHMARKS.md).
LIMITS = {
    "engine memory, MB": Limit(per_minute=1.5, in_all=12.0),
    "service memory, MB": Limit(per_minute=1.5, in_all=12.0),
    "engine descriptors": Limit(per_minute=0.5, in_all=4.0),
    "service descriptors": Limit(per_minute=0.5, in_all=8.0),
    "engine threads": Limit(per_minute=0.2, in_all=2.0),
    "service threads": Limit(per_minute=0.2, in_all=4.0),
    "other processes": Limit(per_minute=0.2, in_all=2.0),
    "K/V blocks held": Limit(per_minute=0.5, in_all=2.0),
}
ENDS = ("died", "hung", "failed")  # of an engine
# What is back at rest to what it was before the first request: threads and memory are kept for later ones
AT_REST = (
    *("requests running", "requests waiting", "engines ended", "K/V in use, parts of 1", "K/V blocks held"),
    *("K/V blocks cached", "host K/V blocks"),
    *(f"{tier} {what}" for tier in ("device", "host") for what in ("bytes_used", "bytes_pinned", "adapters")),
)
SAMPLE_SECONDS = 1.0
SILENT_SECONDS = 60.0  # without a snapshot of the engine, which a machine that is busy otherwise may delay
REST_SECONDS = 30.0  # for what is under way to end, once the traffic has


class Grown(Exception):
    """Something grew, or is not back to what it was; one reason a line."""


Sample = Mapping[str, float]


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="of traffic, the warm-up included")
    parser.add_argument("--warm-up", type=float, help="seconds that are not judged; default: 30 percent")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--kinds", default=",".join(KINDS), help="of the traffic, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    add_api_key(parser, "what the server asks for, and all calls send; default: none")
    parser.add_argument("--model", help="the served model's directory; default: the embedded model")
    parser.add_argument("--server-args", default="", help="additional arguments of the server")
    parser.add_argument("--samples", type=Path, help="a file for all samples, one JSON object a line")
    chosen = parser.parse_args(argv)
    if unknown := [kind for kind in chosen.kinds.split(",") if kind not in KINDS]:
        parser.error(f"there is no kind of traffic {unknown[0]!r}, only {', '.join(KINDS)}")
    if chosen.warm_up is None:
        chosen.warm_up = 0.3 * chosen.seconds
    if chosen.warm_up >= chosen.seconds:
        parser.error("--warm-up must leave some of --seconds")
    if sys.platform != "linux":
        parser.error("it reads /proc, which only Linux has")
    return chosen


class Watched(NamedTuple):
    """A server, and a client of it."""

    server: Server
    client: AdapterClient
    base: str  # the model's name

    def sample(self) -> Sample:
        """Return what the server holds now. Raises Grown if its engine is gone."""
        engine = engine_of(self.server.pid)
        if engine is None:
            raise Grown("the server has no engine any more")
        found: dict[str, float] = {}
        for name, pid in (("engine", engine), ("service", self.server.pid)):
            held = held_by(pid)
            found[f"{name} memory, MB"] = held.memory
            found[f"{name} descriptors"], found[f"{name} threads"] = held.descriptors, held.threads
        metrics, labels = self.client.metrics(), {"model_name": self.base, "engine": "0"}
        found["other processes"] = len(children_of(self.server.pid)) - 1
        found["engines ended"] = sum(metrics.value("rootstock_engine_restarts_total", reason=why) for why in ENDS)
        found["requests running"] = metrics.value("vllm:num_requests_running", **labels)
        found["requests waiting"] = metrics.value("vllm:num_requests_waiting", **labels)
        found["K/V in use, parts of 1"] = metrics.value("vllm:kv_cache_usage_perc", **labels)
        found["K/V blocks held"] = metrics.value("rootstock_blocks_held")
        found["K/V blocks cached"] = metrics.value("rootstock_blocks_cached")
        found["host K/V blocks"] = metrics.value("rootstock_host_kv_blocks")
        for tier in ("device", "host"):
            for what in ("bytes_used", "bytes_pinned", "adapters"):
                found[f"{tier} {what}"] = metrics.tier(what, tier)
        return found


async def soak(
    server: Server, model: Model, chosen: argparse.Namespace
) -> tuple[list[tuple[float, Sample]], list[str]]:
    """Run the traffic; return the samples with their seconds since its start, and what is left when it has ended.

    Raises Grown without an engine, Refused.
    """
    kinds = {kind: KINDS[kind] for kind in chosen.kinds.split(",")}
    traffic = Traffic(server.url, model.config, kinds, chosen.seed, chosen.api_key)
    with AdapterClient(server.url, chosen.api_key) as client:
        watched = Watched(server, client, client.base())
        before = await asyncio.to_thread(watched.sample)
        await traffic.prepare()
        stop, start, samples = asyncio.Event(), time.monotonic(), []
        running = asyncio.create_task(traffic.run(chosen.clients, stop))
        try:
            while (seconds := time.monotonic() - start) < chosen.seconds and not running.done():
                try:
                    samples.append((seconds, await asyncio.to_thread(watched.sample)))
                except CallFailed:
                    if seconds - (samples[-1][0] if samples else 0.0) > SILENT_SECONDS:
                        raise
                else:
                    show(samples, chosen, traffic)
                await asyncio.wait([running], timeout=SAMPLE_SECONDS)
        finally:
            stop.set()
            await running
        say(f"at rest, after {', '.join(f'{count} × {kind}' for kind, count in sorted(traffic.done.items()))}")
        await traffic.clear()
        left = await rest(watched, before)
    return samples, left


def show(samples: Sequence[tuple[float, Sample]], chosen: argparse.Namespace, traffic: Traffic) -> None:
    """Keep the sample if it is asked for, and say once in half a minute how things are."""
    seconds, found = samples[-1]
    if chosen.samples:
        with chosen.samples.open("a") as file:
            file.write(json.dumps({"seconds": round(seconds, 2), **found}) + "\n")
    if len(samples) % 30 == 1:
        held = ", ".join(f"{name} {found[name]:.0f}" for name in ("engine memory, MB", "service memory, MB"))
        say(f"{seconds:5.0f} s: {traffic.done.total()} done; {held}")


async def rest(watched: Watched, before: Sample) -> list[str]:
    """Wait until all is back to what it was before the traffic; return a reason for each figure that stays above."""
    deadline = time.monotonic() + REST_SECONDS
    was = {name: before[name] for name in AT_REST}
    while reasons := not_back(was, await asyncio.to_thread(watched.sample)):
        if time.monotonic() > deadline:
            return reasons
        await asyncio.sleep(SAMPLE_SECONDS)
    return []


def judged(samples: Sequence[tuple[float, Sample]], warm_up: float) -> list[Growth]:
    """Measure each series that has a limit, without the warm-up."""
    later = [(seconds, found) for seconds, found in samples if seconds >= warm_up]
    return [growth(name, [(seconds, found[name]) for seconds, found in later], at) for name, at in LIMITS.items()]


def report(growths: Sequence[Growth]) -> str:
    """Return a Markdown table."""
    head = ["held", "first", "last", "a minute", "limit a minute", ""]
    rows = [
        [
            each.name,
            f"{each.first:.1f}",
            f"{each.last:.1f}",
            f"{each.per_minute:+.2f}",
            f"{each.limit.per_minute:g}",
            each.verdict,
        ]
        for each in growths
    ]
    return table(head, rows)


def main(argv: Sequence[str] | None = None) -> None:
    chosen = options(argv)
    model = find_model(chosen.model)
    say("starting a server with little memory")
    arguments = ["--model", str(model.directory), *LITTLE_MEMORY, *shlex.split(chosen.server_args)]
    with started_server(arguments, asking_for(chosen.api_key)) as server:
        samples, left = asyncio.run(soak(server, model, chosen))
    growths = judged(samples, chosen.warm_up)
    print(report(growths), flush=True)
    if reasons := [each.reason for each in growths if each.failed] + left:
        raise Grown("\n".join(reasons))


if __name__ == "__main__":
    try:
        main()
    except* (Grown, Refused, CallFailed, ServerFailed, httpx.HTTPError, OSError) as group:
        sys.exit("\n".join(f"failed: {str(error) or type(error).__name__}" for error in group.exceptions))
    except* KeyboardInterrupt:
        sys.exit("interrupted")
