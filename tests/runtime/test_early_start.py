"""The engine computes the tokens before the invocation while the adapter loads (rule 9)."""

import time

import pytest

from runtime.messages import Failed, Generate, HoldPrefix, PrefixHeld, SamplingParams, Tokens
from tests.runtime.adapter_format.adapter_files import canonical_bytes
from tests.runtime.tiny_engine import ADAPTER_CONFIG, GREEDY, adapter_tensors, engines, prompt, run


@pytest.fixture
def start(tmp_path):
    with engines(tmp_path) as start:
        yield start


@pytest.fixture
def canonical(tmp_path):
    """The digest, the path and the content of an adapter that an engine knows and whose file is not there."""

    def register(engine):
        arrays = {name: tensor.numpy() for name, tensor in adapter_tensors().items()}
        digest, content = canonical_bytes(arrays, ADAPTER_CONFIG, engine.runner.model)
        engine.register_adapter(digest, tmp_path / "adapter")
        return digest, tmp_path / "adapter", content

    return register


def request(name, adapter, invocation_start=50, length=60, **fields):
    return Generate(
        request_id=name,
        token_ids=prompt(length),
        params=GREEDY,
        adapter=adapter,
        invocation_start=invocation_start,
        **fields,
    )


def step_until(engine, condition):
    """The events until a condition is true; fails after the deadline."""
    events, deadline = [], time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "stepped in vain"
        events += engine.step()
        engine.check()
    return events


def test_rule_9_the_prompt_up_to_the_invocation_is_computed_before_the_file_is_there(start, canonical):
    other = start(prefix_cache=False)
    [expected] = other.generate([prompt(60)], GREEDY, other.add_adapter(adapter_tensors(), ADAPTER_CONFIG), [50])
    engine = start(max_batch_tokens=16, max_running=4)
    digest, path, content = canonical(engine)
    engine.add_request(request("early", digest))
    engine.add_request(request("plain", digest, invocation_start=0))
    step_until(engine, lambda: engine.adapters.missing and engine.steps and not engine.scheduler.running)
    early = engine.requests["early"]
    assert (early.cached_tokens, early.num_generated) == (0, 0)
    assert engine.stats().namespaces[""].blocks_cached == 4, "50 tokens of 16 a block"
    assert engine.blocks.used == 0, "it waits again, for its adapter, and holds nothing"
    path.write_bytes(content)
    engine.register_adapter(digest, path)
    outputs = run(engine)
    assert outputs["early"] == (expected.token_ids, "length")
    assert outputs["plain"][1] == "length"
    assert engine.scheduler.preemptions == 0


def test_others_are_served_meanwhile_however_few_places_there_are(start, canonical):
    engine = start(max_running=1, blocks=9)
    digest, _, _ = canonical(engine)
    engine.add_request(request("early", digest))
    step_until(engine, lambda: engine.adapters.missing and not engine.scheduler.running)
    for seed in range(3):
        name = f"base {seed}"
        engine.add_request(Generate(request_id=name, token_ids=prompt(100, seed), params=GREEDY))
        step_until(engine, lambda name=name: name not in engine.requests)
    engine.abort("early")


def test_when_the_file_cannot_be_had_the_request_fails_with_the_reason(start, canonical):
    engine = start(max_batch_tokens=16, max_running=4)
    digest, _, _ = canonical(engine)
    engine.add_request(request("early", digest))
    events = step_until(engine, lambda: engine.adapters.missing)
    engine.adapters.fail(digest, "the bucket said 403")
    events += step_until(engine, lambda: not engine.busy)
    [failed] = [event for event in events if isinstance(event, Failed)]
    assert (failed.request_id, failed.code) == ("early", "adapter_failed")
    assert "the bucket said 403" in failed.message
    assert not any(isinstance(event, Tokens) for event in events)


def test_rule_9_a_prefix_that_ends_where_its_adapter_begins_waits_for_none(start, canonical):
    engine = start(max_batch_tokens=16, max_running=4)
    digest, _, _ = canonical(engine)
    asked = {"token_ids": prompt(40), "adapter": digest, "invocation_start": 40}
    engine.hold_prefix(HoldPrefix(request_id="r", prefix_id="p", **asked))
    [held] = [event for event in step_until(engine, lambda: not engine.busy) if isinstance(event, PrefixHeld)]
    assert held.tokens == 40
    assert engine.generate([[*prompt(40), 9]], GREEDY)[0].cached_tokens == 40
    engine.release_prefix("p")


def test_without_a_prefix_cache_a_request_waits_for_its_adapter_as_ever(start, canonical):
    engine = start(prefix_cache=False)
    digest, path, content = canonical(engine)
    engine.add_request(request("late", digest))
    step_until(engine, lambda: engine.adapters.missing)
    assert engine.steps == 0
    path.write_bytes(content)
    engine.register_adapter(digest, path)
    assert run(engine)["late"][1] == "length"


def test_a_step_that_fails_before_a_copy_is_done_leaves_no_wrong_k_and_v_behind(start):
    engine = start()
    engine.generate([prompt(40)], GREEDY)
    tokens = [*prompt(40)[:36], 9, 10, 11]
    [expected] = start(prefix_cache=False).generate([tokens], GREEDY)
    copy = engine.runner.kv.copy

    def stumble(copies):
        assert copies, "a part of a block is found"
        raise RuntimeError("the device stumbled")

    engine.runner.kv.copy = stumble
    engine.add_request(Generate(request_id="r", token_ids=tokens, params=SamplingParams(max_tokens=1)))
    with pytest.raises(RuntimeError):
        engine.step()
    engine.check()
    [failed] = engine.fail_all("engine_error", "")
    assert failed.request_id == "r"
    engine.check()
    engine.runner.kv.copy = copy
    assert engine.generate([tokens], GREEDY)[0].token_ids == expected.token_ids
