"""What the service may expect of an engine process, held of the fake one and of the real one alike.

Every test speaks runtime.messages with both, and leaves no request, adapter or prefix behind.
"""

import ast
import time
from pathlib import Path
from typing import Any, get_args

import pytest

from runtime.messages import (
    Abort,
    Answer,
    Command,
    DropNamespace,
    Event,
    KvChanges,
    PrefixEnded,
    PrefixHeld,
    ReleasePrefix,
    RetireAdapter,
    SetPaused,
    Shutdown,
    Stats,
    Tokens,
)
from tests.service.engine.either_engine import (
    ADAPTER_BYTES,
    COMMANDS,
    MAX_MODEL_LEN,
    MAX_RUNNING,
    MAX_WAITING,
    PROMPT,
    Adapter,
    Engine,
    endless,
    request,
    start,
    tokens_of,
)


def test_it_is_ready_with_its_limits(engine: Engine) -> None:
    ready = engine.ready
    assert (ready.max_model_len, ready.max_batch_tokens) == (MAX_MODEL_LEN, 256)
    assert (ready.vocab_size, ready.block_size, ready.dtype) == (268, 16, "float32")
    assert ready.num_blocks > 0
    assert ready.adapter_bytes == 3 * ADAPTER_BYTES


def test_a_request_gives_a_token_at_a_time_until_its_length(engine: Engine) -> None:
    asked_at = time.monotonic()
    first, *between, last = engine.generate(max_tokens=5, cache_salt="a salt of its own")
    assert len(between) == 3
    assert [len(event.token_ids) for event in (first, *between, last)] == [1] * 5
    assert (first.cached_tokens, first.finish_reason, last.finish_reason) == (0, None, "length")
    assert first.queue_seconds is not None
    assert first.queue_seconds >= 0
    assert first.started_at is not None
    assert first.computed_at is not None
    assert asked_at <= first.started_at <= first.computed_at <= time.monotonic(), "it has a clock of its own"
    for event in (*between, last):
        assert (event.cached_tokens, event.queue_seconds, event.started_at, event.computed_at) == (None,) * 4
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
    assert last.stop_logprobs is None
    *_, last = engine.generate(max_tokens=6, stop_token_ids=(stop,), logprobs=1)
    assert last.logprobs is None
    assert last.stop_logprobs is not None
    assert len(last.stop_logprobs.top_ids) == 1


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
        ({"max_tokens": -1}, "invalid_max_tokens"),
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


def test_while_it_is_paused_nothing_is_computed_and_requests_queue(engine: Engine) -> None:
    alone = tokens_of(engine.generate(max_tokens=9))
    assert engine.ask(SetPaused, paused=True) is None
    engine.send(request("first", max_tokens=9), request("second", max_tokens=1))
    steps = engine.stats().steps
    for _ in range(3):
        stats = engine.stats()
        assert (stats.steps, stats.running, stats.waiting) == (steps, 0, 2)
    engine.send(Abort(request_id="second"))
    assert engine.stats().waiting == 1
    assert engine.ask(SetPaused, paused=False) is None
    events = [engine.next(Tokens, request_id="first")]
    while events[-1].finish_reason is None:
        events.append(engine.next(Tokens, request_id="first"))
    assert tokens_of(events) == alone


@pytest.mark.parametrize("kind", COMMANDS)
def test_it_ends_when_it_is_told_to_with_requests_running(kind: str, model: Path) -> None:
    engine = start(kind, model)
    engine.send(endless("long"))
    engine.next(Tokens)
    engine.send(Shutdown())
    assert engine.died() == "status 0"
    engine.close()


def test_the_real_one_tells_of_its_blocks_if_it_is_asked_to(model: Path) -> None:
    """The fake one keeps none."""
    engine = start("real", model, kv_changes=True)
    engine.send(request("one", max_tokens=1))
    [stored] = engine.next(KvChanges).changes
    assert (stored.token_ids, len(stored.blocks), stored.parent) == (PROMPT[:48], 3, None)
    assert (stored.namespace, stored.host) == (None, False)
    engine.close()


def test_every_message_is_spoken_in_this_suite() -> None:
    names = ("either_engine.py", "test_engine_contract.py", "test_engine_contract_adapters.py")
    files = [Path(__file__).with_name(name) for name in names]
    spoken = {node.id for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}
    messages = {kind.__name__ for kind in (*get_args(Command), *get_args(Event))}
    assert messages - {"Ready"} - spoken == set()
