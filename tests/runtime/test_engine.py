"""The engine as a library, on a tiny model with random weights."""

import math

import pytest

from runtime.adapter_format.errors import InvalidAdapter
from runtime.config import MIB, EngineConfig
from runtime.messages import Failed, Generate, SamplingParams, Tokens
from runtime.request import RequestRefused
from tests.runtime.tiny_engine import ADAPTER_CONFIG, GREEDY, adapter_tensors, engines, prompt, run


@pytest.fixture
def start(tmp_path):
    with engines(tmp_path) as start:
        yield start


def test_output_is_the_same_whatever_the_chunks_the_batch_and_the_cache(start):
    prompts = [prompt(length, seed=length) for length in (1, 15, 16, 17, 33, 70, 100)]
    expected = [completion.token_ids for completion in start(prefix_cache=False).generate(prompts, GREEDY)]
    for budget in (7, 16, 512):
        engine = start(max_batch_tokens=budget, max_running=7)
        for _ in range(2):
            assert [completion.token_ids for completion in engine.generate(prompts, GREEDY)] == expected
        alone = [engine.generate([each], GREEDY)[0].token_ids for each in prompts]
        assert alone == expected


def test_preempted_sequences_end_with_the_same_output(start):
    prompts = [prompt(30, seed=seed) for seed in range(6)]
    expected = [completion.token_ids for completion in start().generate(prompts, GREEDY)]
    tight = start(blocks=12)
    assert [completion.token_ids for completion in tight.generate(prompts, GREEDY)] == expected
    assert tight.scheduler.preemptions > 0


def test_a_seed_gives_the_same_tokens_in_any_company_and_after_preemption(start):
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=5, ignore_eos=True)
    engine = start()
    [alone] = engine.generate([prompt(30)], params)
    others = [SamplingParams(max_tokens=20, seed=seed) for seed in range(5)]
    crowd = [prompt(30), *(prompt(30, seed) for seed in range(1, 6))]
    assert engine.generate(crowd, [params, *others])[0].token_ids == alone.token_ids
    tight = start(blocks=12)
    assert tight.generate(crowd[::-1], [*others, params])[-1].token_ids == alone.token_ids
    assert tight.scheduler.preemptions > 0
    again = SamplingParams(max_tokens=20, temperature=1.0, seed=6, ignore_eos=True)
    assert engine.generate([prompt(30)], again)[0].token_ids != alone.token_ids


def test_stop_tokens_end_a_sequence_and_are_not_in_its_output(start):
    engine = start()
    [free] = engine.generate([prompt(10)], GREEDY)
    stop = free.token_ids[5]
    at = free.token_ids.index(stop)
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, stop_token_ids=(stop,))
    [stopped] = engine.generate([prompt(10)], params)
    assert (stopped.token_ids, stopped.finish_reason, stopped.stop_token) == (free.token_ids[:at], "stop", stop)


def test_output_ends_at_the_context_limit_with_reason_length(start):
    engine = start(max_model_len=40)
    [completion] = engine.generate([prompt(39)], GREEDY)
    assert (len(completion.token_ids), completion.finish_reason) == (1, "length")
    [completion] = engine.generate([prompt(30)], GREEDY)
    assert (len(completion.token_ids), completion.finish_reason) == (10, "length")


