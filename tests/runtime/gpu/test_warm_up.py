"""The steps of the warm-up: one for each launch configuration that a later step may use, and the largest."""

import random

from hypothesis import given
from hypothesis import strategies as st

from kernels.paged_attention import LEAST_SEQUENCES
from kernels.tuned import Tuned, lookup, thresholds
from runtime.config import Sizes
from runtime.gpu.step_inputs import StepShape
from runtime.gpu.step_lora import DECODE_HEIGHT
from runtime.gpu.warm_up import Rows, largest, shapes
from runtime.scheduler import SCORED_ROWS

WIDTH, RANKS = 9, 48


def sizes(running, tokens):
    return Sizes(1, 1, running, tokens)


@given(
    measured=st.lists(st.integers(1, 300), max_size=4, unique=True),
    most=st.integers(1, 300),
    chosen=st.sampled_from([1, 2, 8]),
)
def test_every_configuration_of_a_table_has_a_batch(measured, most, chosen):
    """Of kernels with a row for each token, and of those with one for each expert of a token."""
    table = {"GPU": {"silu_mul": tuple(Tuned(rows, f"config {rows}", "1 µs") for rows in sorted(measured))}}
    batches = Rows(thresholds("GPU", table), chosen).up_to(most)
    assert batches == sorted(set(batches))
    assert 1 <= batches[0] <= batches[-1] == most
    for each in (1, chosen):
        used = {lookup("GPU", "silu_mul", rows * each, tables=table).config for rows in range(1, most + 1)}
        assert used == {lookup("GPU", "silu_mul", rows * each, tables=table).config for rows in batches}


def test_without_a_table_steps_of_one_row_and_of_the_most_are_run():
    assert Rows((), 1).up_to(256) == [1, 256]
    assert Rows((), 8).up_to(1) == [1]


def test_every_shape_fits_the_buffer_and_the_largest_comes_last():
    choose = random.Random(0)
    for _ in range(200):
        running = choose.randint(1, 300)
        each = sizes(running, choose.randint(running, 2048))
        room = StepShape.largest(each.max_batch_tokens, running, WIDTH, DECODE_HEIGHT, SCORED_ROWS)
        found = list(shapes(each, Rows((1, 32, 128, 2048), 1), WIDTH, RANKS))
        assert all(shape.total <= room.total for shape in found)
        assert found[-1] == largest(each, WIDTH, RANKS)
        assert found[-1].tokens == each.max_batch_tokens
        assert found[-1].logits == min(each.max_batch_tokens, running + SCORED_ROWS)
        assert {(shape.tiles > 0, shape.hot) for shape in found} == {(False, False), (True, False), (True, True)}
        assert max(shape.decodes for shape in found) == running


def test_each_kind_of_prefill_is_run_at_each_threshold():
    found = {(shape.prefills, shape.tokens) for shape in shapes(sizes(200, 512), Rows((32, 128), 1), WIDTH, RANKS)}
    assert {(1, 1), (1, 32), (1, 128), (1, 512)} <= found
    assert {(LEAST_SEQUENCES, 128), (LEAST_SEQUENCES, 512), (2 * LEAST_SEQUENCES, 128)} <= found
