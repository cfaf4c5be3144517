"""Measures every launch configuration of every kernel on this GPU and prints the table for kernels/tuned.py.

    python -m kernels.tune [KERNEL ...]     names from kernels.tuned.DEFAULTS; without any, all kernels

The shapes are Qwen3-8B's. Refused configurations are listed on standard error, each with the reason.
"""

import sys
from collections.abc import Callable, Iterable, Iterator

import torch
import triton

from kernels.tune.attention import decode_case, prefill_case, write_case
from kernels.tune.choosing import Case, NoRightConfig, Timer, choose
from kernels.tune.lora import lora_cases
from kernels.tune.products import product_cases
from kernels.tune.rows import ModelShape, row_cases, sampling_cases
from kernels.tuned import DEFAULTS


def main(arguments: list[str]) -> int:
    """The exit status: 2 for an unknown kernel, 1 without a CUDA device or if a kernel has no right configuration."""
    unknown = [name for name in arguments if name not in DEFAULTS]
    if unknown:
        print(f"no kernel is named {', '.join(unknown)}; choose from {', '.join(DEFAULTS)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("there is no CUDA device to measure", file=sys.stderr)
        return 1
    cases = [case for case in all_cases(ModelShape()) if not arguments or case.kernel in arguments]
    table, broken = tune(cases, _median_seconds)
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    print("\n".join(paste(torch.cuda.get_device_name(), versions, table)))
    return 1 if broken else 0


def all_cases(
    model: ModelShape, decode: tuple[int, ...] = (1, 32, 128), prefill: int = 2048, context: int = 1024
) -> Iterator[Case]:
    """Every kernel at batches of `decode` rows and, if prompts use it, of `prefill` rows."""
    for rows in (*decode, prefill):
        yield from row_cases(model, rows)
        yield write_case(model, rows)
    for rows in decode:
        yield from sampling_cases(model, rows)
        yield decode_case(model, rows, context)
        yield from product_cases(model, rows, "decode")
    yield prefill_case(model, prefill, prefill + context)
    yield from product_cases(model, prefill, "prefill")
    for rank in (16, 64):
        for rows in decode:
            yield from lora_cases(model, rows, min(rows, 8), rank, "decode")
        yield from lora_cases(model, prefill, 4, rank, "prefill")


def tune(cases: Iterable[Case], timer: Timer) -> tuple[list[tuple[Case, str]], bool]:
    """Each case with its line for the table, and whether any kernel had no right configuration."""
    lines, broken = [], False
    for case in cases:
        try:
            chosen = choose(case, timer)
        except NoRightConfig as error:
            print(error, file=sys.stderr)
            broken = True
            continue
        for config, fault in chosen.refused:
            print(f"{case.kernel}, {case.shape}, {case.rows} rows: {config} {fault}", file=sys.stderr)
        times = f"{chosen.seconds * 1e6:.1f} µs, slowest of {chosen.timed} {chosen.slowest_seconds * 1e6:.1f}"
        lines.append((case, f'Tuned({case.rows}, {chosen.config}, "{times}; {case.shape}"),'))
    return lines, broken


def paste(gpu: str, versions: str, table: list[tuple[Case, str]]) -> Iterator[str]:
    """The lines of the GPU's entry in TABLES. Of several lines of a kernel for the same rows, a person keeps one."""
    yield f'    "{gpu}": {{  # {versions}'
    for kernel in dict.fromkeys(case.kernel for case, _ in table):
        yield f'        "{kernel}": ('
        mine = [(case.rows, line) for case, line in table if case.kernel == kernel]
        yield from (f"            {line}" for _, line in sorted(mine, key=lambda entry: entry[0]))
        yield "        ),"
    yield "    },"


def _median_seconds(launch: Callable[[], object]) -> float:
    milliseconds: float = triton.testing.do_bench(launch, return_mode="median")
    return milliseconds / 1e3
