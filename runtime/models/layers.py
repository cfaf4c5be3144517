"""The pieces of a decoder layer that hold tensors: linear projections, norms and rotary angles."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import onednn
from kernels.cpu.elementwise import rms_norm
from runtime.models.config import RopeConfig


class Linear:
    """y = x Wᵀ + b, with W packed once into the layout that the CPU's matrix kernels stream best.

    `weight` is (out, in), `bias` (out,) or None. A decode step of a 135M model in bfloat16 takes 20 ms of packed
    linears, and 34 ms of F.linear (2 threads of a Zen 4, batch 1).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.packed = weight.device.type == "cpu" and onednn.computes(weight.dtype)
        self.weight = onednn.packed(weight) if self.packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed:
            return onednn.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


class RmsNorm:
    """RMSNorm over the last dimension; the weight is (n,), or (heads, n) for a norm per head.

    `weight` and `floor` are what the kernels take, `plain` and `eps` what the checkpoint says.
    """

    def __init__(self, weight: Tensor, eps: float):
        size = weight.shape[-1]
        self.plain, self.eps = weight, eps
        self.weight = weight.float() * size**0.5
        self.floor = torch.tensor((size * eps) ** 0.5, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.floor)


class Rotary:
    """The cosines and sines of RoPE, computed for the positions of a step, not looked up: no table to bound or hold."""

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device | str = "cpu"):
        frequencies = inverse_frequencies(rope, head_dim)
        # Negated angles in the first half: the cosine stays, the sine gets the sign that the rotation wants there.
        self.frequencies = torch.cat((-frequencies, frequencies)).to(device)
        self.scale = 1.0 if rope.attention_factor is None else rope.attention_factor

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and signed sin as `kernels.reference.elementwise.rotary` takes them, (T, 1, head_dim) in `dtype`."""
        angles = positions[:, None, None].float() * self.frequencies
        cos, sin = angles.cos(), angles.sin_()
        if self.scale != 1.0:
            cos, sin = cos * self.scale, sin * self.scale
        return cos.to(dtype), sin.to(dtype)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """The angle of each pair of dimensions per position, (head_dim / 2,) float32."""
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == "llama3":
        return _llama3(rope, frequencies)
    if rope.type == "yarn":
        return _yarn(rope, frequencies, head_dim)
    return frequencies


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Slow pairs are interpolated, fast ones kept, and those between are blended by how often they turn."""
    turns = rope.original_max_position * frequencies / (2 * math.pi)
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / rope.factor)


def _yarn(rope: RopeConfig, frequencies: Tensor, head_dim: int) -> Tensor:
    """As llama3, but the blend is a ramp over the pair's index between two numbers of turns."""

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
