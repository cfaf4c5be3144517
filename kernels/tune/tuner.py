"""Measures the kernels' launch configurations on this GPU and prints the table for kernels/tuned.py.

    python -m kernels.tune [KERNEL ...]     names from kernels.tuned.DEFAULTS; without any, all kernels
    python -m kernels.tune --seconds 100    what is not measured by then is left out; default: 600
    python -m kernels.tune --tiny           tiny shapes, each launched once: under a sanitizer, say, or
                                            with TRITON_INTERPRET=1 on a CPU

The shapes are Qwen3-8B's. Each line is printed as it is found, and all of them as a table at the end. Refused
configurations are listed on standard error, each with the reason. Candidates are compiled ahead on all cores.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
import triton
from triton.runtime.driver import driver

from kernels.interpreter import interpreted
from kernels.tune.attention import decode_case, prefill_case, write_case
from kernels.tune.choosing import Case, DeviceBroken, Launch, NoRightConfig, Timer, choose, pruned
from kernels.tune.compiling import Ahead
from kernels.tune.lora import lora_cases
from kernels.tune.products import product_cases
from kernels.tune.rows import ModelShape, row_cases, sampling_cases
from kernels.tuned import DEFAULTS

CANDIDATES = 20  # of a case at most: there are up to 108, of which compilers and GPU would be busy for half an hour
LARGEST_SHARE = 3  # of the time that is left, a case may take so many times its part
MEASURED_MS = 4.0  # of one replay of a graph; each candidate is replayed ten times
TINY = ModelShape(48, 4, 2, 16, 40, 300)


def main(arguments: list[str]) -> int:
    """The exit status: 2 for an unknown kernel, 1 without a CUDA device or if a kernel has no right configuration."""
    chosen = options(arguments)
    unknown = [name for name in chosen.kernels if name not in DEFAULTS]
    if unknown:
        print(f"no kernel is named {', '.join(unknown)}; choose from {', '.join(DEFAULTS)}", file=sys.stderr)
        return 2
    on_cpu = chosen.tiny and interpreted()
    if not on_cpu and not torch.cuda.is_available():
        print("there is no CUDA device to measure", file=sys.stderr)
        return 1
    until = time.monotonic() + chosen.seconds
    make_cases = partial(chosen_cases, tuple(chosen.kernels), chosen.candidates, chosen.tiny)
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    if chosen.tiny:
        # Triton's interpreter multiplies the bits of bfloat16
        model = TINY._replace(device="cpu", dtype=torch.float32) if on_cpu else TINY
        table, broken = tune(make_cases(model), wall_seconds, until, alive=_alive(model))
        print("\n".join(paste("tiny shapes, launched once", versions, table)))
        return 1 if broken else 0
    model = ModelShape()
    cases = make_cases(model)
    workers = max(len(os.sched_getaffinity(0)) - 1, 1)
    ahead = Ahead(make_cases, model, len(cases), driver.active.get_current_target(), workers)
    try:
        table, broken = tune(cases, graph_seconds, until, ahead, _alive(model), eager_seconds)
    finally:
        ahead.close()
    print("\n".join(paste(torch.cuda.get_device_name(), versions, table)))
    return 1 if broken else 0


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m kernels.tune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("kernels", nargs="*")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--candidates", type=int, default=CANDIDATES, help="of a case at most; default: %(default)s")
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args(arguments)


def chosen_cases(kernels: Sequence[str], most: int, tiny: bool, model: ModelShape) -> list[Case]:
    """The cases of these kernels, or all; each with its default and at most so many candidates."""
    sizes = {"decode": (1, 3), "prefill": 20, "context": 30} if tiny else {}
    cases = all_cases(model, **sizes)  # type: ignore[arg-type]
    return [
        case._replace(candidates=pruned(case.candidates, DEFAULTS[case.kernel], most))
        for case in cases
        if not kernels or case.kernel in kernels
    ]


def all_cases(
    model: ModelShape, decode: tuple[int, ...] = (1, 32, 128), prefill: int = 2048, context: int = 1024
) -> Iterator[Case]:
    """Every kernel at batches of `decode` rows and, if prompts use it, of `prefill` rows; what gains most is first."""
    for rows in decode:
        yield from lora_cases(model, rows, min(rows, 8), 16, "decode")
        yield decode_case(model, rows, context)
    yield prefill_case(model, prefill, prefill + context)
    yield from lora_cases(model, prefill, 4, 16, "prefill")
    for rows in (*decode, prefill):
        yield from row_cases(model, rows)
        yield write_case(model, rows)
    for rows in decode:
        yield from sampling_cases(model, rows)
        yield from product_cases(model, rows, "decode")
    yield from product_cases(model, prefill, "prefill")
    for rows in decode:
        yield from lora_cases(model, rows, min(rows, 8), 64, "decode")
    yield from lora_cases(model, prefill, 4, 64, "prefill")


def tune(
    cases: Iterable[Case],
    timer: Timer,
    until: float = math.inf,
    ahead: Ahead | None = None,
    alive: Callable[[], object] = lambda: None,
    eager_timer: Timer | None = None,  # of what steps launch outside graphs; None: the same
) -> tuple[list[tuple[Case, str]], bool]:
    """Each case with its line for the table, and whether any kernel had no right configuration.

    Lines are printed as they are found. What is not measured at `until`, by time.monotonic(), is left out.
    """
    lines: list[tuple[Case, str]] = []
    broken, cases = False, list(cases)
    for index, case in enumerate(cases):
        now = time.monotonic()
        if now > until:
            print(f"not measured: {case.kernel}, {case.shape}, {case.rows} rows: out of time", file=sys.stderr)
            continue
        end = now + LARGEST_SHARE * (until - now) / (len(cases) - index)
        ready = partial(_ready, ahead, index, min(end, until))
        try:
            timed = eager_timer if case.eager and eager_timer is not None else timer
            chosen = choose(case, timed, until=min(end, until), ready=ready, alive=alive)
        except NoRightConfig as error:
            print(error, file=sys.stderr, flush=True)
            broken = True
            continue
        except DeviceBroken as error:
            print(f"{case.kernel}: {error}; run the other kernels in a new process", file=sys.stderr, flush=True)
            return lines, True
        finally:
            if ahead is not None:
                ahead.drop(index)
        for config, fault in chosen.refused:
            print(f"{case.kernel}, {case.shape}, {case.rows} rows: {config} {fault}", file=sys.stderr)
        times = f"{chosen.seconds * 1e6:.1f} µs, slowest of {chosen.timed} {chosen.slowest_seconds * 1e6:.1f}"
        line = f'Tuned({case.rows}, {chosen.config}, "{times}; {case.shape}"),'
        print(f"{case.kernel}: {line}", flush=True)
        lines.append((case, line))
    return lines, broken


def _ready(ahead: Ahead | None, case: int, until: float, candidate: int) -> bool:
    return ahead is None or ahead.ready(case, candidate, until)


def paste(gpu: str, versions: str, table: list[tuple[Case, str]]) -> Iterator[str]:
    """The lines of the GPU's entry in TABLES. Of several lines of a kernel for the same rows, a person keeps one."""
    yield f'    "{gpu}": {{  # {versions}'
    for kernel in dict.fromkeys(case.kernel for case, _ in table):
        yield f'        "{kernel}": ('
        mine = [(case.rows, line) for case, line in table if case.kernel == kernel]
        yield from (f"            {line}" for _, line in sorted(mine, key=lambda entry: entry[0]))
        yield "        ),"
    yield "    },"


def _alive(model: ModelShape) -> Callable[[], object]:
    return torch.cuda.synchronize if model.device == "cuda" else lambda: None


def _run_all(launches: Sequence[Launch]) -> None:
    for launch in launches:
        launch()


def graph_seconds(launches: Sequence[Launch]) -> float:
    """In a CUDA graph, as the engine runs decode steps: without the host's time between two launches."""
    milliseconds: float = triton.testing.do_bench_cudagraph(
        partial(_run_all, launches), rep=MEASURED_MS, return_mode="median"
    )
    return milliseconds / 1e3


def eager_seconds(launches: Sequence[Launch]) -> float:
    """By events around launches from the host."""
    milliseconds: float = triton.testing.do_bench(partial(_run_all, launches), rep=20, return_mode="median")
    return milliseconds / 1e3


def wall_seconds(launches: Sequence[Launch]) -> float:
    """One run, by the host's clock."""
    started = time.perf_counter()
    _run_all(launches)
    return time.perf_counter() - started
