"""Downloads, conversions and loading a model: bars on a terminal, and lines elsewhere."""

import os
import pty
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.service.live_server import wait_until
from tests.storage.fake_hub import REPOSITORY, FakeHub

ADAPTER = Path(__file__).parents[1] / "adapters" / "aurora"
DOWNLOAD = f"""
from service.configure import configure
from service.settings import read
from service.logs import set_up
set_up("info")
configure(read(["--model", "{REPOSITORY}"]))
"""
CONVERSION = """
import sys
from service.convert.__main__ import main
main(sys.argv[1:])
"""
LOADING = """
import sys
from runtime.config import EngineConfig
from runtime.engine import Engine
from service.logs import set_up
set_up("info")
Engine(EngineConfig(model=sys.argv[1], load_format="dummy", threads=1, kv_cache_bytes=1 << 20)).close()
"""
AT_ONCE = "from runtime.output import progress; progress.LINE_SECONDS = 0.0\n"  # else what is done soon has no line


class Terminal:
    """Standard error of a program: a terminal of 100 columns, and what was written to it."""

    def __init__(self) -> None:
        self._ours, self.theirs = pty.openpty()
        termios.tcsetwinsize(self.theirs, (24, 100))
        self.shown = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        try:
            while read := os.read(self._ours, 65536):
                self.shown += read.decode(errors="replace")
        except OSError:  # EIO: nobody has the other end any more
            pass

    def close(self) -> None:
        os.close(self.theirs)
        self._reader.join(20)
        os.close(self._ours)


@contextmanager
def on_a_terminal(command: list[str], **environment: str) -> Iterator[tuple[Terminal, "subprocess.Popen[bytes]"]]:
    terminal = Terminal()
    program = [sys.executable, *command]
    with subprocess.Popen(program, stderr=terminal.theirs, env={**os.environ, **environment}) as process:
        try:
            yield terminal, process
            assert process.wait(timeout=60) == 0, terminal.shown
        finally:
            process.kill()
            process.wait()
            terminal.close()


def lines_of(program: str, *arguments: str, **environment: str) -> list[str]:
    """What a program writes to standard error, which is a pipe."""
    command = [sys.executable, "-c", AT_ONCE + program, *arguments]
    environment = {**os.environ, **environment}
    ended = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=True, timeout=60)
    assert "\r" not in ended.stderr
    assert "|" not in ended.stderr
    return ended.stderr.splitlines()


@pytest.fixture
def hub_of_a_model(tiny_model: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The variables by which a hub that has a model is asked for it."""
    hub = FakeHub()
    hub.commit({path.name: path.read_bytes() for path in tiny_model.iterdir()} | {"model.safetensors": bytes(1 << 20)})
    with hub.running():
        yield {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}


def test_a_download_is_a_bar(hub_of_a_model: dict[str, str]) -> None:
    with on_a_terminal(["-c", DOWNLOAD], **hub_of_a_model) as (terminal, process):
        process.wait(timeout=60)
    assert "Fetching 4 files: 100%|" in terminal.shown
    assert "INFO" not in terminal.shown


def test_a_download_is_lines_elsewhere(hub_of_a_model: dict[str, str]) -> None:
    lines = lines_of(DOWNLOAD, **hub_of_a_model)
    assert any("Fetching 4 files: 100 %, 4 of 4" in line for line in lines), lines


def test_a_conversion_is_a_bar(tmp_path: Path) -> None:
    command = ["-m", "service.convert", str(ADAPTER), str(tmp_path / "converted")]
    with on_a_terminal(command) as (terminal, process):
        process.wait(timeout=60)
    assert "writing the tensors: 100%|" in terminal.shown
    assert "INFO" not in terminal.shown


def test_a_conversion_is_lines_elsewhere(tmp_path: Path) -> None:
    lines = lines_of(CONVERSION, str(ADAPTER), str(tmp_path / "converted"))
    assert "INFO runtime.output.progress: writing the tensors: 100 %" in lines[-1]


def test_a_models_loading_is_a_bar_of_the_engine(tiny_model: Path, tmp_path: Path) -> None:
    command = ["-m", "service", "--model", str(tiny_model), "--load-format", "dummy", "--port", "0", "--threads", "1"]
    command += ["--data-directory", str(tmp_path), "--kv-cache-bytes", "1M", "--adapter-bytes", "1M"]
    with on_a_terminal(command) as (terminal, process):
        wait_until(lambda: "Rootstock serves" in terminal.shown or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
    assert "loading the model: 100%|" in terminal.shown
    assert "2/2" in terminal.shown


def test_a_models_loading_is_lines_elsewhere(tiny_model: Path) -> None:
    lines = lines_of(LOADING, str(tiny_model))
    assert "INFO runtime.output.progress: loading the model: 100 %, 2 of 2, 0 s" in [line[24:] for line in lines]
