"""What the service may expect of an engine process, held of the fake one and of the real one alike.

Every test speaks runtime.messages with both, and leaves no request, adapter or prefix behind.
"""

import asyncio
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar, get_args

import pytest

from runtime.adapter_format.canonical import canonical_from_tensors
from runtime.config import EngineConfig
from runtime.messages import (
    Abort,
    AdapterState,
    Answer,
    Command,
    DropNamespace,
    Event,
    FailAdapter,
    Failed,
    Generate,
    GetStats,
    HoldPrefix,
    LoadAdapter,
    PinsSet,
    PrefixEnded,
    PrefixHeld,
    RegisterAdapter,
    ReleasePrefix,
    RetireAdapter,
    SamplingParams,
    SetPins,
    Shutdown,
    Stats,
    Tier,
    Tokens,
    UnloadAdapter,
)
from runtime.models.config import ModelConfig
from service.engine.process import EngineProcess
from tests.service.adapters.adapter_bundles import config as adapter_config
from tests.service.adapters.adapter_bundles import tensors
from tests.service.engine import fake_engine
from tests.service.tiny_model import write_tiny_model

COMMANDS = {"fake": fake_engine.COMMAND, "real": (sys.executable, "-m", "runtime.process")}
DEADLINE_SECONDS = 20
ADAPTER_BYTES = 256  # of one in device memory: A and B of rank 2 on 16 features, float32
BLOCK_BYTES = 2048  # layers, tokens, K and V, features of a head, float32
MAX_MODEL_LEN, MAX_RUNNING, MAX_WAITING = 4096, 4, 2
PROMPT = list(range(20, 69))  # three whole blocks and a token
SEEDS = count()  # of adapters: none is like another
T = TypeVar("T", bound=Event)


class Engine:
    """An engine process and the events that it has sent."""

    def __init__(self, command: tuple[str, ...], config: EngineConfig):
        self._runner = asyncio.Runner()
        self._requests = 0
        self._runner.run(self._start(command, config))

    async def _start(self, command: tuple[str, ...], config: EngineConfig) -> None:
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self.process = EngineProcess(command)
        self.ready = await self.process.start(config, self._events.put_nowait)

    def close(self) -> None:
        self._runner.run(self.process.close())
        self._runner.close()

    def send(self, *commands: Command) -> None:
        self._runner.run(self._send(commands))

    async def _send(self, commands: tuple[Command, ...]) -> None:
        for command in commands:
            self.process.send(command)

    def next(self, kind: type[T], **fields: Any) -> T:
        """The next event of a kind that has these values; those before it are dropped."""
        return self._runner.run(self._next(kind, fields))

    async def _next(self, kind: type[T], fields: dict[str, Any]) -> T:
        passed: list[Event] = []
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                while True:
                    event = await self._events.get()
                    if isinstance(event, kind) and all(getattr(event, name) == fields[name] for name in fields):
                        return event
                    passed.append(event)
        except TimeoutError:
            raise AssertionError(f"no {kind.__name__} with {fields} came, but {passed[-5:]}") from None

    def new_id(self) -> str:
        self._requests += 1
        return f"request {self._requests}"

    def ask(self, kind: type[Command], **fields: Any) -> str | None:
        """Send a command that is answered; the code of a refusal."""
        request_id = self.new_id()
        self.send(kind(request_id=request_id, **fields))
        return self.next(Answer, request_id=request_id).code

    def set_pins(self, pins: dict[str, Tier]) -> dict[str, str]:
        """Ask for pins; the codes of those that are refused, by digest."""
        request_id = self.new_id()
        self.send(SetPins(request_id=request_id, pins=pins))
        answer = self.next(PinsSet, request_id=request_id)
        return {digest: refusal.code for digest, refusal in answer.refused.items()}

    def generate(self, token_ids: list[int] = PROMPT, **fields: Any) -> list[Tokens]:
        """All events of a request that runs to its end."""
        command = request(self.new_id(), token_ids, **fields)
        self.send(command)
        events = [self.next(Tokens, request_id=command.request_id)]
        while events[-1].finish_reason is None:
            events.append(self.next(Tokens, request_id=command.request_id))
        return events

    def refusal(self, command: Generate | HoldPrefix) -> str:
        self.send(command)
        return self.next(Failed, request_id=command.request_id).code

    def hold(self, prefix_id: str, token_ids: list[int], **fields: Any) -> HoldPrefix:
        return HoldPrefix(request_id=self.new_id(), prefix_id=prefix_id, token_ids=token_ids, **fields)

    def stats(self) -> Stats:
        self.send(GetStats())
        return self.next(Stats)

    def died(self) -> str:
        return self._runner.run(asyncio.wait_for(self.process.died(), DEADLINE_SECONDS))


