"""The engine process: what it does when something fails, or its parent is gone.

tests/service/engine/test_engine_contract.py has what it does on every command.
"""

import json
import os
import subprocess
import sys
import threading

import pytest
import zmq

from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.messages import (
    Failed,
    Shutdown,
    Tokens,
    decode_events,
    encode,
)
from runtime.process import EngineServer
from tests.runtime.engine_peer import DEADLINE_MS, Peer, generate
from tests.runtime.tiny_model import TINY


class StumblingRunner:
    """A runner whose first step fails."""

    def __init__(self, runner):
        self._runner, self._stumbled = runner, False

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def launch(self):
        if not self._stumbled:
            self._stumbled = True
            raise RuntimeError("the device stumbled")
        return self._runner.launch()


def test_a_step_that_fails_ends_its_requests_and_the_engine_serves_on(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    engine = Engine(EngineConfig(model=str(tmp_path), load_format="dummy", kv_cache_bytes=2**22, max_model_len=128))
    engine.runner = StumblingRunner(engine.runner)
    ours, theirs = (zmq.Context.instance().socket(zmq.PAIR) for _ in range(2))
    ours.bind("inproc://stumbling")
    theirs.connect("inproc://stumbling")
    for command in (generate("a"), generate("b")):
        ours.send(encode(command))
    thread = threading.Thread(target=EngineServer(engine, theirs, os.getppid()).run)
    thread.start()
    events = []
    while not any(isinstance(event, Failed) for event in events):
        assert ours.poll(DEADLINE_MS)
        events += decode_events(ours.recv())
    assert {(event.request_id, event.code) for event in events if isinstance(event, Failed)} >= {("a", "engine_error")}
    ours.send(encode(generate("c")))
    while not any(isinstance(event, Tokens) and event.finish_reason for event in events):
        assert ours.poll(DEADLINE_MS)
        events += decode_events(ours.recv())
    ours.send(encode(Shutdown()))
    thread.join(timeout=20)
    assert not thread.is_alive()
    engine.check()
    assert engine.blocks.used == 0
    engine.close()
    ours.close()
    theirs.close()


def test_an_engine_that_cannot_start_says_why(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"architectures": ["GPT2LMHeadModel"]}))
    engine = Peer(tmp_path)
    _, stderr = engine.process.communicate(timeout=60)
    assert engine.process.returncode == 3
    assert "GPT2LMHeadModel" in stderr
    engine.close()


def test_an_engine_whose_parent_is_gone_ends_by_itself(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    engine_pid = int(parent.stdout.readline())
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    parent.communicate()
    watcher = subprocess.run(["tail", f"--pid={engine_pid}", "-f", "/dev/null"], timeout=30)
    assert watcher.returncode == 0


PARENT = """
import pathlib
import signal
import sys

from runtime.messages import Ready
from tests.runtime.engine_peer import Peer
peer = Peer(pathlib.Path(sys.argv[1]))
print(peer.process.pid, flush=True)
peer.next(Ready)
print("ready", flush=True)
signal.pause()
"""


@pytest.mark.parametrize("configured", [False, True])
def test_an_engine_whose_parent_died_before_it_was_ready_ends_by_itself(tmp_path, configured):
    """Its parent is another process than the one that it was started for: that one is gone."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    socket = zmq.Context.instance().socket(zmq.PAIR)
    socket.bind(f"ipc://{tmp_path}/socket")
    command = [sys.executable, "-m", "runtime.process", f"--parent={os.getpid() + 1}", f"ipc://{tmp_path}/socket"]
    with subprocess.Popen(command) as engine:
        if configured:
            socket.send(encode(EngineConfig(model=str(tmp_path), load_format="dummy", max_model_len=128)))
        assert engine.wait(timeout=60) == 0
    socket.close(linger=0)
