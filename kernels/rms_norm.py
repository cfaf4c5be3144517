"""RMSNorm, alone or fused with what comes before it: one launch, one pass over memory.

Before it come the addition to the residual stream, and before that an adapter's expand. The latter is not used by the
engine: whether one program reads a row's B faster than a launch of its own takes, only a GPU says
(`python -m tools.expand_norm`).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import offset_table
from kernels.launches import ceil_div, launch, power_of_2

_RANKS = tl.constexpr(offset_table.RANKS)
_B = tl.constexpr(offset_table.B)
_BIAS = tl.constexpr(offset_table.BIAS)
_GAIN = tl.constexpr(offset_table.GAIN)
_FIELDS = tl.constexpr(offset_table.FIELDS)
_ALIGNMENT = tl.constexpr(offset_table.ALIGNMENT)


class RmsNormConfig(NamedTuple):
    """Launch configuration of the norms."""

    elements: int  # of one program, which takes whole rows
    num_warps: int

    def tile(self, width: int) -> tuple[int, int]:
        """The rows of a program, at least one, and its columns: `width` rounded up to a power of two.

        A program holds whole rows, so that each is read once.
        """
        columns = power_of_2(width)
        return max(1, self.elements // columns), columns


CANDIDATES = [
    RmsNormConfig(elements, num_warps)
    for elements, num_warps in [(1024, 4), (1024, 1), (1024, 2), (1024, 8), (1024, 16), (4096, 4), (4096, 8), (256, 1)]
]
DEFAULT = CANDIDATES[0]  # not measured


class ExpandNormConfig(NamedTuple):
    """Launch configuration of the norm after an expand; a program has one row."""

    ranks: int  # rows of B that are read at a time
    num_warps: int


EXPAND_CANDIDATES = [ExpandNormConfig(ranks, num_warps) for ranks in (4, 2, 8) for num_warps in (8, 16)]
EXPAND_DEFAULT = EXPAND_CANDIDATES[0]  # not measured


def rms_norm(x: Tensor, weight: Tensor, floor: Tensor, config: RmsNormConfig = DEFAULT) -> Tensor:
    """y = x / sqrt(‖x‖² + floor²) · weight over the last dimension, in float32, rounded once to x's dtype.

    This is x / sqrt(mean(x²) + eps) · w, for weight = √n · w and floor = √(n · eps). `x` is (T, n) or (T, heads, n),
    and its last dimension has no gaps. `weight` is float32, (n,), or (heads, n) for a norm per head; `floor` is a
    float32 scalar tensor.
    """
    tokens, heads, width = (x.shape[0], 1, x.shape[1]) if x.dim() == 2 else x.shape
    assert weight.shape in ((width,), (heads, width))
    assert x.stride(-1) == weight.stride(-1) == 1
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    head_stride = x.stride(1) if x.dim() == 3 else 0
    weight_stride = weight.stride(0) if weight.dim() == 2 else 0
    rows, block = config.tile(width)
    if out.numel():
        launch(
            _rms_norm_kernel, (ceil_div(tokens * heads, rows),),
            x, weight, floor, out, tokens * heads, x.stride(0), head_stride, weight_stride, HEADS=heads, WIDTH=width,
            ROWS=rows, BLOCK=block, num_warps=config.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def add_rms_norm(
    residual: Tensor, y: Tensor, alpha: float, weight: Tensor, floor: Tensor, config: RmsNormConfig = DEFAULT
) -> Tensor:
    """residual += alpha · y, in place, rounded to its dtype; returns the norm of the rounded sum, as `rms_norm` does.

    `residual` and `y` are (T, n) of one dtype; they do not overlap, and their rows have no gaps. `weight` is float32
    (n,), `floor` a float32 scalar tensor.
    """
    tokens, width = residual.shape
    assert (y.shape, y.dtype, weight.shape) == (residual.shape, residual.dtype, (width,))
    assert residual.stride(1) == y.stride(1) == weight.stride(0) == 1
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    rows, block = config.tile(width)
    if out.numel():
        launch(
            _add_rms_norm_kernel, (ceil_div(tokens, rows),),
            residual, y, float(alpha), weight, floor, out, tokens, residual.stride(0), y.stride(0), WIDTH=width,
            ROWS=rows, BLOCK=block, num_warps=config.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def expand_add_rms_norm(
    residual: Tensor,
    y: Tensor,
    t: Tensor,
    slots: Tensor,
    site: int,
    arena: Tensor,
    table: Tensor,
    alpha: float,
    weight: Tensor,
    floor: Tensor,
    config: ExpandNormConfig = EXPAND_DEFAULT,
) -> Tensor:
    """`add_rms_norm` of `y` after `kernels.grouped_lora.expand`, for a site of one part; y itself keeps its bits.

    slots is (T,) int32, the slot of each row's adapter, -1 for none. t is (T, splits, width) float32, the result of the
    shrink. The expanded y is rounded to its dtype before it is added.
    """
    tokens, width = residual.shape
    assert (y.shape, y.dtype, weight.shape) == (residual.shape, residual.dtype, (width,))
    assert residual.stride(1) == y.stride(1) == weight.stride(0) == t.stride(2) == 1
    assert table.is_contiguous()
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    if out.numel():
        launch(
            _expand_add_rms_norm_kernel, (tokens,),
            residual, y, t, slots, arena, table, float(alpha), weight, floor, out, residual.stride(0), y.stride(0),
            t.stride(0), t.stride(1), table.shape[1], site, WIDTH=width, BLOCK=power_of_2(width), SPLITS=t.shape[1],
            BLOCK_R=config.ranks, num_warps=config.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out


@triton.jit
def _norm(x: tl.tensor, weight: tl.tensor, floor: tl.tensor) -> tl.tensor:
    """x / sqrt(‖x‖² + floor²) · weight for each row of x, float32."""
    length = tl.sqrt(tl.sum(x * x, 1) + floor * floor)
    return x / length[:, None] * weight


@triton.jit(do_not_specialize=["rows"])  # it changes with the batch
def _rms_norm_kernel(
    x: tl.tensor, weight: tl.tensor, floor: tl.tensor, out: tl.tensor, rows: tl.tensor, token_stride: tl.tensor,
    head_stride: tl.tensor, weight_stride: tl.tensor, HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """out[row] = x[token, head] / sqrt(‖x[token, head]‖² + floor²) · weight[head], row = token · HEADS + head."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (column < WIDTH)
    start = (row // HEADS).to(tl.int64) * token_stride + row % HEADS * head_stride
    values = tl.load(x + start[:, None] + column, inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + (row % HEADS * weight_stride)[:, None] + column, inside, other=0.0)
    y = _norm(values, scale, tl.load(floor))
    tl.store(out + row.to(tl.int64)[:, None] * WIDTH + column, y.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows"])
def _add_rms_norm_kernel(
    residual: tl.tensor, y: tl.tensor, alpha: tl.tensor, weight: tl.tensor, floor: tl.tensor, out: tl.tensor,
    rows: tl.tensor, residual_stride: tl.tensor, y_stride: tl.tensor, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """residual[row] += alpha · y[row]; out[row] = residual[row] / sqrt(‖residual[row]‖² + floor²) · weight."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)
    old = tl.load(residual + row * residual_stride + column, inside, other=0.0).to(tl.float32)
    added = tl.load(y + row * y_stride + column, inside, other=0.0).to(tl.float32)
    total = (old + added * alpha).to(residual.dtype.element_ty)
    tl.store(residual + row * residual_stride + column, total, inside)
    scale = tl.load(weight + column, column < WIDTH, other=0.0)
    normed = _norm(total.to(tl.float32), scale, tl.load(floor))
    tl.store(out + row * WIDTH + column, normed.to(out.dtype.element_ty), inside)


@triton.jit
def _expanded(
    y: tl.tensor, t: tl.tensor, arena: tl.tensor, entry: tl.tensor, column: tl.tensor, t_split: tl.tensor,
    WIDTH: tl.constexpr, SPLITS: tl.constexpr, BLOCK_R: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(y + Σₛ Σᵣ t[s, r] B[r]) · gain + bias of one row, float32."""
    rank = tl.load(entry + _RANKS + 1).to(tl.int32)
    bias, gain = tl.load(entry + _BIAS), tl.load(entry + _GAIN)
    r, inside = tl.arange(0, BLOCK_R), column < WIDTH
    b_tile = arena + tl.multiple_of(tl.load(entry + _B), _ALIGNMENT) + (r[:, None] * WIDTH + column[None, :])
    for first in range(0, rank, BLOCK_R):
        in_rank = first + r < rank
        factor = tl.zeros((BLOCK_R,), tl.float32)
        for split in tl.static_range(SPLITS):
            factor += tl.load(t + first + r + split * t_split, mask=in_rank, other=0.0)
        b = tl.load(b_tile + first * WIDTH, mask=in_rank[:, None] & inside[None, :], other=0.0).to(tl.float32)
        y += tl.sum(factor[:, None] * b, 0)
    if gain > 0:
        y *= tl.load(arena + tl.multiple_of(gain, _ALIGNMENT) + column, mask=inside, other=0.0).to(tl.float32)
    if bias > 0:
        y += tl.load(arena + tl.multiple_of(bias, _ALIGNMENT) + column, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["sites", "site"])
def _expand_add_rms_norm_kernel(
    residual: tl.tensor, y: tl.tensor, t: tl.tensor, slots: tl.tensor, arena: tl.tensor, table: tl.tensor,
    alpha: tl.tensor, weight: tl.tensor, floor: tl.tensor, out: tl.tensor, residual_stride: tl.tensor,
    y_stride: tl.tensor, t_row: tl.tensor, t_split: tl.tensor, sites: tl.tensor, site: tl.tensor,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, BLOCK_R: tl.constexpr,
) -> None:  # fmt: skip
    """residual[row] += alpha · y', y' = y[row] + LoRA; out[row] = residual[row] / sqrt(‖·‖² + floor²) · weight."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    dtype: tl.constexpr = residual.dtype.element_ty
    added = tl.load(y + row * y_stride + column, inside, other=0.0).to(tl.float32)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        entry = table + (slot * sites + site) * _FIELDS
        added = _expanded(added, t + row * t_row, arena, entry, column, t_split, WIDTH, SPLITS, BLOCK_R)
        added = added.to(dtype).to(tl.float32)
    old = tl.load(residual + row * residual_stride + column, inside, other=0.0).to(tl.float32)
    total = (old + added * alpha).to(dtype)
    tl.store(residual + row * residual_stride + column, total, inside)
    scale = tl.load(weight + column, inside, other=0.0)
    normed = _norm(total.to(tl.float32)[None, :], scale[None, :], tl.load(floor))
    tl.store(out + row * WIDTH + column[None, :], normed.to(out.dtype.element_ty), inside[None, :])
