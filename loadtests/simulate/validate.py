"""Sets the simulation beside real servers: `python -m loadtests.simulate.validate --servers 2 --threads 1 FILE`.

Servers on one store and the same cores answer requests: adapters by Zipf's law, some at a time; the client routes. What
their steps cost is measured on the same servers, in turn with the requests (loadtests.simulate.calibrate). The
simulation gets the same requests and these costs. FILE keeps what was measured; if it exists, nothing is measured.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from loadtests.adapter_client import AdapterClient, CallFailed
from loadtests.bench.report import change, cpu_name, percentile, say, table
from loadtests.completion_stream import StreamFailed, complete
from loadtests.load.plots import shown
from loadtests.random_adapter import adapter_file
from loadtests.server_process import Model, ServerFailed, find_model, running_server
from loadtests.simulate import costs as cost_tables
from loadtests.simulate.calibrate import Prompts, Rounds, costs_of, load_costs, upload
from loadtests.simulate.costs import Costs, Limits, as_fields
from loadtests.simulate.figures import first_seconds
from loadtests.simulate.routers import Asked, View, by_name
from loadtests.simulate.simulation import Cluster, Simulation, routing
from loadtests.simulate.traffic import (
    BASE,
    Conversation,
    Lengths,
    Request,
    Traffic,
    adapter_name,
    conversation_name,
    conversations,
)

PUBLISH_SECONDS = 0.5
SLACK = 1.02  # of an adapter's file, in memory
VOCABULARY = 49_152  # of the embedded model
ROUTERS = ("random", "rendezvous", "ours")  # on two servers
HEAD = (
    "tokens/s",
    "first token mean, ms",
    "p50, ms",
    "p99, ms",
    "loads to the device",
    "of them from disk",
    "a load, ms",
    "prompts reused, %",
    "steps",
)


class Measured(NamedTuple):
    """What one run took, real or simulated. Milliseconds."""

    tokens_per_second: float
    first_mean: float
    first_p50: float
    first_p99: float
    loads: float  # adapters to the device
    reads: float  # adapters from disk
    load: float  # of one, without its waits for a turn and for room
    reused: float  # percent of the prompts' tokens
    steps: float  # of all engines: how requests are batched, whatever a step takes


class Answer(NamedTuple):
    """What became of one request, real or simulated. Seconds."""

    conversation: int
    turn: int
    replica: int
    began: float  # after the first one
    first: float  # to the first token
    ended: float  # after the first one began
    tokens: int
    prompt: int  # tokens
    cached: int  # tokens of the prompt that were not computed


def measured(answers: Sequence[Answer], loads: float, reads: float, load_seconds: float, steps: float) -> Measured:
    """`load_seconds` are of all loads together."""
    first = [1000 * each.first for each in answers]
    times = (statistics.fmean(first), statistics.median(first), percentile(first, 0.99))
    speed = sum(each.tokens for each in answers) / max(each.ended for each in answers)
    reused = 100 * sum(each.cached for each in answers) / sum(each.prompt for each in answers)
    return Measured(speed, *times, loads, reads, 1000 * load_seconds / max(1, loads), reused, steps)


# Real servers


class Servers(NamedTuple):
    """Servers on one store."""

    urls: Sequence[str]
    base: str
    names: Sequence[str]  # of the adapters
    places: int


class Client:
    """Sends requests to the server that a router chooses, by what a poll of all servers said last."""

    def __init__(self, servers: Servers, router: str, seed: int, prompts: Prompts) -> None:
        """`seed` is of what a router does at random, which is then what it does in the simulation."""
        self._servers, self._router, self._rng = servers, by_name(router), routing(seed)
        self._prompts = prompts
        self._loads, self._open, self._published = ([0] * len(servers.urls) for _ in range(3))
        self._device: dict[str, list[int]] = {}
        self._host: dict[str, list[int]] = {}
        names = [f"replica-{number}" for number in range(len(servers.urls))]  # as in the simulation: the same hashes
        queues = [0.0] * len(names)  # there are always places
        self._view = View(names, servers.places, self._loads, queues, self._device, self._host, {})
        limits = httpx.Limits(max_connections=None)
        self._clients = [httpx.AsyncClient(base_url=url, timeout=600, limits=limits) for url in servers.urls]

    async def play(self, talks: Sequence[Conversation], at_a_time: int) -> list[Answer]:
        """Have the conversations, so many at a time."""
        answers: list[Answer] = []
        polling = asyncio.create_task(self._poll())
        queue, began = iter(talks), time.perf_counter()
        try:
            await asyncio.gather(*(self._work(queue, began, answers) for _ in range(at_a_time)))
            return answers
        finally:
            polling.cancel()
            await asyncio.gather(polling, return_exceptions=True)
            for client in self._clients:
                await client.aclose()

    async def _work(self, queue: Iterator[Conversation], start: float, answers: list[Answer]) -> None:
        for conversation in queue:
            adapter = None if conversation.adapter == BASE else adapter_name(conversation.adapter)
            asked = Asked(adapter, conversation_name(conversation.number))
            model, said = adapter or self._servers.base, list[int]()
            for turn, (new, tokens, pause) in enumerate(conversation.turns):
                await asyncio.sleep(pause)
                said += self._prompts.some(new)
                number = self._router.choose(asked, self._view, self._rng)
                self._count(number, 1)
                began, generated = time.perf_counter() - start, list[int]()
                timing = await complete(self._clients[number], model, said, tokens, generated)
                self._count(number, -1)
                ended, cached = time.perf_counter() - start, len(said) - timing.prefilled
                what = (conversation.number, turn, number, began, timing.first_seconds, ended)
                answers.append(Answer(*what, timing.tokens, len(said), cached))
                said += generated

    def _count(self, number: int, more: int) -> None:
        """As loadtests.simulate.board does."""
        self._open[number] += more
        self._loads[number] = max(self._open[number], self._published[number])

    async def _poll(self) -> None:
        """Every PUBLISH_SECONDS take over the loads, and read residency for the one router that looks at it."""
        while True:
            if self._router.name == "ours":
                tiers = await asyncio.gather(*map(_tiers, self._clients))
                for held, names in ((self._device, ("device",)), (self._host, ("device", "host"))):
                    held.clear()
                    for name in self._servers.names:
                        held[name] = [server for server, tier in enumerate(tiers) if tier[name] in names]
            self._published[:] = self._loads[:] = self._open
            await asyncio.sleep(PUBLISH_SECONDS)


async def _tiers(client: httpx.AsyncClient) -> dict[str, str]:
    answer = (await client.get("/adapters")).raise_for_status()
    return {adapter["name"]: adapter["tier"] for adapter in answer.json()["adapters"]}


def arguments(limits: Limits) -> list[str]:
    """The server's options for them."""
    sizes = {
        "adapter-bytes": limits.device_bytes,
        "host-adapter-bytes": limits.host_bytes,
        "kv-cache-bytes": limits.kv_bytes,
    }
    counts = {"max-running": limits.max_running, "max-batch-tokens": limits.max_batch_tokens}
    return [f"--{name}={round(number)}" for name, number in (sizes | counts).items()]


