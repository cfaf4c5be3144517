"""The element-wise work between projections: RMSNorm, RoPE, the gated SiLU and the write to the KV cache."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x², last dim) + eps) · weight, in float32, rounded once to x's dtype.

    `x` is (..., n); `weight` broadcasts against it (n, or (heads, n) for a norm per head) and is float32.
    """
    # hypot(‖x‖, √(n·eps)) = √n · √(mean(x²) + eps): four small operations, where F.rms_norm takes eight.
    size = x.shape[-1]
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    norm = torch.hypot(norm, norm.new_full((), (size * eps) ** 0.5)) * size**-0.5
    return (x / norm * weight).to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """out = x · cos + rotate(x) · sin, where rotate swaps the two halves of each head.

    `x` and `out` are (T, heads, d) and may be the same tensor; `cos` and `sin` are (T, 1, d) in x's dtype. The
    minus sign that a rotation gives its first half is already in `sin`: sin[..., i] = -sin(θᵢ) for i < d/2.
    """
    return torch.addcmul(x * cos, torch.roll(x, x.shape[-1] // 2, -1), sin, out=out)


def silu_mul(gate_up: Tensor) -> Tensor:
    """y = gate · sigmoid(gate) · up, for `gate_up` (T, 2n) with the gate in its first half; y is (T, n)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def kv_write(kv: Tensor, slots: Tensor, rows: Tensor) -> None:
    """kv[slots[t]] = rows[t], for `kv` (slots, 2, kv_heads, d), `slots` (T,) int64, `rows` (T, 2, kv_heads, d)."""
    kv.index_copy_(0, slots, rows)
