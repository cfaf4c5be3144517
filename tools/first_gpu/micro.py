"""Micro-benchmarks of what the design of the GPU path depends on; each line is printed as it is measured.

    python -m tools.first_gpu.micro --out DIRECTORY [NAME ...]     names of BENCHMARKS; without any, all

- rows_below: what a product costs whose weight has 64 to 384 more rows: the A of adapters below each projection's.
- idle_programs: what programs of an expand cost whose tiles are unused.
- decode_attention: stages, warps and splits, at short and long contexts.
- prefill_attention: stages and tiles.
- sort: the sort and the top-k of the sampler, below and above 128 rows.
- add_norm: warps of the residual sum with its norm.

The shapes are Qwen3-8B's. Times are medians in CUDA graphs over copies that no cache holds. `micro.csv` gets each line.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from tests.kernels.quick_interpreter import quicken_the_interpreter

EXTRA_ROWS = (0, 64, 128, 192, 384)
COPIES = 4  # of weights that are larger than a cache
Launches = list[Callable[[], object]]


class Measured(NamedTuple):
    """Launches to be timed together, each on its own memory, and how many of them count as one."""

    name: str
    launches: Launches
    eager: bool = False  # not in a graph


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 if a benchmark failed."""
    chosen = options(argv)
    unknown = set(chosen.names) - BENCHMARKS.keys()
    if unknown:
        print(f"no benchmark is named {', '.join(sorted(unknown))}; choose from {', '.join(BENCHMARKS)}")
        return 2
    if chosen.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it decorates a kernel
        quicken_the_interpreter()
    chosen.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + chosen.seconds
    wrong = 0
    with (chosen.out / "micro.csv").open("a") as file:
        for name in chosen.names or BENCHMARKS:
            print(f"{name}:", flush=True)
            for line, right in measure(BENCHMARKS[name], until, dry_run=chosen.dry_run):
                wrong += not right
                print(f"  {line}", flush=True)
                file.write(f'"{name}","{line}"\n')
                file.flush()
    return 1 if wrong else 0


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tools.first_gpu.micro")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=170.0)
    parser.add_argument("--dry-run", action="store_true")
    return parser.parse_args(argv)


def measure(benchmark: Callable[..., Iterator[Measured]], until: float, *, dry_run: bool) -> Iterator[tuple[str, bool]]:
    """A line for each of a benchmark's measurements, and whether it could be made."""
    from kernels.tune.choosing import FAULTS
    from kernels.tune.rows import ModelShape
    from kernels.tune.tuner import TINY, eager_seconds, graph_seconds, wall_seconds

    model = TINY._replace(device="cpu", dtype=torch.float32) if dry_run else ModelShape()
    try:
        for name, launches, eager in benchmark(model, small=dry_run):
            if time.monotonic() > until:
                yield "out of time", True
                return
            timer = wall_seconds if dry_run else eager_seconds if eager else graph_seconds
            try:
                for launch in launches:
                    launch()
                yield f"{name}: {1e6 * timer(launches) / len(launches):.2f} µs", True
            except FAULTS as error:
                yield f"{name}: failed: {type(error).__name__}: {str(error).splitlines()[0]}", False
    except FAULTS as error:
        yield f"failed: {type(error).__name__}: {error}", False


def rows_below(model: Any, *, small: bool) -> Iterator[Measured]:
    heads = (model.q_heads + 2 * model.kv_heads) * model.head_dim
    sites = {
        "qkv": (model.hidden, heads),
        "o": (model.q_heads * model.head_dim, model.hidden),
        "gate up": (model.hidden, 2 * model.intermediate),
        "down": (model.intermediate, model.hidden),
    }
    for site, (inputs, outputs) in sites.items():
        for rows in (1, 8, 32, 128):
            x = model.random(0, rows, inputs)
            for extra in EXTRA_ROWS:
                weights = [model.random(copy, outputs + extra, inputs) for copy in range(COPIES)]
                launches: Launches = [partial(F.linear, x, weight) for weight in weights]
                yield Measured(f"{site}, {rows} rows, {outputs} + {extra} columns", launches)


