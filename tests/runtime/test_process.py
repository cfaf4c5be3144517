"""The engine process: what it does when something fails, or its parent is gone.

tests/service/engine/test_engine_contract.py has what it does on every command.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import zmq

from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.messages import (
    Failed,
    Ready,
    Shutdown,
    Tokens,
    decode_events,
    encode,
)
from runtime.process import FAILED_STEPS, EngineBroken, EngineServer
from tests.runtime.engine_peer import DEADLINE_MS, Peer, generate
from tests.runtime.failing_engine import FailingRunner
from tests.runtime.tiny_model import TINY


class Served:
    """An engine server in this process, on a thread, and the service's end of its socket."""

    def __init__(self, directory, failures, **options):
        (directory / "config.json").write_text(json.dumps(TINY))
        options = {"load_format": "dummy", "kv_cache_bytes": 2**22, "max_model_len": 128, "threads": 1, **options}
        config = EngineConfig(model=str(directory), **options)
        self.engine = Engine(config)
        self.engine.runner = FailingRunner(self.engine.runner, failures)
        self.ours, self._theirs = (zmq.Context.instance().socket(zmq.PAIR) for _ in range(2))
        self.ours.bind("inproc://served")
        self._theirs.connect("inproc://served")
        self.broken = None  # the reason
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        try:
            EngineServer(self.engine, self._theirs, os.getppid()).run()
        except EngineBroken as broken:
            self.broken = str(broken)

    def end_of(self, name):
        """Run a request; its last event, or None if the engine broke."""
        self.ours.send(encode(generate(name)))
        while self._thread.is_alive():
            if self.ours.poll(100):
                for event in decode_events(self.ours.recv()):
                    if isinstance(event, Failed) or (isinstance(event, Tokens) and event.finish_reason):
                        return event
        return None

    def close(self):
        if self.broken is None:
            self.ours.send(encode(Shutdown()))
        self._thread.join(timeout=20)
        assert not self._thread.is_alive()
        self.engine.close()
        self.ours.close(linger=0)
        self._theirs.close(linger=0)


def test_a_step_that_fails_ends_its_requests_and_the_engine_serves_on(tmp_path):
    served = Served(tmp_path, ["the device stumbled", "the device stumbled", None, "once more", "once more"])
    ends = [served.end_of(f"r{index}") for index in range(2)]
    assert {event.code for event in ends} == {"engine_error"}
    assert served.end_of("fails in its second step").code == "engine_error"
    assert served.end_of("fails in its first step").code == "engine_error"
    assert served.end_of("good").finish_reason == "length"
    served.close()
    assert served.broken is None
    served.engine.check()
    assert served.engine.blocks.used == 0


def test_an_engine_whose_steps_fail_again_and_again_gives_up_with_the_reason(tmp_path):
    served = Served(tmp_path, ["no kernel image\nlook at the driver"] * FAILED_STEPS)
    assert [served.end_of(f"r{index}") for index in range(FAILED_STEPS)][-1] is None
    served.close()
    assert served.broken == "3 steps in a row failed: RuntimeError: no kernel image"


@pytest.mark.parametrize(
    "failure",
    [
        "CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA",
        "Triton Error [CUDA]: an illegal memory access was encountered",
        "CUDA error: uncorrectable ECC error encountered",
    ],
)
def test_an_engine_whose_device_failed_for_good_gives_up_at_once(tmp_path, failure):
    served = Served(tmp_path, [failure])
    assert served.end_of("r") is None
    served.close()
    assert served.broken == f"the device failed: RuntimeError: {failure.splitlines()[0]}"


def test_an_idle_engine_gives_signs_of_life(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    engine = Peer(tmp_path)
    engine.next(Ready)
    for _ in range(2):
        assert engine.socket.poll(DEADLINE_MS)
        assert decode_events(engine.socket.recv()) == []
    engine.close()


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
        configuration = encode(EngineConfig(model=str(tmp_path), load_format="dummy", max_model_len=128))
        while configured and engine.poll() is None:  # it may end before there is anybody to send to
            with contextlib.suppress(zmq.Again):
                socket.send(configuration, zmq.DONTWAIT)
                break
            time.sleep(0.02)
        assert engine.wait(timeout=60) == 0
    socket.close(linger=0)
