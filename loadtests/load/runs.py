"""Runs of Locust against a server, and what their entries say."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loadtests.api_key import FLOOD_VARIABLE, VARIABLE
from loadtests.bench.report import percentile

ROOT = Path(__file__).parents[2]
MARGIN_SECONDS = 60  # for Locust to start, and for the last answers
FLOOD = "flood"  # the name of the entries of a flood


class RunFailed(RuntimeError):
    """Locust ended without entries; the message has the end of its output."""


class Scenario(NamedTuple):
    """One of Locust's files with its options."""

    name: str
    file: str  # in loadtests/, without .py
    users: int
    options: Sequence[str] = ()
    api_keys: tuple[str, str] = ("", "")  # of its users, and of a flood; empty: none


class Figures(NamedTuple):
    """What one run measured. Milliseconds; None where no answer says it."""

    answers: int
    failures: int
    first_p50: float | None
    first_p99: float | None
    gap_p50: float | None  # of the answers' mean times between tokens
    gap_p99: float | None
    tokens_per_second: float
    others: Mapping[str, float]  # medians of other entries, by their kind; and how many answers a flood had


def run(scenario: Scenario, url: str, seconds: float, models: Sequence[str], scratch: Path) -> Figures:
    """Run one scenario for some seconds. Raises RunFailed."""
    timings = scratch / "timings"
    timings.unlink(missing_ok=True)
    command = [sys.executable, "-m", "locust", "-f", f"loadtests/{scenario.file}.py"]
    most = round(seconds + MARGIN_SECONDS / 2)  # without a first answer
    command += ["--headless", "--only-summary", "--host", url, "--seconds", str(seconds), "--run-time", f"{most}s"]
    command += ["--users", str(scenario.users), "--spawn-rate", str(scenario.users), "--timings", str(timings)]
    command += ["--models", ",".join(models), *scenario.options]
    limit = seconds + MARGIN_SECONDS
    variables = os.environ | dict(zip((VARIABLE, FLOOD_VARIABLE), scenario.api_keys, strict=True))
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False, env=variables)
    entries = [json.loads(line) for line in timings.read_text().splitlines()] if timings.exists() else []
    if not entries:
        raise RunFailed(f"{scenario.name}: {ended.stderr[-2000:]}")
    return figures(entries)


def figures(entries: Sequence[Mapping[str, Any]]) -> Figures:
    """Sum up the entries of a run, which lasts from the first one's beginning to the end of the last one.

    Of a flood only the answers are counted; all other figures are those of the other users.
    """
    began, ended = min(entry["at"] - entry["ms"] / 1000 for entry in entries), max(entry["at"] for entry in entries)
    floods = [entry for entry in entries if entry["name"] == FLOOD]
    entries = [entry for entry in entries if entry["name"] != FLOOD]
    failed = [entry for entry in entries if "failed" in entry]
    by_kind: dict[str, list[float]] = {}
    for entry in entries:
        if "failed" not in entry:
            by_kind.setdefault(entry["kind"], []).append(entry["ms"])
    first, gaps = by_kind.pop("first token", []), by_kind.pop("per token", [])
    answers = by_kind.pop("POST", [])
    by_kind.pop("GET", None)
    tokens = sum(entry.get("tokens", 0) for entry in entries)
    others = {kind: statistics.median(values) for kind, values in by_kind.items()}
    if floods:
        others[FLOOD] = sum(entry["kind"] == "POST" and "failed" not in entry for entry in floods)
    return Figures(
        answers=len(answers),
        failures=len(failed),
        first_p50=at(first, 0.5),
        first_p99=at(first, 0.99),
        gap_p50=at(gaps, 0.5),
        gap_p99=at(gaps, 0.99),
        tokens_per_second=tokens / max(ended - began, 1e-3),
        others=others,
    )


def at(values: Sequence[float], share: float) -> float | None:
    return percentile(values, share) if values else None
