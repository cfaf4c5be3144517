"""An engine process without a model: it speaks runtime.messages, and its answers are the prompt over again.

A request's `cache_salt` scripts it: "die" ends the process, "break" ends it as one whose device failed, "hold" gives
one token and then nothing, "silent" gives nothing, "slow" at most ten tokens a second, "fail CODE" fails after one
token, "refuse CODE" at once. An adapter turns the answer round, and leaves out what is before its invocation. A load is
done at once if the file is there; one adapter can be pinned. A prefix is held at once; half of the blocks can be held.
test_engine_contract.py holds that it speaks as the real one.
Command line: python -m tests.service.engine.fake_engine [--cannot-start] ENDPOINT.
"""

import os
import sys
import time
from itertools import cycle, islice
from pathlib import Path

import msgspec
import zmq

from runtime.config import CPU_SIZES, EngineConfig
from runtime.kv.held_prefixes import as_generate
from runtime.messages import (
    BROKEN,
    Abort,
    Answer,
    DropNamespace,
    Event,
    FailAdapter,
    Failed,
    Generate,
    GetStats,
    HoldPrefix,
    HostKvStats,
    LoadAdapter,
    Ready,
    RegisterAdapter,
    ReleasePrefix,
    RetireAdapter,
    SetPaused,
    SetPins,
    Shutdown,
    Stats,
    TokenLogprobs,
    Tokens,
    UnloadAdapter,
    decode_command,
    encode,
)
from runtime.request import RequestRefused, check_limits
from tests.service.engine.fake_adapters import FakeAdapters
from tests.service.kv.fake_kv import BLOCK, FakeKv

COMMAND = (sys.executable, "-m", "tests.service.engine.fake_engine")
CONTEXT = 200
SLOW_SECONDS = 0.1  # a token
STOP_TOKEN = 2  # what ends an answer when the prompt begins with it


class Sequence:
    """A request and the tokens that it will give, one a step. It runs once its adapter is on the device."""

    def __init__(self, command: Generate):
        self.command = command
        self.cached_tokens: int | None = None  # None while it waits
        self.started_at = 0.0
        prompt = command.token_ids[command.invocation_start :][::-1] if command.adapter else command.token_ids
        self.answer = list(islice(cycle(prompt or command.token_ids), command.params.max_tokens))
        self.given = 0

    def step(self) -> Event | None:
        script, params, request_id = self.command.cache_salt, self.command.params, self.command.request_id
        if script == "silent" or (script == "hold" and self.given):
            return None
        if script == "slow" and time.monotonic() < self.started_at + self.given * SLOW_SECONDS:
            return None
        if script.startswith("fail ") and self.given:
            return Failed(request_id=request_id, code=script.split()[1], message="as scripted")
        scores = self.scores() if self.given == 0 and params.prompt_logprobs is not None else None
        if not self.answer:
            return Tokens(
                request_id=request_id,
                token_ids=[],
                finish_reason="length",
                prompt_logprobs=scores,
                **self.first_event,
            )
        token, first = self.answer[self.given], self.given == 0
        self.given += 1
        stopped = (token == STOP_TOKEN and not params.ignore_eos) or token in params.stop_token_ids
        entry = TokenLogprobs(-0.5, [token, 5, 6][: params.logprobs], [-0.5, -1.5, -2.5][: params.logprobs])
        return Tokens(
            request_id=request_id,
            token_ids=[] if stopped else [token],
            finish_reason="stop" if stopped else "length" if self.given == len(self.answer) else None,
            stop_token=token if stopped else None,
            logprobs=None if stopped or params.logprobs is None else [entry],
            stop_logprobs=entry if stopped and params.logprobs is not None else None,
            prompt_logprobs=scores,
            **(self.first_event if first else {}),
        )

    @property
    def first_event(self) -> dict[str, object]:
        times = {"started_at": self.started_at, "computed_at": time.monotonic()}
        return {"cached_tokens": self.cached_tokens, "queue_seconds": 0.25, **times}

    def scores(self) -> list[TokenLogprobs]:
        """Of token i of the prompt -i, as the third likeliest."""
        most = self.command.params.prompt_logprobs
        return [
            TokenLogprobs(-float(place), [5, 6][:most], [-0.5, -0.75][:most], 3)
            for place in range(1, len(self.command.token_ids))
        ]


