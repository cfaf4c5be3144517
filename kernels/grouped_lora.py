"""Grouped LoRA products over tiles: one launch shrinks all rows of a site, one launch expands them to all its parts.

A shrink is t = x Aᵀ, an expand y = (y + t B) · gain + bias. kernels.reference.grouped_lora specifies both in PyTorch.
A tile of an expert has the expert's site: `site` is then that of the first one.
"""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import lora_tiles, offset_table
from kernels.interpreter import BFLOAT16_DOT
from kernels.launches import ceil_div, launch
from kernels.lora_tiles import Tiles

_A = tl.constexpr(offset_table.A)
_RANKS = tl.constexpr(offset_table.RANKS)
_ALL_RANKS = tl.constexpr(offset_table.RANKS + offset_table.MAX_PARTS)
_B = tl.constexpr(offset_table.B)
_BIAS = tl.constexpr(offset_table.BIAS)
_GAIN = tl.constexpr(offset_table.GAIN)
_FIELDS = tl.constexpr(offset_table.FIELDS)
_ALIGNMENT = tl.constexpr(offset_table.ALIGNMENT)
_FIRST_ROW = tl.constexpr(lora_tiles.FIRST_ROW)
_ROWS = tl.constexpr(lora_tiles.ROWS)
_SLOT = tl.constexpr(lora_tiles.SLOT)
_EXPERT = tl.constexpr(lora_tiles.EXPERT)
_SITES_PER_EXPERT = tl.constexpr(lora_tiles.SITES_PER_EXPERT)
_TILE_FIELDS = tl.constexpr(lora_tiles.TILE_FIELDS)

_EMBEDDING_RANKS = 64  # ranks of one program; not measured


class ShrinkConfig(NamedTuple):
    """Launch configuration of the shrink."""

    block_r: int  # ranks of one program
    block_k: int  # inputs that are multiplied at a time
    split_k: int  # programs that share the sum over the inputs; the expand adds their partial sums
    num_warps: int
    num_stages: int


class ExpandConfig(NamedTuple):
    """Launch configuration of the expand."""

    block_n: int  # columns of one program
    block_r: int  # ranks that are multiplied at a time
    num_warps: int
    num_stages: int


class Candidates(NamedTuple):
    """The launch configurations that a tuner may choose from for one kind of batch; each is correct for every shape."""

    heights: tuple[int, ...]  # the most rows of a tile
    shrink: tuple[ShrinkConfig, ...]
    expand: tuple[ExpandConfig, ...]


def _shrinks(*choices: tuple[int, ...]) -> tuple[ShrinkConfig, ...]:
    return tuple(ShrinkConfig(*choice) for choice in product(*choices))


def _expands(*choices: tuple[int, ...]) -> tuple[ExpandConfig, ...]:
    return tuple(ExpandConfig(*choice) for choice in product(*choices))


# Few rows: the weights are read once, and the speed depends on how many programs read them at the same time.
DECODE = Candidates(
    heights=(16,),
    shrink=_shrinks((16, 32, 64), (64, 128, 256), (1, 4, 16), (2, 4), (2, 4)),
    expand=_expands((32, 64, 128), (16, 32, 64), (2, 4), (1, 2)),
)
# Many rows: x and y are most of the traffic, and each should be read once.
PREFILL = Candidates(
    heights=(32, 64, 128),
    shrink=_shrinks((16, 32, 64), (32, 64, 128), (1, 2, 4), (4, 8), (2, 3)),
    expand=_expands((64, 128), (16, 32), (4, 8), (1, 2)),
)

# Not measured: values from the middle of the candidates, until a tuner has measured better ones.
DECODE_SHRINK = ShrinkConfig(block_r=16, block_k=128, split_k=4, num_warps=4, num_stages=4)
DECODE_EXPAND = ExpandConfig(block_n=64, block_r=16, num_warps=4, num_stages=2)
PREFILL_SHRINK = ShrinkConfig(block_r=32, block_k=64, split_k=1, num_warps=4, num_stages=3)
PREFILL_EXPAND = ExpandConfig(block_n=128, block_r=16, num_warps=4, num_stages=2)


