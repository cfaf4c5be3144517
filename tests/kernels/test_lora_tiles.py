"""Tiles, which the host prepares for the grouped LoRA kernels."""

from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.lora_tiles import BASE, TILE_FIELDS, lay_tiles, most_tiles


@given(
    runs=st.lists(st.tuples(st.integers(BASE, 3), st.integers(1, 70)), max_size=12), height=st.sampled_from((1, 16, 64))
)
def test_tiles_cover_each_adapted_row_once_and_leave_no_old_tile_behind(
    runs: list[tuple[int, int]], height: int
) -> None:
    slots = np.array([slot for slot, count in runs for _ in range(count)], np.int32)
    out = np.full((most_tiles(len(slots), len(runs), height) + 2, TILE_FIELDS), 99, np.int32)
    total = lay_tiles(slots, height, out)
    covered = np.full(len(slots), BASE)
    for first, rows, slot, expert in out[:total]:
        assert expert == 0
        assert 0 < rows <= height
        assert (covered[first : first + rows] == BASE).all()
        covered[first : first + rows] = slot
    assert covered.tolist() == slots.tolist()
    assert total == sum(-(-len(list(run)) // height) for slot, run in groupby(slots.tolist()) if slot != BASE)
    assert not out[total:].any()


@pytest.mark.parametrize(
    ("slots", "runs", "height"),
    [(list(range(20)), 20, 16), ([0] * 33, 1, 16), ([0] * 17 + [1] * 17, 2, 16), ([0, 1, 0], 3, 1)],
)
def test_the_bound_on_tiles_is_reached(slots: list[int], runs: int, height: int) -> None:
    out = np.empty((len(slots), TILE_FIELDS), np.int32)
    assert lay_tiles(np.array(slots, np.int32), height, out) == most_tiles(len(slots), runs, height)


def test_more_tiles_than_a_graph_was_captured_for_are_a_mistake_of_ours() -> None:
    out = np.zeros((2, TILE_FIELDS), np.int32)
    with pytest.raises(AssertionError, match="3 tiles do not fit 2"):
        lay_tiles(np.array([0, 1, 2], np.int32), 16, out)
