"""The service's end of an engine process, for tests: messages over a socket."""

import subprocess
import sys

import msgspec
import zmq

from runtime.config import EngineConfig
from runtime.messages import Generate, SamplingParams, decode_events, encode

DEADLINE_MS = 20_000


class Peer:
    """The service's end of the socket."""

    def __init__(self, directory, **options):
        self.socket = zmq.Context.instance().socket(zmq.PAIR)
        self.socket.setsockopt(zmq.LINGER, 0)
        endpoint = f"ipc://{directory}/engine.sock"
        self.socket.bind(endpoint)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "runtime.process", endpoint], stderr=subprocess.PIPE, text=True
        )
        config = EngineConfig(
            model=str(directory),
            load_format="dummy",
            threads=1,
            **{"kv_cache_bytes": 2**22, "max_model_len": 128} | options,
        )
        self.socket.send(msgspec.msgpack.encode(config))
        self.events = []

    def send(self, command):
        self.socket.send(encode(command))

    def next(self, kind):
        """The next event of a kind; others are dropped."""
        while True:
            while self.events:
                event = self.events.pop(0)
                if isinstance(event, kind):
                    return event
            assert self.socket.poll(DEADLINE_MS), f"no {kind} within the deadline"
            self.events += decode_events(self.socket.recv())

    def close(self):
        self.process.kill()
        self.process.communicate()
        self.socket.close()


def generate(name, max_tokens=5, **fields):
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Generate(request_id=name, token_ids=fields.pop("token_ids", [5, 6, 7]), params=params, **fields)
