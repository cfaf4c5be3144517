"""The engine and its adapters: more of them than memory holds, files that do not come, training loops."""

import threading

import pytest
import torch

from runtime.adapters.arena import aligned
from runtime.adapters.loads import PATIENCE_SECONDS
from runtime.messages import AdapterState, Failed, Generate, SamplingParams, Tokens
from runtime.request import RequestRefused
from tests.runtime.adapter_format.adapter_files import canonical_bytes
from tests.runtime.tiny_engine import ADAPTER_CONFIG, GREEDY, adapter_tensors, engines, prompt, run

# Bytes of an adapter: two layers, A of q and v together in a panel of 16 ranks, a scale for each of these, B of q and v
# of rank 4; the first 64 are not used.
SIZE = aligned(64 + 2 * 4 * (16 * 32 + 16 + 4 * (32 + 16)))


@pytest.fixture
def start(tmp_path):
    with engines(tmp_path) as start:
        yield start


def request(name, adapter=None, max_tokens=20, seed=0):
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Generate(request_id=name, token_ids=prompt(20, seed), params=params, adapter=adapter)


def canonical(engine, seed=0):
    arrays = {name: tensor.numpy() for name, tensor in adapter_tensors(seed).items()}
    return canonical_bytes(arrays, ADAPTER_CONFIG, engine.runner.model)


def test_more_adapters_than_memory_holds_take_turns(start):
    one = start()
    engine = start(adapter_bytes=int(SIZE * 2.5))
    digests = [engine.add_adapter(adapter_tensors(seed), ADAPTER_CONFIG) for seed in range(8)]
    together = engine.generate([prompt(20)] * 8, GREEDY, digests)
    for digest, completion in zip(digests, together, strict=True):
        assert one.add_adapter(adapter_tensors(digests.index(digest)), ADAPTER_CONFIG) == digest
        assert one.generate([prompt(20)], GREEDY, digest)[0].token_ids == completion.token_ids
    assert engine.adapters.device.evictions > 0


@pytest.mark.parametrize(("device", "host"), [(8, 16), (8, 2), (2, 16), (2, 2)])
@pytest.mark.parametrize("max_running", [4, 64])
def test_twice_the_adapters_that_the_device_holds_and_more_are_served_in_bounded_steps(
    start, device, host, max_running
):
    engine = start(blocks=400, adapter_bytes=device * SIZE, host_adapter_bytes=host * SIZE, max_running=max_running)
    digests = [engine.add_adapter(adapter_tensors(seed), ADAPTER_CONFIG) for seed in range(16)]
    for turn in range(2):
        for index, digest in enumerate(digests):
            engine.add_request(request(f"{turn}-{index}", digest, max_tokens=10, seed=turn))
    finished = {}
    while engine.busy:
        steps = engine.steps
        for event in engine.step():
            assert not isinstance(event, Failed)
            if isinstance(event, Tokens) and event.finish_reason:
                finished[event.request_id] = engine.steps
        engine.check()
        if engine.steps == steps:
            engine.adapters.wait(timeout=1.0)
    assert len(finished) == 32
    assert max(finished.values()) <= 32 * 10 + 20, "at worst one after the other, however slow the loads are"
    assert engine.adapters.device.loads <= 3 * 32, "nobody is loaded over and over"


@pytest.mark.parametrize("holds", [1, 2])
@pytest.mark.parametrize("count", [3, 6])
@pytest.mark.parametrize("in_host", [True, False])
@pytest.mark.parametrize("max_running", [1, 2, 64])
def test_adapters_that_the_device_cannot_hold_together_are_loaded_about_once_a_request(
    start, holds, count, in_host, max_running
):
    engine = start(blocks=400, adapter_bytes=holds * SIZE, host_adapter_bytes=8 * SIZE, max_running=max_running)
    digests = [engine.add_adapter(adapter_tensors(seed), ADAPTER_CONFIG) for seed in range(count)]
    if in_host:
        for digest in digests:
            engine.adapters.load(digest, "host")
        while engine.adapters.wait(timeout=30):
            engine.step()
    for turn in range(4):
        loads, steps = engine.adapters.device.loads, 0
        for index, digest in enumerate(digests[turn:] + digests[:turn]):
            engine.add_request(request(f"{turn}-{index}", digest, max_tokens=3, seed=turn))
        while engine.busy:
            before = engine.steps
            assert not [event for event in engine.step() if isinstance(event, Failed)]
            engine.check()
            steps += 1
            assert steps <= 30 * count, "nobody gets to run"
            if engine.steps == before:
                assert engine.adapters.wait(timeout=30), "nothing will ever change"
        # Without a slot, whoever came may have to go again; so may the last in line for a file that was read late
        most = 3 * count if max_running < count else count if in_host else 2 * count - holds
        assert engine.adapters.device.loads - loads <= most