def request(request_id: str, token_ids: list[int] = PROMPT, max_tokens: int = 5, **fields: Any) -> Generate:
    """A greedy request; `fields` are those of Generate or of SamplingParams."""
    params = {name: fields.pop(name) for name in list(fields) if name in SamplingParams.__struct_fields__}
    sampling = SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, **params})
    return Generate(request_id=request_id, token_ids=token_ids, params=sampling, **fields)


def endless(request_id: str, **fields: Any) -> Generate:
    """A request that runs until it is aborted: "hold" scripts the fake engine, to the real one it is any salt."""
    return request(request_id, max_tokens=MAX_MODEL_LEN, cache_salt="hold", **fields)


def tokens_of(events: list[Tokens]) -> list[int]:
    return [token for event in events for token in event.token_ids]


@dataclass
class Adapter:
    """An adapter's digest and canonical file, which is yet to be written to its path."""

    digest: str
    path: Path
    content: bytes

    def register(self) -> RegisterAdapter:
        return RegisterAdapter(digest=self.digest, path=str(self.path))

    def write(self) -> None:
        self.path.write_bytes(self.content)


def start(kind: str, model: Path) -> Engine:
    config = EngineConfig(
        model=str(model),
        load_format="dummy",
        threads=1,
        max_model_len=MAX_MODEL_LEN,
        max_running=MAX_RUNNING,
        max_waiting=MAX_WAITING,
        kv_cache_bytes=400 * BLOCK_BYTES,
        adapter_bytes=3 * ADAPTER_BYTES,
        host_adapter_bytes=4 * ADAPTER_BYTES,
        log_level="warning",
    )
    return Engine(COMMANDS[kind], config)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiny_model(tmp_path_factory.mktemp("model"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": MAX_MODEL_LEN}))
    return directory


@pytest.fixture(scope="module", params=list(COMMANDS))
def running(request: pytest.FixtureRequest, model: Path) -> Iterator[Engine]:
    started = start(request.param, model)
    yield started
    started.close()


@pytest.fixture
def engine(running: Engine) -> Iterator[Engine]:
    """The engine that the tests of this file share; each leaves it idle."""
    yield running
    stats = running.stats()
    assert (stats.running, stats.waiting, stats.blocks_used, stats.blocks_held) == (0, 0, 0, 0)
    assert stats.device.adapters == stats.host.adapters == []


@pytest.fixture
def adapter(engine: Engine, model: Path, tmp_path: Path) -> Iterator[Adapter]:
    """An adapter that no other test has, retired when the test ends."""
    yield (made := make_adapter(model, tmp_path))
    engine.send(RetireAdapter(digest=made.digest))


@pytest.fixture
def other(engine: Engine, model: Path, tmp_path: Path) -> Iterator[Adapter]:
    """Another one."""
    yield (made := make_adapter(model, tmp_path))
    engine.send(RetireAdapter(digest=made.digest))


def make_adapter(model: Path, directory: Path) -> Adapter:
    config = ModelConfig.from_directory(model)
    digest, file = canonical_from_tensors(tensors(next(SEEDS)), json.loads(adapter_config()), config, max_rank=8)
    return Adapter(digest, directory / f"{digest}.safetensors", file.data.tobytes())


def test_it_is_ready_with_its_limits(engine: Engine) -> None:
    ready = engine.ready
    assert (ready.max_model_len, ready.max_batch_tokens) == (MAX_MODEL_LEN, 256)
    assert (ready.vocab_size, ready.block_size, ready.dtype) == (268, 16, "float32")
    assert ready.num_blocks > 0
    assert ready.adapter_bytes == 3 * ADAPTER_BYTES


def test_a_request_gives_a_token_at_a_time_until_its_length(engine: Engine) -> None:
    first, *between, last = engine.generate(max_tokens=5, cache_salt="a salt of its own")
    assert len(between) == 3
    assert [len(event.token_ids) for event in (first, *between, last)] == [1] * 5
    assert (first.cached_tokens, first.finish_reason, last.finish_reason) == (0, None, "length")
    assert first.queue_seconds is not None
    assert first.queue_seconds >= 0
    for event in (*between, last):
        assert (event.cached_tokens, event.queue_seconds) == (None, None)
    assert {event.logprobs for event in (first, *between, last)} == {None}
    assert {event.stop_token for event in (first, *between, last)} == {None}


def test_every_token_has_as_many_alternatives_as_are_asked_for(engine: Engine) -> None:
    for event in engine.generate(logprobs=2):
        assert event.logprobs is not None
        [entry] = event.logprobs
        assert entry.logprob <= 0
        assert len(entry.top_ids) == len(entry.top_logprobs) == 2
    [none_of_them] = engine.generate(logprobs=0, max_tokens=1)[0].logprobs or []
    assert none_of_them.top_ids == none_of_them.top_logprobs == []


def test_a_stop_token_ends_a_request_and_is_named_apart(engine: Engine) -> None:
    whole = tokens_of(engine.generate(max_tokens=6))
    stop = whole[-1]
    *before, last = engine.generate(max_tokens=6, stop_token_ids=(stop,))
    assert tokens_of(before) == whole[: whole.index(stop)]
    assert (last.token_ids, last.finish_reason, last.stop_token, last.logprobs) == ([], "stop", stop, None)


def test_requests_side_by_side_give_what_each_gives_alone(engine: Engine) -> None:
    prompts = [PROMPT, PROMPT[::-1], PROMPT[5:]]
    alone = [tokens_of(engine.generate(prompt)) for prompt in prompts]
    commands = [request(engine.new_id(), prompt) for prompt in prompts]
    engine.send(*commands)
    together: dict[str, list[int]] = {command.request_id: [] for command in commands}
    while any(len(tokens) < 5 for tokens in together.values()):
        event = engine.next(Tokens)
        together[event.request_id] += event.token_ids
    assert list(together.values()) == alone


def test_an_aborted_request_says_nothing_more(engine: Engine) -> None:
    engine.send(endless("long"))
    engine.next(Tokens, request_id="long")
    assert engine.stats().running == 1
    engine.send(Abort(request_id="long"), Abort(request_id="never heard of"))
    assert engine.stats().running == 0
    engine.generate(max_tokens=2)
    engine.send(request("long", max_tokens=1))
    assert engine.next(Tokens, request_id="long").finish_reason == "length", "its id is free again"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"token_ids": []}, "empty_prompt"),
        ({"token_ids": [5] * MAX_MODEL_LEN}, "context_length_exceeded"),
        ({"token_ids": [5, 268]}, "invalid_token_id"),
        ({"token_ids": [-1]}, "invalid_token_id"),
        ({"stop_token_ids": (268,)}, "invalid_token_id"),
        ({"invocation_start": len(PROMPT) + 1}, "invalid_invocation_start"),
        ({"max_tokens": 0}, "invalid_max_tokens"),
        ({"adapter": "unknown"}, "adapter_failed"),
    ],
)
def test_a_request_that_cannot_run_is_refused_with_its_code(engine: Engine, fields: dict[str, Any], code: str) -> None:
    assert engine.refusal(request(engine.new_id(), **fields)) == code


