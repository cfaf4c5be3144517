"""copy: milliseconds from host to device memory by adapter size, compared with a memcpy of the same bytes.

The engine measures the milliseconds itself, as the stage "copy". The memcpy is numpy's, on one thread, between
prefaulted ordinary pages, as the engine's are; a second memcpy uses huge pages, if the system has them.
"""

import argparse
import mmap
import shlex
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from loadtests.adapter_client import AdapterClient, CallFailed
from loadtests.bench.report import conditions, medians, say, table, verdict
from loadtests.random_adapter import adapter_file, tensor_shapes
from loadtests.server_process import Model, running_server

DEFAULTS = {"rounds": 15, "ranks": [8, 16, 64, 256]}
GOAL = 0.60  # of the memcpy's speed
PAGE_BYTES = 4096
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Buffers(NamedTuple):
    """A pair of buffers of the same size."""

    source: np.ndarray
    target: np.ndarray

    def copy_seconds(self) -> float:
        start = time.perf_counter()
        np.copyto(self.target, self.source)
        return time.perf_counter() - start


def add_options(add: Any) -> None:
    del add  # --rounds and --ranks are enough


def run(chosen: argparse.Namespace, model: Model, scratch: Path) -> str:
    del scratch
    largest = max(chosen.ranks)
    arguments = ["--model", str(model.directory), "--max-lora-rank", str(max(256, largest))]
    room = str(memory_bytes(model, largest) + 2**20)
    arguments += ["--adapter-bytes", room, "--host-adapter-bytes", room, *shlex.split(chosen.server_args)]
    say("starting a server")
    with running_server(arguments) as url, AdapterClient(url) as client:
        rows = [measure(client, model, rank, chosen.rounds) for rank in chosen.ranks]
        stated = conditions(
            model,
            url,
            "Adapters: random, all seven projections; the server does nothing else, and each is alone in its tiers.",
            f"Rounds: {chosen.rounds} of each size after one to warm up, each a load and then a memcpy; medians, and "
            "the ratio of the medians.",
            f"Transparent huge pages: {HUGE_PAGES.read_text().strip() if HUGE_PAGES.exists() else 'unknown'}.",
        )
    return f"{table(head(), rows)}\n\n{stated}"


def head() -> list[str]:
    share = f"speed of the memcpy's (goal ≥ {GOAL:.0%})"
    return ["rank", "MB", "copy, ms", "GB/s", "memcpy, ms", share, "memcpy on huge pages, ms", "whole call, ms"]


def memory_bytes(model: Model, rank: int) -> int:
    """Return an upper bound of an adapter's bytes in memory: four bytes a weight, and padding for alignment."""
    shapes = tensor_shapes(model.config, rank).values()
    return sum(4 * rows * columns + PAGE_BYTES for rows, columns in shapes)


def measure(client: AdapterClient, model: Model, rank: int, rounds: int) -> list[str]:
    """Measure one rank and return its row of the table. Raises CallFailed."""
    name = f"bench-{rank}"
    say(f"rank {rank}: {rounds} rounds")
    client.put(name, adapter_file(model.config, rank, rank), preload=False)
    client.load(name, "host")
    before = client.metrics().tier("bytes_used")
    client.load(name, "device")
    size = round(client.metrics().tier("bytes_used") - before)
    ordinary, huge = buffers(size, huge=False), buffers(size, huge=True)
    figures = []
    for number in range(rounds + 1):
        copy, call = load_seconds(client, name)
        figure = [copy, ordinary.copy_seconds(), huge.copy_seconds(), call]
        if number:
            figures.append(figure)
    client.delete(name)
    copy, memcpy, huge_memcpy, call = medians(figures)
    share = verdict(f"{memcpy / copy:.0%}", met=memcpy / copy >= GOAL)
    cells = [f"{1000 * copy:.3g}", f"{size / copy / 1e9:.3g}", f"{1000 * memcpy:.3g}", share]
    return [str(rank), f"{size / 1e6:.2f}", *cells, f"{1000 * huge_memcpy:.3g}", f"{1000 * call:.3g}"]


def load_seconds(client: AdapterClient, name: str) -> tuple[float, float]:
    """Unload an adapter from the device and load it from host memory.

    Returns the seconds of the engine's copy and those of the whole call. Raises CallFailed.
    """
    client.unload(name, "device")
    before = client.metrics()
    start = time.perf_counter()
    client.load(name, "device")
    call = time.perf_counter() - start
    stages = client.metrics().load_stages(before)
    if stages.keys() != {"copy"} or stages["copy"][1] != 1:
        raise CallFailed(f"{name}: expected one copy from host memory, found {stages}")
    return stages["copy"][0], call


def buffers(size: int, *, huge: bool) -> Buffers:
    return Buffers(touched(size, 1, huge=huge), touched(size, 0, huge=huge))


def touched(size: int, value: int, *, huge: bool) -> np.ndarray:
    """Allocate and prefault memory, in huge pages if asked for and available."""
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    array[:] = value
    return array
