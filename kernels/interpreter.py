"""Whether Triton interprets the kernels, on which devices they run, and what those have."""

import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver


def interpreted() -> bool:
    """Whether Triton was told to interpret kernels when they were imported; interpreted kernels take CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


# As what products of bfloat16 are made: Triton's interpreter would multiply the bit patterns as integers
BFLOAT16_DOT = tl.float32 if interpreted() else tl.bfloat16


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


def shared_bytes(device: torch.device) -> int:
    """The most shared memory of a program on a CUDA device."""
    return int(driver.active.utils.get_device_properties(device.index)["max_shared_mem"])