def test_a_request_with_the_id_of_a_running_one_is_refused(engine: Engine) -> None:
    engine.send(endless("twice"))
    engine.next(Tokens, request_id="twice")
    assert engine.refusal(request("twice")) == "duplicate_request"
    engine.send(Abort(request_id="twice"))


def test_as_many_requests_are_queued_as_may_run_and_wait(engine: Engine) -> None:
    names = [f"queued {i}" for i in range(MAX_RUNNING + MAX_WAITING)]
    engine.send(*map(endless, names))
    assert engine.refusal(endless("one more")) == "queue_full"
    engine.send(Abort(request_id=names[0]), endless("instead"))
    engine.send(Abort(request_id="instead"), *(Abort(request_id=name) for name in names))


def test_a_prompt_finds_the_kv_of_an_equal_beginning(engine: Engine) -> None:
    before = engine.stats()
    salted = {"cache_salt": "equal beginnings", "max_tokens": 1}
    first, again, longer, shorter, elsewhere = (
        engine.generate(token_ids, **fields)[0].cached_tokens
        for token_ids, fields in (
            (PROMPT, salted),
            (PROMPT, salted),
            ([*PROMPT[:48], 7, 7, 7], salted),
            (PROMPT[:33], salted),
            (PROMPT, {**salted, "cache_salt": "another tenant"}),
        )
    )
    assert (first, again, longer, shorter, elsewhere) == (0, 48, 48, 32, 0)
    after = engine.stats()
    assert after.prompt_tokens - before.prompt_tokens == 3 * 49 + 51 + 33
    assert after.cached_tokens - before.cached_tokens == 48 + 48 + 32
    assert after.generated_tokens - before.generated_tokens == 5
    assert after.steps > before.steps
    assert after.blocks_total >= after.blocks_cached > 0
    base = after.namespaces[""]
    assert base.query_tokens - base_of(before)[0] == 3 * 49 + 51 + 33
    assert base.hit_tokens - base_of(before)[1] == 48 + 48 + 32
    assert base.blocks_cached == after.blocks_cached
    assert after.host_kv.bytes_total == after.preemptions == 0


