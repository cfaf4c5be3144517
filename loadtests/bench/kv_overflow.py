"""overflow: the pipeline of base turns and aLoRA checks on a K/V cache smaller and larger than its working set.

Several conversations take turns, call by call. The working set is the base's blocks of all conversations at their end,
counted on a server that evicts nothing. The blocks that the checks add are not part of it.
"""

import argparse
import math
import shlex
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from loadtests.adapter_client import AdapterClient, CallFailed
from loadtests.bench.alora_first_token import vocabulary
from loadtests.bench.report import conditions, medians, percentile, say, table
from loadtests.completion_stream import prompts
from loadtests.conversation import Call, Conversation, hit_rate, prefilled
from loadtests.random_adapter import RANK, adapter_file
from loadtests.server_process import Model, ServerFailed, running_server

DEFAULTS = {"rounds": 3, "max_tokens": 16, "adapters": 3}


class Round(NamedTuple):
    """The calls of one round."""

    calls: list[Call]  # all, in order
    checks: list[Call]  # those of checks
    seconds: float  # of the whole round


class WorkingSet(NamedTuple):
    """The K/V blocks that one round leaves in a cache that evicts nothing."""

    blocks: int  # of the base
    written: int  # of the base and the checks
    block_bytes: float

    def bytes_for(self, share: float) -> int:
        """Return the size of a cache that holds a share of the working set, with one block for the server itself."""
        return math.ceil((share * self.blocks + 1) * self.block_bytes)


def add_options(add: Any) -> None:
    add("--shares", type=float, nargs="+", default=[0.5, 1, 2], help="of the working set that the K/V cache holds")
    add("--conversations", type=int, default=6, help="that take turns")
    add("--turns", type=int, default=3, help="of each conversation")
    add("--notes", type=int, default=300, help="additional words of the first turn")
    add("--check-tokens", type=int, default=4, help="tokens of a check's answer")
    add("--ample-kv-bytes", type=int, default=2**30, help="a K/V cache large enough to evict nothing")


def run(chosen: argparse.Namespace, model: Model, scratch: Path) -> str:
    del scratch
    say("starting a server that evicts nothing")
    with running_server(arguments(chosen, model, chosen.ample_kv_bytes)) as url:
        names = upload(url, model, chosen.adapters)
        rounds = [play(chosen, url, names, 0)]
        needed = working_set(url, chosen.ample_kv_bytes)
        rounds += [play(chosen, url, names, number) for number in range(1, chosen.rounds)]
        rows = [row("everything", needed.written, "off", rounds, "")]
        stated = conditions(model, url, *load_conditions(chosen, needed))
    for share in chosen.shares:
        for host in (False, True):
            rows.append(measure(chosen, model, needed, share, host=host))
    return f"{rows_table(rows)}\n\n{stated}"


def arguments(chosen: argparse.Namespace, model: Model, kv_bytes: int, host_bytes: int = 0) -> list[str]:
    """Return a server's arguments; --host-kv-bytes only if there is a host tier."""
    host = ["--host-kv-bytes", str(host_bytes)] if host_bytes else []
    return ["--model", str(model.directory), *shlex.split(chosen.server_args), "--kv-cache-bytes", str(kv_bytes), *host]


def upload(url: str, model: Model, count: int) -> list[str]:
    """Upload the checks, aLoRA adapters with different invocations; return their names."""
    first = vocabulary(model.config["vocab_size"]).invocation
    names = [f"bench-check-{number}" for number in range(count)]
    with AdapterClient(url) as client:
        for number, name in enumerate(names):
            invocation = [token + number * len(first) for token in first]
            client.put(name, adapter_file(model.config, number, invocation=invocation))
    return names


def working_set(url: str, kv_bytes: int) -> WorkingSet:
    """Return the blocks on a server that has played one round and nothing else. Raises CallFailed if it evicted any."""
    with AdapterClient(url) as client:
        kv = client.kv()
    blocks = kv["blocks"]
    if not blocks["free"]:
        raise CallFailed(f"--ample-kv-bytes {kv_bytes} is too little: all {blocks['total']} blocks are in use")
    base = next(each for each in kv["namespaces"] if each["kind"] == "base")
    held = base["blocks_used"] + base["blocks_cached"]
    return WorkingSet(held, blocks["used"] + blocks["cached"], kv_bytes / blocks["total"])


