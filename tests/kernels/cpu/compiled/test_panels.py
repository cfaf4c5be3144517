"""Matrices in panels, read back by their documented layout."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.cpu.compiled.panels import (
    INT4,
    INT8,
    LINE_BYTES,
    NF4,
    PIECE_BYTES,
    PanelMemory,
    pack,
    pack_codes,
    quantize,
)
from tests.kernels.cpu.compiled.steps import FLOATS, GROUP, exact_weight, random, same_bits, scales_of, unpacked

pytestmark = pytest.mark.usefixtures("library")

SHAPES = pytest.mark.parametrize(("columns", "k"), [(1, 1), (16, 2), (17, 3), (15, 128), (33, 129), (50, 301)])
DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=str)


@DTYPES
@SHAPES
def test_panels_hold_every_weight_as_it_is_and_zeros_beyond_the_last_column(
    columns: int, k: int, dtype: torch.dtype
) -> None:
    weight = random(columns, k, dtype=dtype)
    panels = pack(weight)
    assert (panels.columns, panels.k) == (columns, k)
    assert same_bits(exact_weight(panels), weight.float())
    assert not unpacked(panels)[columns:].any()


@DTYPES
def test_a_matrix_is_packed_alike_whatever_its_strides(dtype: torch.dtype) -> None:
    wide = random(46, 35, dtype=dtype)
    for weight in (wide.t(), wide[1::2], wide[:, 1::2], wide[3:20, 5:], wide[:1].expand(20, 35)):
        assert np.array_equal(pack(weight).memory, pack(weight.contiguous()).memory)


@DTYPES
def test_special_weights_keep_their_bits(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    values = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, info.max, info.min, info.tiny, info.smallest_normal / 4]
    weight = torch.tensor([values], dtype=dtype)
    assert same_bits(exact_weight(pack(weight)), weight.float())


@SHAPES
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_quantised_weight_is_off_by_half_a_scale_at_most(columns: int, k: int, dtype: torch.dtype) -> None:
    weight = random(columns, k, dtype=dtype) * torch.logspace(-6, 3, columns).to(dtype)[:, None]
    panels = quantize(weight)
    error = np.abs(exact_weight(panels).double().numpy() - weight.double().numpy())
    assert (error <= scales_of(panels) * (0.5 + 127 * 2.0**-22)).all()
    assert not unpacked(panels)[columns:].any()


@SHAPES
def test_the_largest_weight_of_each_column_and_128_k_becomes_127(columns: int, k: int) -> None:
    weight = random(columns, k)
    panels = quantize(weight)
    steps = np.rint(exact_weight(panels).numpy() / scales_of(panels))
    for first in range(0, k, GROUP):
        assert (np.abs(steps[:, first : first + GROUP]).max(1) == 127).all()
        largest = weight[:, first : first + GROUP].abs().amax(1)
        torch.testing.assert_close(torch.from_numpy(scales_of(panels)[:, first].copy()), largest / 127)


def test_half_a_scale_is_rounded_to_the_even_step() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    assert exact_weight(quantize(weight)).tolist() == [[127.0, 0.0, 2.0, 2.0, 0.0, -2.0, -2.0, 126.0]]


def one_value(columns: int, k: int, value: float) -> Tensor:
    return torch.full((columns, k), value)


@pytest.mark.parametrize("k", [1, 128, 200])
def test_columns_of_zeros_stay_zeros_beside_others(k: int) -> None:
    weight = random(20, k)
    weight[[0, 7, 19]] = 0.0
    weight[3, :128] = 0.0
    exact = exact_weight(quantize(weight))
    assert not exact[weight == 0].any()
    assert exact[weight != 0].any()
    assert not exact_weight(quantize(one_value(20, k, 0.0))).any()


def test_equal_weights_and_their_negatives_are_exact() -> None:
    for value in (1.0, -1.0, 1e-20, 3e20):
        weight = one_value(3, 130, value)
        torch.testing.assert_close(exact_weight(quantize(weight)), weight, rtol=2.0**-22, atol=0.0)


@pytest.mark.parametrize("type", [INT8, INT4, NF4])
def test_threads_fill_panels_as_one_does(type: int) -> None:
    """A matrix that is large enough to be shared."""
    weight = random(4001, 300)
    alone, shared = (quantize(weight, type=type, threads=threads) for threads in (1, 3))
    assert np.array_equal(alone.memory, shared.memory)
    assert same_bits(exact_weight(shared)[-30:], exact_weight(quantize(weight[-30:], type=type)))
    if type == INT8:
        assert np.array_equal(pack(weight).memory, pack(weight, threads=3).memory)
        return
    codes, zeros = (torch.randint(16, shape).byte() for shape in ((4001, 300), (4001, 3)))
    each = [
        pack_codes(type, codes, random(4001, 3), zeros.char() if type == INT4 else None, 128, threads=threads)
        for threads in (1, 3)
    ]
    assert np.array_equal(each[0].memory, each[1].memory)


def test_a_matrix_is_quantised_alike_whatever_its_strides() -> None:
    wide = random(150, 35)
    for weight in (wide.t(), wide[1::2], wide[:, 1::2], wide[:, 1::2].bfloat16()):
        assert np.array_equal(quantize(weight).memory, quantize(weight.contiguous()).memory)


def test_panels_side_by_side_in_large_pieces_are_those_that_have_memory_of_their_own() -> None:
    memory, weights = PanelMemory(), [random(columns, 301, seed=columns) for columns in range(1, 40)]
    for make in (pack, quantize):
        lent = [make(weight, memory) for weight in weights]  # written after one another, so that overlaps show
        assert all(np.array_equal(one.memory, make(weight).memory) for one, weight in zip(lent, weights, strict=True))
        assert not any(one.address % LINE_BYTES for one in lent)


def test_memory_larger_than_a_piece_is_a_piece_of_its_own() -> None:
    memory = PanelMemory()
    first, large, last = memory.take(100), memory.take(PIECE_BYTES + 1), memory.take(100)
    assert [len(first), len(large), len(last)] == [100, PIECE_BYTES + 1, 100]
    assert not any(np.shares_memory(one, other) for one, other in ((first, large), (large, last), (first, last)))
    assert not large[-1000:].any()