def base_of(stats: Stats) -> tuple[int, int]:
    base = stats.namespaces.get("")
    return (0, 0) if base is None else (base.query_tokens, base.hit_tokens)


def test_an_adapter_shares_kv_with_the_base_up_to_its_invocation(engine: Engine, adapter: Adapter) -> None:
    salted = {"cache_salt": "invocations", "max_tokens": 1}
    adapter.write()
    engine.send(adapter.register())
    engine.generate(**salted)
    of_adapter = {**salted, "adapter": adapter.digest}
    assert engine.generate(**of_adapter, invocation_start=32)[0].cached_tokens == 32
    assert engine.generate(**of_adapter)[0].cached_tokens == 0
    assert engine.generate(**of_adapter)[0].cached_tokens == 48
    assert engine.generate(**of_adapter, kv_is_base=True)[0].cached_tokens == 48
    namespace = engine.stats().namespaces[adapter.digest]
    assert (namespace.query_tokens, namespace.hit_tokens) == (17 + 2 * 49, 48)
    assert namespace.blocks_cached > 0
    assert engine.ask(DropNamespace, namespace=adapter.digest) is None
    assert engine.generate(**of_adapter)[0].cached_tokens == 0
    assert engine.generate(**salted)[0].cached_tokens == 48, "the base's are still there"


def test_a_prefix_is_held_found_and_released(engine: Engine) -> None:
    salted = {"cache_salt": "held"}
    engine.send(engine.hold("p", PROMPT[:48], **salted))
    held = engine.next(PrefixHeld)
    assert (held.prefix_id, held.tokens, held.blocks, held.cached_tokens) == ("p", 48, 3, 0)
    stats = engine.stats()
    assert (stats.blocks_held, stats.namespaces[""].blocks_used) == (3, 3)
    assert engine.refusal(engine.hold("p", PROMPT[:48], **salted)) == "duplicate_prefix"
    engine.send(engine.hold("q", PROMPT[:48], **salted))
    assert engine.next(PrefixHeld, prefix_id="q").cached_tokens in (32, 47), "all but what must be computed"
    engine.send(ReleasePrefix(prefix_id="q"), ReleasePrefix(prefix_id="never held"))
    assert engine.generate(**salted, max_tokens=1)[0].cached_tokens == 48
    engine.send(ReleasePrefix(prefix_id="p"))
    stats = engine.stats()
    assert (stats.blocks_held, stats.namespaces[""].blocks_used) == (0, 0)