def test_logprobs_come_with_every_token(start):
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True, logprobs=3)
    [completion] = start().generate([prompt(10)], params)
    assert len(completion.logprobs) == 5
    for token, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
        assert logprob.top_ids[0] == token
        assert logprob.logprob == logprob.top_logprobs[0] < 0


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"token_ids": []}, "empty_prompt"),
        ({"token_ids": [300]}, "invalid_token_id"),
        ({"token_ids": [-1]}, "invalid_token_id"),
        ({"token_ids": [5] * 128}, "context_length_exceeded"),
        ({"params": SamplingParams(max_tokens=-1)}, "invalid_max_tokens"),
        ({"params": SamplingParams(stop_token_ids=(300,))}, "invalid_token_id"),
        ({"adapter": "unknown"}, "adapter_failed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_request_that_cannot_run_is_refused_and_leaves_nothing_behind(start, change, code):
    engine = start()
    fields = {"request_id": "r", "token_ids": [5, 6], "params": GREEDY} | change
    with pytest.raises(RequestRefused) as refusal:
        engine.add_request(Generate(**fields))
    assert refusal.value.code == code
    assert not engine.busy


def test_the_queue_is_bounded_and_says_so(start):
    engine = start(max_running=2, max_waiting=1)
    for name in "abc":
        engine.add_request(Generate(request_id=name, token_ids=[5], params=GREEDY))
    with pytest.raises(RequestRefused) as refusal:
        engine.add_request(Generate(request_id="d", token_ids=[5], params=GREEDY))
    assert refusal.value.code == "queue_full"
    run(engine)


def test_aborts_at_every_stage_free_everything_and_disturb_nobody(start):
    engine = start(max_running=2, max_batch_tokens=16)
    [expected] = engine.generate([prompt(40)], GREEDY)
    for name in "abcd":
        engine.add_request(Generate(request_id=name, token_ids=prompt(40), params=GREEDY))
    for aborted in "dba":  # still waiting, in the middle of its prompt, decoding
        engine.step()
        engine.abort(aborted)
        engine.abort(aborted)
        engine.check()
    tokens, reason = run(engine)["c"]  # but for those that came with the steps above
    assert (tokens, reason) == (expected.token_ids[-len(tokens) :], "length")
    assert engine.blocks.used == 0


def test_adapters_change_the_output_and_base_rows_beside_them_stay_exact(start):
    engine = start()
    digests = [engine.add_adapter(adapter_tensors(seed), ADAPTER_CONFIG) for seed in range(3)]
    assert len(set(digests)) == 3
    [base] = engine.generate([prompt(20)], GREEDY)
    mixed = engine.generate([prompt(20)] * 4, GREEDY, [*digests, None])
    assert mixed[3].token_ids == base.token_ids
    alone = [engine.generate([prompt(20)], GREEDY, digest)[0].token_ids for digest in digests]
    assert [completion.token_ids for completion in mixed[:3]] == alone
    assert len({tuple(tokens) for tokens in [base.token_ids, *alone]}) == 4


def test_the_same_tensors_are_the_same_adapter_and_their_cached_blocks_are_found_again(start):
    engine = start()
    digest = engine.add_adapter(adapter_tensors(), ADAPTER_CONFIG)
    engine.generate([prompt(40)], GREEDY, digest)
    assert engine.add_adapter(adapter_tensors(), ADAPTER_CONFIG) == digest
    [again] = engine.generate([prompt(40)], GREEDY, digest)
    assert again.cached_tokens == 39
    [base] = engine.generate([prompt(40)], GREEDY)
    assert base.cached_tokens == 0


def test_a_retired_adapter_finishes_what_runs_and_is_then_unknown(start):
    engine = start()
    digest = engine.add_adapter(adapter_tensors(), ADAPTER_CONFIG)
    [expected] = engine.generate([prompt(20)], GREEDY, digest)
    engine.add_request(Generate(request_id="r", token_ids=prompt(20), params=GREEDY, adapter=digest))
    engine.step()
    engine.retire_adapter(digest)
    outputs = {"r": []}
    while engine.busy:
        for event in engine.step():
            if isinstance(event, Tokens):
                outputs["r"] += event.token_ids
    assert expected.token_ids[-len(outputs["r"]) :] == outputs["r"]
    with pytest.raises(RequestRefused, match=digest):
        engine.generate([prompt(20)], GREEDY, digest)
    assert engine.adapters.device.bytes_used == 0


@pytest.mark.parametrize("preempted", ["afterwards", "before"])
def test_a_request_that_is_preempted_finishes_on_its_adapter_although_that_is_retired(start, preempted):
    prompts = [prompt(30, seed=seed) for seed in range(6)]
    engine = start(adapter_bytes=MIB)
    expected = engine.generate(prompts, GREEDY, engine.add_adapter(adapter_tensors(), ADAPTER_CONFIG))
    tight = start(blocks=12)
    digest = tight.add_adapter(adapter_tensors(), ADAPTER_CONFIG)
    for index, each in enumerate(prompts):
        tight.add_request(Generate(request_id=f"{index}", token_ids=each, params=GREEDY, adapter=digest))
    outputs = {f"{index}": [] for index in range(len(prompts))}
    begun, failed, retired = set(), set(), False

    def step():
        for event in tight.step():
            if isinstance(event, Tokens):
                outputs[event.request_id] += event.token_ids
            else:
                failed.add(event.request_id) if isinstance(event, Failed) else None
        tight.check()

    while tight.busy:
        step()
        if not retired and (tight.scheduler.preemptions if preempted == "before" else tight.scheduler.running):
            assert bool(tight.scheduler.preemptions) == (preempted == "before")
            begun = {request_id for request_id, r in tight.requests.items() if r.started_at is not None}
            done = outputs.keys() - tight.requests.keys()
            tight.retire_adapter(digest)
            retired = True
    assert tight.scheduler.preemptions > 0
    assert failed == outputs.keys() - begun - done, "only those that had not begun"
    for request_id in begun | done:
        assert outputs[request_id] == expected[int(request_id)].token_ids
    tight.step()
    assert tight.adapters.device.bytes_used == 0


def test_an_adapter_that_overflows_fails_its_own_requests_and_poisons_nobody(start):
    engine = start(blocks=9)
    [expected] = engine.generate([prompt(40)], GREEDY)
    overflowing = engine.add_adapter(adapter_tensors(scale=1e25), ADAPTER_CONFIG)
    base = Generate(request_id="base", token_ids=prompt(40), params=GREEDY)
    broken = Generate(request_id="broken", token_ids=prompt(40), params=GREEDY, adapter=overflowing)
    outputs = run(engine, broken, base)
    assert outputs["broken"] == ([], "non_finite_logits")
    assert outputs["base"] == (expected.token_ids, "length")
    for seed in range(1, 4):  # blocks that held NaN are used again
        fresh = start()
        [clean] = fresh.generate([prompt(50, seed)], GREEDY)
        assert engine.generate([prompt(50, seed)], GREEDY)[0].token_ids == clean.token_ids


def test_a_broken_adapter_is_refused_and_changes_nothing(start):
    engine = start()
    tensors = adapter_tensors()
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][0, 0] = math.nan
    with pytest.raises(InvalidAdapter, match="q_proj"):
        engine.add_adapter(tensors, ADAPTER_CONFIG)
    assert engine.adapters.device.bytes_used == 0


def test_a_cache_too_small_for_one_sequence_is_refused_with_the_figures(start):
    with pytest.raises(ValueError, match="kv_cache_bytes holds 48 tokens"):
        start(blocks=4)
    assert start(blocks=4, max_model_len=None).runner.max_model_len == 48


def test_host_memory_for_kv_that_could_keep_nothing_is_refused_with_the_figures(start):
    with pytest.raises(ValueError, match="host_kv_bytes must be 0 or at least 4096, one block; it is 4095"):
        start(host_kv_bytes=4095)
    with pytest.raises(ValueError, match="host_kv_bytes must be 0 without prefix_cache"):
        EngineConfig(model="anywhere", host_kv_bytes=4096, prefix_cache=False)
