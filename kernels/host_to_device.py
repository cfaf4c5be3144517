"""Uploads from the host to a device during a step: from page-locked memory, without waiting."""

import torch
from torch import Tensor


def host_buffer(count: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A host tensor of `count` numbers, to be filled and uploaded to a device; page-locked unless that is a CPU."""
    return torch.empty(count, dtype=dtype, pin_memory=torch.device(device).type != "cpu")


def upload(buffer: Tensor, device: torch.device | str) -> Tensor:
    """The buffer's numbers on a device, in stream order with its kernels; on a CPU, the buffer itself.

    The host does not wait. It must not write to the buffer again, but may free it at once: a `non_blocking` copy
    records its stream in torch's allocator of page-locked memory (`CachingHostAllocator::record_event`), and that
    allocator reuses a freed block only after an event on each recorded stream has completed.
    """
    return buffer.to(device, non_blocking=True)