@pytest.mark.parametrize(
    ("token_ids", "fields", "code"),
    [
        ([], {}, "empty_prompt"),
        ([268], {}, "invalid_token_id"),
        ([5], {"adapter": "unknown"}, "adapter_failed"),
        ([5] * 2400, {}, "prefixes_full"),
    ],
)
def test_a_prefix_that_cannot_be_held_is_refused_with_its_code(
    engine: Engine, token_ids: list[int], fields: dict[str, Any], code: str
) -> None:
    assert engine.refusal(engine.hold("refused", token_ids, **fields)) == code
    engine.send(engine.hold("refused", [5] * 16, cache_salt="refused"))
    engine.next(PrefixHeld, prefix_id="refused")
    engine.send(ReleasePrefix(prefix_id="refused"))


def test_a_dropped_namespace_ends_what_is_held_of_it(engine: Engine) -> None:
    salted = {"cache_salt": "dropped"}
    engine.send(engine.hold("p", PROMPT[:48], **salted))
    engine.next(PrefixHeld, prefix_id="p")
    engine.send(DropNamespace(request_id="drop", namespace=None))
    events = {type(event): event for event in (engine.next(Answer | PrefixEnded), engine.next(Answer | PrefixEnded))}
    assert events[PrefixEnded] == PrefixEnded(prefix_id="p", reason="dropped")
    assert events[Answer] == Answer(request_id="drop")
    assert engine.generate(**salted, max_tokens=1)[0].cached_tokens == 0


def test_a_retired_adapter_ends_what_is_held_of_it(engine: Engine, adapter: Adapter) -> None:
    adapter.write()
    engine.send(adapter.register(), engine.hold("p", PROMPT[:48], adapter=adapter.digest))
    engine.next(PrefixHeld, prefix_id="p")
    engine.send(RetireAdapter(digest=adapter.digest))
    assert engine.next(PrefixEnded) == PrefixEnded(prefix_id="p", reason="adapter_retired")
    assert adapter.digest not in engine.stats().namespaces


def load(engine: Engine, adapter: Adapter, tier: Tier) -> str | None:
    return engine.ask(LoadAdapter, digest=adapter.digest, tier=tier)


def state(engine: Engine, adapter: Adapter, state: str, tier: Tier | None = None) -> AdapterState:
    """The next report of an adapter in a state and a tier."""
    return engine.next(AdapterState, digest=adapter.digest, state=state, tier=tier)


def test_an_adapter_is_loaded_from_tier_to_tier_and_unloaded(engine: Engine, adapter: Adapter) -> None:
    before = engine.stats()
    adapter.write()
    engine.send(adapter.register())
    state(engine, adapter, "idle")
    engine.send(LoadAdapter(digest=adapter.digest, tier="host"))
    assert set(state(engine, adapter, "idle", "host").seconds) == {"read", "pack"}
    assert load(engine, adapter, "host") is None, "it is there already"
    engine.send(LoadAdapter(digest=adapter.digest))
    assert set(state(engine, adapter, "idle", "device").seconds) == {"copy"}
    assert load(engine, adapter, "device") is None
    assert load(engine, adapter, "host") is None
    stats = engine.stats()
    for tier, earlier, size in ((stats.device, before.device, 3), (stats.host, before.host, 4)):
        assert (tier.adapters, tier.loads - earlier.loads, tier.bytes_pinned) == ([adapter.digest], 1, 0)
        assert 0 < tier.bytes_used < tier.bytes_total == size * ADAPTER_BYTES
    assert engine.ask(UnloadAdapter, digest=adapter.digest, tier="device") is None
    stats = engine.stats()
    assert (stats.device.adapters, stats.device.bytes_used, stats.host.adapters) == ([], 0, [adapter.digest])
    assert load(engine, adapter, "device") is None
    engine.send(UnloadAdapter(request_id="unload", digest=adapter.digest, tier="host"))
    state(engine, adapter, "idle", None)
    assert engine.next(Answer) == Answer(request_id="unload")
    stats = engine.stats()
    assert stats.device.bytes_used == stats.host.bytes_used == 0
    assert engine.ask(UnloadAdapter, digest=adapter.digest, tier="host") is None, "there is nothing left to do"