def play(chosen: argparse.Namespace, url: str, checks: Sequence[str], number: int) -> Round:
    """Play all conversations from beginning to end; they differ from round to round. Raises StreamFailed."""
    with AdapterClient(url) as adapters:
        base = adapters.base()
    notes = prompts(chosen.conversations, chosen.notes, f"notes {number}")
    calls, checked = [], []
    with httpx.Client(base_url=url, timeout=600) as client:
        talks = [Conversation(client, base, f"{number}", exact_length=True) for _ in range(chosen.conversations)]
        start = time.perf_counter()
        for turn in range(chosen.turns):
            words = prompts(chosen.conversations, chosen.prompt_words, f"turn {number}/{turn}")
            for talk, text, more in zip(talks, words, notes, strict=True):
                calls.append(talk.say(f"{more}\n{text}" if turn == 0 else text, chosen.max_tokens))
            for check in checks:
                checked += [talk.check(check, chosen.check_tokens, activated=True) for talk in talks]
        return Round(calls + checked, checked, time.perf_counter() - start)


def measure(chosen: argparse.Namespace, model: Model, needed: WorkingSet, share: float, *, host: bool) -> list[str]:
    """Measure a server with this share of K/V, and host memory for twice the working set or none; return its row."""
    kv_bytes, word = needed.bytes_for(share), "on" if host else "off"
    holds, blocks = f"{share:g} × working set", round(share * needed.blocks)
    say(f"starting a server whose KV cache holds {holds}, host tier {word}")
    try:
        with running_server(arguments(chosen, model, kv_bytes, needed.bytes_for(2) if host else 0)) as url:
            names = upload(url, model, chosen.adapters)
            with AdapterClient(url) as client:
                if host and not client.kv()["host"]:
                    return not_built(holds, blocks)
                rounds = [play(chosen, url, names, number) for number in range(chosen.rounds)]
                tier = client.kv()["host"] if host else None
            return row(holds, blocks, word, rounds, f"{tier['stores']} / {tier['hits']}" if tier else "")
    except ServerFailed as error:
        if host and "host-kv-bytes" in str(error):  # the server does not have the option
            return not_built(holds, blocks)
        raise


def not_built(holds: str, blocks: int) -> list[str]:
    return [holds, str(blocks), "not built", *[""] * 6]


def row(holds: str, blocks: int, host: str, rounds: Sequence[Round], moved: str) -> list[str]:
    """Return one row: medians of the rounds, and first-token times of the checks of all rounds."""
    figures = [[hit_rate(each.calls), hit_rate(each.checks), prefilled(each.calls), each.seconds] for each in rounds]
    hits, check_hits, computed, seconds = medians(figures)
    waits = [1000 * call.first_seconds for each in rounds for call in each.checks]
    cells = [f"{hits:.1%}", f"{check_hits:.1%}", f"{computed:.0f}", f"{seconds:.1f}"]
    cells += [f"{statistics.median(waits):.0f} / {percentile(waits, 0.99):.0f}", moved]
    return [holds, str(blocks), host, *cells]


def rows_table(rows: Sequence[Sequence[str]]) -> str:
    head = ["KV holds", "blocks", "host tier", "hit rate", "of checks", "tokens prefilled", "end to end, s"]
    return table([*head, "first token of a check p50 / p99, ms", "blocks to / from host"], rows)


def load_conditions(chosen: argparse.Namespace, needed: WorkingSet) -> tuple[str, ...]:
    return (
        f"Adapters: {chosen.adapters} random aLoRA ones of rank {RANK}, all seven projections, on the device.",
        f"Load: {chosen.conversations} conversations of {chosen.turns} turns, call by call in turn, one call at a "
        f"time: {chosen.notes + chosen.prompt_words} random words at first and {chosen.prompt_words} later, answers of "
        f"{chosen.max_tokens} tokens, and after each turn every check once, {chosen.check_tokens} tokens.",
        f"Working set: {needed.blocks} blocks of {needed.block_bytes / 1e6:.2f} MB, {needed.written} with those of the "
        "checks. The host tier holds twice the working set.",
        f"Rounds: {chosen.rounds}, the same on each server, with different conversations in each; medians.",
    )
