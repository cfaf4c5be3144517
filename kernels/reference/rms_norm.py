"""The specification of kernels.rms_norm."""

import torch
from torch import Tensor

from kernels.lora_tiles import Tiles
from kernels.reference.grouped_lora import expand


def rms_norm(x: Tensor, weight: Tensor, floor: Tensor) -> Tensor:
    """y = x / sqrt(‖x‖² + floor²) · weight over the last dimension, in float32, rounded once to x's dtype.

    Arguments as in kernels.rms_norm.rms_norm.
    """
    values = x.float()
    length: Tensor = torch.linalg.vector_norm(values, dim=-1, keepdim=True).hypot(floor)
    return (values / length * weight).to(x.dtype)


def add_rms_norm(residual: Tensor, y: Tensor, alpha: float, weight: Tensor, floor: Tensor) -> Tensor:
    """residual += alpha · y, in place, rounded to its dtype; returns the norm of the rounded sum, as `rms_norm` does.

    Arguments as in kernels.rms_norm.add_rms_norm.
    """
    return rms_norm(residual.add_(y, alpha=alpha), weight, floor)


def expand_add_rms_norm(
    residual: Tensor,
    y: Tensor,
    t: Tensor,
    slots: Tensor,
    site: int,
    arena: Tensor,
    table: Tensor,
    alpha: float,
    weight: Tensor,
    floor: Tensor,
) -> Tensor:
    """`add_rms_norm` of `y` after `kernels.grouped_lora.expand`, for a site of one part; y itself keeps its bits.

    Arguments as in kernels.rms_norm.expand_add_rms_norm.
    """
    rows = torch.arange(len(y), dtype=torch.int32, device=y.device)
    fields = torch.stack((rows, torch.ones_like(rows), slots, torch.zeros_like(rows)), 1)  # a tile of each row
    expanded = y.clone()
    expand(t, expanded, site, arena, table, Tiles(fields, 1), [y.shape[1]])
    return add_rms_norm(residual, expanded, alpha, weight, floor)
