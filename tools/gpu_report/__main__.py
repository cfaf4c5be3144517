"""Tests and measures the engine on the GPU of this machine and writes a report, without a network.

    python -m tools.gpu_report                 all sections, in under 9 minutes, into loadtests/results
    python -m tools.gpu_report --only prefill  some sections; those that measure start an engine first
    python -m tools.gpu_report --dry-run       on a CPU with a tiny model, to see that the report runs

Checks the engine's output against transformers and PEFT, measures a model of Qwen3-8B's shape with random weights, and
runs the kernels' tests. Every figure is printed as it is measured, and with its floor. The result is a JSON file with
every sample and a Markdown file with a table for each section, both written anew after each figure, so that a run which
is cut loses nothing; they are named by device and date.

Needs torch, triton, transformers, peft, safetensors, numpy, msgspec, blake3, llguidance, tqdm, pytest and hypothesis,
48 GB of device memory and 24 GB of host memory. With pytest-xdist, the kernels' tests run in parallel.

The exit status is 2 without a GPU, 1 if a check failed or a section did not complete, otherwise 0. A missed goal does
not change it.
"""

import argparse
import datetime
import faulthandler
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import torch

from tests.kernels.quick_interpreter import quicken_the_interpreter
from tools.gpu_report.clock import Clock
from tools.gpu_report.floors import Floors, Limits, Shape
from tools.gpu_report.markdown import markdown
from tools.gpu_report.plan import TINY, TINY_SHAPE, Plan
from tools.gpu_report.programs import apart, kernels, tune
from tools.gpu_report.rows import Report, Row, Section
from tools.gpu_report.sections import Task, run_all

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "loadtests" / "results"
PACKAGES = ("torch", "triton", "transformers", "peft", "numpy")
MEASURING = ("decode", "lora", "prefill", "load", "alora", "working_set", "update")
NAMES = ("correctness", "engine", *MEASURING, "kernels", "tune")
ENDING_SECONDS = 10.0  # reserved for imports, the last report and the end of the process


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    chosen = options(argv)
    if chosen.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it decorates a kernel
        quicken_the_interpreter()
    elif not torch.cuda.is_available():
        print("torch finds no CUDA device to measure; --dry-run runs the report on a CPU", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="  %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    seconds = 60 * chosen.minutes
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)  # if a device hangs; the report so far is on disk
    started = time.monotonic()
    report = introduction(chosen)
    directory = chosen.out or (Path(tempfile.mkdtemp(prefix="dry-run-")) if chosen.dry_run else RESULTS)
    directory.mkdir(parents=True, exist_ok=True)
    out = directory / file_name(report, chosen.only)

    def write(sections: list[Section]) -> None:
        """At any moment there is a whole report, of what has been measured by then."""
        report.sections, report.minutes = sections, (time.monotonic() - started) / 60
        data = msgspec.json.format(msgspec.json.encode(report), indent=1)
        for suffix, content in ((".json", data), (".md", markdown(report).encode())):
            out.with_suffix(".partial").write_bytes(content)
            out.with_suffix(".partial").replace(out.with_suffix(suffix))

    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sections = run_all(tasks(chosen, scratch, stack), seconds - ENDING_SECONDS, write)
    faulthandler.cancel_dump_traceback_later()
    print(markdown(report))
    print(f"written to {out}.json and .md", file=sys.stderr)
    return 0 if all(section.passed for section in sections) else 1


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, help="directory of the report; default: loadtests/results, or a temporary one in a dry run")
    add("--minutes", type=float, default=9.0, help="time limit of the whole report; default: %(default)g")
    add("--only", nargs="+", default=[], choices=NAMES, metavar="NAME", help=f"run these sections: {', '.join(NAMES)}")
    add("--tune", action="store_true", help="also run the tuner and print its table")
    add("--dry-run", action="store_true", help="run on a CPU, in Triton's interpreter, with a tiny model")
    add("--here", action="store_true", help="check the output in this process, not in one of its own for each dtype")
    add("--dtypes", nargs="+", help="dtypes in which the output is checked")
    for option, field in (
        ("--layers", "num_hidden_layers"),
        ("--hidden", "hidden_size"),
        ("--inner", "intermediate_size"),
        ("--heads", "num_attention_heads"),
        ("--kv-heads", "num_key_value_heads"),
        ("--head-dim", "head_dim"),
        ("--vocabulary", "vocab_size"),
    ):
        add(option, dest=field, type=int, help=f"{field} of the measured model; default: {getattr(Shape(), field)}")
    limits = Limits()
    help_of_limits = "for floors: {} a second; default: %(default)g"
    for option, default, unit in (
        ("--memory-bandwidth", limits.memory, "bytes of device memory"),
        ("--link-bandwidth", limits.host_to_device, "bytes from host to device"),
        ("--throughput", limits.operations, "bfloat16 operations"),
    ):
        add(option, type=float, default=default, help=help_of_limits.format(unit))
    chosen = parser.parse_args(argv)
    plan = TINY if chosen.dry_run else Plan()
    chosen.plan = plan._replace(dtypes=tuple(chosen.dtypes or plan.dtypes))
    given = {name: getattr(chosen, name) for name in Shape._fields if getattr(chosen, name) is not None}
    shape = (TINY_SHAPE if chosen.dry_run else Shape())._replace(**given)
    itemsize = getattr(torch, chosen.plan.dtype).itemsize
    chosen.limits = Limits(chosen.memory_bandwidth, chosen.link_bandwidth, chosen.throughput)
    chosen.floors = Floors(shape, chosen.limits, itemsize)
    return chosen


