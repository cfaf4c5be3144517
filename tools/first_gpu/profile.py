"""Where the time of steps goes: a table of kernels for each batch, and what the host does in a step with a prompt.

    python -m tools.first_gpu.profile --out DIRECTORY

The model has Qwen3-8B's shape and random weights. For each batch, three replays of its CUDA graph are traced; then a
few steps in which a prompt is computed beside decoding requests, on the host and on the device. `kernels.csv` gets
every kernel's launches and time as each batch is done.
"""

import argparse
import cProfile
import os
import pstats
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.kernels.quick_interpreter import quicken_the_interpreter
from tools.gpu_report.clock import Clock
from tools.gpu_report.floors import Floors, Shape
from tools.gpu_report.plan import TINY, TINY_SHAPE, Plan

REPLAYS = 3
SHOWN = 25  # lines of a table
MIXED_STEPS = 4
MOST_TOKENS = 400  # that a request may decode: it must not end while others wait for their first token
PROMPT = 256  # tokens of the prompt beside decoding requests


class Spent(NamedTuple):
    """A kernel's part of a trace."""

    kernel: str
    launches: int
    microseconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    chosen = options(argv)
    if chosen.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it decorates a kernel
        quicken_the_interpreter()
    from tools.gpu_report.bench import Bench

    plan = TINY if chosen.dry_run else Plan()
    shape = TINY_SHAPE if chosen.dry_run else Shape()
    batches = [2] if chosen.dry_run else chosen.batches
    chosen.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        floors = Floors(shape, itemsize=getattr(torch, plan.dtype).itemsize)
        bench = Bench(plan, floors, device="cpu" if chosen.dry_run else "cuda", scratch=Path(scratch))
        with closing(bench):
            bench.clock = Clock.of(60 * chosen.minutes)
            bench.start()
            for batch in batches:
                for adapters in sorted({0, min(chosen.adapters, batch, plan.tier)}):
                    profile_decode(bench, batch, adapters, chosen.out, trace=chosen.trace)
            if chosen.mixed:
                for adapters in (0, 1):
                    profile_mixed(bench, min(32, max(batches)), adapters, chosen.out)
    return 0


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tools.first_gpu.profile")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--adapters", type=int, default=8, help="in a batch with adapters, at most")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--no-mixed", dest="mixed", action="store_false", help="no steps with a prompt")
    parser.add_argument("--no-trace", dest="trace", action="store_false", help="replay without torch's profiler")
    parser.add_argument("--dry-run", action="store_true")
    return parser.parse_args(argv)


def profile_decode(bench: Any, batch: int, adapters: int, out: Path, *, trace: bool) -> None:
    """Trace replays of the forward pass of `batch` decoding requests, row i under adapter i modulo `adapters`."""
    name = f"bs {batch}, {adapters}×r{bench.plan.rank}" if adapters else f"bs {batch}, base"
    with decoding(bench, batch, adapters):
        replay = bench.engine.runner.forward_pass()
        replay()
        bench.synchronize()
        if not trace:
            replay()
            bench.synchronize()
            return
        with tracer(bench) as traced:
            for _ in range(REPLAYS):
                replay()
            bench.synchronize()
    table(name, [each._replace(launches=each.launches // REPLAYS, microseconds=each.microseconds / REPLAYS)
                 for each in spent(traced)], out)  # fmt: skip


def profile_mixed(bench: Any, batch: int, adapters: int, out: Path) -> None:
    """Steps in which a prompt is computed in chunks beside decoding requests: the host's functions, and the trace."""
    prompt = min(PROMPT, bench.plan.max_model_len // 2)
    name = f"bs {batch} beside a prompt of {prompt}, {'1 adapter' if adapters else 'base'}"
    digests = bench.adapters(adapters, bench.plan.rank)
    with decoding(bench, batch, adapters):
        host = cProfile.Profile()
        times = []
        with tracer(bench) as traced:
            for _ in range(MIXED_STEPS):
                bench.submit(bench.prompt(prompt), 1, *digests)
                bench.synchronize()
                started = time.perf_counter()
                host.enable()
                bench.step()
                host.disable()
                times.append(1e3 * (time.perf_counter() - started))
                bench.synchronize()
    print(f"\n{name}: milliseconds of the host in each step: {', '.join(f'{each:.2f}' for each in times)}", flush=True)
    pstats.Stats(host, stream=sys.stdout).sort_stats("tottime").print_stats(SHOWN)
    table(name, spent(traced), out)


@contextmanager
def decoding(bench: Any, batch: int, adapters: int) -> Iterator[None]:
    """Requests that decode inside, row i under adapter i modulo `adapters`."""
    from runtime.messages import Tokens
    from tools.gpu_report.decoding import contexts

    digests = bench.adapters(adapters, bench.plan.rank)
    bench.load(digests)
    requests = []
    for row, prompt in enumerate(contexts(bench, batch)):
        tokens = min(bench.plan.max_model_len - len(prompt), MOST_TOKENS)
        adapter = digests[row % len(digests)] if digests else None
        requests.append(bench.submit(prompt, tokens, adapter, max(len(prompt) - 1, 0)))
    waiting = set(requests)
    while waiting:
        waiting -= {event.request_id for event in bench.step() if isinstance(event, Tokens)}
    bench.step()
    try:
        yield
    finally:
        for request_id in requests:
            bench.engine.abort(request_id)
        bench.finish()


def tracer(bench: Any) -> torch.profiler.profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.engine.runner.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)


def spent(traced: torch.profiler.profile) -> list[Spent]:
    """The kernels of a trace, the longest first; where there is no device, the host's operators."""
    on_device: dict[str, list[float]] = defaultdict(list)
    on_host: dict[str, list[float]] = defaultdict(list)
    for event in traced.events():
        if event.device_type.name == "CUDA":
            on_device[event.name].append(event.time_range.elapsed_us())
        else:
            on_host[event.name].append(event.self_cpu_time_total)
    found = [Spent(name, len(times), sum(times)) for name, times in (on_device or on_host).items()]
    return sorted(found, key=lambda each: -each.microseconds)


def table(name: str, kernels: Sequence[Spent], out: Path) -> None:
    """Print the longest kernels, and append all of them to `kernels.csv`."""
    total = sum(each.microseconds for each in kernels) or 1.0
    print(f"\n{name}: {sum(each.launches for each in kernels)} launches, {total / 1e3:.3f} ms", flush=True)
    for kernel, launches, microseconds in kernels[:SHOWN]:
        each = microseconds / max(launches, 1)
        print(f"{100 * microseconds / total:5.1f} %{microseconds:11.1f} µs{launches:6} × {each:8.2f} µs  {kernel[:90]}")
    sys.stdout.flush()
    with (out / "kernels.csv").open("a") as file:
        file.writelines(lines(name, kernels))


def lines(name: str, kernels: Sequence[Spent]) -> Iterator[str]:
    for kernel, launches, microseconds in kernels:
        quoted = kernel.replace('"', '""')
        yield f'"{name}","{quoted}",{launches},{microseconds:.2f}\n'


if __name__ == "__main__":
    sys.exit(main())
