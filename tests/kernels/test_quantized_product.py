"""The product with quantised weights against the dequantised product in float64."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from kernels.quantized_product import BLOCK, DECODE_PRODUCT, HALF, PREFILL_PRODUCT, ProductConfig, quantized_product
from kernels.reference.quantized_product import quantized_product as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIGS = [DECODE_PRODUCT, PREFILL_PRODUCT, ProductConfig(16, 32, 3, 4, 2)]
BOOK = torch.tensor([1.5**place / 100 for place in range(8)] + [-(1.4**place) / 90 for place in range(8)])
KINDS = pytest.mark.parametrize(
    ("kind", "group", "zeros"),
    [
        *[("int8", 64, False), ("int8", 128, True), ("int4", 32, True), ("int4", 64, True), ("int4", 128, False)],
        *[("float8", 128, False), ("book", 64, False)],
    ],
)


def drawn(rows: int, columns: int, inputs: int, kind: str, group: int, zeros: bool) -> tuple[Any, ...]:
    """Rows, what `quantized_product` takes beside them, and the weights that this stands for in float64."""
    generator = torch.Generator().manual_seed(inputs + len(kind) + group)
    low, high = (-128, 128) if kind == "int8" else (0, 256) if kind == "float8" else (0, 16)
    blocks, groups = -(-inputs // BLOCK), -(-inputs // group)
    codes = torch.randint(low, high, (columns, blocks * BLOCK), generator=generator)
    if kind == "float8":
        codes[codes & 127 == 127] = 1  # they are NaN, which has no place in a weight
    points = torch.randint(low, high, (groups, columns), generator=generator).to(torch.int8) if zeros else None
    scales = torch.rand((groups, columns), generator=generator) / high
    of_input = torch.arange(inputs) // group
    floats = codes.to(torch.uint8).view(torch.float8_e4m3fn)
    values = {"float8": floats.double(), "book": BOOK.double()[codes % 16]}.get(kind, codes.double())[:, :inputs]
    exact = (values - (0 if points is None else points[of_input].t())) * scales.double()[of_input].t()
    held = (floats if kind == "float8" else codes).view(columns, blocks, BLOCK).transpose(0, 1).contiguous()
    if kind in ("int4", "book"):
        held = (held[..., :HALF] & 15 | (held[..., HALF:] & 15) << 4).to(torch.uint8)
    held = held.to(torch.int8) if kind == "int8" else held
    x = torch.randn((rows, inputs), generator=generator)
    book = BOOK if kind == "book" else None
    tensors = [one if one is None else one.to(DEVICE) for one in (x, held, scales, points, book, exact)]
    return tensors[0], (*tensors[1:4], group, tensors[4]), tensors[5]


@KINDS
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("rows", "columns", "inputs"), [(1, 64, 64), (3, 70, 300), (20, 33, 512)])
def test_a_product_is_that_of_the_dequantised_weight(rows, columns, inputs, config, kind, group, zeros) -> None:
    x, weight, exact = drawn(rows, columns, inputs, kind, group, zeros)
    y = quantized_product(x, *weight, config)
    assert (y.dtype, y.shape) == (torch.float32, (rows, columns))
    magnitude = x.double().abs() @ exact.abs().t()
    assert ((y.double() - x.double() @ exact.t()).abs() <= 2**-20 * magnitude).all()


@KINDS
def test_the_twin_is_the_same_up_to_rounding(kind, group, zeros) -> None:
    x, weight, _ = drawn(5, 70, 300, kind, group, zeros)
    ours, theirs = (make(x, *weight) for make in (quantized_product, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_slice_of_wider_rows_is_read_where_it_lies() -> None:
    x, weight, _ = drawn(5, 40, 128, "int4", 64, True)
    wide = torch.full((5, 200), torch.nan, device=DEVICE)
    wide[:, 10:138] = x
    y = quantized_product(wide[:, 10:138], *weight)
    assert torch.equal(y, quantized_product(x, *weight))


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    x, weight, _ = drawn(3, 40, 128, "int4", 64, True)
    good = quantized_product(x, *weight)
    x[1, 7] = torch.nan
    y = quantized_product(x, *weight)
    assert torch.equal(y[[0, 2]], good[[0, 2]])
    assert y[1].isnan().all()


def test_no_rows_give_none() -> None:
    x, weight, _ = drawn(0, 40, 128, "int4", 64, True)
    assert quantized_product(x, *weight).shape == (0, 40)


def test_every_code_of_a_float_has_its_number() -> None:
    """Also those so small that a float32 of their bits is subnormal."""
    codes = torch.arange(256).to(torch.uint8)
    codes[codes & 127 == 127] = 0
    numbers = codes.view(torch.float8_e4m3fn).to(DEVICE)
    held = torch.zeros((1, 256, BLOCK), dtype=torch.uint8, device=DEVICE)
    held[0, :, 5] = codes.to(DEVICE)
    x = torch.zeros((1, BLOCK), device=DEVICE)
    x[0, 5] = 1.0
    one = torch.ones((1, 256), device=DEVICE)
    y = quantized_product(x, held.view(torch.float8_e4m3fn), one, None, BLOCK)
    assert torch.equal(y[0], numbers.float())


def test_a_book_keeps_more_bits_than_one_bfloat16_term_has() -> None:
    x, weight, exact = drawn(5, 70, 300, "book", 64, False)
    x = x.to(torch.bfloat16)
    y = quantized_product(x, *weight)
    magnitude = x.double().abs() @ exact.abs().t()
    assert ((y.double() - x.double() @ exact.t()).abs() <= 2**-15 * magnitude).all()
