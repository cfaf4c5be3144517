"""Runs a program, shows its output as it comes, and stops it at its deadline with all processes that it has started."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.gpu_report.clock import Clock

ROOT = Path(__file__).parents[2]


def run(
    command: Sequence[str], clock: Clock, log: Path | None = None, environment: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    """The exit status, None if it was stopped at the deadline; and the output, which is on standard error and in `log`.

    Raises OSError if there is no such program.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=None if environment is None else {**os.environ, **environment},
        text=True,
        errors="replace",
        start_new_session=True,
    )
    late = threading.Event()

    def stop() -> None:
        late.set()
        _kill(process)

    timer = threading.Timer(clock.left, stop)
    timer.start()
    lines = []
    assert process.stdout is not None
    try:
        with open(os.devnull if log is None else log, "w") as file:
            for line in process.stdout:
                lines.append(line)
                print(f"    {line}", end="", file=sys.stderr, flush=True)
                file.write(line)
                file.flush()
        status = process.wait()
    finally:
        timer.cancel()
        _kill(process)
        process.stdout.close()
    return None if late.is_set() else status, "".join(lines)


def _kill(process: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
