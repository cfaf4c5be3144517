"""The specification of kernels.silu_mul."""

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up: Tensor) -> Tensor:
    """y = gate · sigmoid(gate) · up, in float32, rounded once to the dtype of `gate_up`.

    Arguments as in kernels.silu_mul.silu_mul.
    """
    gate, up = gate_up.float().chunk(2, -1)
    return (gate * gate.sigmoid() * up).to(gate_up.dtype)


def clamped_mul(gate_up: Tensor, limit: float) -> Tensor:
    """As `silu_mul`, y = g · sigmoid(1.702 g) · (u + 1), for g the gate up to `limit` and u from -limit to limit.

    Arguments as in kernels.silu_mul.clamped_mul.
    """
    gate, up = gate_up.float().chunk(2, -1)
    gate = gate.clamp(max=limit)
    return (gate * (1.702 * gate).sigmoid() * (up.clamp(-limit, limit) + 1)).to(gate_up.dtype)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """As `silu_mul`, with the GELU that is computed by tanh.

    Arguments as in kernels.silu_mul.gelu_mul.
    """
    gate, up = gate_up.float().chunk(2, -1)
    return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)
