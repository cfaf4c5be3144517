"""Choosing an index from weights on the CPU."""

import torch
from torch import Tensor


def invert(weights: Tensor, draw: float) -> int:
    """The first index at which the running sum of `weights` (n,) exceeds the share `draw`, in [0, 1), of their total.

    Weights are not negative and not all 0; sums are float64. If `draw` times the total was rounded up to the total,
    the last index with a weight.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    index = int(torch.searchsorted(cumulative, cumulative[-1] * draw, right=True))
    return index if index < len(weights) else int((weights > 0).nonzero()[-1])
