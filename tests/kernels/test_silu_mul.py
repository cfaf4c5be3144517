"""The gated SiLU's kernel against its formula in float64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")

from kernels.reference.silu_mul import clamped_mul as clamped_reference
from kernels.reference.silu_mul import gelu_mul as gelu_reference
from kernels.reference.silu_mul import silu_mul as reference
from kernels.silu_mul import CANDIDATES, SiluMulConfig, clamped_mul, gelu_mul, silu_mul

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative. float32: exp to 2 ulp and its argument's rounding times |gate| < 8, the sum, a quotient to 2 ulp and a
# product, in halves of an ulp: 4 + 8 + 1 + 4 + 1. Else the one rounding; the interpreter cuts off to bfloat16.
TOLERANCE = {
    torch.float32: 18 * 2**-24,
    torch.float16: 2**-11 + 18 * 2**-24,
    torch.bfloat16: (2**-8 if DEVICE == "cuda" else 2**-7) + 18 * 2**-24,
}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def exact(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().chunk(2, -1)
    return gate * gate.sigmoid() * up


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[actual.dtype], atol=2**-24)


@DTYPES
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("width", [1, 17, 255, 1536, 3001])
@pytest.mark.parametrize("config", [CANDIDATES[0], SiluMulConfig(256, 1), SiluMulConfig(2048, 8)])
def test_silu_mul_is_its_formula_and_leaves_its_input_alone(
    config: SiluMulConfig, width: int, rows: int, dtype: torch.dtype
) -> None:
    gate_up = random(rows, 2 * width, dtype=dtype)
    before = gate_up.clone()
    y = silu_mul(gate_up, config)
    assert (y.dtype, y.shape, y.is_contiguous()) == (dtype, (rows, width), True)
    assert_close(y, exact(gate_up))
    assert torch.equal(gate_up, before)


@DTYPES
@pytest.mark.parametrize("twin", [clamped_mul, clamped_reference])
def test_gates_and_ups_may_be_clamped(twin: Callable[[Tensor, float], Tensor], dtype: torch.dtype) -> None:
    gate_up, limit = random(5, 600, dtype=dtype) * 3, 2.0
    gate, up = gate_up.double().chunk(2, -1)
    assert (gate > limit).any()
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    exact = gate * (1.702 * gate).sigmoid() * (up + 1)
    bound = TOLERANCE[dtype] * 2 * (gate.abs() * (up.abs() + 1)) + 2**-24
    assert ((twin(gate_up, limit).double() - exact).abs() <= bound).all()
    gate_up[1, 5], gate_up[2, 306] = float("nan"), float("nan")
    assert twin(gate_up, limit).isnan().nonzero().tolist() == [[1, 5], [2, 6]]


@DTYPES
def test_a_slice_of_wider_rows_is_read_where_it_lies(dtype: torch.dtype) -> None:
    wide = random(5, 200, dtype=dtype)
    assert_close(silu_mul(wide[:, 11:91]), exact(wide[:, 11:91]))


def test_the_twin_is_the_same_up_to_rounding() -> None:
    gate_up = random(7, 640, dtype=torch.float16)
    ours, theirs = silu_mul(gate_up), reference(gate_up)
    torch.testing.assert_close(ours, theirs, rtol=2 * TOLERANCE[torch.float16], atol=2**-23)


def test_gates_far_from_zero_saturate() -> None:
    gate_up = torch.tensor([[-1e30, -200.0, 200.0, 0.0, 3.0, 3.0, 3.0, 3.0]], device=DEVICE)
    with np.errstate(over="ignore"):  # the interpreter is numpy: exp(200) is an infinity to divide by
        y = silu_mul(gate_up)
    assert y.tolist() == [[0.0, 0.0, 600.0, 0.0]]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_element(poison: float) -> None:
    gate_up = random(3, 80)
    good = silu_mul(gate_up)
    gate_up[1, 5] = poison
    gate_up[2, 40 + 6] = poison
    with np.errstate(invalid="ignore", over="ignore"):
        y = silu_mul(gate_up)
    spoilt = torch.zeros(3, 40, dtype=torch.bool, device=DEVICE)
    spoilt[1, 5] = spoilt[2, 6] = True
    assert torch.equal(y[~spoilt], good[~spoilt])
    torch.testing.assert_close(y[spoilt], reference(gate_up)[spoilt], equal_nan=True)
    assert not y[spoilt].isfinite().any()


def test_no_rows_give_none() -> None:
    assert silu_mul(random(0, 8)).shape == (0, 4)


@pytest.mark.parametrize("gated", [gelu_mul, gelu_reference], ids=["kernel", "reference"])
def test_gelu_mul_is_its_formula(gated: Callable[[Tensor], Tensor]) -> None:
    gate_up = random(3, 2 * 1700) * 2
    gate, up = gate_up.double().chunk(2, -1)
    exact = torch.nn.functional.gelu(gate, approximate="tanh") * up
    # The error of the sigmoid's argument, which is up to 2 gate², is that of the closed gate
    torch.testing.assert_close(gated(gate_up).double(), exact, rtol=1e-5, atol=1e-6)
