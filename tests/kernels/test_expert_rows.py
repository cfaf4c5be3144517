"""The product of each tile with its expert's weight, against its formula in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")

from kernels.expert_rows import DECODE, PREFILL, ExpertConfig, expert_matmul
from kernels.lora_tiles import BASE, TILE_FIELDS, Tiles
from kernels.reference.expert_rows import expert_matmul as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative to the sum of magnitudes: sums of float32, and the one rounding, which the interpreter cuts off
TOLERANCE = {torch.float32: 2**-18, torch.bfloat16: (2**-8 if DEVICE == "cuda" else 2**-7) + 2**-18}
EXPERTS = 5


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def tiles_of(counts: list[tuple[int, int]], height: int) -> Tiles:
    """Tiles of so many rows of an expert each, and two that are unused."""
    fields, first = [], 0
    for expert, count in counts:
        fields.append([first, count, BASE, expert])
        first += count
    return Tiles(torch.tensor([*fields, *[[0] * TILE_FIELDS] * 2], dtype=torch.int32, device=DEVICE), height)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("inputs", "out"), [(128, 64), (72, 40), (17, 200)])
@pytest.mark.parametrize(("config", "height"), [(DECODE, 16), (PREFILL, 64), (ExpertConfig(16, 32, 2, 2), 32)])
def test_each_tiles_rows_are_multiplied_by_its_experts_weight(
    config: ExpertConfig, height: int, inputs: int, out: int, dtype: torch.dtype
) -> None:
    counts = [(0, 1), (2, height), (2, 3), (4, height - 1)]
    rows = sum(count for _, count in counts)
    x, weight = random(rows, inputs, dtype=dtype), random(EXPERTS, out, inputs, dtype=dtype)
    tiles = tiles_of(counts, height)
    bias = None if inputs == 72 else random(EXPERTS, out, dtype=dtype)
    y, twin, first = expert_matmul(x, weight, bias, tiles, config), reference(x, weight, bias, tiles), 0
    assert (y.dtype, y.shape) == (dtype, (rows, out))
    for expert, count in counts:
        own = slice(first, first + count)
        added = torch.zeros(out) if bias is None else bias[expert].double()
        exact = x[own].double() @ weight[expert].double().T + added
        bound = TOLERANCE[dtype] * (x[own].double().abs() @ weight[expert].double().abs().T + added.abs())
        for each in (y, twin):
            assert ((each[own].double() - exact).abs() <= bound).all()
        first += count


def test_what_is_not_finite_stays_in_its_row() -> None:
    x, weight, tiles = random(20, 40), random(EXPERTS, 24, 40), tiles_of([(3, 16), (1, 4)], 16)
    good = expert_matmul(x, weight, None, tiles)
    x[2, 7], x[17, 3] = torch.nan, torch.inf
    with np.errstate(invalid="ignore"):  # the interpreter is numpy
        got = expert_matmul(x, weight, None, tiles)
    whole = [row for row in range(20) if row not in (2, 17)]
    assert torch.equal(got[whole], good[whole])
    assert not got[[2, 17]].isfinite().any()
