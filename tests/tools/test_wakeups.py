"""Threads of the compiled kernels that sleep wake up, and a pool that wakes nobody is noticed."""

import shutil
from pathlib import Path

import pytest

from kernels.cpu.compiled import build
from tools import wakeups

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def test_threads_that_sleep_wake_up(capfd: pytest.CaptureFixture[str]) -> None:
    assert wakeups.main(2.0) == 0
    runs, _, words = capfd.readouterr().out.partition(" ")
    assert int(runs) > 1000
    assert words == "runs, and every thread woke up\n"


def test_a_pool_that_wakes_nobody_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wakeups, "SILENT_SECONDS", 1)
    header = (build.HERE / "pool.h").read_text()
    assert "value.notify_all();" in header
    (tmp_path / "pool.h").write_text(header.replace("value.notify_all();", ""))
    assert wakeups.main(2.0, tmp_path) == 1
    assert capfd.readouterr().out == "a thread never woke up\n"