class Played(NamedTuple):
    """What one run on real servers took."""

    measured: Measured
    answers: Sequence[Answer]
    stages: Mapping[str, tuple[float, int]]  # of loads: seconds of all, and how many


def play(servers: Servers, router: str, talks: Sequence[Conversation], chosen: argparse.Namespace) -> Played:
    """Have the conversations on servers without an adapter in memory."""
    clients = [AdapterClient(url) for url in servers.urls]
    for client in clients:
        for name in servers.names:
            client.unload(name, "host")
    before = [client.metrics() for client in clients]
    prompts = Prompts(VOCABULARY, time.time_ns())  # none is in a cache
    answers = asyncio.run(play_on(servers, router, prompts, talks, chosen))
    after = [client.metrics() for client in clients]
    spans = list(zip(before, after, strict=True))
    loads, steps = (
        sum(now.value(name) - then.value(name) for then, now in spans)
        for name in ("rootstock_adapter_loads_total", "rootstock_steps_total")
    )
    by_server, stages = [now.load_stages(then) for then, now in spans], {}
    for stage in ("read", "pack", "copy"):
        seconds, counts = zip(*(each.get(stage, (0.0, 0)) for each in by_server), strict=True)
        stages[stage] = sum(seconds), sum(counts)
    load_seconds = sum(seconds for seconds, _ in stages.values())
    return Played(measured(answers, loads, stages["read"][1], load_seconds, steps), answers, stages)


