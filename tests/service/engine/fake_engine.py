"""An engine process without a model: it speaks runtime.messages, and its answers are the prompt over again.

A request's `cache_salt` scripts it: "die" ends the process, "hold" gives one token and then nothing, "silent" gives
nothing, "fail CODE" fails after one token, "refuse CODE" at once. An adapter turns the answer round, and leaves out
what is before its invocation. A load is done at once if the file is there, else the file is missing; of pins there is
room for one. A prefix is held at once; half of the blocks may be held. Command line:
python -m tests.service.engine.fake_engine [--cannot-start] ENDPOINT.
"""

import os
import sys
from itertools import cycle, islice
from pathlib import Path

import msgspec
import zmq

from runtime.config import EngineConfig
from runtime.messages import (
    Abort,
    AdapterState,
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
    PinsSet,
    Ready,
    Refusal,
    RegisterAdapter,
    ReleasePrefix,
    RetireAdapter,
    SetPins,
    Shutdown,
    Stats,
    Tier,
    TierStats,
    TokenLogprobs,
    Tokens,
    UnloadAdapter,
    decode_command,
    encode,
)
from tests.service.kv.fake_kv import BLOCK, FakeKv

COMMAND = (sys.executable, "-m", "tests.service.engine.fake_engine")
CONTEXT = 200
STOP_TOKEN = 2  # what ends an answer when the prompt begins with it


class Sequence:
    """A running request: the tokens it will give, one a step."""

    def __init__(self, command: Generate, cached_tokens: int):
        self.command, self.cached_tokens = command, cached_tokens
        prompt = command.token_ids[command.invocation_start :][::-1] if command.adapter else command.token_ids
        self.answer = list(islice(cycle(prompt), command.params.max_tokens))
        self.given = 0

    def step(self) -> Event | None:
        script, params, request_id = self.command.cache_salt, self.command.params, self.command.request_id
        if script == "silent" or (script == "hold" and self.given):
            return None
        if script.startswith("fail ") and self.given:
            return Failed(request_id=request_id, code=script.split()[1], message="as scripted")
        token, first = self.answer[self.given], self.given == 0
        self.given += 1
        stopped = token == STOP_TOKEN or token in params.stop_token_ids
        entry = TokenLogprobs(-0.5, [token, 5, 6][: params.logprobs], [-0.5, -1.5, -2.5][: params.logprobs])
        return Tokens(
            request_id=request_id,
            token_ids=[] if stopped else [token],
            finish_reason="stop" if stopped else "length" if self.given == len(self.answer) else None,
            stop_token=token if stopped else None,
            logprobs=None if stopped or params.logprobs is None else [entry],
            cached_tokens=self.cached_tokens if first else None,
            queue_seconds=0.25 if first else None,
        )


