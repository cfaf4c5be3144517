"""Runs sections one after the other, each in its share of the time, and records how each ended."""

import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
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
    """Run every task. `after_each` gets all sections after each of them, so that a report so far can be written.

    The time that a section leaves unused is shared by the sections after it.
    """
    whole = Clock.of(seconds)
    sections = [Section(name=task.name, title=task.title, check=task.check) for task in tasks]
    for index, task in enumerate(tasks):
        print(f"{task.name}: {whole.left:.0f} s left", file=sys.stderr, flush=True)
        shares = sum(later.share for later in tasks[index:])
        _run(task, sections[index], Clock.of(whole.left * task.share / shares), whole)
        after_each(sections)
    return sections


def _run(task: Task, section: Section, clock: Clock, whole: Clock) -> None:
    started = time.monotonic()
    rows: list[Row] = []  # outside the try: they are kept if the section fails
    try:
        with stopped_after(min(clock.left + GRACE_SECONDS, whole.left)):
            clock.check()
            for row in task.run(clock):
                rows.append(row)
                print(f"  {row.name}: {_told(row)}", file=sys.stderr, flush=True)
        section.status = "complete"
    except OutOfTime as error:
        section.status, section.reason = "out of time", str(error)
    except Exception as error:
        traceback.print_exc()
        section.status, section.reason = "failed", f"{type(error).__name__}: {error}"
    section.rows, section.seconds = rows, time.monotonic() - started


def _told(row: Row) -> str:
    return row.note if row.median is None else f"{row.median:.4g} {row.unit}"