def shrink(x: Tensor, site: int, arena: Tensor, table: Tensor, tiles: Tiles, t: Tensor, config: ShrinkConfig) -> Tensor:
    """Σₛ t[rows, s, :rank] = x[rows] Aᵀ for every tile whose adapter adapts the site, accumulated in float32.

    x is (T, in), `t` (T, splits, width) float32 with at least `config.split_k` splits. Returns `t[:, :split_k]`, the
    input of the expand. Other rows of `t`, and columns beyond the adapter's ranks, are not written.
    """
    assert config.split_k <= t.shape[1], f"{config.split_k} splits do not fit {t.shape[1]}"
    assert x.stride(1) == t.stride(2) == 1
    assert table.is_contiguous()
    grid = (len(tiles.fields), ceil_div(t.shape[2], config.block_r), config.split_k)
    launch(
        _shrink_kernel,
        grid,
        x,
        arena,
        table,
        tiles.fields,
        t,
        x.stride(0),
        t.stride(0),
        t.stride(1),
        table.shape[1],
        site,
        IN=x.shape[1],
        DOT=_dot_dtype(x, arena),
        BLOCK_M=tiles.height,
        BLOCK_R=config.block_r,
        BLOCK_K=config.block_k,
        SPLIT_K=config.split_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    return t[:, : config.split_k]


def embedding_shrink(token_ids: Tensor, site: int, arena: Tensor, table: Tensor, tiles: Tiles, t: Tensor) -> Tensor:
    """The shrink of one-hot rows: t[rows, 0, :rank] = A[token_ids[rows]], for A stored as (vocab, rank).

    token_ids is (T,) int64. Returns `t[:, :1]`, the input of the expand.
    """
    assert t.stride(2) == 1
    assert table.is_contiguous()
    grid = (len(tiles.fields), ceil_div(t.shape[2], _EMBEDDING_RANKS))
    launch(
        _embedding_shrink_kernel,
        grid,
        token_ids,
        arena,
        table,
        tiles.fields,
        t,
        t.stride(0),
        table.shape[1],
        site,
        BLOCK_M=tiles.height,
        BLOCK_R=_EMBEDDING_RANKS,
        enable_fp_fusion=True,
    )
    return t[:, :1]


def expand(
    t: Tensor,
    y: Tensor,
    site: int,
    arena: Tensor,
    table: Tensor,
    tiles: Tiles,
    widths: Sequence[int],
    config: ExpandConfig,
    hots: Tensor | None = None,
    hot_ranks: int = 0,
) -> None:
    """y[rows, columns] += Σₛ t[rows, s, ranks] B + bias, in place, for every tile and every part that is adapted.

    `t` is the result of the shrink. y is (T, out); the site's parts fill its columns side by side, `widths[i]` columns
    for part i. Accumulated in float32 and rounded to y's dtype once. For bfloat16 weights, each t is split into three
    bfloat16 terms that together hold its 24 bits, so that tensor cores lose none (an infinite t gives NaN). Rows of no
    tile, and columns of parts that are not adapted, keep their bits.

    With `hots`, int32 by slot, t has the products with the A of several adapters side by side, (T, 1, columns) of y's
    dtype: those of the adapter in slot s begin at column hots[s] · hot_ranks.
    """
    assert y.stride(1) == t.stride(2) == 1
    assert table.is_contiguous()
    first, second, third = [*widths, *[0] * (offset_table.MAX_PARTS - len(widths))]
    grid = (len(tiles.fields), sum(ceil_div(width, config.block_n) for width in widths))
    launch(
        _expand_kernel,
        grid,
        t,
        y,
        arena,
        table,
        tiles.fields,
        tiles.fields if hots is None else hots,
        t.stride(0),
        t.stride(1),
        y.stride(0),
        table.shape[1],
        site,
        WIDTH_0=first,
        WIDTH_1=second,
        WIDTH_2=third,
        SPLITS=t.shape[1],
        HOT_RANKS=hot_ranks,
        TERMS=3 if arena.dtype == torch.bfloat16 and t.dtype != torch.bfloat16 else 1,
        DOT=_dot_dtype(arena),
        BLOCK_M=tiles.height,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )


def _dot_dtype(*factors: Tensor) -> tl.dtype:
    """The dtype that tensor cores multiply: bfloat16 if all factors are."""
    return BFLOAT16_DOT if all(factor.dtype == torch.bfloat16 for factor in factors) else tl.float32


@triton.jit(do_not_specialize=["sites", "site"])
def _shrink_kernel(
    x: tl.tensor,
    arena: tl.tensor,
    table: tl.tensor,
    tiles: tl.tensor,
    t: tl.tensor,
    x_row: tl.tensor,
    t_row: tl.tensor,
    t_split: tl.tensor,
    sites: tl.tensor,
    site: tl.tensor,
    IN: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
) -> None:
    """t[rows, s, ranks] = Σₖ x[rows, k] A[ranks, k] for one tile, a block of ranks and the k of split s."""
    tile = tiles + tl.program_id(0) * _TILE_FIELDS
    count, slot = tl.load(tile + _ROWS), tl.load(tile + _SLOT)
    if (count == 0) | (slot < 0):
        return
    entry = table + (slot.to(tl.int64) * sites + site + tl.load(tile + _EXPERT) * _SITES_PER_EXPERT) * _FIELDS
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.load(entry + _ALL_RANKS).to(tl.int32)
    if tl.program_id(1) * BLOCK_R >= total:
        return
    row = tl.arange(0, BLOCK_M)
    first_row = tl.load(tile + _FIRST_ROW).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x_tile = x + first_row * x_row + (row[:, None] * x_row + k[None, :])
    a_tile = arena + tl.multiple_of(tl.load(entry + _A), _ALIGNMENT) + (ranks[None, :] * IN + k[:, None])
    in_tile, in_rank = row[:, None] < count, ranks[None, :] < total

    # The last splits may have no inputs: they still write zeros, because the expand adds every split.
    SHARE: tl.constexpr = (IN + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K) * BLOCK_K
    start = tl.program_id(2) * SHARE
    acc = tl.full((BLOCK_M, BLOCK_R), 0.0, tl.float32)
    for first in range(start, tl.minimum(start + SHARE, IN), BLOCK_K):
        if IN % BLOCK_K == 0:
            rows_of_x = tl.load(x_tile + first, mask=in_tile, other=0.0)
            rows_of_a = tl.load(a_tile + first, mask=in_rank, other=0.0)
        else:
            rows_of_x = tl.load(x_tile + first, mask=in_tile & (first + k[None, :] < IN), other=0.0)
            rows_of_a = tl.load(a_tile + first, mask=in_rank & (first + k[:, None] < IN), other=0.0)
        acc = tl.dot(rows_of_x.to(DOT), rows_of_a.to(DOT), acc, input_precision="ieee")
    out = t + first_row * t_row + tl.program_id(2) * t_split + (row[:, None] * t_row + ranks[None, :])
    tl.store(out, acc, mask=in_tile & in_rank)


@triton.jit(do_not_specialize=["sites", "site"])
def _embedding_shrink_kernel(
    token_ids: tl.tensor,
    arena: tl.tensor,
    table: tl.tensor,
    tiles: tl.tensor,
    t: tl.tensor,
    t_row: tl.tensor,
    sites: tl.tensor,
    site: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """t[rows, 0, ranks] = A[token_ids[rows], ranks] for one tile and a block of ranks."""
    tile = tiles + tl.program_id(0) * _TILE_FIELDS
    count, slot = tl.load(tile + _ROWS), tl.load(tile + _SLOT)
    if (count == 0) | (slot < 0):
        return
    entry = table + (slot.to(tl.int64) * sites + site + tl.load(tile + _EXPERT) * _SITES_PER_EXPERT) * _FIELDS
    total = tl.load(entry + _ALL_RANKS)
    row = tl.arange(0, BLOCK_M)
    first_row = tl.load(tile + _FIRST_ROW).to(tl.int64)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    tokens = tl.load(token_ids + first_row + row, mask=row < count, other=0)
    mask = (row[:, None] < count) & (ranks[None, :] < total)
    a = tl.load(arena + tl.load(entry + _A) + tokens[:, None] * total + ranks[None, :], mask=mask, other=0.0)
    tl.store(t + first_row * t_row + (row[:, None] * t_row + ranks[None, :]), a.to(tl.float32), mask=mask)


@triton.jit
def _part_of(
    block: tl.tensor, WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr, WIDTH_2: tl.constexpr, BLOCK_N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """For a block of a site's columns: its part, the part's width and first column, and the block's index in the part.

    No block has columns of two parts.
    """
    BLOCKS_0: tl.constexpr = (WIDTH_0 + BLOCK_N - 1) // BLOCK_N
    BLOCKS_1: tl.constexpr = BLOCKS_0 + (WIDTH_1 + BLOCK_N - 1) // BLOCK_N
    part = (block >= BLOCKS_0).to(tl.int32) + (block >= BLOCKS_1).to(tl.int32)
    width = tl.where(part == 0, WIDTH_0, tl.where(part == 1, WIDTH_1, WIDTH_2))
    first_column = tl.where(part == 0, 0, tl.where(part == 1, WIDTH_0, WIDTH_0 + WIDTH_1))
    return part, width, first_column, block - tl.where(part == 0, 0, tl.where(part == 1, BLOCKS_0, BLOCKS_1))


@triton.jit(do_not_specialize=["sites", "site"])
def _expand_kernel(
    t: tl.tensor,
    y: tl.tensor,
    arena: tl.tensor,
    table: tl.tensor,
    tiles: tl.tensor,
    hots: tl.tensor,
    t_row: tl.tensor,
    t_split: tl.tensor,
    y_row: tl.tensor,
    sites: tl.tensor,
    site: tl.tensor,
    WIDTH_0: tl.constexpr,
    WIDTH_1: tl.constexpr,
    WIDTH_2: tl.constexpr,
    SPLITS: tl.constexpr,
    HOT_RANKS: tl.constexpr,
    TERMS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """y[rows, n] = (y[rows, n] + Σₛ Σᵣ t[rows, s, r] B[r, n]) · gain[n] + bias[n] for one tile and a block."""
    tile = tiles + tl.program_id(0) * _TILE_FIELDS
    count, slot = tl.load(tile + _ROWS), tl.load(tile + _SLOT)
    if (count == 0) | (slot < 0):
        return
    part, width, first_column, block = _part_of(tl.program_id(1), WIDTH_0, WIDTH_1, WIDTH_2, BLOCK_N)
    entry = table + (slot.to(tl.int64) * sites + site + tl.load(tile + _EXPERT) * _SITES_PER_EXPERT) * _FIELDS + part
    first_rank = tl.load(entry + _RANKS).to(tl.int32)
    rank = tl.load(entry + _RANKS + 1).to(tl.int32) - first_rank
    bias, gain = tl.load(entry + _BIAS), tl.load(entry + _GAIN)
    if (rank == 0) & (bias <= 0) & (gain <= 0):
        return
    row = tl.arange(0, BLOCK_M)
    first_row = tl.load(tile + _FIRST_ROW).to(tl.int64)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    in_tile, in_part = row[:, None] < count, columns[None, :] < width
    t_tile = t + first_row * t_row + first_rank + (row[:, None] * t_row + r[None, :])
    if HOT_RANKS:
        t_tile += tl.load(hots + slot) * HOT_RANKS
    b_tile = arena + tl.multiple_of(tl.load(entry + _B), _ALIGNMENT) + (r[:, None] * width + columns[None, :])

    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for first in range(0, rank, BLOCK_R):
        in_rank = first + r < rank
        rest = tl.full((BLOCK_M, BLOCK_R), 0.0, tl.float32)
        for split in tl.static_range(SPLITS):
            part_of_t = tl.load(t_tile + first + split * t_split, mask=in_tile & in_rank[None, :], other=0.0)
            rest += part_of_t.to(tl.float32)
        b = tl.load(b_tile + first * width, mask=in_rank[:, None] & in_part, other=0.0).to(DOT)
        for _ in tl.static_range(TERMS):
            term = rest.to(arena.dtype.element_ty)
            acc = tl.dot(term.to(DOT), b, acc, input_precision="ieee")
            rest -= term.to(tl.float32)
    out = y + first_row * y_row + first_column + (row[:, None] * y_row + columns[None, :])
    total = tl.load(out, mask=in_tile & in_part, other=0.0).to(tl.float32) + acc
    if gain > 0:
        gain = tl.multiple_of(gain, _ALIGNMENT)
        total *= tl.load(arena + gain + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    if bias > 0:
        bias = tl.multiple_of(bias, _ALIGNMENT)
        total += tl.load(arena + bias + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    tl.store(out, total.to(y.dtype.element_ty), mask=in_tile & in_part)
