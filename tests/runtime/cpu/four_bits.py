"""A matrix of floats in four bits: what the compiled kernels make of it while a checkpoint is loaded."""

import torch
from torch import Tensor

from runtime.quantization.weight import NF4, QuantizedWeight

GROUP = 64  # weights with one scale


def to_int4(weight: Tensor) -> QuantizedWeight:
    """Integers from the smallest weight of a group to its largest, 0 always among them; rounded to nearest."""
    wide = _grouped(weight)
    low, high = wide.amin(2, keepdim=True).clamp_(max=0), wide.amax(2, keepdim=True).clamp_(min=0)
    scales = (high - low) / 15
    safe = scales.clamp(min=1e-36)
    zeros = (-low / safe).round_().clamp_(0, 15)
    codes = (wide / safe).round_().add_(zeros).clamp_(0, 15).sub_(8).to(torch.int8)
    inputs = weight.shape[1]
    return QuantizedWeight(
        codes.flatten(1)[:, :inputs].contiguous(), 4, scales[..., 0], GROUP, zeros[..., 0].sub_(8).short()
    )


def to_nf4(weight: Tensor) -> QuantizedWeight:
    """The nearest of 16 quantiles of the normal distribution, scaled by the group's largest weight."""
    wide = _grouped(weight)
    largest = wide.abs().amax(2, keepdim=True)
    codes = torch.bucketize(wide / largest.clamp(min=1e-36), (NF4[1:] + NF4[:-1]) / 2).to(torch.uint8)
    return QuantizedWeight(codes.flatten(1)[:, : weight.shape[1]].contiguous(), 4, largest[..., 0], GROUP, book=NF4)


def _grouped(weight: Tensor) -> Tensor:
    """(out, groups, GROUP) float32, padded with zeros."""
    grouped: Tensor = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    return grouped
