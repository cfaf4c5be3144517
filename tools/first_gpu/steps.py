"""Steps of a script: programs that run one after the other, each with a time limit, whatever became of those before."""

import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tools.gpu_report.clock import Clock
from tools.gpu_report.running import run


class Step(NamedTuple):
    """A program to be run. Its output goes to standard error as it comes, and to a file with the step's name."""

    name: str
    seconds: float  # that it may take, of those that are left
    command: Sequence[str]
    environment: Mapping[str, str] | None = None  # variables besides this process's


class Ended(NamedTuple):
    """How a step ended."""

    name: str
    status: str  # ok, failed, stopped or skipped, with the reason
    seconds: float


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-u", *arguments]


def run_steps(steps: Sequence[Step], out: Path, seconds: float) -> list[Ended]:
    """Run every step that there is time for, and print how each ended, once more for all at the end."""
    out.mkdir(parents=True, exist_ok=True)
    whole = Clock.of(seconds)
    ended = []
    for step in steps:
        print(f"== {step.name}: {min(step.seconds, whole.left):.0f} s of {whole.left:.0f}", file=sys.stderr, flush=True)
        started = time.monotonic()
        status = _run(step, out, whole)
        ended.append(Ended(step.name, status, time.monotonic() - started))
        (out / "steps.txt").write_text("".join(told(ended)))
    print("".join(told(ended)), flush=True)
    return ended


def told(ended: Sequence[Ended]) -> Iterator[str]:
    for name, status, seconds in ended:
        yield f"{name:24} {seconds:6.1f} s  {status}\n"


def _run(step: Step, out: Path, whole: Clock) -> str:
    if not whole.left:
        return "skipped: no time was left"
    if shutil.which(step.command[0]) is None:
        return f"skipped: there is no {step.command[0]} here"
    clock = Clock.of(min(step.seconds, whole.left))
    status, _ = run(step.command, clock, out / f"{step.name}.log", step.environment)
    return "ok" if status == 0 else "stopped at its time limit" if status is None else f"failed with status {status}"
