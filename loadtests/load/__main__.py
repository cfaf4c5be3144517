"""Load scenarios by Locust, and their report: `python -m loadtests.load`.

Steady chats over adapters by Zipf's law, bursts, replacement under load, agents' pipelines with aLoRA, training loops,
and a few users alone, then beside a flood of requests of one tenant, and of one adapter. Then steady chats over more
and more adapters, and over more and more of them on a server whose device memory holds a few. --url measures a running
server. --beside measures another one too, in turn: any that speaks OpenAI's API (vLLM, llama.cpp). Writes report.md and
report.html.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import httpx

from loadtests.adapter_client import AdapterClient, CallFailed
from loadtests.api_key import BESIDE_VARIABLE, FLOOD_VARIABLE, add_api_key, asking_for, bearer
from loadtests.bench.report import conditions, say
from loadtests.load.page import Report, Result, Sweep, html, markdown
from loadtests.load.runs import Figures, RunFailed, Scenario, run
from loadtests.random_adapter import RANK, adapter_file, number_file, write_adapter
from loadtests.server_process import Model, ServerFailed, find_model, running_server

PREFIX = "load-"  # of our adapters' names
ACTIVATED = (f"{PREFIX}activated-0", f"{PREFIX}activated-1")
INVOCATION = (504, 1048)  # of these; any tokens
SCENARIOS = ("steady", "burst", "replacement", "pipeline", "training", "fairness")
# The runs of a scenario that is more than one
PARTS = {"fairness": ("fairness, no flood", "fairness, a tenant floods", "fairness, an adapter is hot")}
FLOOD_USERS = 16  # for each user of --users
SOME = 16  # adapters of a scenario
ANYWHERE = ("steady", "burst")  # what another server than ours can do too


class Target(NamedTuple):
    """A server under load."""

    name: str
    url: str
    base: str
    adapters: Sequence[str]
    api_key: str = ""


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.load", description=__doc__)
    add = parser.add_argument
    add("--url", help="a running server; default: start some")
    add("--beside", help="another server's URL")
    add("--beside-load", action="store_true", help="have it load the adapters from files, as vLLM's API does")
    add("--out", type=Path, default=Path("load-report"), help="directory of the report [load-report]")
    add("--seconds", type=float, default=10.0, help="of each run")
    add("--users", type=int, default=8)
    add("--max-tokens", type=int, default=32, help="of an answer")
    add("--adapters", type=int, nargs="+", default=[0, 1, 4, 16, 32], help="numbers of adapters to chat over")
    add("--resident", type=int, default=4, help="adapters that the smaller device memory holds")
    add("--working-sets", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0], help="over that memory")
    add("--scenarios", default=",".join(SCENARIOS), help="separated by commas")
    add_api_key(parser, "what all calls send, and servers that are started ask for; it needs all scopes")
    add_api_key(parser, "of the other server", "--beside-api-key", BESIDE_VARIABLE)
    add_api_key(parser, "of a tenant that floods, where tenants are keys", "--flood-api-key", FLOOD_VARIABLE)
    add("--model", help="the served model's directory; default: the embedded model")
    add("--server-args", default="", help="additional arguments of the servers that are started")
    chosen = parser.parse_args(argv)
    chosen.scenarios = [name for name in chosen.scenarios.split(",") if name]
    if unknown := [name for name in chosen.scenarios if name not in SCENARIOS]:
        parser.error(f"there is no scenario {unknown[0]!r}, only {', '.join(SCENARIOS)}")
    return chosen


def scenario(name: str, chosen: argparse.Namespace, model: Model) -> Scenario:
    """Return a scenario with its options."""
    tokens = ["--max-tokens", str(chosen.max_tokens)]
    shapes = ["--model-directory", str(model.directory.resolve())]
    match name:
        case "steady":
            return Scenario(name, "locustfile", chosen.users, tokens)
        case "burst":
            period = str(burst_seconds(chosen))
            return Scenario(name, "locust_burst", 2 * chosen.users, [*tokens, "--burst-seconds", period])
        case "replacement":
            return Scenario(name, "locust_replacement", chosen.users + 1, [*tokens, *shapes])
        case "pipeline":
            return Scenario(name, "locust_pipeline", max(1, chosen.users // 2), tokens)
        case "training":
            return Scenario(name, "locust_training", max(1, chosen.users // 2), [*tokens, *shapes])
        case _:
            return fairness(name, chosen, tokens)


def fairness(name: str, chosen: argparse.Namespace, tokens: Sequence[str]) -> Scenario:
    alone, _, hot = PARTS["fairness"]
    others = max(1, chosen.users // 2)
    users = others if name == alone else others + FLOOD_USERS * chosen.users
    flood = "adapter" if name == hot else "tenant"
    return Scenario(name, "locust_fairness", users, [*tokens, "--others", str(others), "--flood", flood])


def burst_seconds(chosen: argparse.Namespace) -> float:
    return max(1.0, float(chosen.seconds) / 3)


def upload(url: str, model: Model, count: int, api_key: str) -> Target:
    """Put random adapters on our server and load them, the most popular ones last."""
    say(f"uploading {count} adapters")
    file = adapter_file(model.config, 0)
    names = [f"{PREFIX}{number}" for number in range(count)]
    with AdapterClient(url, api_key) as client:
        for number, name in enumerate(names):
            number_file(file, number)
            client.put(name, file)
        for name in reversed(names):
            client.load(name, "device")
        return Target("ours", url, client.base(), names, api_key)


def upload_activated(target: Target, model: Model) -> None:
    """Put the aLoRAs of the pipeline on our server."""
    file = adapter_file(model.config, 0, 8, INVOCATION)
    with AdapterClient(target.url, target.api_key) as client:
        for number, name in enumerate(ACTIVATED):
            number_file(file, number)
            client.put(name, file)


def remove(target: Target) -> None:
    with AdapterClient(target.url, target.api_key) as client:
        for name in (*target.adapters, *ACTIVATED):
            client.delete(name)


def adapter_bytes(target: Target) -> int:
    """Return the bytes of device memory that one adapter takes on our server."""
    with AdapterClient(target.url, target.api_key) as client:
        client.load(target.adapters[0], "device")
        before = client.metrics().tier("bytes_used")
        client.unload(target.adapters[0], "device")
        return round(before - client.metrics().tier("bytes_used"))


def other(chosen: argparse.Namespace, model: Model, count: int, scratch: Path) -> Target:
    """Return the other server with the models that it serves, the base first."""
    key = chosen.beside_api_key
    with httpx.Client(base_url=chosen.beside, headers=bearer(key), timeout=120) as client:
        for number in range(count if chosen.beside_load else 0):
            name = f"{PREFIX}{number}"
            write_adapter(scratch / name, model.config, number)
            body = {"lora_name": name, "lora_path": str(scratch / name)}
            client.post("/v1/load_lora_adapter", json=body).raise_for_status()
        cards = client.get("/v1/models").raise_for_status().json()["data"]
    base = next((card["id"] for card in cards if not card.get("parent")), cards[0]["id"])
    adapters = [card["id"] for card in cards if card["id"] not in (base, *ACTIVATED)]
    return Target("beside", chosen.beside, base, adapters, key)


def warm_up(target: Target) -> None:
    """Ask each model something: a server's first answers are slower than all others."""
    with httpx.Client(base_url=target.url, headers=bearer(target.api_key), timeout=120) as client:
        for model in (target.base, *target.adapters):
            body = {"model": model, "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 4}
            client.post("/v1/chat/completions", json=body).raise_for_status()


class Runner:
    """Runs scenarios as the options say."""

    def __init__(self, chosen: argparse.Namespace, model: Model, scratch: Path) -> None:
        self._chosen, self._model, self._scratch = chosen, model, scratch

    def one(self, name: str, target: Target, count: int) -> Figures:
        """Run one scenario over some of a server's adapters, or over its base."""
        say(f"{name} on {target.name}, {count} adapters: {self._chosen.seconds:g} s")
        models = ACTIVATED if name == "pipeline" else target.adapters[:count] or [target.base]
        made = scenario(name, self._chosen, self._model)
        made = made._replace(api_keys=(target.api_key, self._chosen.flood_api_key))
        return run(made, target.url, self._chosen.seconds, models, self._scratch)

    def scenarios(self, targets: Sequence[Target]) -> Iterator[Result]:
        for name in (part for chosen in self._chosen.scenarios for part in PARTS.get(chosen, (chosen,))):
            for target in targets:
                if target.name == "ours" or name in ANYWHERE:
                    figures = self.one(name, target, min(SOME, len(target.adapters)))
                    yield Result(name, target.name, figures)

    def by_adapters(self, targets: Sequence[Target]) -> Iterator[Result]:
        for count in self._chosen.adapters:
            for target in targets:
                if count <= len(target.adapters):
                    yield Result(str(count), target.name, self.one("steady", target, count), count)

    def by_working_set(self, target: Target) -> Iterator[Result]:
        for count in map(self.count_of, self._chosen.working_sets):
            share = count / self._chosen.resident
            yield Result(f"{share:g} ({count} adapters)", target.name, self.one("steady", target, count), share)

    def count_of(self, working_set: float) -> int:
        """Return how many adapters are so many times the smaller device memory."""
        return max(1, round(working_set * int(self._chosen.resident)))


def measure(chosen: argparse.Namespace, model: Model, scratch: Path) -> Report:
    runner = Runner(chosen, model, scratch)
    arguments = ["--model", str(model.directory), *shlex.split(chosen.server_args)]
    count = max(1, *chosen.adapters)
    with ExitStack() as stack:
        if not (url := chosen.url):
            say("starting a server")
            url = stack.enter_context(running_server(arguments, asking_for(chosen.api_key)))
        ours = upload(url, model, count, chosen.api_key)
        upload_activated(ours, model)
        stack.callback(remove, ours)
        targets = [ours, *([other(chosen, model, count, scratch)] if chosen.beside else [])]
        for target in targets:
            warm_up(target)
        scenarios, by_adapters = list(runner.scenarios(targets)), list(runner.by_adapters(targets))
        each = adapter_bytes(ours)
        stated = conditions(model, url, *load_conditions(chosen, each), api_key=chosen.api_key)
        lines = stated.removeprefix("- ").split("\n- ")
    sweeps = [Sweep("By number of adapters", "adapters in use", by_adapters)]
    if not chosen.url and chosen.working_sets:
        sweeps.append(with_little_memory(runner, chosen, model, each, arguments))
    return Report(f"Load report, {datetime.now(UTC):%d %B %Y}", scenarios, sweeps, lines)


def with_little_memory(
    runner: Runner, chosen: argparse.Namespace, model: Model, each: int, arguments: Sequence[str]
) -> Sweep:
    say(f"starting a server with device memory for {chosen.resident} adapters")
    count = max(runner.count_of(share) for share in chosen.working_sets)
    memory = ["--adapter-bytes", str(chosen.resident * each)]
    with running_server([*arguments, *memory], asking_for(chosen.api_key)) as url:
        target = upload(url, model, count, chosen.api_key)  # and no others: between these, those would take a place
        warm_up(target)
        results = list(runner.by_working_set(target))
    return Sweep("By working set over device memory", "working set / device memory", results)


def load_conditions(chosen: argparse.Namespace, each: int) -> list[str]:
    return [
        f"Load: streamed chats, {chosen.users} users at a time (bursts: twice as many, all at once every "
        f"{burst_seconds(chosen):.1f} s), {chosen.max_tokens} tokens at most, {chosen.seconds:g} s a run; adapters by "
        "Zipf's law with exponent 1.",
        f"Adapters: random, rank {RANK}, all seven projections, {each / 1e6:.1f} MB of device memory each.",
        f"Fairness: {max(1, chosen.users // 2)} users alone, beside {FLOOD_USERS * chosen.users} more that are one "
        "tenant, and beside as many that ask one adapter; the figures are those of the first ones.",
        "Time between tokens: the mean within each answer; p50 and p99 are over the answers.",
        *([f"Beside: {chosen.beside}, in turn, run by run."] if chosen.beside else []),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    chosen = options(argv)
    model = find_model(chosen.model)
    with tempfile.TemporaryDirectory() as scratch:
        report = measure(chosen, model, Path(scratch))
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "report.md").write_text(markdown(report))
    (chosen.out / "report.html").write_text(html(report))
    print(markdown(report), flush=True)
    say(f"written: {chosen.out}/report.md and {chosen.out}/report.html")
    results = [*report.scenarios, *(result for sweep in report.sweeps for result in sweep.results)]
    if failed := [result for result in results if result.figures.failures]:
        sys.exit(
            "\n".join(f"failed: {each.figures.failures} requests of {each.what}, {each.server}" for each in failed)
        )


if __name__ == "__main__":
    try:
        main()
    except (CallFailed, RunFailed, ServerFailed, httpx.HTTPError, subprocess.SubprocessError) as error:
        sys.exit(f"failed: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
