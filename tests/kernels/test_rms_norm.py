"""RMSNorm's kernels against the formula in float64, and against their twins where those are exact."""

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")

from kernels.reference import rms_norm as reference
from kernels.rms_norm import CANDIDATES, RmsNormConfig, add_rms_norm, rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative. float32: the sum's roundings, at most one a level of its tree and halved by the root, root and quotient to
# 2 ulp each on a GPU, two products. Else the one rounding; the interpreter cuts float32 off to bfloat16.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))
WIDTHS = pytest.mark.parametrize("width", [1, 3, 128, 576, 577, 4096])
CONFIGS = pytest.mark.parametrize("config", [CANDIDATES[0], RmsNormConfig(256, 1), RmsNormConfig(4096, 4)])
EPS = 1e-5


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def scaled(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and floor as the kernels take them."""
    width = weight.shape[-1]
    return weight * width**0.5, torch.tensor((width * EPS) ** 0.5, device=DEVICE)


def exact(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    # A float16 below its normal range rounds to a fixed step, float32's other roundings come on top of the last.
    rtol = TOLERANCE[actual.dtype] + (TOLERANCE[torch.float32] if actual.dtype != torch.float32 else 0)
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=2**-24, equal_nan=True)


@DTYPES
@WIDTHS
@pytest.mark.parametrize("rows", [1, 3, 33])
def test_rms_norm_is_its_formula(rows: int, width: int, dtype: torch.dtype) -> None:
    x, weight = random(rows, width, dtype=dtype) * 30, random(width)
    y = rms_norm(x, *scaled(weight))
    assert (y.dtype, y.is_contiguous()) == (dtype, True)
    assert_close(y, exact(x, weight))


@DTYPES
@CONFIGS
@pytest.mark.parametrize("per_head", [True, False])
def test_a_norm_of_heads_reads_its_part_of_a_wider_row_and_writes_nothing_there(
    per_head: bool, config: RmsNormConfig, dtype: torch.dtype
) -> None:
    wide, weight = random(5, 7, 48, dtype=dtype), random(4, 48) if per_head else random(48)
    before = wide.clone()
    assert_close(rms_norm(wide[:, 1:5], *scaled(weight), config), exact(wide[:, 1:5], weight))
    assert torch.equal(wide, before)


@DTYPES
@WIDTHS
@CONFIGS
def test_add_rms_norm_adds_in_place_and_norms_the_sum_as_it_was_rounded(
    width: int, config: RmsNormConfig, dtype: torch.dtype
) -> None:
    residual, y, weight = random(3, width, dtype=dtype), random(4, width, dtype=dtype)[1:], random(width)
    before, total = y.clone(), residual.double() + y.double()
    expected = residual + y
    normed = add_rms_norm(residual, y, 1.0, *scaled(weight), config)
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        assert_close(residual, total)
    else:
        assert torch.equal(residual, expected), "one rounding of one sum, as on the CPU path"
    assert_close(normed, exact(residual, weight))
    assert torch.equal(y, before)


@DTYPES
def test_the_residual_multiplier_scales_what_is_added(dtype: torch.dtype) -> None:
    residual, y, weight = random(3, 577, dtype=dtype), random(4, 577, dtype=dtype)[1:], random(577)
    total = residual.double() + 0.22 * y.double()
    normed = add_rms_norm(residual, y, 0.22, *scaled(weight))
    # Where the two terms cancel, the product's own roundings stay: of 0.22 and of the product, in float32.
    torch.testing.assert_close(residual.double(), total, rtol=TOLERANCE[dtype], atol=float(y.abs().max()) * 2**-24)
    assert_close(normed, exact(residual, weight))


def test_the_twin_gives_the_same_bits_where_the_product_is_exact() -> None:
    # torch rounds the multiplier to the dtype on a CPU: 7/32 is exact.
    residual, y, weight = random(3, 577, dtype=torch.float16), random(4, 577, dtype=torch.float16)[1:], random(577)
    twin = residual.clone()
    normed = add_rms_norm(residual, y, 7 / 32, *scaled(weight))
    twin_normed = reference.add_rms_norm(twin, y, 7 / 32, *scaled(weight))
    assert torch.equal(residual, twin)
    torch.testing.assert_close(normed, twin_normed, rtol=2 * TOLERANCE[torch.float16], atol=2**-24)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_leaves_the_rows_of_its_program_alone(poison: float) -> None:
    x, weight, config = random(6, 40), random(40), RmsNormConfig(256, 1)
    good = rms_norm(x, *scaled(weight), config)
    x[2, 7] = poison
    with np.errstate(invalid="ignore"):  # the interpreter is numpy
        y = rms_norm(x, *scaled(weight), config)
        added = add_rms_norm(x.clone(), torch.zeros_like(x), 1.0, *scaled(weight), config)
    others = [0, 1, 3, 4, 5]
    for normed in (y, added):
        assert torch.equal(normed[others], good[others])
        assert torch.equal(normed[2].isnan(), reference.rms_norm(x, *scaled(weight))[2].isnan())
        assert normed[2].isnan().any()


def test_a_row_of_zeros_gives_zeros_a_huge_one_is_finite_and_no_rows_give_none() -> None:
    x = torch.stack((torch.zeros(64), torch.full((64,), 1e18))).to(DEVICE)
    weight, floor = scaled(torch.ones(64, device=DEVICE))
    torch.testing.assert_close(rms_norm(x, weight, floor), torch.stack((torch.zeros(64), torch.ones(64))).to(DEVICE))
    assert rms_norm(x[:0], weight, floor).shape == (0, 64)
    assert add_rms_norm(x[:0], x[:0], 1.0, weight, floor).shape == (0, 64)


def test_a_program_takes_one_row_at_least_and_as_many_as_it_is_told_to() -> None:
    assert RmsNormConfig(1024, 4).tile(4096) == (1, 4096)
    assert RmsNormConfig(1024, 4).tile(100) == (8, 128)