def test_a_request_loads_its_adapter_which_is_in_use_meanwhile(engine: Engine, adapter: Adapter) -> None:
    adapter.write()
    engine.send(adapter.register(), endless("long", adapter=adapter.digest))
    assert set(state(engine, adapter, "idle", "device").seconds) == {"read", "pack", "copy"}
    engine.next(Tokens, request_id="long")
    assert engine.stats().running_adapters == [adapter.digest]
    assert engine.ask(UnloadAdapter, digest=adapter.digest, tier="device") == "adapter_in_use"
    engine.send(Abort(request_id="long"))
    assert engine.ask(UnloadAdapter, digest=adapter.digest, tier="device") is None
    assert engine.stats().running_adapters == []


def test_the_base_and_an_adapter_answer_differently(engine: Engine, adapter: Adapter) -> None:
    adapter.write()
    engine.send(adapter.register())
    of_adapter = tokens_of(engine.generate(adapter=adapter.digest, max_tokens=20))
    assert of_adapter != tokens_of(engine.generate(max_tokens=20))


def test_what_waits_for_a_missing_file_goes_on_when_it_is_registered_again(engine: Engine, adapter: Adapter) -> None:
    engine.send(adapter.register())
    state(engine, adapter, "idle")
    load = LoadAdapter(request_id="load", digest=adapter.digest)
    engine.send(load, request("waiting", adapter=adapter.digest))
    assert state(engine, adapter, "missing").reason
    engine.generate(max_tokens=2)  # others run meanwhile
    stats = engine.stats()
    assert (stats.waiting, stats.waiting_adapters, stats.running_adapters) == (1, [adapter.digest], [])
    adapter.write()
    engine.send(adapter.register())
    assert engine.next(Answer).code is None
    engine.next(Tokens, request_id="waiting", finish_reason="length")


def test_a_file_that_cannot_be_had_fails_what_waits_for_it_with_the_reason(engine: Engine, adapter: Adapter) -> None:
    engine.send(adapter.register(), LoadAdapter(request_id="load", digest=adapter.digest))
    engine.send(request("waiting", adapter=adapter.digest))
    state(engine, adapter, "missing")
    engine.send(FailAdapter(digest=adapter.digest, reason="the bucket said 403"))
    assert state(engine, adapter, "failed").reason == "the bucket said 403"
    answer = engine.next(Answer, request_id="load")
    assert (answer.code, "the bucket said 403" in answer.message) == ("adapter_failed", True)
    failed = engine.next(Failed, request_id="waiting")
    assert (failed.code, "the bucket said 403" in failed.message) == ("adapter_failed", True)
    assert engine.refusal(request(engine.new_id(), adapter=adapter.digest)) == "adapter_failed"
    assert load(engine, adapter, "host") == "adapter_failed"
    adapter.write()
    engine.send(adapter.register())
    assert load(engine, adapter, "host") is None, "a new registration is a new start"


def test_a_retired_adapter_is_unknown_and_what_waits_for_it_is_told(engine: Engine, adapter: Adapter) -> None:
    engine.send(adapter.register(), LoadAdapter(request_id="load", digest=adapter.digest))
    engine.send(request("waiting", adapter=adapter.digest))
    state(engine, adapter, "missing")
    engine.send(RetireAdapter(digest=adapter.digest), RetireAdapter(digest="unknown"))
    state(engine, adapter, "retired")
    assert engine.next(Answer, request_id="load").code == "unknown_adapter"
    assert engine.next(Failed, request_id="waiting").code == "adapter_failed"
    assert engine.refusal(request(engine.new_id(), adapter=adapter.digest)) == "adapter_failed"
    adapter.write()
    engine.send(adapter.register())
    assert len(engine.generate(adapter=adapter.digest)) == 5, "the same bytes may come again"


def test_an_adapter_is_retired_when_the_last_request_on_it_has_ended(engine: Engine, adapter: Adapter) -> None:
    adapter.write()
    engine.send(adapter.register(), endless("long", adapter=adapter.digest))
    engine.next(Tokens, request_id="long")
    engine.send(RetireAdapter(digest=adapter.digest))
    assert engine.refusal(request(engine.new_id(), adapter=adapter.digest)) == "adapter_failed"
    assert load(engine, adapter, "host") == "unknown_adapter"
    stats = engine.stats()
    assert (stats.running, stats.device.adapters) == (1, [adapter.digest])
    engine.send(Abort(request_id="long"))
    state(engine, adapter, "retired")