def tasks(chosen: argparse.Namespace, scratch: Path, stack: ExitStack) -> list[Task]:
    """The chosen sections, in order, with an engine that `stack` closes.

    Imports the kernels, and thereby fixes whether Triton interprets or compiles them.
    """
    from tools.gpu_report import decoding, moving, prompts
    from tools.gpu_report.bench import Bench

    plan, device = chosen.plan, "cpu" if chosen.dry_run else "cuda"
    bench = Bench(plan, chosen.floors, device=device, scratch=scratch)
    stack.callback(bench.close)

    def measured(section: Callable[[Bench], Iterator[Row]], clock: Clock) -> Iterator[Row]:
        bench.clock = clock
        bench.recover()
        yield from section(bench)

    def correctness(clock: Clock) -> Iterator[Row]:
        """Run in processes of its own, so that a fault of the device there does not break this process."""
        if not chosen.here:
            parts = [["--dry-run"]] if chosen.dry_run else [["--dtypes", dtype] for dtype in plan.dtypes]
            return apart("correctness", parts, clock)
        from tools.gpu_report.checks import correctness  # imports transformers and PEFT

        return correctness(plan, clock, device)

    rank = plan.rank
    every = [
        Task("correctness", "Output against transformers and PEFT", 110, correctness, check=True),
        Task("engine", "Start of the engine", 170, partial(measured, decoding.start)),  # the MEASURING sections need it
        Task("decode", f"Base decode, context {plan.context}", 40, partial(measured, decoding.base)),
        Task("lora", f"Decode with adapters, context {plan.context}", 70, partial(measured, decoding.adapted)),
        Task("prefill", "Prefill, to the first token", 20, partial(measured, prompts.prefill)),
        Task("load", "Adapters from host memory to the device", 30, partial(measured, moving.load)),
        Task("alora", "First token of aLoRA after a conversation", 30, partial(measured, prompts.alora)),
        Task("working_set", f"First token by working set, r{rank}", 50, partial(measured, prompts.working_set)),
        Task("update", "In-memory update", 30, partial(measured, moving.update)),
        Task("kernels", "Kernel tests", 100, partial(kernels, plan.kernel_tests), check=True),
        Task("tune", "Tuner", 120, tune),
    ]
    names = set(chosen.only or NAMES[:-1]) | ({"tune"} if chosen.tune else set())
    names |= {"engine"} if names & set(MEASURING) else set()
    return [task for task in every if task.name in names]


def introduction(chosen: argparse.Namespace) -> Report:
    """The report before the first measurement."""
    return Report(
        dry_run=chosen.dry_run,
        date=datetime.date.today().isoformat(),
        device="no GPU (dry run)" if chosen.dry_run else torch.cuda.get_device_name(),
        driver="none" if chosen.dry_run else driver(),
        versions={"Python": platform.python_version()} | {name: installed(name) for name in PACKAGES},
        model=chosen.floors.shape._asdict(),
        dtype=chosen.plan.dtype,
        limits=chosen.limits._asdict(),
        plan=chosen.plan._asdict(),
        sections=[],
    )


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def file_name(report: Report, only: Sequence[str]) -> str:
    """Named by device and date, and by the sections of --only, so that a part does not overwrite a whole report."""
    device = "dry-run" if report.dry_run else re.sub(r"[^a-z0-9]+", "-", report.device.lower()).strip("-")
    return "-".join([device, report.date, *only])


if __name__ == "__main__":
    sys.exit(main())
