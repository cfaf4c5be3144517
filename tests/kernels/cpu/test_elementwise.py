"""Each element-wise function against its formula in float64."""

import pytest
import torch
from torch import Tensor

from kernels.cpu.elementwise import gelu_mul, kv_write, rms_norm, rotary, silu_mul

# Relative: a sum's few roundings in float32, one rounding of the result in bfloat16.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))
ROWS = pytest.mark.parametrize("rows", [1, 2, 7, 64])


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_close(actual: Tensor, exact: Tensor, dtype: torch.dtype, roundings: int = 1) -> None:
    assert actual.dtype == dtype
    tolerance = roundings * TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=tolerance)


@DTYPES
@ROWS
@pytest.mark.parametrize("size", [3, 64, 577])
def test_rms_norm_is_its_formula(rows: int, size: int, dtype: torch.dtype) -> None:
    x, weight, eps = random(rows, size, dtype=dtype) * 30, random(size), 0.5
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    assert_close(rms_norm(x, weight * size**0.5, torch.tensor((size * eps) ** 0.5)), exact, dtype)


@DTYPES
def test_rms_norm_takes_a_weight_for_each_head_and_reads_a_slice_without_writing_to_it(dtype: torch.dtype) -> None:
    wide, weight, eps = random(5, 6, 16, dtype=dtype), random(4, 16), 1e-6
    before = wide.clone()
    x = wide[:, :4]
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    assert_close(rms_norm(x, weight * 4, torch.tensor((16 * eps) ** 0.5)), exact, dtype)
    assert torch.equal(wide, before)


def test_rms_norm_of_a_row_of_zeros_is_zero_and_of_a_huge_row_is_finite() -> None:
    x = torch.stack((torch.zeros(64), torch.full((64,), 1e18)))
    y = rms_norm(x, torch.full((64,), 8.0), torch.tensor((64 * 1e-6) ** 0.5))
    torch.testing.assert_close(y, torch.stack((torch.zeros(64), torch.ones(64))))


@DTYPES
@ROWS
@pytest.mark.parametrize("size", [2, 24, 64])
def test_rotary_turns_each_pair_of_dimensions_by_its_angle(rows: int, size: int, dtype: torch.dtype) -> None:
    wide = random(rows, 5, size, dtype=dtype)
    x = wide[:, :3]
    angles = random(rows, 1, size // 2).double() * 40
    pairs = torch.view_as_complex(torch.stack(x.double().chunk(2, -1), -1)) * torch.polar(
        torch.ones_like(angles), angles
    )
    exact = torch.cat((pairs.real, pairs.imag), -1)
    cos = torch.cat((angles.cos(), angles.cos()), -1).to(dtype)
    sin = torch.cat((-angles.sin(), angles.sin()), -1).to(dtype)
    out = torch.empty_like(x)
    rotary(x, cos, sin, out=out)
    assert_close(out, exact, dtype, roundings=4)  # cosine, sine, the first product and the sum
    untouched = wide[:, 3:].clone()
    rotary(x, cos, sin, out=x)
    assert torch.equal(x, out)
    assert torch.equal(wide[:, 3:], untouched)


def test_rotary_takes_the_other_dimension_of_a_pair_where_it_is_named() -> None:
    x, cos, sin = random(3, 2, 6), random(3, 1, 6), random(3, 1, 6)
    partner = torch.tensor([1, 0, 3, 2, 5, 4])
    out = rotary(x, cos, sin, torch.empty_like(x), partner)
    assert torch.equal(out, torch.addcmul(x * cos, x[..., partner], sin))


@ROWS
def test_gelu_mul_is_its_formula(rows: int) -> None:
    gate_up = random(rows, 2 * 96)
    gate, up = gate_up.double().chunk(2, -1)
    exact = torch.nn.functional.gelu(gate, approximate="tanh") * up
    assert_close(gelu_mul(gate_up), exact, torch.float32, roundings=16)


@DTYPES
@ROWS
@pytest.mark.parametrize("size", [1, 17, 96])
def test_silu_mul_is_its_formula_and_leaves_its_input_alone(rows: int, size: int, dtype: torch.dtype) -> None:
    gate_up = random(rows, 2 * size, dtype=dtype)
    before = gate_up.clone()
    gate, up = gate_up.double().chunk(2, -1)
    y = silu_mul(gate_up)
    assert_close(y, gate * gate.sigmoid() * up, dtype, roundings=2)
    assert y.is_contiguous()
    assert torch.equal(gate_up, before)


@DTYPES
def test_kv_write_puts_each_row_into_its_slot_and_touches_no_other(dtype: torch.dtype) -> None:
    kv = random(12, 2, 3, 8, dtype=dtype)
    expected = kv.clone()
    rows = random(4, 9, 8, dtype=dtype)[:, 3:].view(4, 2, 3, 8)
    slots = [7, 2, 11, 5]
    for row, slot in enumerate(slots):
        expected[slot] = rows[row]
    kv_write(kv, torch.tensor(slots), rows)
    assert torch.equal(kv, expected)
