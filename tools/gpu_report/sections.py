"""Runs sections one after the other, each in its share of the time, and records how each ended."""

import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from tools.gpu_report.clock import Clock, OutOfTime, stopped_after
from tools.gpu_report.rows import Row, Section

GRACE_SECONDS = 15.0  # for a section that checks its clock too seldom


class Task(NamedTuple):
    """A section to be run."""

    name: str
    title: str
    share: float  # of the time, relative to the shares of the sections that are left
    run: Callable[[Clock], Iterator[Row]]  # yields rows as they are measured
    check: bool = False


def run_all(
    tasks: Sequence[Task], seconds: float, after_each: Callable[[list[Section]], None] = lambda sections: None
) -> list[Section]:
    """Run every task. `after_each` gets all sections after each row and each section, to write a report so far.

    The time that a section leaves unused is shared by the sections after it.
    """
    whole = Clock.of(seconds)
    sections = [Section(name=task.name, title=task.title, check=task.check) for task in tasks]
    for index, task in enumerate(tasks):
        print(f"{task.name}: {whole.left:.0f} s left", file=sys.stderr, flush=True)
        shares = sum(later.share for later in tasks[index:])
        told = partial(after_each, sections)
        _run(task, sections[index], Clock.of(whole.left * task.share / shares), whole, told)
        told()
    return sections


def _run(task: Task, section: Section, clock: Clock, whole: Clock, told: Callable[[], None]) -> None:
    started = time.monotonic()
    section.status, section.rows = "running", []
    try:
        with stopped_after(min(clock.left + GRACE_SECONDS, whole.left)):
            clock.check()
            for row in task.run(clock):
                section.rows.append(row)
                print(f"  {row.name}: {_told(row)}", file=sys.stderr, flush=True)
                told()
        section.status = "complete"
    except OutOfTime as error:
        section.status, section.reason = "out of time", str(error)
    except Exception as error:
        traceback.print_exc()
        section.status, section.reason = "failed", f"{type(error).__name__}: {error}"
    section.seconds = time.monotonic() - started


def _told(row: Row) -> str:
    return row.note if row.median is None else f"{row.median:.4g} {row.unit}"
