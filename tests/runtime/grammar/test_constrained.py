"""Requests with a grammar, against a choice by hand: of the model's tokens, the likeliest that a matcher allows."""

import json
import threading

import numpy as np
import pytest
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from runtime.engine import Engine
from runtime.grammar.grammars import KEPT, Grammars
from runtime.messages import Failed, Generate, SamplingParams, Tokens
from tests.runtime.gpu.late_runner import LateRunner
from tests.runtime.tiny_engine import ADAPTER_CONFIG, adapter_tensors, engines, prompt
from tests.runtime.tiny_model import TINY
from tests.service.tiny_model import make_tokenizer

VOCAB, END = TINY["vocab_size"], TINY["eos_token_id"]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GRAMMARS = {
    "schema": LLMatcher.grammar_from_json_schema(PERSON, overrides={"whitespace_flexible": False}),
    "regex": LLMatcher.grammar_from_regex("[a-f]{3,9}(yes|no)"),
    "choice": LLMatcher.grammar_from_lark('start: "hello world" | "hello" | "he"'),
    "list": LLMatcher.grammar_from_lark('start: "[" item ("," item){2,6} "]"\nitem: /[0-9]{1,3}/'),
}


@pytest.fixture
def start(tmp_path):
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with engines(tmp_path) as start:
        yield start


@pytest.fixture
def tokenizer(tmp_path):
    make_tokenizer().save(str(tmp_path / "other.json"))
    return LLTokenizer(str(tmp_path / "other.json"), n_vocab=VOCAB, eos_token=END)


def params(grammar, **more):
    return SamplingParams(**{"max_tokens": 60, "temperature": 0.0, "grammar": GRAMMARS.get(grammar, grammar)} | more)


def by_hand(engine: Engine, tokenizer: LLTokenizer, token_ids: list[int], grammar: str, adapter=None) -> list[int]:
    """The likeliest allowed token at each position, until the end token is it."""
    matcher, chosen = LLMatcher(tokenizer, grammar), []
    while True:
        ranked = SamplingParams(max_tokens=1, temperature=0.0, logprobs=VOCAB, ignore_eos=True)
        [completion] = engine.generate([token_ids + chosen], ranked, adapter)
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(mask, bitorder="little")
        token_id = next(one for one in completion.logprobs[0].top_ids if allowed[one])
        if token_id == END:
            return chosen
        chosen.append(token_id)
        assert matcher.consume_token(token_id)


@pytest.mark.parametrize("kernels", ["compiled", "torch"])
@pytest.mark.parametrize("grammar", GRAMMARS)
def test_the_token_chosen_is_the_likeliest_that_the_grammar_allows(start, tokenizer, kernels, grammar):
    engine = start(kernels=kernels)
    adapter = engine.add_adapter(adapter_tensors(), ADAPTER_CONFIG)
    for seed in range(4):
        for digest in (None, adapter):
            [completion] = engine.generate([prompt(20, seed)], params(grammar), digest)
            assert completion.token_ids == by_hand(engine, tokenizer, prompt(20, seed), GRAMMARS[grammar], digest)
            assert completion.finish_reason == "stop"


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_steps_run_ahead_of_what_a_grammar_waits_for(start, tokenizer, grammar):
    """The last token is told before the next one is chosen, when the step has been launched."""
    engine = start()
    expected = by_hand(engine, tokenizer, prompt(20), GRAMMARS[grammar])
    other = params(grammar, repetition_penalty=1.3, max_tokens=12)
    waited = engine.generate([prompt(21)], other)[0].token_ids
    engine.runner = LateRunner(engine.runner)
    outputs = engine.generate([prompt(20), prompt(21)], [params(grammar), other])
    assert [output.token_ids for output in outputs] == [expected, waited]
    assert engine.runner.late >= min(len(expected), 12) - 1


