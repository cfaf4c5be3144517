"""The gated SiLU, GELU or clamped SiLU between the two projections of an MLP."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launches import ceil_div, launch


class SiluMulConfig(NamedTuple):
    """Launch configuration of the product."""

    block: int  # columns of one row that a program takes
    num_warps: int


CANDIDATES = [
    SiluMulConfig(block, num_warps)
    for block, num_warps in [(1024, 4), (256, 1), (512, 2), (512, 4), (1024, 2), (1024, 8), (2048, 4), (2048, 8)]
]
DEFAULT = CANDIDATES[0]  # not measured


def silu_mul(gate_up: Tensor, config: SiluMulConfig = DEFAULT) -> Tensor:
    """y = gate · sigmoid(gate) · up, in float32, rounded once to the dtype of `gate_up`.

    `gate_up` is (T, 2n), with the gate in its first half and rows without gaps; y is (T, n).
    """
    return _gated(gate_up, config)


def clamped_mul(gate_up: Tensor, limit: float, config: SiluMulConfig = DEFAULT) -> Tensor:
    """As `silu_mul`, y = g · sigmoid(1.702 g) · (u + 1), for g the gate up to `limit` and u from -limit to limit."""
    return _gated(gate_up, config, limit=limit)


def gelu_mul(gate_up: Tensor, config: SiluMulConfig = DEFAULT) -> Tensor:
    """As `silu_mul`, with the GELU that is computed by tanh: gate / 2 · (1 + tanh(√(2/π) (gate + 0.044715 gate³)))."""
    return _gated(gate_up, config, gelu=True)


def _gated(gate_up: Tensor, config: SiluMulConfig, *, gelu: bool = False, limit: float = 0.0) -> Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert (gate_up.stride(1), gate_up.shape[1]) == (1, 2 * width)
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        launch(
            _silu_mul_kernel, (rows, ceil_div(width, config.block)),
            gate_up, out, gate_up.stride(0), WIDTH=width, BLOCK=config.block, GELU=gelu, LIMIT=limit,
            num_warps=config.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out


@triton.jit
def _silu_mul_kernel(
    gate_up: tl.tensor, out: tl.tensor, row_stride: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    GELU: tl.constexpr, LIMIT: tl.constexpr,
) -> None:  # fmt: skip
    """out[row, c] = gate / (1 + exp(-z)) · up, gate = gate_up[row, c] and up = gate_up[row, WIDTH + c].

    z is the gate, or 2 √(2/π) (gate + 0.044715 gate³): (1 + tanh(z / 2)) / 2 is 1 / (1 + exp(-z)). With a LIMIT it is
    1.702 gate, of a gate that is clamped, and 1 is added to up, which is clamped too. NaN stays NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    start = gate_up + row * row_stride
    gate = tl.load(start + column, inside, other=0.0).to(tl.float32)
    up = tl.load(start + WIDTH + column, inside, other=0.0).to(tl.float32)
    if LIMIT > 0.0:
        gate, up = tl.where(gate > LIMIT, LIMIT, gate), tl.where(up > LIMIT, LIMIT, up)
        z, up = 1.702 * gate, tl.where(up < -LIMIT, -LIMIT, up) + 1.0
    else:
        z = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate) if GELU else gate
    y = gate / (1.0 + tl.exp(-z)) * up
    tl.store(out + row * WIDTH + column, y.to(out.dtype.element_ty), inside)
