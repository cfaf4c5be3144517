"""RMSNorm behind the addition to the residual stream."""

from torch import Tensor

from kernels.cpu.elementwise import rms_norm


def add_rms_norm(residual: Tensor, y: Tensor, alpha: float, weight: Tensor, floor: Tensor) -> Tensor:
    """residual += alpha · y, in place, rounded to its dtype; gives the norm of the sum so rounded, as `rms_norm` does.

    `residual` and `y` are (T, n) of one dtype; `weight` is float32 (n,), `floor` a float32 scalar tensor.
    """
    return rms_norm(residual.add_(y, alpha=alpha), weight, floor)