def test_draws_stay_in_the_grammar_and_a_seed_repeats_in_any_batch(start, tokenizer):
    engine = start()
    drawn = params("schema", temperature=1.5, seed=5)
    alone = engine.generate([prompt(20)], drawn)[0].token_ids
    others = [params("list", temperature=1.0, seed=1), params("regex"), SamplingParams(max_tokens=30, seed=2), drawn]
    together = engine.generate([prompt(20)] * 4, others)
    assert together[3].token_ids == alone
    for seed in range(10):
        [completion] = engine.generate([prompt(20, seed)], params("schema", temperature=2.0, seed=seed))
        person = json.loads(tokenizer.decode_str(completion.token_ids))
        assert set(person) == {"name", "age"}
        assert len(person["name"]) <= 5
        assert 0 <= person["age"] <= 99


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_asking_for_one_token_gives_what_the_mask_says(start, tokenizer, grammar):
    """At every place of some texts, for every token."""
    grammars = start().grammars
    for seed in range(3):
        draw, walk = np.random.default_rng(seed), grammars.constrain(GRAMMARS[grammar])
        generated = []
        while len(generated) < 40 and (not generated or generated[-1] != END):
            grammars.wait(5)
            assert walk.ready
            single = grammars.constrain(GRAMMARS[grammar])
            assert single.ready
            allowed = walk.allowed(generated)[:VOCAB]
            assert [single.allows(generated, token_id) for token_id in range(VOCAB)] == allowed.tolist()
            generated.append(int(draw.choice(np.flatnonzero(allowed))))


def test_drawn_tokens_have_the_masked_distribution(start, tokenizer):
    """Also where the first draw is mostly refused: by chi-square, on what follows a prompt."""
    engine = start()
    letters = LLMatcher.grammar_from_regex("[a-d]x")
    one = SamplingParams(max_tokens=1, temperature=0.0, logprobs=VOCAB)
    ranked = engine.generate([prompt(20)], one)[0].logprobs[0]
    tokens = {tokenizer.tokenize_str(letter)[0]: 0 for letter in "abcd"}
    found = dict(zip(ranked.top_ids, ranked.top_logprobs, strict=True))
    weights = np.array([np.exp(found[token_id]) for token_id in tokens])
    for seed in range(2000):
        [completion] = engine.generate([prompt(20)], params(letters, max_tokens=1, temperature=1.0, seed=seed))
        tokens[completion.token_ids[0]] += 1
    expected = 2000 * weights / weights.sum()
    assert (((np.array(list(tokens.values())) - expected) ** 2) / expected).sum() < 16.3  # 0.1 % of three degrees


def test_preempted_requests_go_on_where_they_were(start):
    want = start().generate([prompt(20, seed) for seed in range(6)], params("schema", temperature=1.0, seed=3))
    few = start(blocks=9)
    got = few.generate([prompt(20, seed) for seed in range(6)], params("schema", temperature=1.0, seed=3))
    assert few.scheduler.preemptions > 0
    assert [one.token_ids for one in got] == [one.token_ids for one in want]


def test_penalties_biases_and_log_probabilities_go_with_a_grammar(start):
    engine = start()
    plain = engine.generate([prompt(20)], params("list", logprobs=VOCAB))[0]
    biased = engine.generate([prompt(20)], params("list", logit_bias={plain.token_ids[1]: -100.0}))[0]
    assert biased.token_ids[1] != plain.token_ids[1]
    for entry, token_id in zip(plain.logprobs, plain.token_ids, strict=True):  # of the model, not of the grammar
        assert entry.logprob == pytest.approx(entry.top_logprobs[entry.top_ids.index(token_id)], abs=1e-5)
        assert sum(map(np.exp, entry.top_logprobs)) == pytest.approx(1.0, abs=1e-4)
    again = engine.generate([prompt(20)], params("list", repetition_penalty=5.0, frequency_penalty=2.0))[0]
    assert again.token_ids != plain.token_ids
    assert again.finish_reason == "stop"


