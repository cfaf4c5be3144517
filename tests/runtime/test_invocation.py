"""PEFT's rule for where an aLoRA adapter begins to apply (see runtime/invocation.py)."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora.variants import calculate_alora_offsets

from runtime.invocation import find_invocation


@pytest.mark.parametrize(
    ("token_ids", "invocation", "invocation_start"),
    [
        ([1, 5, 6, 6], [5, 6], 1),
        ([5, 5, 6], [5, 6], 1),  # the token after a mismatch is tested again
        ([5, 6, 1, 5, 6, 1], [5, 6], 3),  # the last of several
        ([5, 6, 5, 6, 5], [5, 6, 5], 2),  # matches may overlap
        ([5, 5, 5, 5], [5, 5], 2),
        ([5, 6, 1, 5], [5, 6], 0),  # a match that is not full does not count
        ([1, 2, 3], [5, 6], None),
        ([5], [5, 6], None),
        ([5, 6], [5, 6], 0),
        ([1, 2, 5, 6], [5, 6], 2),
        ([1, 1, 2, 1, 1, 1, 2, 3, 1], [1, 1, 2], 4),
        ([], [5], None),
        ([5], [], None),
    ],
)
def test_the_last_full_contiguous_match_counts(token_ids, invocation, invocation_start):
    assert find_invocation(token_ids, invocation) == invocation_start


def naive(token_ids, invocation):
    width = len(invocation)
    matches = [i for i in range(len(token_ids) - width + 1) if token_ids[i : i + width] == invocation]
    return matches[-1] if matches else None


few = st.integers(0, 2)


@given(st.lists(few, max_size=40), st.lists(few, min_size=1, max_size=6))
def test_it_is_what_a_naive_search_finds(token_ids, invocation):
    assert find_invocation(token_ids, invocation) == naive(token_ids, invocation)


@given(st.lists(few, min_size=1, max_size=30), st.lists(few, min_size=1, max_size=4))
def test_it_is_what_peft_finds(token_ids, invocation):
    config = LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=invocation)
    [from_the_end] = calculate_alora_offsets({"check": config}, "check", torch.tensor([token_ids]))
    assert find_invocation(token_ids, invocation) == (None if from_the_end is None else len(token_ids) - from_the_end)


def test_a_long_prompt_and_a_hostile_invocation_take_linear_time():
    token_ids, hostile = [7] * 100_000, [8] + [7] * 5_000  # a naive search compares 500 million tokens
    began = time.perf_counter()
    assert find_invocation(token_ids, hostile) is None
    assert find_invocation([7, 8] * 50_000, [8, 7] * 5_000 + [9]) is None
    assert time.perf_counter() - began < 2.0
