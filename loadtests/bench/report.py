"""The report of a benchmark: a Markdown table, its statistics, and the conditions of the measurement."""

import math
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import httpx

from loadtests.api_key import bearer
from loadtests.server_process import Model

LOAD_AT_START = os.getloadavg()[0]  # before the benchmark adds its own


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` (above 0, at most 1) of all values do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def medians(rounds: Iterable[Sequence[float]]) -> list[float]:
    """Return the median of each figure over the rounds."""
    return [statistics.median(figure) for figure in zip(*rounds, strict=True)]


def change(value: float, base: float) -> str:
    """Return by how many percent a value is above (+) or below (-) another one."""
    return f"{100 * (value / base - 1):+.1f} %"


def verdict(shown: str, *, met: bool) -> str:
    """Return a figure followed by whether it met its goal."""
    return f"{shown} ({'met' if met else 'missed'})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def conditions(model: Model, url: str, *more: str, api_key: str = "") -> str:
    """Return the conditions of a measurement of the server at `url`, then those in `more`, as a Markdown list."""
    version_of = httpx.get(url + "/version", headers=bearer(api_key)).raise_for_status().json()
    versions = ", ".join(f"{name} {installed(name)}" for name in ("torch", "numpy", "transformers"))
    lines = [
        f"Machine: {cpu_name()}, {len(os.sched_getaffinity(0))} cores, load {LOAD_AT_START:.2f} before; "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, {versions}; "
        "the client runs on the same cores.",
        f"Model: {model.directory.name} ({model.dtype}); server {version_of['version']}.",
        *more,
    ]
    return "\n".join(f"- {line}" for line in lines)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def say(text: str) -> None:
    """Print progress to standard error; standard output has only the result."""
    print(text, file=sys.stderr, flush=True)