async def play_on(
    servers: Servers, router: str, prompts: Prompts, talks: Sequence[Conversation], chosen: argparse.Namespace
) -> list[Answer]:
    return await Client(servers, router, chosen.seed, prompts).play(talks, chosen.at_a_time)


# The simulation


def simulate(
    costs: Costs, replicas: int, router: str, talks: Sequence[Conversation], chosen: argparse.Namespace
) -> Measured:
    cluster = Cluster(
        replicas=replicas,
        costs=costs,
        sizes=[costs.adapter_bytes] * chosen.adapters,
        on_disk=range(chosen.adapters),
        publish_seconds=PUBLISH_SECONDS,
        one_machine=True,
        closed=chosen.at_a_time,
    )
    outcome = Simulation(cluster, by_name(router), chosen.seed).run(iter(talks))
    times, steps = outcome.counted.times, sum(replica.steps for replica in outcome.replicas)
    seconds = sum(replica.memory.stage_seconds for replica in outcome.replicas)
    return measured(list(map(answer, outcome.requests)), times.copied, times.read, seconds, steps)


def answer(of: Request) -> Answer:
    what = (of.conversation.number, of.turn, of.replica, of.arrived, first_seconds(of), of.ended)
    return Answer(*what, of.answer, of.prompt, of.cached)


def chosen_talks(chosen: argparse.Namespace, continues: float) -> list[Conversation]:
    traffic = Traffic(
        adapters=chosen.adapters,
        requests_per_second=1000.0,
        seconds=10.0 + chosen.talks / 500,
        prompt=Lengths(60, 0.6, 240),
        follow_up=Lengths(30, 0.6, 120),
        answer=Lengths(40, 0.5, 120),
        continues=continues,
        pause_seconds=0.5,
    )
    return list(conversations(traffic, chosen.seed))[: chosen.talks]


def rows(name: str, router: str, real: Measured, simulated: Measured) -> list[list[str]]:
    deviations = [change(ours, theirs) if theirs else "–" for ours, theirs in zip(simulated, real, strict=True)]
    return [
        [name, router, "measured", *map(shown, real)],
        ["", "", "simulated", *map(shown, simulated)],
        ["", "", "deviation", *deviations],
    ]


def middle(runs: Sequence[Measured]) -> Measured:
    return Measured(*(statistics.median(figure) for figure in zip(*runs, strict=True)))


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.simulate.validate", description=__doc__)
    add = parser.add_argument
    add("file", type=Path, help="of what was measured, in JSON")
    add("--servers", type=int, default=2)
    add("--threads", type=int, default=1, help="of each server [1]")
    add("--routers", default=",".join(ROUTERS), help="of several servers, separated by commas")
    add("--adapters", type=int, default=48)
    add("--resident", type=int, default=8, help="adapters that each server's device holds, its host twice as many [8]")
    add("--talks", type=int, default=128, help="conversations [128]")
    add(
        "--continues", default="0", help="probabilities of another turn of one, separated by commas: a run for each [0]"
    )
    add("--at-a-time", type=int, default=12)
    add("--rounds", type=int, default=2)
    add("--samples", type=int, default=3, help="of the costs, before each round [3]")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    chosen = options(argv)
    if not chosen.file.exists():
        for found in run_servers(chosen):
            chosen.file.write_text(json.dumps(found, indent=1) + "\n")
    print(compared(chosen, json.loads(chosen.file.read_text())))


