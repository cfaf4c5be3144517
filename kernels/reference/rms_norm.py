"""The specification of kernels.rms_norm."""

import torch
from torch import Tensor


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
