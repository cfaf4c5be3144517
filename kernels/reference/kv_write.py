"""The specification of kernels.kv_write."""

import torch
from torch import Tensor

from kernels.reference.rms_norm import rms_norm


def qkv_write(
    qkv: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    frequencies: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    kv: Tensor,
    rotary_scale: float = 1.0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
) -> None:
    """q ← R(q), in place; kv[slot_mapping[t], 0] = R(k); kv[slot_mapping[t], 1] = v; R is an RMSNorm, then RoPE.

    Arguments as in kernels.kv_write.qkv_write.
    """
    kept = (slot_mapping >= 0).nonzero()[:, 0]
    rows, kv_heads, head_dim = qkv[kept], kv.shape[2], qkv.shape[2]
    q_heads = rows.shape[1] - 2 * kv_heads
    turned = rows[:, : q_heads + kv_heads]
    if q_weight is not None and k_weight is not None:
        weight = torch.cat((q_weight.expand(q_heads, -1), k_weight.expand(kv_heads, -1))).float() * head_dim**0.5
        turned = rms_norm(turned, weight, torch.tensor((head_dim * eps) ** 0.5, device=qkv.device))
    dims = head_dim if rotary_dim is None else rotary_dim
    angles = positions[kept, None, None].float() * frequencies[: dims // 2]
    cos, sin = ((table * rotary_scale).to(qkv.dtype) for table in (angles.cos(), angles.sin()))
    turned = torch.cat((_rotated(turned[..., :dims], cos, sin, interleaved), turned[..., dims:]), -1)
    qkv[kept, :q_heads] = turned[:, :q_heads]
    slots = slot_mapping[kept].long()
    kv[slots, 0] = turned[:, q_heads:]
    kv[slots, 1] = rows[:, q_heads + kv_heads :]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Pairs (a, b) of each head become (a cos - b sin, b cos + a sin); only the products with cos are rounded first.

    `x` is (T, heads, d), `cos` and `sin` are (T, 1, d / 2). The pairs are halves, or neighbours if `interleaved`.
    """
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    pair = torch.addcmul(a * cos, b, -sin), torch.addcmul(b * cos, a, sin)
    return torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
