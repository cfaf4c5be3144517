"""Whether kernels are interpreted, and so where they run."""

import torch
import triton
from triton.runtime.driver import driver


def interpreted() -> bool:
    """Whether Triton was told to interpret kernels when they were imported: then they take tensors of the CPU."""
    return bool(triton.knobs.runtime.interpret)


def can_run_on(device: torch.device) -> bool:
    """Whether kernels take tensors of a device; interpreted ones take any.

    Of a CUDA device Triton is not asked: if it cannot have it, for want of a C compiler say, its own error at the first
    launch says why.
    """
    if interpreted() or device.type == "cuda":
        return True
    try:
        return bool(driver.active.get_active_torch_device().type == device.type)
    except RuntimeError:  # Triton finds no GPU
        return False