def test_an_unknown_digest_is_refused(engine: Engine) -> None:
    for kind in (LoadAdapter, UnloadAdapter):
        assert engine.ask(kind, digest="unknown", tier="host") == "unknown_adapter"
    assert engine.set_pins({"unknown": "host"}) == {"unknown": "unknown_adapter"}
    engine.send(LoadAdapter(digest="unknown"), FailAdapter(digest="unknown", reason="no"))
    assert engine.ask(DropNamespace, namespace="unknown") is None


def test_a_pinned_adapter_is_not_unloaded_and_pins_can_be_full(
    engine: Engine, adapter: Adapter, other: Adapter
) -> None:
    for each in (adapter, other):
        each.write()
        engine.send(each.register())
    assert engine.set_pins({adapter.digest: "device"}) == {}
    assert load(engine, adapter, "device") is None
    stats = engine.stats()
    assert (stats.device.adapters, stats.device.bytes_pinned) == ([adapter.digest], stats.device.bytes_used)
    assert stats.host.bytes_pinned == 0
    assert engine.ask(UnloadAdapter, digest=adapter.digest, tier="device") == "adapter_pinned"
    assert engine.ask(UnloadAdapter, digest=adapter.digest, tier="host") == "adapter_pinned"
    assert engine.set_pins({adapter.digest: "device", other.digest: "device"}) == {other.digest: "pins_full"}
    assert engine.ask(UnloadAdapter, digest=adapter.digest, tier="device") == "adapter_pinned", "the others stay pinned"
    engine.send(SetPins(request_id="unpin", pins={}))
    assert engine.next(AdapterState, digest=adapter.digest, pinned=None).tier == "device"
    assert engine.next(PinsSet) == PinsSet(request_id="unpin")
    assert engine.set_pins({adapter.digest: "device"}) == {}
    assert engine.set_pins({other.digest: "device"}) == {}, "one takes the place of the other"
    assert load(engine, other, "device") is None


def test_a_pin_waits_for_the_file_and_fails_with_it(engine: Engine, adapter: Adapter) -> None:
    engine.send(adapter.register(), SetPins(request_id="pin", pins={adapter.digest: "host"}))
    state(engine, adapter, "missing")
    engine.send(FailAdapter(digest=adapter.digest, reason="gone"))
    assert state(engine, adapter, "failed").reason == "gone"
    refusal = engine.next(PinsSet, request_id="pin").refused[adapter.digest]
    assert (refusal.code, "gone" in refusal.message) == ("adapter_failed", True)
    adapter.write()
    engine.send(adapter.register())
    assert engine.set_pins({adapter.digest: "host"}) == {}
    assert load(engine, adapter, "host") is None
    assert engine.stats().host.bytes_pinned > 0


def test_pins_that_wait_for_a_file_are_answered_when_others_replace_them(
    engine: Engine, adapter: Adapter, other: Adapter
) -> None:
    other.write()
    engine.send(adapter.register(), other.register(), SetPins(request_id="pin", pins={adapter.digest: "host"}))
    state(engine, adapter, "missing")
    assert engine.set_pins({other.digest: "host"}) == {}
    engine.send(SetPins(request_id="again", pins={adapter.digest: "device", other.digest: "host"}))
    engine.send(SetPins(request_id="none", pins={}))
    refused = engine.next(PinsSet, request_id="again").refused
    assert {digest: refusal.code for digest, refusal in refused.items()} == {adapter.digest: "superseded"}
    assert engine.next(PinsSet) == PinsSet(request_id="none")
    assert load(engine, other, "host") is None


@pytest.mark.parametrize("kind", COMMANDS)
def test_it_ends_when_it_is_told_to_with_requests_running(kind: str, model: Path) -> None:
    engine = start(kind, model)
    engine.send(endless("long"))
    engine.next(Tokens)
    engine.send(Shutdown())
    assert engine.died() == "status 0"
    engine.close()


def test_every_message_is_spoken_here() -> None:
    """What this file imports it uses: the linter sees to that."""
    messages = {kind.__name__ for kind in (*get_args(Command), *get_args(Event))}
    assert messages - {"Ready"} <= set(globals())
