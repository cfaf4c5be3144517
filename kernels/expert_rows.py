"""The products of routed experts: each pair of a row and an expert that it chose is a row, sorted by expert."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import lora_tiles
from kernels.interpreter import BFLOAT16_DOT
from kernels.launches import ceil_div, launch
from kernels.lora_tiles import Tiles

_FIRST_ROW = tl.constexpr(lora_tiles.FIRST_ROW)
_ROWS = tl.constexpr(lora_tiles.ROWS)
_EXPERT = tl.constexpr(lora_tiles.EXPERT)
_TILE_FIELDS = tl.constexpr(lora_tiles.TILE_FIELDS)


class ExpertConfig(NamedTuple):
    """Launch configuration of the product."""

    block_n: int  # columns of one program
    block_k: int  # inputs that are multiplied at a time
    num_warps: int
    num_stages: int


DECODE = ExpertConfig(block_n=64, block_k=128, num_warps=4, num_stages=3)  # not measured
PREFILL = ExpertConfig(block_n=128, block_k=64, num_warps=8, num_stages=3)  # not measured


def expert_matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, tiles: Tiles, config: ExpertConfig = DECODE
) -> Tensor:
    """y[rows] = x[rows] W[expert]ᵀ + bias[expert] for every tile, in float32, rounded once to the dtype of x.

    x is (P, in), `weight` (experts, out, in) and `bias` (experts, out), all without gaps; y is (P, out). Rows of no
    tile are not written.
    """
    assert x.stride(1) == 1
    assert weight.is_contiguous()
    assert bias is None or bias.is_contiguous()
    _, out, inputs = weight.shape
    y = torch.empty((len(x), out), dtype=x.dtype, device=x.device)
    launch(
        _expert_matmul_kernel,
        (len(tiles.fields), ceil_div(out, config.block_n)),
        x,
        weight,
        weight if bias is None else bias,
        tiles.fields,
        y,
        x.stride(0),
        BIASED=bias is not None,
        OUT=out,
        IN=inputs,
        DOT=tl.float32 if x.dtype == torch.float32 else BFLOAT16_DOT,
        BLOCK_M=tiles.height,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    return y


@triton.jit
def _expert_matmul_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    tiles: tl.tensor,
    y: tl.tensor,
    x_row: tl.tensor,
    BIASED: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """y[rows, n] = Σₖ x[rows, k] W[expert, n, k] + bias[expert, n] for one tile and a block of columns."""
    tile = tiles + tl.program_id(0) * _TILE_FIELDS
    count = tl.load(tile + _ROWS)
    if count == 0:
        return
    row, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_row = tl.load(tile + _FIRST_ROW).to(tl.int64)
    expert = tl.load(tile + _EXPERT).to(tl.int64)
    own = weight + expert * (OUT * IN)
    x_tile = x + first_row * x_row + (row[:, None] * x_row + k[None, :])
    w_tile = own + (columns[None, :] * IN + k[:, None])
    in_tile, in_out = row[:, None] < count, columns[None, :] < OUT
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for first in range(0, IN, BLOCK_K):
        if IN % BLOCK_K == 0:
            rows_of_x = tl.load(x_tile + first, mask=in_tile, other=0.0)
            rows_of_w = tl.load(w_tile + first, mask=in_out, other=0.0)
        else:
            rows_of_x = tl.load(x_tile + first, mask=in_tile & (first + k[None, :] < IN), other=0.0)
            rows_of_w = tl.load(w_tile + first, mask=in_out & (first + k[:, None] < IN), other=0.0)
        acc = tl.dot(rows_of_x.to(DOT), rows_of_w.to(DOT), acc, input_precision="ieee")
    if BIASED:
        acc += tl.load(bias + expert * OUT + columns, mask=columns < OUT, other=0.0).to(tl.float32)[None, :]
    out = y + first_row * OUT + (row[:, None] * OUT + columns[None, :])
    tl.store(out, acc.to(y.dtype.element_ty), mask=in_tile & in_out)
