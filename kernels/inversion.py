"""Inverting a uniform number through a distribution: what the sampling kernels share."""

import triton
import triton.language as tl

from kernels.reference.sampling import LEAST_TEMPERATURE

_LEAST_TEMPERATURE = tl.constexpr(LEAST_TEMPERATURE)


@triton.jit
def divisor(temperature: tl.tensor) -> tl.tensor:
    """What logits are divided by, float32."""
    return tl.maximum(temperature, _LEAST_TEMPERATURE).to(tl.float32)


@triton.jit
def first_past(
    sums: tl.tensor, weights: tl.tensor, target: tl.tensor, index: tl.tensor, END: tl.constexpr
) -> tl.tensor:
    """The first index at which the running sum is past the target, END if there is none.

    A parallel sum need not rise step by step, so it may pass the target at a weight of 0: that is no choice.
    """
    return tl.min(tl.where((sums > target) & (weights > 0), index, END), 0)


@triton.jit
def invert(weights: tl.tensor, target: tl.tensor, index: tl.tensor, END: tl.constexpr) -> tl.tensor:
    """The first index at which the running sum of `weights` is past the target.

    It is the last one with a weight where the target was rounded up to the total.
    """
    passed = first_past(tl.cumsum(weights, 0), weights, target, index, END)
    return tl.minimum(passed, tl.max(tl.where(weights > 0, index, 0), 0))
