"""Log-probabilities over reused K/V: what computing it all would give (rules 8, 10 and 12 of test_block_keys.py)."""

import pytest
import torch

from runtime.messages import SamplingParams
from tests.runtime.adapters.peft_engine import CONFIG, INVOCATIONS, TOKENS, PeftOracle, engines, forget
from tests.runtime.tiny_engine import prompt

VOCABULARY = CONFIG["vocab_size"]
ROUNDING = 16 * 2**-20  # sixteen last places of a log-probability between -8 and -16, as the least are here
PARAMS = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, logprobs=VOCABULARY)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    return PeftOracle(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def start(oracle):
    with engines(oracle) as start:
        yield start


@pytest.fixture(scope="module")
def roomy(start):
    return start()


@pytest.fixture
def engine(roomy):
    forget(roomy)
    return roomy


@pytest.fixture(scope="module")
def uncached(start):
    return start(prefix_cache=False)


def ask(engine, tokens, name=None, invocation_start=None):
    """The completion, and the log-probabilities of all tokens of the vocabulary for each one of it."""
    [completion] = engine.generate([tokens], PARAMS, engine.digests[name], [invocation_start])
    found = torch.full((len(completion.logprobs), VOCABULARY), float("nan"))
    for row, entry in zip(found, completion.logprobs, strict=True):
        row[torch.tensor(entry.top_ids)] = torch.tensor(entry.top_logprobs)
    return completion, found


def text(talk, name):
    return [*talk, *(INVOCATIONS.get(name) or [50, 51])]


PAIRS = [(None, "attention"), (None, "linears"), ("attention", None), ("attention", "linears"), ("linears", "head")]


@pytest.mark.parametrize("length", [16, 21, 31, 47])
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_rules_8_and_12_reuse_in_either_direction_changes_nothing_but_rounding(
    engine, uncached, oracle, first, second, length
):
    talk = prompt(length)
    ask(engine, text(talk, first), first)
    tokens = text(talk, second)
    warm, got = ask(engine, tokens, second)
    assert warm.cached_tokens == length
    cold, expected = ask(uncached, tokens, second)
    assert warm.token_ids == cold.token_ids
    torch.testing.assert_close(got, expected, rtol=0, atol=ROUNDING)
    judged = oracle.logits(second, tokens, warm.token_ids).log_softmax(-1)
    torch.testing.assert_close(got, judged, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("length", [1, 16, 37])
@pytest.mark.parametrize("name", ["attention", "linears", "head"])
def test_rule_10_before_the_invocation_log_probabilities_are_the_bases_to_the_last_bit(engine, name, length):
    tokens = prompt(length)
    ask(engine, tokens)
    base, expected = ask(engine, tokens)
    before, got = ask(engine, tokens, name, invocation_start=length)
    assert before.cached_tokens == base.cached_tokens == length - 1, "they compute the same in the same shapes"
    assert torch.equal(got[0], expected[0])
    _, other = ask(engine, tokens, name, invocation_start=length - 1)
    assert (other[0] - expected[0]).abs().max() > 1000 * ROUNDING, "the adapter changes something"


@pytest.mark.parametrize("name", [None, "plain", "attention"])
def test_rule_10_cached_tokens_give_no_logits(engine, name):
    """What is found has none: each answer has those of its own tokens and of nothing else, found or not."""
    tokens = text(prompt(45), name)
    cold, expected = ask(engine, tokens, name)
    warm, got = ask(engine, tokens, name)
    assert (cold.cached_tokens, warm.cached_tokens) == (0, len(tokens) - 1)
    assert len(warm.logprobs) == len(warm.token_ids) == TOKENS
    torch.testing.assert_close(got, expected, rtol=0, atol=ROUNDING)