class FakeEngine:
    def __init__(self, config: EngineConfig):
        model = msgspec.json.decode((Path(config.model) / "config.json").read_bytes())
        self.vocab_size, self.num_blocks = model["vocab_size"], 64
        self.max_model_len = config.max_model_len or CONTEXT
        self.max_waiting = config.max_waiting
        self.running: dict[str, Sequence] = {}
        self.computed: set[tuple[int, ...]] = set()  # prompts
        self.kv = FakeKv(self.num_blocks)
        self.host_kv = HostKvStats(bytes_total=config.host_kv_bytes, bytes_used=64, blocks=1, stores=2, loads=1)
        self.adapters: dict[str, Path] = {}
        self.missing: dict[str, tuple[str, Tier, str | None]] = {}
        self.tiers: dict[str, Tier] = {}
        self.pins: dict[str, Tier] = {}
        self.steps = self.generated_tokens = 0

    def ready(self) -> Ready:
        return Ready(
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            block_size=BLOCK,
            num_blocks=self.num_blocks,
            max_batch_tokens=512,
            dtype="float32",
            adapter_bytes=1000,
        )

    def obey(self, command: object) -> list[Event]:
        match command:
            case Generate():
                return self.add(command)
            case Abort(request_id=request_id):
                self.running.pop(request_id, None)
            case RegisterAdapter(digest=digest, path=path):
                self.adapters[digest] = Path(path)
                return self.load(*self.missing.pop(digest)) if digest in self.missing else [self.state(digest)]
            case FailAdapter(digest=digest, reason=reason):
                failed = AdapterState(digest=digest, state="failed", reason=reason)
                return [failed, *self.answer_load(digest, "adapter_failed", reason)]
            case LoadAdapter(digest=digest, tier=tier, request_id=asked):
                return self.load(digest, tier, asked)
            case UnloadAdapter():
                return self.unload(command)
            case SetPins():
                return self.set_pins(command)
            case RetireAdapter(digest=digest):
                answers = self.answer_load(digest, "unknown_adapter", "it was retired")
                for known in (self.adapters, self.tiers, self.pins):
                    known.pop(digest, None)
                return [AdapterState(digest=digest, state="retired"), *answers]
            case HoldPrefix(cache_salt="die"):
                os._exit(9)
            case HoldPrefix():
                return self.kv.hold(command)
            case ReleasePrefix(prefix_id=prefix_id):
                self.kv.release(prefix_id)
            case DropNamespace(request_id=request_id, namespace=namespace):
                return [*self.kv.drop(namespace), Answer(request_id=request_id)]
            case GetStats():
                return [self.stats()]
            case Shutdown():
                sys.exit(0)
        return []

    def add(self, command: Generate) -> list[Event]:
        prompt, script = tuple(command.token_ids), command.cache_salt
        refusal = None
        if script == "die":
            os._exit(9)
        if script.startswith("refuse "):
            refusal = script.split()[1]
        elif command.adapter is not None and command.adapter not in self.adapters:
            refusal = "adapter_failed"
        elif command.params.choice > 0 and prompt not in self.computed:
            refusal = "choice_came_too_early"  # before the first had computed the prompt for it
        elif len(self.running) > self.max_waiting:
            refusal = "queue_full"
        if refusal is not None:
            return [Failed(request_id=command.request_id, code=refusal, message="as scripted")]
        self.running[command.request_id] = Sequence(command, self.kv.look_up(command))
        return []

    def load(self, digest: str, tier: Tier, asked: str | None = None) -> list[Event]:
        if not self.adapters[digest].exists():
            self.missing[digest] = digest, tier, asked
            return [AdapterState(digest=digest, state="missing")]
        self.tiers[digest] = tier
        state = self.state(digest, read=0.01, pack=0.02, **({"copy": 0.04} if tier == "device" else {}))
        return [state] if asked is None else [state, Answer(request_id=asked)]

    def answer_load(self, digest: str, code: str, message: str) -> list[Event]:
        """Refuse whoever waits for the load of an adapter whose file is missing."""
        _, _, asked = self.missing.pop(digest, (digest, "device", None))
        return [] if asked is None else [Answer(request_id=asked, code=code, message=message)]

    def set_pins(self, command: SetPins) -> list[Event]:
        unpinned = [digest for digest, tier in self.pins.items() if command.pins.get(digest) != tier]
        for digest in unpinned:
            del self.pins[digest]
        events = [self.state(digest) for digest in unpinned]
        refused: dict[str, Refusal] = {}
        for digest, tier in command.pins.items():
            if digest not in self.adapters:
                refused[digest] = Refusal("unknown_adapter", "nobody has registered it")
            elif self.pins.keys() - {digest}:
                refused[digest] = Refusal("pins_full", "there is room for one")
            elif digest not in self.pins:
                self.pins[digest] = tier
                events += self.load(digest, tier)
        return [*events, PinsSet(request_id=command.request_id, refused=refused)]

    def unload(self, command: UnloadAdapter) -> list[Event]:
        request_id, digest, tier = command.request_id, command.digest, command.tier
        if digest in self.pins:
            return [Answer(request_id=request_id, code="adapter_pinned", message="it is pinned")]
        elif any(sequence.command.adapter == digest for sequence in self.running.values()):
            return [Answer(request_id=request_id, code="adapter_in_use", message="it is in use")]
        elif self.tiers.pop(digest, None) == "device" and tier == "device":
            self.tiers[digest] = "host"
        return [self.state(digest), Answer(request_id=request_id)]

    def state(self, digest: str, **seconds: float) -> AdapterState:
        tier, pinned = self.tiers.get(digest), self.pins.get(digest)
        return AdapterState(digest=digest, state="idle", tier=tier, pinned=pinned, seconds=seconds)

    def tier_stats(self, *tiers: Tier) -> TierStats:
        held = sorted(digest for digest, tier in self.tiers.items() if tier in tiers)
        pinned = [digest for digest in held if self.pins.get(digest) in tiers]
        return TierStats(
            bytes_total=1000,
            bytes_used=100 * len(held),
            bytes_pinned=100 * len(pinned),
            adapters=held,
            loads=len(held),
            evictions=3,
            hits=2,
            misses=1,
        )

    def step(self) -> list[Event]:
        events = self.kv.expire()
        for request_id, sequence in list(self.running.items()):
            event = sequence.step()
            if event is None:
                continue
            events.append(event)
            self.computed.add(tuple(sequence.command.token_ids))
            self.kv.compute(sequence.command)
            self.generated_tokens += 1
            if isinstance(event, Failed) or event.finish_reason:
                del self.running[request_id]
        self.steps += bool(events)
        return events

    def stats(self) -> Stats:
        on = sorted({s.command.adapter for s in self.running.values() if s.command.adapter})
        return Stats(
            running=len(self.running),
            waiting=0,
            blocks_total=self.num_blocks,
            blocks_used=len(self.running),
            blocks_cached=0,
            prompt_tokens=0,
            cached_tokens=0,
            generated_tokens=self.generated_tokens,
            preemptions=0,
            steps=self.steps,
            device=self.tier_stats("device"),
            host=self.tier_stats("device", "host"),
            running_adapters=on,
            waiting_adapters=[],
            blocks_held=self.kv.blocks_held,
            namespaces=self.kv.namespaces(),
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
        if events:
            socket.send(encode(events))


if __name__ == "__main__":
    if "--cannot-start" in sys.argv:
        print("engine: there is no room for the weights", file=sys.stderr)
        sys.exit(3)
    main(sys.argv[-1])
