"""What the host tells a device during a step: written to page-locked memory, and copied without waiting."""

import torch
from torch import Tensor


def host_buffer(count: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Room for `count` numbers on the host that are uploaded to a device; page-locked unless that is a CPU."""
    return torch.empty(count, dtype=dtype, pin_memory=torch.device(device).type != "cpu")


def upload(buffer: Tensor, device: torch.device | str) -> Tensor:
    """The buffer's numbers on a device, in order with its kernels; on a CPU, the buffer itself.

    The host does not wait, and may drop the buffer at once, but must not write to it again. The copy notes its stream
    in torch's allocator of page-locked memory (`CachingHostAllocator::record_event`, which only a copy that is
    `non_blocking` calls); a block that is freed gets an event on each such stream, and nobody is given it before those
    have passed.
    """
    return buffer.to(device, non_blocking=True)
