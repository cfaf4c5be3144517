"""The specification of kernels.kv_write, put together from the functions of the CPU path."""

import torch
from torch import Tensor

from kernels.cpu import elementwise


def qkv_write(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    frequencies: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    kv: Tensor,
    rotary_scale: float = 1.0,
) -> None:
    """q ← R(q), in place; kv[slots[t], 0] = R(k); kv[slots[t], 1] = v; R: x / sqrt(mean(x²) + eps) · weight, turned.

    Arguments as in kernels.kv_write.qkv_write.
    """
    kept = (slots >= 0).nonzero()[:, 0]
    rows, kv_heads, head_dim = qkv[kept], kv.shape[2], qkv.shape[2]
    q_heads = rows.shape[1] - 2 * kv_heads
    turned = rows[:, : q_heads + kv_heads]
    source = turned
    if q_weight is not None and k_weight is not None:
        weight = torch.cat((q_weight.expand(q_heads, -1), k_weight.expand(kv_heads, -1))).float() * head_dim**0.5
        source = elementwise.rms_norm(turned, weight, torch.tensor((head_dim * eps) ** 0.5, device=qkv.device))
    angles = positions[kept, None, None].float() * torch.cat((-frequencies, frequencies))
    cos, sin = angles.cos() * rotary_scale, angles.sin() * rotary_scale
    elementwise.rotary(source, cos.to(qkv.dtype), sin.to(qkv.dtype), out=turned)
    qkv[kept, :q_heads] = rows[:, :q_heads]
    elementwise.kv_write(kv, slots[kept].long(), rows[:, q_heads:].unflatten(1, (2, kv_heads)))
