"""The product with quantised weights against the dequantised product in float64."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")

from kernels.quantized_product import BLOCK, DECODE_PRODUCT, HALF, PREFILL_PRODUCT, ProductConfig, quantized_product
from kernels.reference.quantized_product import quantized_product as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIGS = [DECODE_PRODUCT, PREFILL_PRODUCT, ProductConfig(16, 32, 3, 4, 2)]
KINDS = pytest.mark.parametrize(
    ("bits", "group", "zeros"), [(8, 64, False), (8, 128, True), (4, 32, True), (4, 64, True), (4, 128, False)]
)


def drawn(rows: int, columns: int, inputs: int, bits: int, group: int, zeros: bool) -> tuple[Tensor, ...]:
    """Rows, codes in blocks, scales, zero points or None, and the weights that they stand for in float64."""
    generator = torch.Generator().manual_seed(inputs + bits + group)
    low, high = (0, 16) if bits == 4 else (-128, 128)
    blocks, groups = -(-inputs // BLOCK), -(-inputs // group)
    codes = torch.randint(low, high, (columns, blocks * BLOCK), generator=generator)
    points = torch.randint(low, high, (groups, columns), generator=generator).to(torch.int8) if zeros else None
    scales = torch.rand((groups, columns), generator=generator) / high
    of_input = torch.arange(inputs) // group
    exact = codes[:, :inputs].double() - (0 if points is None else points[of_input].t())
    exact *= scales.double()[of_input].t()
    held = codes.view(columns, blocks, BLOCK).transpose(0, 1).contiguous()
    held = (held[..., :HALF] | held[..., HALF:] << 4).to(torch.uint8) if bits == 4 else held.to(torch.int8)
    x = torch.randn((rows, inputs), generator=generator)
    return tuple(one if one is None else one.to(DEVICE) for one in (x, held, scales, points, exact))


@KINDS
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("rows", "columns", "inputs"), [(1, 64, 64), (3, 70, 300), (20, 33, 512)])
def test_a_product_is_that_of_the_dequantised_weight(rows, columns, inputs, config, bits, group, zeros) -> None:
    x, codes, scales, points, exact = drawn(rows, columns, inputs, bits, group, zeros)
    y = quantized_product(x, codes, scales, points, group, config)
    assert (y.dtype, y.shape) == (torch.float32, (rows, columns))
    magnitude = x.double().abs() @ exact.abs().t()
    assert ((y.double() - x.double() @ exact.t()).abs() <= 2**-20 * magnitude).all()


@KINDS
def test_the_twin_is_the_same_up_to_rounding(bits, group, zeros) -> None:
    x, codes, scales, points, _ = drawn(5, 70, 300, bits, group, zeros)
    ours, theirs = (make(x, codes, scales, points, group) for make in (quantized_product, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_slice_of_wider_rows_is_read_where_it_lies() -> None:
    x, codes, scales, points, _ = drawn(5, 40, 128, 4, 64, True)
    wide = torch.full((5, 200), torch.nan, device=DEVICE)
    wide[:, 10:138] = x
    y = quantized_product(wide[:, 10:138], codes, scales, points, 64)
    assert torch.equal(y, quantized_product(x, codes, scales, points, 64))


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    x, codes, scales, points, _ = drawn(3, 40, 128, 4, 64, True)
    good = quantized_product(x, codes, scales, points, 64)
    x[1, 7] = torch.nan
    y = quantized_product(x, codes, scales, points, 64)
    assert torch.equal(y[[0, 2]], good[[0, 2]])
    assert y[1].isnan().all()


def test_no_rows_give_none() -> None:
    x, codes, scales, points, _ = drawn(0, 40, 128, 4, 64, True)
    assert quantized_product(x, codes, scales, points, 64).shape == (0, 40)
