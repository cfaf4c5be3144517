"""Sections that run as processes of their own: the kernels' tests, a part of this report, the tuner."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from tools.gpu_report.clock import Clock, OutOfTime
from tools.gpu_report.rows import Goal, Report, Row, Section
from tools.gpu_report.running import run

WORKERS = 14  # processes of the kernels' tests at most, whose time is mostly the compiler's
# Compiles hundreds of kernels, of which the tuner compiles those that it measures, and checks their numbers as well
TOO_LONG = "every_candidate"
ENDING_SECONDS = 5.0  # of the tuner, after its last line
STARTING_SECONDS = 5.0  # start of a part of the report


def kernels(tests: Sequence[str], clock: Clock) -> Iterator[Row]:
    """Run the kernels' tests, but for those of every candidate. What they print goes to standard error."""
    # Warnings are errors with the pinned versions; a GPU machine may have others.
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    command += ["-k", f"not {TOO_LONG}", *tests]
    if find_spec("xdist") and (workers := min(WORKERS, len(os.sched_getaffinity(0)) - 2)) > 1:
        command += ["-n", str(workers)]
    started = time.perf_counter()
    status, text = _python(command, clock)
    summary = text.strip().rpartition("\n")[2].strip("= ") or "it printed nothing"
    note = summary if status is not None else f"stopped when its time was used up, at: {summary[-80:]}"
    seconds = [[time.perf_counter() - started]]
    yield Row(name=" ".join(tests), unit="s", rounds=seconds, goal=Goal("exit status", status, 0), note=note)


def apart(name: str, parts: Sequence[Sequence[str]], clock: Clock) -> Iterator[Row]:
    """Run a section of the report in parallel processes, one for each list of options in `parts`."""
    with ThreadPoolExecutor(len(parts)) as threads:
        sections = list(threads.map(lambda options: _part(name, options, clock), parts))
    for section in sections:
        yield from section.rows
    for section in sections:
        if section.status == "out of time":
            raise OutOfTime(section.reason)
        if section.status != "complete":
            raise RuntimeError(section.reason)


def _part(name: str, options: Sequence[str], clock: Clock) -> Section:
    minutes = max(clock.left - STARTING_SECONDS, 1.0) / 60
    with TemporaryDirectory() as out:
        command = ["-m", "tools.gpu_report", "--only", name, "--here", "--minutes", f"{minutes:.3f}", "--out", out]
        status, _ = _python([*command, *options], clock)
        files = list(Path(out).glob("*.json"))
        if files:
            (section,) = msgspec.json.decode(files[0].read_bytes(), type=Report).sections
            return section
    if status is None:
        return Section(name=name, title="", status="out of time", reason="its process was stopped")
    return Section(name=name, title="", status="failed", reason=f"its process ended with status {status} and no report")


def tune(clock: Clock) -> Iterator[Row]:
    """Run the tuner; its lines for kernels/tuned.py go to standard error as it finds them."""
    started = time.perf_counter()
    status, _ = _python(["-m", "kernels.tune", "--seconds", f"{max(clock.left - ENDING_SECONDS, 1.0):.0f}"], clock)
    if status != 0:
        raise RuntimeError("it was stopped" if status is None else f"the tuner ended with status {status}")
    yield Row(name="kernels.tune", unit="s", rounds=[[time.perf_counter() - started]])


def _python(arguments: Sequence[str], clock: Clock) -> tuple[int | None, str]:
    return run([sys.executable, "-u", *arguments], clock)
