"""Whether Triton interprets the kernels, and on which devices they run."""

import torch
import triton
from triton.runtime.driver import driver


def interpreted() -> bool:
    """Whether Triton was told to interpret kernels when they were imported; interpreted kernels take CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def can_run_on(device: torch.device) -> bool:
    """Whether kernels take tensors of a device; interpreted kernels take any.

    True for every CUDA device, without asking Triton: if Triton cannot use it, for example because a C compiler is
    missing, Triton's own error at the first launch names the reason.
    """
    if interpreted() or device.type == "cuda":
        return True
    try:
        return bool(driver.active.get_active_torch_device().type == device.type)
    except RuntimeError:  # Triton finds no GPU
        return False
