"""What a sequence's blocks are known by, and how far it may go with what it holds."""

import pytest

from runtime.kv.block_keys import Salt
from runtime.messages import Generate, SamplingParams
from runtime.request import Sequence

B = 4


def sequence(tokens=10, computed=0, params=None, **fields):
    request = Generate(request_id="r", token_ids=list(range(tokens)), params=params or SamplingParams(), **fields)
    made = Sequence(request, max_tokens=100)
    made.computed = computed
    return made


def test_a_last_block_is_known_by_what_is_computed_of_it():
    made = sequence(computed=6)
    whole, tail = (made.identity_of(index, B) for index in range(2))
    assert (whole.token_ids, tail.token_ids) == ((0, 1, 2, 3), (4, 5))
    assert whole.parent == made.root
    assert tail.parent == whole.key == made.keys_up_to(6, B)[0]
    made.computed = 8
    assert made.identity_of(1, B).key == made.keys_up_to(8, B)[1] != tail.key


@pytest.mark.parametrize("activation", range(11))
def test_rules_2_and_3_a_block_is_the_adapters_from_the_first_one_on_that_reaches_past_the_activation(activation):
    made = sequence(computed=10, adapter="a", activation=activation)
    base = sequence(computed=10)
    for index, (start, stop) in enumerate(((0, 4), (4, 8), (8, 10))):
        identity = made.identity_of(index, B)
        assert identity.namespace == ("a" if stop > activation else None)
        assert identity.salt == (Salt("a", activation - start) if start <= activation < stop else None)
        assert (identity.key == base.identity_of(index, B).key) == (stop <= activation)


def test_an_adapter_that_leaves_k_and_v_alone_has_no_blocks_of_its_own():
    made, base = sequence(computed=10, adapter="a", shares_kv=True), sequence(computed=10)
    for index in range(3):
        assert made.identity_of(index, B) == base.identity_of(index, B)
    assert made.adapter == "a", "and it applies all the same"


@pytest.mark.parametrize(("computed", "reach"), [(0, 6), (5, 1), (6, 0)])
def test_rule_9_without_its_adapter_a_sequence_reaches_its_activation(computed, reach):
    made = sequence(computed=computed, adapter="a", activation=6)
    assert made.reach == reach
    made.holds_adapter = True
    assert made.reach == 10 - computed
    assert sequence(computed=computed).reach == 10 - computed


@pytest.mark.parametrize(
    ("penalty", "prompt"), [({"repetition_penalty": 1.5}, [0, 1]), ({"presence_penalty": 1.0}, [])]
)
def test_what_penalties_apply_to_is_counted_as_it_is_generated(penalty, prompt):
    made = sequence(2, params=SamplingParams(max_tokens=20, **penalty))
    generated = []
    for more in ([], [7], [7, 1, 8], [8, 7]):
        for token in more:
            made.advance(1, samples=True)
            made.append(token)
        generated += more
        tokens = made.penalised
        assert list(tokens.ids) == list(dict.fromkeys(prompt + generated))
        assert list(tokens.counts) == [generated.count(token) for token in tokens.ids]
