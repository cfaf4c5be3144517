"""Progress of long work: a bar on a terminal, else lines of the log, and nothing of what is done at once."""

import logging
import os
import pty
import subprocess
import sys
import termios

import pytest

from runtime.output import progress as module
from runtime.output.progress import bar_class, progress

PROGRAM = """
from runtime.output.progress import progress
for _ in progress(range(3), "loading the model", bars=True, unit="layer"):
    pass
"""


def test_items_pass_unchanged_and_what_is_done_at_once_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "runtime.output")
    assert list(progress("abc", "loading", bars=False, unit="layer")) == ["a", "b", "c"]
    assert caplog.records == []


def test_without_a_terminal_long_work_is_told_in_lines_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "runtime.output")
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    monkeypatch.setattr(module.Bar, "_time", staticmethod(lambda: now), raising=False)
    bar = bar_class(bars=False)(total=100, desc="loading", unit="layer")
    bar._time = lambda: now
    bar.start_t = bar.last_print_t = now
    for _ in range(10):
        now += 2.0
        bar.update(10)
    bar.close()
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "loading: 30 %, 30 of 100, 6 s",
        "loading: 60 %, 60 of 100, 12 s",
        "loading: 90 %, 90 of 100, 18 s",
        "loading: 100 %, 100 of 100, 20 s",
    ]
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_a_bar() -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    try:
        subprocess.run([sys.executable, "-c", PROGRAM], stderr=theirs, check=True, timeout=60)
        shown = os.read(ours, 65536).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "loading the model: 100%|" in shown
    assert "3/3" in shown