class FakeEngine:
    def __init__(self, config: EngineConfig):
        model = msgspec.json.decode((Path(config.model) / "config.json").read_bytes())
        self.sizes = config.sizes(CPU_SIZES)
        self.config, self.vocab_size, self.num_blocks = config, model["vocab_size"], 64
        self.max_model_len = config.max_model_len or CONTEXT
        self.requests: dict[str, Sequence] = {}
        self.computed: set[tuple[int, ...]] = set()  # prompts
        self.kv = FakeKv(self.num_blocks)
        self.host_kv = HostKvStats(bytes_total=config.host_kv_bytes, bytes_used=64, blocks=1, stores=2, loads=1)
        self.adapters = FakeAdapters(config)
        self.steps = self.generated_tokens = 0
        self.paused = False

    def ready(self) -> Ready:
        return Ready(
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            block_size=BLOCK,
            num_blocks=self.num_blocks,
            max_running=self.sizes.max_running,
            max_batch_tokens=self.sizes.max_batch_tokens,
            dtype="float32",
            adapter_bytes=self.sizes.adapter_bytes,
            kernels="fake",
        )

    def obey(self, command: object) -> list[Event]:
        match command:
            case Generate(cache_salt="die") | HoldPrefix(cache_salt="die"):
                os._exit(9)
            case Generate(cache_salt="break"):
                print("engine: the device failed: as scripted", file=sys.stderr, flush=True)
                os._exit(BROKEN)
            case Generate():
                return self.refused(command) or self.add(command)
            case Abort(request_id=request_id):
                self.requests.pop(request_id, None)
            case RegisterAdapter(digest=digest, path=path):
                return self.adapters.register(digest, Path(path))
            case FailAdapter(digest=digest, reason=reason):
                return self.adapters.fail(digest, reason)
            case LoadAdapter():
                return self.adapters.load(command)
            case SetPins():
                return self.adapters.set_pins(command)
            case UnloadAdapter():
                return self.adapters.unload(command, in_use=command.digest in self.adapters_of(running=True))
            case RetireAdapter(digest=digest):
                return [*self.kv.retire(digest), *self.adapters.retire(digest, self.adapters_of(running=True))]
            case HoldPrefix():
                return self.refused(command) or self.kv.hold(command)
            case ReleasePrefix(prefix_id=prefix_id):
                self.kv.release(prefix_id)
            case DropNamespace(request_id=request_id, namespace=namespace):
                return [*self.kv.drop(namespace, "dropped"), Answer(request_id=request_id)]
            case SetPaused(request_id=request_id, paused=paused):
                self.paused = paused
                return [Answer(request_id=request_id)]
            case GetStats():
                return [self.stats()]
            case Shutdown():
                sys.exit(0)
        return []

    def refused(self, command: Generate | HoldPrefix) -> list[Event]:
        """What a request, or a prefix, is refused with; nothing if it can run."""
        generate = command if isinstance(command, Generate) else as_generate(command)
        try:
            if command.request_id in self.requests:
                raise RequestRefused("duplicate_request", "it is running already")
            check_limits(generate, self.max_model_len, self.vocab_size)
            if command.adapter is not None and not self.adapters.usable(command.adapter):
                raise RequestRefused("adapter_failed", self.adapters.failure(command.adapter))
            if generate.params.choice > 0 and tuple(command.token_ids) not in self.computed:
                raise RequestRefused("engine_error", "a choice came before the first had computed the prompt for it")
            if len(self.requests) >= self.sizes.max_running + self.config.max_waiting:
                raise RequestRefused("queue_full", "try again later")
        except RequestRefused as refusal:
            return [Failed(request_id=command.request_id, code=refusal.code, message=str(refusal))]
        return []

    def add(self, command: Generate) -> list[Event]:
        if command.cache_salt.startswith("refuse "):
            code = command.cache_salt.split()[1]
            return [Failed(request_id=command.request_id, code=code, message="as scripted")]
        self.requests[command.request_id] = Sequence(command)
        if command.adapter is None or self.adapters.on_device(command.adapter):
            return []
        return self.adapters.load(LoadAdapter(digest=command.adapter))

    def adapters_of(self, *, running: bool) -> list[str]:
        """The adapters of requests that run, or of those that wait."""
        of_them = [each for each in self.requests.values() if (each.cached_tokens is not None) == running]
        return sorted({each.command.adapter for each in of_them if each.command.adapter is not None})

    def step(self) -> list[Event]:
        events: list[Event] = []
        for request_id, sequence in [] if self.paused else list(self.requests.items()):
            event = self.start(sequence) if sequence.cached_tokens is None else None
            if sequence.cached_tokens is not None:
                event = sequence.step()
            if event is None:
                continue
            events.append(event)
            if isinstance(event, Tokens):
                self.computed.add(tuple(sequence.command.token_ids))
                self.kv.compute(sequence.command)
                self.generated_tokens += 1
            if isinstance(event, Failed) or event.finish_reason:
                del self.requests[request_id]
        self.steps += bool(events)
        return [*self.adapters.drop_retired(self.adapters_of(running=True)), *events]

    def start(self, sequence: Sequence) -> Failed | None:
        """Let a request run if its adapter is on the device, or fail it if it will not be."""
        command = sequence.command
        if command.adapter is None or self.adapters.on_device(command.adapter):
            sequence.cached_tokens, sequence.started_at = self.kv.look_up(command), time.monotonic()
        elif not self.adapters.usable(command.adapter):
            message = self.adapters.failure(command.adapter)
            return Failed(request_id=command.request_id, code="adapter_failed", message=message)
        return None

    def stats(self) -> Stats:
        running = sum(sequence.cached_tokens is not None for sequence in self.requests.values())
        namespaces = self.kv.namespaces()
        return Stats(
            running=running,
            waiting=len(self.requests) - running,
            blocks_total=self.num_blocks,
            blocks_used=running,
            blocks_cached=sum(each.blocks_cached for each in namespaces.values()),
            prompt_tokens=self.kv.prompt_tokens,
            cached_tokens=self.kv.cached_tokens,
            generated_tokens=self.generated_tokens,
            preemptions=0,
            steps=self.steps,
            device=self.adapters.stats("device"),
            host=self.adapters.stats("host"),
            running_adapters=self.adapters_of(running=True),
            waiting_adapters=self.adapters_of(running=False),
            blocks_held=self.kv.blocks_held,
            namespaces=namespaces,
            host_kv=self.host_kv if self.host_kv.bytes_total else HostKvStats(),
        )


def main(endpoint: str) -> None:
    socket = zmq.Context.instance().socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(endpoint)
    engine = FakeEngine(msgspec.msgpack.decode(socket.recv(), type=EngineConfig))
    socket.send(encode([engine.ready()]))
    parent, events = os.getppid(), []
    while os.getppid() == parent:
        asked = socket.poll(0 if events else 100)
        events = engine.obey(decode_command(socket.recv())) if asked else []
        events += engine.step()
        socket.send(encode(events))  # without events it is a sign of life


if __name__ == "__main__":
    if "--cannot-start" in sys.argv:
        print("engine: there is no room for the weights", file=sys.stderr)
        sys.exit(3)
    main(sys.argv[-1])
