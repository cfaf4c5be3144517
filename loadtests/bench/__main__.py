"""Benchmarks of the server: `python -m loadtests.bench [NAME ...]`; without a NAME, all of them.

Each starts the servers that it needs. --url measures a running server instead (throughput, interference, alora and
structured only). A benchmark ignores the options that it does not use, and has its own defaults.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import httpx

from loadtests.adapter_client import CallFailed
from loadtests.bench import (
    adapter_copy,
    alora_first_token,
    interference,
    kv_overflow,
    s3_cold_load,
    structured,
    throughput,
    tiers,
)
from loadtests.bench.report import say
from loadtests.completion_stream import StreamFailed
from loadtests.server_process import ServerFailed, find_model

BENCHMARKS: Mapping[str, ModuleType] = {
    "throughput": throughput,
    "copy": adapter_copy,
    "interference": interference,
    "tiers": tiers,
    "s3": s3_cold_load,
    "alora": alora_first_token,
    "overflow": kv_overflow,
    "structured": structured,
}
ANY_SERVER = ("throughput", "interference", "alora", "structured")  # can measure a running server


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    about = [__doc__ or "", *(module.__doc__ or "" for module in BENCHMARKS.values())]
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.bench", description="\n".join(about), formatter_class=formatter
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    add("--url", help="a running server; default: start one")
    add("--model", help="the served model's directory; default: the embedded model")
    add("--server-args", default="", help="additional arguments of the servers that are started")
    add("--rounds", type=int, help="repetitions; medians are shown")
    add("--requests", type=int, help="throughput: per unit of concurrency, at least 8; tiers: in one round")
    add("--seconds", type=float, help="interference: of each measurement")
    add("--adapters", type=int, help="number of adapters; s3: of each rank; overflow: of checks")
    add("--ranks", type=int, nargs="+", help="copy, s3: of the adapters")
    add("--prompt-words", type=int, default=60)
    add("--max-tokens", type=int)
    for name, module in BENCHMARKS.items():
        module.add_options(parser.add_argument_group(name).add_argument)
    chosen = parser.parse_args(argv)
    if unknown := [name for name in chosen.names if name not in BENCHMARKS]:
        parser.error(f"there is no benchmark {unknown[0]!r}, only {', '.join(BENCHMARKS)}")
    if chosen.url and (refused := [name for name in chosen.names if name not in ANY_SERVER]):
        parser.error(f"{refused[0]} starts its own servers: leave --url out")
    if chosen.peer and len(chosen.peer_models.split(",")) != 5:
        parser.error("--peer-models takes five names: the base's and four adapters'")
    chosen.names = chosen.names or list(ANY_SERVER if chosen.url else BENCHMARKS)
    return chosen


def with_defaults(chosen: argparse.Namespace, defaults: Mapping[str, object]) -> argparse.Namespace:
    """Return the options with a benchmark's defaults for those that were not given."""
    missing = {name: value for name, value in defaults.items() if getattr(chosen, name) is None}
    return argparse.Namespace(**{**vars(chosen), **missing})


def main(argv: Sequence[str] | None = None) -> None:
    chosen = options(argv)
    model = find_model(chosen.model)
    for name in chosen.names:
        module = BENCHMARKS[name]
        say(f"benchmark {name}")
        with tempfile.TemporaryDirectory() as scratch:
            result = module.run(with_defaults(chosen, module.DEFAULTS), model, Path(scratch))
        print(f"### {name}\n\n{result}\n", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (CallFailed, StreamFailed, ServerFailed, httpx.HTTPError, subprocess.CalledProcessError) as error:
        sys.exit(f"failed: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