def test_an_adapter_that_comes_for_a_request_that_was_aborted_makes_way_at_once(start):
    engine = start(adapter_bytes=SIZE)
    first, second = (engine.add_adapter(adapter_tensors(seed), ADAPTER_CONFIG) for seed in range(2))
    for digest in (first, second):
        engine.adapters.load(digest, "host")
    while engine.adapters.wait(timeout=30):
        engine.step()
    woken = threading.Event()
    engine.adapters.watch(woken.set)
    engine.add_request(request("aborted", first))
    engine.abort("aborted")
    engine.adapters.wait(timeout=30)
    engine.add_request(request("waits", second, max_tokens=1))
    woken.clear()
    engine.step()
    assert engine.adapters.device.adapters == [], "no request waits for the first one any more"
    assert woken.wait(timeout=30), "an engine that sleeps is told to come back"
    assert engine.adapters.wait(timeout=30)
    assert run(engine)["waits"][1] == "length"
    assert (engine.adapters.device.loads, engine.adapters.device.evictions) == (2, 1)


def test_a_cold_adapter_gets_its_turn_among_requests_that_never_let_the_device_go(start):
    engine = start(blocks=400, adapter_bytes=2 * SIZE)
    engine.adapters.loads.clock = lambda: engine.steps * 0.1  # ten steps a second
    hot = [engine.add_adapter(adapter_tensors(seed), ADAPTER_CONFIG) for seed in range(2)]
    cold = engine.add_adapter(adapter_tensors(2), ADAPTER_CONFIG)
    engine.generate([prompt(8)] * 2, GREEDY, hot)
    for digest in hot:
        engine.add_request(request(f"first {digest}", digest))
    engine.step()
    engine.add_request(request("cold", cold, max_tokens=1))
    began = engine.adapters.loads.clock()
    names = iter(range(1000))
    while "cold" in engine.requests:
        for digest in hot:
            if not any(other.adapter == digest and other.num_generated < 10 for other in engine.requests.values()):
                engine.add_request(request(f"{next(names)}", digest))
        engine.add_request(request(base := f"base {next(names)}", max_tokens=1))
        engine.adapters.wait(timeout=30)  # for a load that is under way: the clock goes by steps, and threads do not
        engine.step()
        engine.check()
        assert base not in engine.requests, "requests to the base never wait for adapter memory"
        waited = engine.adapters.loads.clock() - began
        assert waited < PATIENCE_SECONDS + 4, "its patience and the longest request that ran then"
    engine.fail_all("test_over", "")


def test_a_training_loop_that_replaces_its_adapter_does_not_grow(start):
    engine = start(adapter_bytes=4 * SIZE, host_adapter_bytes=4 * SIZE)
    before, used = None, []
    for seed in range(12):
        digest = engine.add_adapter(adapter_tensors(seed), ADAPTER_CONFIG)
        engine.generate([prompt(20)], GREEDY, digest)
        if before is not None:
            engine.retire_adapter(before)
        before = digest
        used.append((engine.adapters.device.bytes_used, engine.adapters.host.bytes_used))
    assert set(used) == {(SIZE, SIZE)}
    assert len(engine.adapters.digests) == 1


def test_what_was_added_from_memory_stays_as_it_was_whatever_comes_and_goes(start):
    """Three lie in one's room, so each is read anew from the engine's own memory; others take turns in that."""
    engine, reference = start(adapter_bytes=SIZE, host_adapter_bytes=SIZE), start()
    tensors = [adapter_tensors(seed) for seed in range(3)]
    expected = [
        reference.generate([prompt(20)], GREEDY, reference.add_adapter(each, ADAPTER_CONFIG))[0] for each in tensors
    ]
    digests = [engine.add_adapter(each, ADAPTER_CONFIG) for each in tensors]
    for each in tensors:
        for tensor in each.values():
            tensor.zero_()
    for seed in range(3, 6):
        passing = engine.add_adapter(adapter_tensors(seed), ADAPTER_CONFIG)
        engine.generate([prompt(20)], GREEDY, passing)
        engine.retire_adapter(passing)
        for digest, completion in zip(digests, expected, strict=True):
            engine.drop_namespace(digest)
            assert engine.generate([prompt(20)], GREEDY, digest)[0].token_ids == completion.token_ids
    assert engine.adapters.host.loads == 12


