"""Log-probabilities of a prompt's tokens against transformers and PEFT, in fp32."""

import pytest
import torch

import runtime.scheduler
from runtime.messages import Generate, SamplingParams
from tests.runtime.adapters.peft_engine import INVOCATIONS, PeftOracle, engines, forget
from tests.runtime.tiny_engine import prompt

TOP = 5
SCORE = SamplingParams(max_tokens=0, temperature=0.0, ignore_eos=True, prompt_logprobs=TOP)
KERNELS = ["compiled", "torch", "triton"]
NAMES = [None, "plain", "attention", "linears", "head"]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    return PeftOracle(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def start(oracle):
    with engines(oracle) as start:
        yield start


@pytest.fixture(scope="module", params=KERNELS)
def roomy(request, start):
    return start(kernels=request.param, device="cpu", max_batch_tokens=48, max_running=6)


@pytest.fixture
def engine(roomy):
    forget(roomy)
    return roomy


def text(name, before=18, after=9, seed=0):
    """A prompt with the invocation of an aLoRA adapter between two texts, so that it has tokens on both sides."""
    tokens = [token % 250 + 30 for token in prompt(before + after, seed)]
    return [*tokens[:before], *(INVOCATIONS.get(name) or [50]), *tokens[before:]]


def assert_right(oracle, name, tokens, found, first=1):
    """Each entry is what the model of the adapter gives for the token after those before it."""
    assert len(found) == len(tokens) - first
    judged = oracle.logits(name, tokens[:1], tokens[1:], start_of(name, tokens)).log_softmax(-1)[first - 1 :]
    for row, token, entry in zip(judged, tokens[first:], found, strict=True):
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert entry.rank == int((row > row[token]).sum()) + 1
        values, ids = row.topk(len(entry.top_ids))
        assert entry.top_ids == ids.tolist()
        assert entry.top_logprobs == pytest.approx(values.tolist(), abs=1e-4)


def start_of(name, tokens):
    """The invocation's place in the whole text: the oracle's own prompt is its first token alone."""
    invocation = INVOCATIONS.get(name)
    if invocation is None:
        return None
    places = range(len(tokens) - len(invocation), -1, -1)
    return next(place for place in places if tokens[place : place + len(invocation)] == invocation)


@pytest.mark.parametrize("name", NAMES)
def test_each_token_of_a_prompt_has_the_models_log_probability(engine, oracle, name):
    tokens = text(name)
    [scored] = engine.generate([tokens], SCORE, engine.digests[name])
    assert (scored.token_ids, scored.finish_reason) == ([], "length")
    assert all(len(entry.top_ids) == TOP for entry in scored.prompt_logprobs)
    assert_right(oracle, name, tokens, scored.prompt_logprobs)


def test_requests_of_all_kinds_side_by_side_in_pieces(engine, oracle, monkeypatch):
    monkeypatch.setattr(runtime.scheduler, "SCORED_ROWS", 7)
    texts = [text(name, seed=index) for index, name in enumerate(NAMES)]
    plain = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    params = [SCORE, plain, SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, prompt_logprobs=0)]
    params = [params[index % 3] for index in range(len(NAMES))]
    found = engine.generate(texts, params, [engine.digests[name] for name in NAMES])
    for name, tokens, asked, one in zip(NAMES, texts, params, found, strict=True):
        assert len(one.token_ids) == asked.max_tokens
        if asked.max_tokens:
            assert oracle.agrees(name, tokens, one.token_ids)
        if asked.prompt_logprobs is None:
            assert one.prompt_logprobs == []
        else:
            assert_right(oracle, name, tokens, one.prompt_logprobs)


def test_no_step_computes_more_logits_than_its_bound(engine, monkeypatch):
    monkeypatch.setattr(runtime.scheduler, "SCORED_ROWS", 7)
    rows = []
    prepare = engine.runner.prepare

    def counting(chunks):
        rows.append(sum(len(chunk.scored) for chunk in chunks))
        return prepare(chunks)

    monkeypatch.setattr(engine.runner, "prepare", counting)
    engine.generate([text(None, seed=1), text(None, seed=2)], SCORE)
    assert max(rows) == 7
    assert sum(rows) == 2 * (len(text(None)) - 1)


@pytest.mark.parametrize("first", [0, 1, 17, 25])
def test_the_cache_is_used_up_to_the_last_token_that_needs_no_logits(engine, oracle, first):
    tokens = text(None)
    engine.generate([tokens], SCORE)
    part = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True, prompt_logprobs=2, logprobs_from=first)
    [scored] = engine.generate([tokens], part)
    assert scored.cached_tokens == max(first - 1, 0)
    assert_right(oracle, None, tokens, scored.prompt_logprobs, max(first, 1))
    assert oracle.agrees(None, tokens, scored.token_ids)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preempted_requests_have_each_log_probability_once(start, oracle, prefix_cache):
    engine = start(
        blocks=8, kernels="torch", max_model_len=64, prefix_cache=prefix_cache, max_batch_tokens=16, max_running=4
    )
    texts = [text(None, seed=seed) for seed in range(3)]
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True, prompt_logprobs=3)
    found = engine.generate(texts, params)
    assert engine.stats().preemptions > 0
    for tokens, one in zip(texts, found, strict=True):
        assert_right(oracle, None, tokens, one.prompt_logprobs)
        assert oracle.agrees(None, tokens, one.token_ids)


def test_a_prompt_of_one_token_has_none(engine):
    [scored] = engine.generate([[5]], SCORE)
    assert (scored.prompt_logprobs, scored.finish_reason) == ([], "length")


def test_nothing_generated_without_log_probabilities_leaves_the_prompt_in_the_cache(engine):
    tokens = text(None)
    [nothing] = engine.generate([tokens], SamplingParams(max_tokens=0))
    assert (nothing.token_ids, nothing.prompt_logprobs, nothing.finish_reason) == ([], [], "length")
    [after] = engine.generate([tokens], SamplingParams(max_tokens=1))
    assert after.cached_tokens == len(tokens) - 1


def test_a_prompt_as_long_as_the_context_can_be_scored(engine, oracle):
    tokens = text(None, before=100, after=27)
    assert len(tokens) == engine.runner.max_model_len
    [scored] = engine.generate([tokens], SCORE)
    assert_right(oracle, None, tokens, scored.prompt_logprobs)


def test_logits_of_a_prompt_that_are_not_finite_end_the_request(engine, monkeypatch):
    forward = engine.runner.forward

    def broken(*args):
        return torch.full_like(forward(*args), float("nan"))

    monkeypatch.setattr(engine.runner, "forward", broken)
    engine.add_request(Generate(request_id="broken", token_ids=text(None), params=SCORE))
    events = []
    while engine.busy:
        events += engine.step()
    assert [event.code for event in events] == ["non_finite_logits"]