def compared(chosen: argparse.Namespace, found: dict[str, Any]) -> str:
    """Return a table of what was measured and what the simulation makes of it, and the conditions."""
    costs = cost_tables.parse(found["costs"])
    name = f"{chosen.servers} × {chosen.threads} thread(s)"
    lines = []
    for router, continues, taken in found["runs"]:
        talks = chosen_talks(chosen, continues)
        real = middle([Measured(*figures) for figures, _, _ in taken])
        lines += rows(f"{name}, {continues:g}", router, real, simulate(costs, chosen.servers, router, talks, chosen))
    return f"{table(['servers, another turn', 'router', '', *HEAD], lines)}\n\n{found['conditions']}"


def run_servers(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Start the servers, and measure and play in turn; yield all that was measured after each round."""
    model, load = find_model(None), os.getloadavg()[0]
    names = [adapter_name(number) for number in range(chosen.adapters)]
    device = chosen.resident * round(SLACK * len(adapter_file(model.config, 0)))
    limits = Limits(max_running=16, device_bytes=device, host_bytes=2 * device, kv_bytes=2**28)
    routers = chosen.routers.split(",") if chosen.servers > 1 else ROUTERS[:1]
    runs = [
        (router, float(continues), list[Played]()) for continues in chosen.continues.split(",") for router in routers
    ]
    with ExitStack() as stack:
        store = stack.enter_context(tempfile.TemporaryDirectory())
        given = ["--model", str(model.directory), "--data-directory", store, f"--threads={chosen.threads}"]
        say(f"starting {chosen.servers} server(s)")
        urls = [stack.enter_context(running_server([*given, *arguments(limits)])) for _ in range(chosen.servers)]
        servers = Servers(urls, upload(urls, model, names), names, limits.max_running)
        rounds = Rounds(urls, model, servers.base, names)
        play(servers, routers[0], chosen_talks(chosen, 0.0)[: chosen.at_a_time], chosen)
        loads = load_costs(urls, model, servers.base)
        what = f"{chosen.servers} server(s), {chosen.threads} thread(s)."
        for number in range(chosen.rounds):
            for _ in range(chosen.samples):
                rounds.measure()
            for router, continues, taken in runs:
                say(f"round {number + 1}, {router}, another turn {continues:g}")
                taken.append(play(servers, router, chosen_talks(chosen, continues), chosen))
            costs = costs_of(rounds, loads, model, limits, [what])
            yield {
                "costs": as_fields(costs),
                "runs": runs,
                "conditions": conditions(chosen, model, load, number + 1),
            }


def conditions(chosen: argparse.Namespace, model: Model, load: float, rounds: int) -> str:
    lines = (
        f"Measured on {datetime.now(UTC):%d %B %Y}: {model.directory.name} on {len(os.sched_getaffinity(0))} cores of "
        f"{cpu_name()}, load average {load:.2f} before and {os.getloadavg()[0]:.2f} after; the client on the same "
        "cores.",
        f"{chosen.talks} conversations, {chosen.at_a_time} at a time, another turn after 0.5 s with the probability "
        f"in the first column, {chosen.adapters} adapters by Zipf(1), a tenth on "
        f"the base; the device of each server holds {chosen.resident} adapters, its host memory twice as many; "
        f"adapters begin on disk. Medians of {rounds} round(s), before each of which the costs were measured "
        f"{chosen.samples} time(s), and one simulation.",
    )
    return "\n".join(f"- {line}" for line in lines)


if __name__ == "__main__":
    try:
        main()
    except (CallFailed, StreamFailed, ServerFailed, httpx.HTTPError, ValueError) as error:
        sys.exit(f"failed: {error}")