def test_while_requests_stream_on_one_generation_the_next_is_installed_and_used(start):
    engine = start()
    old, new = (engine.add_adapter(adapter_tensors(seed), ADAPTER_CONFIG) for seed in range(2))
    [expected_old], [expected_new] = (engine.generate([prompt(20)], GREEDY, digest) for digest in (old, new))
    engine.retire_adapter(new)
    engine.step()
    engine.add_request(request("old", old))
    engine.step()
    assert engine.add_adapter(adapter_tensors(1), ADAPTER_CONFIG) == new
    engine.retire_adapter(old)
    outputs = run(engine, request("new", new))
    assert outputs["new"] == (expected_new.token_ids, "length")
    tokens, reason = outputs["old"]
    assert (tokens, reason) == (expected_old.token_ids[-len(tokens) :], "length")
    engine.step()
    assert engine.adapters.device.adapters == [new]


def test_as_a_library_a_file_that_nobody_will_bring_fails_the_request(start, tmp_path):
    engine = start()
    digest, content = canonical(engine)
    engine.register_adapter(digest, tmp_path / "adapter")
    with pytest.raises(RequestRefused, match="is missing"):
        engine.generate([prompt(20)] * 2, GREEDY, [None, digest])
    (tmp_path / "adapter").write_bytes(content)
    engine.register_adapter(digest, tmp_path / "adapter")
    [completion] = engine.generate([prompt(20)], GREEDY, digest)
    assert len(completion.token_ids) == 20


def test_a_request_waits_for_a_file_that_is_wanted_while_others_run(start, tmp_path):
    engine = start()
    [expected] = engine.generate([prompt(20)], GREEDY)
    digest, content = canonical(engine)
    engine.register_adapter(digest, tmp_path / "adapter")
    engine.add_request(request("waits", digest))
    engine.add_request(request("runs"))
    events = []
    while "runs" in engine.requests or not engine.adapters.missing:
        events += engine.step()
        engine.check()
    [wanted] = [event for event in events if isinstance(event, AdapterState) and event.state == "missing"]
    assert wanted.digest == digest
    ran = [token for event in events if isinstance(event, Tokens) for token in event.token_ids]
    assert ran == expected.token_ids
    (tmp_path / "adapter").write_bytes(content)
    engine.register_adapter(digest, tmp_path / "adapter")
    assert run(engine)["waits"][1] == "length"


def test_the_reason_why_a_file_cannot_be_had_reaches_the_request_that_waits_and_no_other(start, tmp_path):
    engine = start()
    digest, _ = canonical(engine)
    engine.register_adapter(digest, tmp_path / "adapter")
    engine.add_request(request("waits", digest))
    while not engine.adapters.missing:
        engine.step()
        engine.adapters.wait(timeout=1.0)
    engine.add_request(request("runs"))
    engine.adapters.fail(digest, "the bucket said 403")
    events = engine.step()
    [failed] = [event for event in events if isinstance(event, Failed)]
    assert (failed.request_id, failed.code) == ("waits", "adapter_failed")
    assert "the bucket said 403" in failed.message
    assert run(engine)["runs"][1] == "length"


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_file_from_where_larger_ranks_are_allowed_fails_its_load_by_the_module(start, tmp_path, in_memory):
    engine = start(max_lora_rank=3)
    digest, content = canonical(engine)
    (tmp_path / "adapter").write_bytes(content)
    engine.register_adapter(digest, content if in_memory else tmp_path / "adapter")
    reason = (
        "model.layers.0.self_attn.q_proj: has rank 4, and max_lora_rank is 3; start the server with --max-lora-rank 4"
    )
    engine.add_request(request("adapted", digest))
    engine.add_request(request("plain"))
    events = []
    while engine.busy:
        events += engine.step()
    states = [event for event in events if isinstance(event, AdapterState)]
    assert [(each.digest, each.state, each.reason) for each in states][-1:] == [(digest, "failed", reason)]
    [failed] = [event for event in events if isinstance(event, Failed)]
    assert (failed.request_id, failed.code) == ("adapted", "adapter_failed")
    assert reason in failed.message
    assert engine.adapters.host.bytes_used == engine.adapters.device.bytes_used == 0


def test_weights_are_the_same_after_a_trip_through_host_memory(start):
    engine = start(adapter_bytes=SIZE)
    digests = [engine.add_adapter(adapter_tensors(seed), ADAPTER_CONFIG) for seed in range(2)]
    first = [engine.generate([prompt(20)], GREEDY, digest)[0].token_ids for digest in digests]
    again = [engine.generate([prompt(20, 1), prompt(20)], GREEDY, digest)[1].token_ids for digest in digests]
    assert first == again
    assert engine.adapters.host.loads == 2
    assert engine.adapters.device.loads == 4
    assert torch.equal(engine.adapters.device.extent(digests[1]), engine.adapters.host.extent(digests[1]))
