"""Products with weights that stay quantised in memory: a program widens its tile of them in registers.

Codes are integers or 8-bit floats, which are exact in bfloat16, so tensor cores multiply them as they are, or places in
a book of 16 numbers, which are taken apart in two bfloat16 terms. Each group's sum is scaled in float32.
Where rows are few, several programs share the sum over the inputs: the speed is then that at which weights are read,
and more programs read at once.
"""

from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.interpreter import BFLOAT16_DOT
from kernels.launches import ceil_div, launch

BLOCK = 64  # inputs that lie together, and that a program multiplies at a time
HALF = BLOCK // 2  # of four bits, the bytes of a block
_BLOCK = tl.constexpr(BLOCK)
_HALF = tl.constexpr(HALF)
_BIAS = tl.constexpr(2.0**120)  # float32's exponents are 127 too high, e4m3's 7


class ProductConfig(NamedTuple):
    """Launch configuration of the product."""

    block_m: int  # rows of one program
    block_n: int  # columns of one program
    split_k: int  # programs that share a sum
    num_warps: int
    num_stages: int


def _configs(*choices: tuple[int, ...]) -> tuple[ProductConfig, ...]:
    return tuple(ProductConfig(*choice) for choice in product(*choices))


DECODE = _configs((16,), (32, 64, 128), (1, 4, 8, 16), (4,), (2, 4))
PREFILL = _configs((64, 128), (64, 128), (1,), (4, 8), (2, 3))
DECODE_PRODUCT = ProductConfig(block_m=16, block_n=64, split_k=8, num_warps=4, num_stages=4)  # not measured
PREFILL_PRODUCT = ProductConfig(block_m=64, block_n=128, split_k=1, num_warps=4, num_stages=3)  # not measured
# Of float32, which tensor cores do not multiply: larger tiles do not fit into registers
FLOAT32_DECODE = ProductConfig(block_m=16, block_n=32, split_k=8, num_warps=4, num_stages=2)
FLOAT32_PREFILL = FLOAT32_DECODE._replace(split_k=1)
FEW_ROWS = 32  # up to which a batch is as a decode step


def quantized_product(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group: int,
    book: Tensor | None = None,
    config: ProductConfig = DECODE_PRODUCT,
) -> Tensor:
    """y = x Wᵀ with W[o][i] = (code − zero) · scale, (T, out) float32.

    x is (T, in). `codes` are in blocks of 64 inputs: (blocks, out, 64) int8 or float8_e4m3fn without NaN, or (blocks,
    out, 32) uint8 of four bits, whose low halves are the first 32 inputs and whose high halves the others; with a
    `book`, (16,) float32, they are places in it. `scales` are (groups, out) float32 and `zeros`, or None, (groups,
    out) int8; a group has `group` inputs, a multiple of 64, or of 32 for four bits.
    """
    rows, inputs = x.shape
    blocks, columns, width = codes.shape
    assert blocks == ceil_div(inputs, BLOCK), (x.shape, codes.shape)
    assert group % (width if width == HALF else BLOCK) == 0, group
    assert x.stride(1) == 1
    assert codes.is_contiguous()
    assert scales.is_contiguous()
    assert zeros is None or zeros.is_contiguous()
    assert book is None or (width == HALF and book.shape == (16,)), "a book is of four bits"
    partial = torch.empty((config.split_k, rows, columns), dtype=torch.float32, device=x.device)
    if rows:
        grid = (ceil_div(columns, config.block_n), ceil_div(rows, config.block_m), config.split_k)
        launch(
            _quantized_product_kernel,
            grid,
            x,
            codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes,
            scales,
            scales if zeros is None else zeros,
            scales if book is None else book,
            partial,
            rows,
            x.stride(0),
            INPUTS=inputs,
            COLUMNS=columns,
            GROUP=group,
            ZEROS=zeros is not None,
            BOOK=book is not None,
            FOUR_BITS=width == HALF,
            FLOATS=codes.dtype == torch.float8_e4m3fn,
            TERMS=2 if book is not None and x.dtype == torch.bfloat16 else 1,
            DOT=BFLOAT16_DOT if x.dtype == torch.bfloat16 else tl.float32,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            SPLIT_K=config.split_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    return partial[0] if config.split_k == 1 else partial.sum(0)


@triton.jit
def _numbers(code: tl.tensor, book: tl.tensor, BOOK: tl.constexpr, FLOATS: tl.constexpr) -> tl.tensor:
    """What codes stand for, float32."""
    bits = code.to(tl.int32)
    if BOOK:
        numbers = tl.load(book + bits)
    elif FLOATS:  # e4m3 without NaN: its bits as a float's, whose exponent has another bias
        numbers = ((bits & 127) << 20 | (bits & 128) << 24).to(tl.float32, bitcast=True) * _BIAS
    else:
        numbers = code.to(tl.float32)
    return numbers


@triton.jit(do_not_specialize=["rows"])
def _quantized_product_kernel(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    book: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    x_row: tl.tensor,
    INPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BOOK: tl.constexpr,
    FOUR_BITS: tl.constexpr,
    FLOATS: tl.constexpr,
    TERMS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
) -> None:
    """out[split, row, c] = Σ over the split's blocks of scale[g, c] · Σ x[row, i] · (code[i, c] − zero[g, c])."""
    WIDTH: tl.constexpr = _HALF if FOUR_BITS else _BLOCK
    BLOCKS: tl.constexpr = (INPUTS + _BLOCK - 1) // _BLOCK
    EACH: tl.constexpr = (BLOCKS + SPLIT_K - 1) // SPLIT_K
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    i = tl.arange(0, WIDTH)
    in_rows, in_columns = row < rows, column < COLUMNS
    x_tile = x + row[:, None].to(tl.int64) * x_row + i[None, :]
    code_tile = codes + (split.to(tl.int64) * EACH * COLUMNS + column[:, None]) * WIDTH + i[None, :]
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for block in range(split * EACH, min((split + 1) * EACH, BLOCKS)):
        held = tl.load(code_tile, mask=in_columns[:, None], other=0)
        code_tile += COLUMNS * WIDTH
        for half in tl.static_range(2 if FOUR_BITS else 1):
            first = block * _BLOCK + half * _HALF
            code = (held >> (4 * half)) & 15 if FOUR_BITS else held
            value = _numbers(code, book, BOOK, FLOATS)
            place = min(first, INPUTS - 1) // GROUP * COLUMNS + column  # a last block may end before its half
            if ZEROS:
                value -= tl.load(zeros + place, mask=in_columns, other=0).to(tl.float32)[:, None]
            mask = in_rows[:, None] & (first + i < INPUTS)[None, :]
            numbers = tl.load(x_tile + first, mask=mask, other=0.0)
            sums = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
            for _ in tl.static_range(TERMS):
                term = value.to(DOT)
                sums = tl.dot(numbers.to(DOT), tl.trans(term), sums, input_precision="ieee")
                value -= term.to(tl.float32)
            scale = tl.load(scales + place, mask=in_columns, other=0.0)
            acc += sums * scale[None, :]
    to = out + (split.to(tl.int64) * rows + row[:, None]) * COLUMNS + column[None, :]
    tl.store(to, acc, mask=in_rows[:, None] & in_columns[None, :])