def idle_programs(model: Any, *, small: bool) -> Iterator[Measured]:
    from kernels import grouped_lora
    from kernels.lora_tiles import TILE_FIELDS
    from kernels.tune.lora import lora_cases

    for rows, idle in ((1, (0, 15, 127)), (32, (0, 31, 96)), (128, (0, 64, 120))):
        shrink, expand = lora_cases(model, rows, min(rows, 8), 16, "decode")
        for case, config in ((shrink, grouped_lora.DECODE_SHRINK), (expand, grouped_lora.DECODE_EXPAND)):
            for count in idle:
                launches: Launches = []
                for prepare in (case.prepare, *case.others):
                    inputs = [
                        each._replace(fields=torch.cat((each.fields, each.fields.new_zeros(count, TILE_FIELDS))))
                        if hasattr(each, "fields")
                        else each
                        for each in prepare(0)
                    ]
                    launches.append(partial(case.launch, *inputs, config=config))
                yield Measured(f"{case.kernel}, {rows} rows, {count} idle tiles, mean of four sites", launches)


def decode_attention(model: Any, *, small: bool) -> Iterator[Measured]:
    from kernels import paged_attention
    from kernels.tune.attention import decode_case

    shapes = [(2, 40)] if small else [(1, 1024), (1, 16_384), (32, 1024), (32, 8192), (128, 1024)]
    for rows, context in shapes:
        case = decode_case(model, rows, context)
        inputs = case.prepare(0)
        for splits in (1, 8, 16, 32):
            for warps in (1, 2, 4):
                for stages in (2, 3, 5):
                    config = paged_attention.DECODE._replace(splits=splits, num_warps=warps, num_stages=stages)
                    name = f"{rows} rows, context {context}: {splits} splits, {warps} warps, {stages} stages"
                    yield Measured(name, [partial(case.launch, *inputs, config=config)])
                    if small:
                        return


def prefill_attention(model: Any, *, small: bool) -> Iterator[Measured]:
    from kernels import paged_attention
    from kernels.tune.attention import prefill_case

    for rows, context in [(8, 20)] if small else [(512, 512), (2048, 2048), (2048, 8192)]:
        case = prefill_case(model, rows, context)
        inputs = case.prepare(0)
        for tile, keys, warps in ((64, 64, 4), (128, 64, 8), (128, 128, 8)):
            for stages in (2, 3, 5):
                config = paged_attention.PREFILL._replace(rows=tile, keys=keys, num_warps=warps, num_stages=stages)
                name = f"{rows} rows, context {context}: {tile}×{keys}, {warps} warps, {stages} stages"
                yield Measured(name, [partial(case.launch, *inputs, config=config)])
                if small:
                    return


def sort(model: Any, *, small: bool) -> Iterator[Measured]:
    for rows in (1, 32, 127, 128, 129):
        keys = torch.randint(-(2**62), 2**62, (rows, model.vocab), device=model.device)
        yield Measured(f"sort, {rows} rows", [partial(torch.sort, keys, -1, True)], eager=True)
        yield Measured(f"top 20, {rows} rows", [partial(torch.topk, keys, 20, -1)], eager=True)


def add_norm(model: Any, *, small: bool) -> Iterator[Measured]:
    from kernels import rms_norm
    from kernels.tune.rows import row_cases

    for rows in (1, 32, 128):
        [case] = [each for each in row_cases(model, rows) if each.kernel == "add_rms_norm"]
        inputs = case.prepare(0)
        for warps in (1, 2, 4, 8, 16):
            config = rms_norm.DEFAULT._replace(num_warps=warps)
            yield Measured(f"{rows} rows, {warps} warps", [partial(case.launch, *inputs, config=config)])


BENCHMARKS: dict[str, Callable[..., Iterator[Measured]]] = {
    "rows_below": rows_below,
    "idle_programs": idle_programs,
    "decode_attention": decode_attention,
    "prefill_attention": prefill_attention,
    "sort": sort,
    "add_norm": add_norm,
}

if __name__ == "__main__":
    sys.exit(main())
