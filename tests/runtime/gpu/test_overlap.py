"""Steps that are launched before the results of the last are known: the same tokens, and no state left behind."""

import pytest

from runtime.messages import Failed, Generate, HoldPrefix, PrefixHeld, SamplingParams, Tokens
from tests.runtime.adapters.peft_engine import INVOCATIONS, PeftOracle, engines
from tests.runtime.gpu.late_runner import LateRunner
from tests.runtime.tiny_engine import prompt, run


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    return PeftOracle(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def start(oracle):
    with engines(oracle) as start:
        yield start


@pytest.fixture(scope="module")
def prompt_engine(start):
    return start(prefix_cache=False)


@pytest.fixture
def engine(start):
    made = start(blocks=60, max_batch_tokens=32, max_running=4)
    made.runner = LateRunner(made.runner)
    return made


def params(max_tokens=12, **fields):
    return SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True} | fields)


def both(engine, other, prompts, each, names=None):
    """The completions of an engine, which are those of another one that waits for each step."""
    names = names or [None] * len(prompts)
    invocation_starts = [None if INVOCATIONS.get(name) else 0 for name in names]
    late = engine.generate(prompts, each, [engine.digests[name] for name in names], invocation_starts)
    while engine.busy:
        engine.step()
    engine.check()
    waited = other.generate(prompts, each, [other.digests[name] for name in names], invocation_starts)
    for ours, theirs in zip(late, waited, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert (ours.finish_reason, ours.stop_token) == (theirs.finish_reason, theirs.stop_token)
        logprobs = [[entry.logprob for entry in output.logprobs] for output in (ours, theirs)]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)
    return late


def test_the_tokens_are_those_of_steps_that_are_waited_for(engine, prompt_engine):
    names = [None, "plain", "attention", "linears", "head", "plain", None]
    prompts = [[*prompt(9 + 7 * index, index), *(INVOCATIONS.get(name) or ())] for index, name in enumerate(names)]
    both(engine, prompt_engine, prompts, params(), names)
    assert engine.runner.late > 10


def test_what_has_stopped_is_computed_once_in_vain_and_its_last_tokens_are_not_told(engine, prompt_engine):
    prompts = [prompt(20, seed) for seed in range(4)]
    free = prompt_engine.generate(prompts, params(16))
    stops = tuple(output.token_ids[3 + 2 * index] for index, output in enumerate(free))
    stopped = both(engine, prompt_engine, prompts, params(16, stop_token_ids=stops))
    assert {output.finish_reason for output in stopped} == {"stop"}
    again = both(
        engine,
        prompt_engine,
        [[*tokens, *output.token_ids] for tokens, output in zip(prompts, stopped, strict=True)],
        params(),
    )
    assert all(output.cached_tokens == 0 or output.cached_tokens >= 16 for output in again)


def test_a_stop_token_that_may_not_come_yet_does_not(engine, prompt_engine):
    prompts = [prompt(20, seed) for seed in range(3)]
    first = prompt_engine.generate(prompts, params(1))
    stops = tuple(output.token_ids[0] for output in first)
    outputs = both(engine, prompt_engine, prompts, params(9, stop_token_ids=stops, min_tokens=5))
    assert all(len(output.token_ids) >= 4 for output in outputs)


def test_penalties_are_of_tokens_that_are_known(engine, prompt_engine):
    prompts = [prompt(20, seed) for seed in range(3)]
    each = [params(), params(repetition_penalty=1.8), params(presence_penalty=1.5, frequency_penalty=0.5)]
    outputs = both(engine, prompt_engine, prompts, each)
    assert len({tuple(output.token_ids) for output in outputs}) == 3
    assert engine.runner.late >= 10


def test_seeded_draws_and_log_probabilities_are_the_same(engine, prompt_engine):
    prompts = [prompt(20, seed) for seed in range(3)]
    both(engine, prompt_engine, prompts, params(temperature=1.3, seed=7, top_k=40))
    both(engine, prompt_engine, prompts, params(temperature=0.9, seed=3, logprobs=2))


@pytest.mark.parametrize("steps", range(1, 9))
def test_requests_may_be_ended_at_any_time(engine, prompt_engine, steps):
    for name in ("a", "b"):
        tokens = prompt(20, ord(name))
        engine.add_request(Generate(request_id=name, token_ids=tokens, params=params(40)))
    for _ in range(steps):
        engine.step()
        engine.check()
    engine.abort("a")
    engine.check()
    engine.add_request(Generate(request_id="a", token_ids=prompt(33, 5), params=params(6)))
    outputs = run(engine)
    [a] = prompt_engine.generate([prompt(33, 5)], params(6))
    [b] = prompt_engine.generate([prompt(20, ord("b"))], params(40))
    assert outputs["a"][0] == a.token_ids
    assert b.token_ids[-len(outputs["b"][0]) :] == outputs["b"][0]
    again = engine.generate([prompt(20, ord("a"))], params(6))
    assert again[0].token_ids == prompt_engine.generate([prompt(20, ord("a"))], params(6))[0].token_ids


