"""The pieces of a decoder layer that hold tensors: linear projections, norms and rotary angles."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import onednn
from kernels.cpu.elementwise import rms_norm
from runtime.models.config import RopeConfig
from runtime.parallel.group import RankGroup
from runtime.quantization.weight import QuantizedWeight


def rounded_to(dtype: torch.dtype, value: float) -> float:
    """Return the nearest value of a dtype."""
    return float(torch.tensor(value, dtype=dtype))


class Linear:
    """y = x Wᵀ + b; with `pack` on a CPU, W is packed once into the layout that oneDNN's matrix products read fastest.

    `weight` is (out, in), `bias` (out,) or None. `quantized` are the stacked parts of a weight as a checkpoint holds
    them, instead of `weight`, for kernels that compute with those.

    A decode step of a 135M model in bfloat16 takes 20 ms of packed linears, and 34 ms of F.linear (2 threads of a Zen
    4, batch 1).
    """

    weight: Tensor

    def __init__(
        self,
        weight: Tensor | None,
        bias: Tensor | None = None,
        *,
        pack: bool = True,
        quantized: Sequence[QuantizedWeight] = (),
    ):
        self.bias, self.quantized = bias, quantized
        if weight is None:
            return
        self.out_features, self.in_features = weight.shape
        self.packed = pack and weight.device.type == "cpu" and onednn.computes(weight.dtype)
        self.weight = onednn.packed(weight) if self.packed else weight

    def plain(self) -> Tensor:
        """W as (out, in); of a packed one a copy."""
        return self.weight.to_dense() if self.packed else self.weight

    def hold(self, weight: Tensor) -> None:
        """Take an equal W that lies elsewhere, as it is."""
        self.weight, self.packed = weight, False

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed:
            return onednn.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


class RmsNorm:
    """RMSNorm over the last dimension; the weight is (n,), or (heads, n) for a norm per head."""

    def __init__(self, weight: Tensor, eps: float):
        size = weight.shape[-1]
        self.plain, self.eps = weight, eps  # what x / sqrt(mean(x²) + eps) is multiplied by
        # The kernels divide by the length of x, not by its root mean square; weight and floor have the factor √n
        self.weight = weight.float() * size**0.5
        self.floor = torch.tensor((size * eps) ** 0.5, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.floor)

    def with_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """The norm with another weight, (n,), as in a checkpoint."""
        return rms_norm(x, weight.float() * weight.shape[-1] ** 0.5, self.floor)


class ProjectionNorms(NamedTuple):
    """An RMSNorm of all query heads together and one of all key heads."""

    q: RmsNorm
    k: RmsNorm

    def __call__(self, heads: Tensor) -> Tensor:
        """Normalise query and key heads that lie side by side, (T, heads, d)."""
        flat = heads.flatten(1)
        q, k = flat.split([len(self.q.plain), len(self.k.plain)], 1)
        return torch.cat((self.q(q), self.k(k)), 1).view(heads.shape)


class CutProjectionNorms(NamedTuple):
    """`ProjectionNorms` where a rank has some of the heads: the ranks add up the squares of all."""

    norms: ProjectionNorms
    widths: tuple[int, int]  # the numbers in all queries and in all keys, counted on each rank that has them
    group: RankGroup

    def __call__(self, heads: Tensor) -> Tensor:
        flat = heads.flatten(1).float()
        each = flat.split([len(norm.plain) for norm in self.norms], 1)
        squares = self.group.add_up(torch.stack([part.square().sum(1) for part in each], 1))
        parts = []
        for norm, part, total, width in zip(self.norms, each, squares.unbind(1), self.widths, strict=True):
            parts.append(part * torch.rsqrt(total / width + norm.eps)[:, None] * norm.plain.float())
        return torch.cat(parts, 1).to(heads.dtype).view(heads.shape)


class Rotary:
    """The cosines and sines of RoPE, computed at each step, so that no table needs memory or a longest position."""

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device | str = "cpu"):
        frequencies = inverse_frequencies(rope, head_dim)
        first, second = rotated_pairs(rope, head_dim)
        # The first of a pair is negated: cosines stay the same, and sines have the sign that the rotation needs there
        self.frequencies = torch.empty(head_dim)
        self.frequencies[first], self.frequencies[second] = -frequencies, frequencies
        self.frequencies = self.frequencies.to(device)
        partner = torch.empty(head_dim, dtype=torch.int64)
        partner[first], partner[second] = second, first
        apart = head_dim // 2
        self.partner = None if torch.equal(partner, torch.arange(head_dim).roll(apart)) else partner.to(device)
        self.scale = 1.0 if rope.attention_factor is None else rope.attention_factor
        self.turned = (torch.arange(head_dim) < rope.rotary_dim(head_dim)).to(device)

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> "Angles":
        """Return cosines and signed sines for `kernels.cpu.elementwise.rotary`, (T, 1, head_dim) in `dtype`."""
        angles = positions[:, None, None].float() * self.frequencies
        cos, sin = angles.cos(), angles.sin_()
        if self.scale != 1.0:
            cos, sin = torch.where(self.turned, cos * self.scale, cos), sin * self.scale
        return Angles(cos.to(dtype), sin.to(dtype), self.partner)


class Angles(NamedTuple):
    """What the dimensions of a head turn by; those that do not turn have the cosine 1 and the sine 0."""

    cos: Tensor
    sin: Tensor  # negated for the first dimension of each pair
    partner: Tensor | None  # (head_dim,), the other dimension of each pair; None: the one half a head away


def rotated_pairs(rope: RopeConfig, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return the first and the second dimension of each pair, (head_dim / 2,) each; those that turn come first."""
    turned = rope.rotary_dim(head_dim)
    pairs, rest = torch.arange(turned // 2), torch.arange(turned, head_dim)
    first, second = (2 * pairs, 2 * pairs + 1) if rope.interleaved else (pairs, pairs + turned // 2)
    kept = rest.chunk(2) if len(rest) else (rest, rest)
    return torch.cat((first, kept[0])), torch.cat((second, kept[1]))


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Return the angle of each pair of dimensions per position, as transformers scales it.

    It is (head_dim / 2,) float32, and 0 for the last pairs, which do not turn.
    """
    turned = rope.rotary_dim(head_dim)
    frequencies = torch.zeros(head_dim // 2)
    frequencies[: turned // 2] = _scaled(rope, turned)
    return frequencies


def _scaled(rope: RopeConfig, dims: int) -> Tensor:
    powers = rope.theta ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    if rope.type == "longrope":
        return 1.0 / (torch.tensor(rope.long_factor if rope.long else rope.short_factor) * powers)
    frequencies = 1.0 / powers
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == "llama3":
        return _llama3(rope, frequencies)
    if rope.type == "yarn":
        return _yarn(rope, frequencies, dims)
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
