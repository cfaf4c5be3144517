"""The pieces of a decoder layer that hold tensors: linear projections, norms and rotary angles."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import onednn
from kernels.cpu.elementwise import rms_norm
from runtime.models.config import RopeConfig


class Linear:
    """y = x Wᵀ + b; with `pack` on a CPU, W is packed once into the layout that oneDNN's matrix products read fastest.

    `weight` is (out, in), `bias` (out,) or None. A decode step of a 135M model in bfloat16 takes 20 ms of packed
    linears, and 34 ms of F.linear (2 threads of a Zen 4, batch 1).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, pack: bool = True):
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.packed = pack and weight.device.type == "cpu" and onednn.computes(weight.dtype)
        self.weight = onednn.packed(weight) if self.packed else weight

    def plain(self) -> Tensor:
        """W as (out, in); of a packed one a copy."""
        return self.weight.to_dense() if self.packed else self.weight

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed:
            return onednn.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


class RmsNorm:
    """RMSNorm over the last dimension; the weight is (n,), or (heads, n) for a norm per head."""

    def __init__(self, weight: Tensor, eps: float):
        size = weight.shape[-1]
        self.plain, self.eps = weight, eps  # as in the checkpoint
        # The kernels divide by the length of x, not by its root mean square; weight and floor have the factor √n
        self.weight = weight.float() * size**0.5
        self.floor = torch.tensor((size * eps) ** 0.5, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.floor)

    def with_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """The norm with another weight, (n,), as in a checkpoint."""
        return rms_norm(x, weight.float() * weight.shape[-1] ** 0.5, self.floor)


class Rotary:
    """The cosines and sines of RoPE, computed at each step, so that no table needs memory or a longest position."""

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device | str = "cpu"):
        frequencies = inverse_frequencies(rope, head_dim)
        # The first half is negated: cosines stay the same, and sines have the sign that the rotation needs there
        self.frequencies = torch.cat((-frequencies, frequencies)).to(device)
        self.scale = 1.0 if rope.attention_factor is None else rope.attention_factor

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and signed sines for `kernels.cpu.elementwise.rotary`, (T, 1, head_dim) in `dtype`."""
        angles = positions[:, None, None].float() * self.frequencies
        cos, sin = angles.cos(), angles.sin_()
        if self.scale != 1.0:
            cos, sin = cos * self.scale, sin * self.scale
        return cos.to(dtype), sin.to(dtype)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Return the angle of each pair of dimensions per position, (head_dim / 2,) float32, as transformers scales it."""
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == "llama3":
        return _llama3(rope, frequencies)
    if rope.type == "yarn":
        return _yarn(rope, frequencies, head_dim)
    return frequencies


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Divide the frequencies of slow pairs, keep those of fast ones, and blend between by turns in a whole context."""
    turns = rope.original_max_position * frequencies / (2 * math.pi)
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / rope.factor)


def _yarn(rope: RopeConfig, frequencies: Tensor, head_dim: int) -> Tensor:
    """Do as `_llama3`, but blend linearly over the pair's index, between the pairs of two numbers of turns."""

    def pair_that_turns(turns: float) -> float:
        span = rope.original_max_position / (turns * 2 * math.pi)
        return head_dim * math.log(span) / (2 * math.log(rope.theta))

    first, last = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first if last != first else 0.001  # an empty ramp would divide by zero
    kept = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / rope.factor)
