"""What the processes of a server hold, by Linux' /proc."""

from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
MEGABYTE = 1e6
ENGINE = b"runtime.process"  # in the command line of an engine


class Held(NamedTuple):
    """What one process holds."""

    memory: float  # MB of anonymous memory in use, swapped pages included
    descriptors: int
    threads: int


def held_by(pid: int) -> Held:
    """Raises OSError if the process has ended."""
    status = dict(line.split(":", 1) for line in (PROC / f"{pid}" / "status").read_text().splitlines())
    kilobytes = sum(int(status[name].split()[0]) for name in ("RssAnon", "VmSwap"))
    return Held(1024 * kilobytes / MEGABYTE, len(list((PROC / f"{pid}" / "fd").iterdir())), int(status["Threads"]))


def children_of(pid: int) -> list[int]:
    """Return the process ids of a process's children."""
    return [int(child) for task in (PROC / f"{pid}" / "task").iterdir() for child in _children(task)]


def _children(task: Path) -> list[str]:
    try:
        return (task / "children").read_text().split()
    except OSError:  # the thread has ended meanwhile
        return []


def engine_of(service: int) -> int | None:
    """Return the process id of a service's engine; None while there is none."""
    for child in children_of(service):
        try:
            if ENGINE in (PROC / f"{child}" / "cmdline").read_bytes():
                return child
        except OSError:
            continue
    return None