def test_what_was_computed_is_found_again_to_the_last_token_that_was_told(engine):
    tokens = prompt(21)
    [output] = engine.generate([tokens], params(30))
    [more] = engine.generate([[*tokens, *output.token_ids, 50]], params(2))
    assert more.cached_tokens == 21 + 30 - 1


def test_a_prefix_is_held_when_it_is_there(engine):
    asked = {"token_ids": prompt(40)}
    engine.hold_prefix(HoldPrefix(request_id="r", prefix_id="p", **asked))
    events = []
    while engine.busy:
        events += engine.step()
        engine.check()
    [held] = [event for event in events if isinstance(event, PrefixHeld)]
    assert (held.tokens, held.blocks) == (40, 3)
    engine.release_prefix("p")


def test_when_blocks_run_out_results_are_waited_for_before_anybody_is_set_back(start, prompt_engine):
    engine = start(blocks=14, max_batch_tokens=64, max_running=4)
    engine.runner = LateRunner(engine.runner)
    prompts = [prompt(40, seed) for seed in range(3)]
    both(engine, prompt_engine, prompts, params(70))
    assert engine.scheduler.preemptions > 0
    assert engine.runner.late > 0


def test_a_failure_ends_everything_and_what_was_under_way_is_never_asked_for(engine):
    engine.add_request(Generate(request_id="a", token_ids=prompt(20), params=params(40)))
    for _ in range(4):
        engine.step()
    assert [type(event) for event in engine.fail_all("engine_error", "it broke")] == [Failed]
    assert not engine.busy
    assert engine.step() == []
    engine.check()


def test_first_tokens_say_what_was_cached_and_only_they_do(engine):
    engine.add_request(Generate(request_id="a", token_ids=prompt(20), params=params(4)))
    events = []
    while engine.busy:
        events += [event for event in engine.step() if isinstance(event, Tokens)]
    assert [event.cached_tokens for event in events] == [0, None, None, None]
    assert [event.finish_reason for event in events] == [None, None, None, "length"]


def test_a_pause_takes_in_what_was_launched_and_requests_go_on_where_they_were(engine, prompt_engine):
    prompts = [prompt(20, seed) for seed in range(3)]
    alone = [output.token_ids for output in prompt_engine.generate(prompts, params(10))]
    outputs = {f"r{index}": [] for index in range(len(prompts))}
    for name, token_ids in zip(outputs, prompts, strict=True):
        engine.add_request(Generate(request_id=name, token_ids=token_ids, params=params(10)))

    def take(events):
        for event in events:
            if isinstance(event, Tokens):
                outputs[event.request_id] += event.token_ids

    for _ in range(4):
        take(engine.step())
    engine.set_paused(True)
    take(engine.step())
    told, steps = [list(tokens) for tokens in outputs.values()], engine.steps
    assert 0 < sum(map(len, told)) < 30
    for _ in range(3):
        assert engine.step() == []
        engine.check()
    assert ([*outputs.values()], engine.steps) == (told, steps)
    engine.set_paused(False)
    while engine.busy:
        take(engine.step())
    assert [*outputs.values()] == alone


def test_a_request_that_gives_its_place_to_another_clients_loses_no_token(engine, prompt_engine):
    """Both wait for results and do not: a place changes hands only when all results are in."""
    names = [None, "plain", None, "attention", "linears", None, "plain", None]
    prompts = [[*prompt(9 + 3 * index, 50 + index)] for index in range(len(names))]
    wanted = prompt_engine.generate(
        prompts, params(20), [prompt_engine.digests[name] for name in names], [0] * len(names)
    )
    found = {f"r{index}": [] for index in range(len(names))}

    def add(index, **whose):
        engine.add_request(
            Generate(
                request_id=f"r{index}",
                token_ids=prompts[index],
                params=params(20),
                adapter=engine.digests[names[index]],
                **whose,
            )
        )

    for index in range(5):
        add(index, call="many")
    steps = 0
    while engine.busy:
        for event in engine.step():
            if isinstance(event, Tokens):
                found[event.request_id] += event.token_ids
        engine.check()
        steps += 1
        if steps in (8, 12, 16):
            add(5 + (steps - 8) // 4, cache_salt=f"tenant {steps}")
    assert engine.scheduler.preemptions > 0
    assert engine.runner.late > 5
    assert [found[f"r{index}"] for index in range(len(names))] == [output.token_ids for output in wanted]