def test_the_end_of_a_grammar_ends_the_text_whatever_else_is_asked(start):
    engine = start()
    short = LLMatcher.grammar_from_lark('start: "he"')
    for more in ({"ignore_eos": True}, {"min_tokens": 20}):
        [completion] = engine.generate([prompt(20)], params(short, **more))
        assert completion.finish_reason == "stop"
        assert len(completion.token_ids) <= 2
    # Where the grammar can go on, `min_tokens` makes it
    digits = LLMatcher.grammar_from_regex("[0-9]{1,40}")
    assert len(engine.generate([prompt(20)], params(digits, min_tokens=30))[0].token_ids) >= 30


@pytest.mark.parametrize("grammar", ["", "{", '{"grammars": []}', LLMatcher.grammar_from_regex("(a")])
def test_a_grammar_that_cannot_be_compiled_ends_its_request_alone(start, grammar):
    engine = start()
    engine.add_request(Generate(request_id="bad", token_ids=prompt(20), params=params(grammar)))
    engine.add_request(Generate(request_id="good", token_ids=prompt(20), params=params("choice")))
    assert ends_of(engine) == {"bad": "grammar_failed", "good": "stop"}


def test_without_a_tokenizer_a_grammar_is_refused_by_name(tmp_path):
    with engines(tmp_path) as start:
        engine = start()
        engine.add_request(Generate(request_id="one", token_ids=prompt(20), params=params("choice")))
        engine.wait(5)
        [failed] = engine.step()
        assert failed.code == "grammar_failed"
        assert "has no tokenizer.json" in failed.message


def test_a_grammar_that_passes_a_limit_ends_its_request_alone(start, tokenizer, monkeypatch):
    """This one is ambiguous: the items of its chart grow with the text."""
    limits = LLParserLimits(max_items_in_row=30)
    monkeypatch.setattr(Grammars, "_compile", lambda _, grammar: LLMatcher(tokenizer, grammar, limits=limits))
    engine = start()
    grammar = LLMatcher.grammar_from_lark('start: s\ns: s s | "a" | s s s | s s s s | a s | s a\na: "a" | a a | s a s')
    for name, asked in (("one", grammar), ("other", GRAMMARS["choice"])):
        engine.add_request(Generate(request_id=name, token_ids=prompt(20), params=params(asked, min_tokens=50)))
    assert ends_of(engine) == {"one": "grammar_failed", "other": "stop"}
    assert engine.tallies.generated_tokens > 5, "it began well"


def ends_of(engine):
    """Step until all requests have ended: how, by request."""
    ends = {}
    while engine.busy:
        steps = engine.steps
        for event in engine.step():
            if isinstance(event, Failed):
                ends[event.request_id] = event.code
            elif isinstance(event, Tokens) and event.finish_reason:
                ends[event.request_id] = event.finish_reason
        if engine.steps == steps:
            engine.wait(5)
    return ends


def test_a_request_whose_grammar_is_being_compiled_is_passed_over(start, monkeypatch):
    may_go_on, compile = threading.Event(), Grammars._compile

    def slow(self, grammar):
        assert may_go_on.wait(30)
        return compile(self, grammar)

    monkeypatch.setattr(Grammars, "_compile", slow)
    engine = start(max_running=1)
    engine.add_request(Generate(request_id="slow", token_ids=prompt(20), params=params("choice")))
    free = SamplingParams(max_tokens=5, ignore_eos=True)
    engine.add_request(Generate(request_id="other", token_ids=prompt(20), params=free))
    while "other" in engine.requests:
        engine.step()
    assert engine.requests["slow"].started_at is None
    may_go_on.set()
    assert ends_of(engine) == {"slow": "stop"}


def test_equal_grammars_are_compiled_once_and_few_are_kept(start, monkeypatch):
    compiled, compile = [], Grammars._compile
    monkeypatch.setattr(Grammars, "_compile", lambda self, grammar: compiled.append(grammar) or compile(self, grammar))
    engine = start()
    for _ in range(3):
        engine.generate([prompt(20)] * 2, params("choice"))
    assert len(compiled) == 1
    for number in range(KEPT):
        engine.grammars.constrain(LLMatcher.grammar_from_regex(f"a{number}"))
    engine.generate([prompt(20)], params("choice"))
    assert compiled.count(GRAMMARS["choice"]) == 2
