"""The identities of a request's blocks, and how far it can be computed."""

import pytest

from runtime.kv.block_keys import Salt
from runtime.messages import Generate, SamplingParams
from runtime.request import Request

B = 4


def request(tokens=10, computed=0, params=None, **fields):
    command = Generate(request_id="r", token_ids=list(range(tokens)), params=params or SamplingParams(), **fields)
    made = Request(command, max_tokens=100)
    made.computed = computed
    return made


def identity(made, index):
    return made.chain.identity_of(made.token_ids, made.computed, index, B)


def test_a_last_block_is_known_by_what_is_computed_of_it():
    made = request(computed=6)
    whole, tail = (identity(made, index) for index in range(2))
    assert (whole.token_ids, tail.token_ids) == ((0, 1, 2, 3), (4, 5))
    assert whole.parent == made.chain.root
    assert tail.parent == whole.key == made.chain.keys_up_to(made.token_ids, 6, B)[0]
    made.computed = 8
    assert identity(made, 1).key == made.chain.keys_up_to(made.token_ids, 8, B)[1] != tail.key


@pytest.mark.parametrize("invocation_start", range(11))
def test_rules_2_and_3_a_block_is_the_adapters_from_the_first_one_on_that_reaches_past_the_invocation(invocation_start):
    made = request(computed=10, adapter="a", invocation_start=invocation_start)
    base = request(computed=10)
    for index, (start, stop) in enumerate(((0, 4), (4, 8), (8, 10))):
        known_as = identity(made, index)
        assert known_as.namespace == ("a" if stop > invocation_start else None)
        assert known_as.salt == (Salt("a", invocation_start - start) if start <= invocation_start < stop else None)
        assert (known_as.key == identity(base, index).key) == (stop <= invocation_start)


def test_an_adapter_that_leaves_k_and_v_alone_has_no_blocks_of_its_own():
    made, base = request(computed=10, adapter="a", kv_is_base=True), request(computed=10)
    for index in range(3):
        assert identity(made, index) == identity(base, index)
    assert made.adapter == "a", "and it applies all the same"


@pytest.mark.parametrize(("computed", "reach"), [(0, 6), (5, 1), (6, 0)])
def test_rule_9_without_its_adapter_a_request_reaches_its_invocation(computed, reach):
    made = request(computed=computed, adapter="a", invocation_start=6)
    assert made.reach == reach
    made.holds_adapter = True
    assert made.reach == 10 - computed
    assert request(computed=computed).reach == 10 - computed


@pytest.mark.parametrize(
    ("penalty", "prompt"), [({"repetition_penalty": 1.5}, [0, 1]), ({"presence_penalty": 1.0}, [])]
)
def test_what_penalties_apply_to_is_counted_as_it_is_generated(penalty, prompt):
    made = request(2, params=SamplingParams(max_tokens=20, **penalty))
    generated = []
    for more in ([], [7], [7, 1, 8], [8, 7]):
        for token in more:
            made.advance(1, samples=True)
            made.append(token)
        generated += more
        tokens = made.penalised
        assert list(tokens.ids) == list(dict.fromkeys(prompt + generated))
        assert list(tokens.counts) == [generated.count(token) for token in tokens.ids]
