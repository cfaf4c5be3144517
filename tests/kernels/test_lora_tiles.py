"""What the host prepares for the grouped LoRA kernels: tiles, rows of the offset table, choices of configuration."""

import subprocess
import sys
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.adapter_table import BIAS, FIELDS, NO_BIAS, RANKS, A, B, PartEntry, SiteEntry, table_rows
from kernels.lora_configs import DECODE, DECODE_EXPAND, DECODE_SHRINK, PREFILL, PREFILL_EXPAND, PREFILL_SHRINK
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
    for first, rows, slot in out[:total]:
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


def test_a_tables_row_says_where_each_part_lies() -> None:
    q, v = PartEntry(rank=4, b=64, bias=128), PartEntry(rank=3, b=256)
    rows = table_rows([None, SiteEntry(a=32, parts=[q, None, v])], width=7)
    assert rows.shape == (2, FIELDS)
    assert not rows[0].any()
    row = rows[1].tolist()
    assert (row[A], row[RANKS:B], row[B], row[B + 2]) == (32, [0, 4, 4, 7], 64, 256)
    assert row[BIAS:] == [128, NO_BIAS, NO_BIAS]


def test_what_the_kernels_would_leave_out_or_misread_does_not_enter_the_table() -> None:
    with pytest.raises(AssertionError, match="7 ranks, and there is room for 6"):
        table_rows([SiteEntry(0, [PartEntry(4, 0), PartEntry(3, 64)])], width=6)
    for site in (SiteEntry(8, [PartEntry(4, 0)]), SiteEntry(0, [PartEntry(4, 8)]), SiteEntry(0, [PartEntry(4, 0, 8)])):
        with pytest.raises(AssertionError, match="not aligned"):
            table_rows([site], width=64)
    with pytest.raises(AssertionError, match="4 parts"):
        table_rows([SiteEntry(0, [PartEntry(1, 0)] * 4)], width=64)


def test_the_defaults_are_candidates() -> None:
    assert DECODE_SHRINK in DECODE.shrink
    assert DECODE_EXPAND in DECODE.expand
    assert PREFILL_SHRINK in PREFILL.shrink
    assert PREFILL_EXPAND in PREFILL.expand


def test_the_reference_needs_no_triton() -> None:
    program = "import sys; sys.modules['triton'] = None; import kernels.reference.tiled_lora, kernels.lora_configs"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True)
